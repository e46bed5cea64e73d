"""A small trained network with fake quantization, whose loss has what real ones have: bowls, coupling, ripples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq.search import Part, StepLoss

Floats = NDArray[np.float64]
WIDTH, INPUTS, CLASSES, BLOCKS = 24, 12, 8, 5
SHARES: dict[Part, float] = {"coarse": 0.25, "held": 0.5}
SAMPLES: dict[Part, slice] = {
    "search": slice(0, 512),
    "coarse": slice(0, 128),
    "held": slice(512, 768),
}


def softmax(logits: Floats) -> Floats:
    """Rows (N, C) to probabilities."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: Floats = powers / powers.sum(axis=1, keepdims=True)
    return found


def fake(values: Floats, step: float, bits: int, signed: bool) -> Floats:
    """Values on the grid of a step, saturated."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return np.clip(np.rint(values / step), low, high) * step


@dataclass(frozen=True)
class Network:
    """A residual network, x = x + B relu(A x) with a relu between blocks, and samples of its task."""

    weights: tuple[Floats, ...]
    inputs: Floats
    labels: NDArray[np.intp]

    def run(self, hook: Callable[[int, Floats, bool], Floats], inputs: Floats) -> list[Floats]:
        """Activations (N, ·) of all layers and the logits last; the hook changes layers' inputs (True) and weights (False)."""
        first, *inner, last = self.weights
        x = np.maximum(inputs @ first, 0.0)
        kept = [inputs, x]
        for layer in range(0, len(inner), 2):
            middle = np.maximum(hook(layer, x, True) @ hook(layer, inner[layer], False), 0.0)
            x = np.maximum(x + hook(layer + 1, middle, True) @ hook(layer + 1, inner[layer + 1], False), 0.0)
            kept += [middle, x]
        return [*kept, x @ last]

    def logits(self, steps: Mapping[str, float], bits: tuple[int, int], inputs: Floats) -> Floats:
        """Logits (N, C) with the inner layers quantized to (weight, activation) bits; 32 leaves them float."""

        def hook(layer: int, values: Floats, activation: bool) -> Floats:
            width = bits[activation]
            if width == 32:
                return values
            return fake(values, steps[f"{'wa'[activation]}{layer}"], width, signed=not activation)

        return self.run(hook, inputs)[-1]


@cache
def network(seed: int = 0) -> Network:
    """Trained with Adam on clusters that overlap, to about 90 % accuracy."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(2 * CLASSES, INPUTS)) * 1.2
    cluster = rng.integers(0, len(centres), 3000)
    inputs = centres[cluster] + rng.normal(size=(len(cluster), INPUTS)) * 0.8
    labels = cluster % CLASSES
    shapes = [(INPUTS, WIDTH), *[(WIDTH, WIDTH)] * (2 * BLOCKS), (WIDTH, CLASSES)]
    weights = [rng.normal(size=shape) * np.sqrt(0.5 / shape[0]) for shape in shapes]
    trained = train(Network(tuple(weights), inputs[1000:], labels[1000:]))
    return Network(trained, inputs[:1000], labels[:1000])


def train(start: Network, steps: int = 150, rate: float = 0.004) -> tuple[Floats, ...]:
    """Weights after full-batch Adam on the cross-entropy."""
    weights = [w.copy() for w in start.weights]
    first, second = ([np.zeros_like(w) for w in weights] for _ in range(2))
    targets = np.eye(CLASSES)[start.labels]
    for step in range(1, steps + 1):
        gradients = backward(Network(tuple(weights), start.inputs, start.labels), targets)
        for w, m, v, g in zip(weights, first, second, gradients, strict=True):
            m += 0.1 * (g - m)
            v += 0.001 * (g * g - v)
            w -= rate * m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    return tuple(weights)


def backward(net: Network, targets: Floats) -> list[Floats]:
    """Gradients of the mean cross-entropy in all weights."""
    inputs, x0, *inner, logits = net.run(lambda _, values, __: values, net.inputs)
    outer = [x0, *inner[1::2]]
    error = (softmax(logits) - targets) / len(targets)
    gradients = [outer[-1].T @ error]
    error = error @ net.weights[-1].T
    for block in reversed(range(BLOCKS)):
        middle, before, after = inner[2 * block], outer[block], outer[block + 1]
        error = error * (after > 0)
        gradients.append(middle.T @ error)
        hidden = (error @ net.weights[2 * block + 2].T) * (middle > 0)
        gradients.append(before.T @ hidden)
        error = error + hidden @ net.weights[2 * block + 1].T
    gradients.append(inputs.T @ (error * (x0 > 0)))
    return gradients[::-1]


def best_step(values: Floats, bits: int, signed: bool, p: float = 2.0) -> float:
    """The step of least p-norm error, from 60 candidates."""
    codes = 2 ** (bits - 1) if signed else 2**bits - 1
    steps = np.abs(values).max() / codes * np.linspace(0.1, 1.1, 60)
    errors = [float(np.sum(np.abs(fake(values, s, bits, signed) - values) ** p)) for s in steps]
    return float(steps[int(np.argmin(errors))])


def toy(weight_bits: int, activation_bits: int, p: float = 2.0, seed: int = 0) -> StepLoss:
    """KL divergence from the float network over the inner layers' steps, from layer-wise L_p ones."""
    net, bits = network(seed), (weight_bits, activation_bits)
    steps: dict[str, float] = {}

    def hook(layer: int, values: Floats, activation: bool) -> Floats:
        if bits[activation] != 32:
            steps[f"{'wa'[activation]}{layer}"] = best_step(values, bits[activation], not activation, p)
        return values

    net.run(hook, net.inputs[:512])
    outputs = {part: softmax(net.logits({}, (32, 32), net.inputs[where])) for part, where in SAMPLES.items()}

    def loss(steps: Mapping[str, float], part: Part) -> float:
        found = softmax(net.logits(steps, bits, net.inputs[SAMPLES[part]])) + 1e-12
        true = outputs[part] + 1e-12
        return float(np.mean(np.sum(true * np.log(true / found), axis=1)))

    return StepLoss(steps, loss, SHARES)


@pytest.fixture(scope="session", params=[(4, 4), (3, 3), (32, 2)], ids="w{0[0]}a{0[1]}".format)
def quantized(request: pytest.FixtureRequest) -> StepLoss:
    """The toy at several bit widths."""
    return toy(*request.param)
