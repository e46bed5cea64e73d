"""The allocation of bits against its own model of noise, and against all there is to choose from."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest

from onnxq.bit_allocation import NoisyLayer, allocate
from onnxq.packing import stored_bytes
from onnxq.precision import Bits

PACKED = (2, 4)
LARGE = 1_000_000  # weights, for which the nodes around them do not count
Layers = dict[str, NoisyLayer]


def random_layers(seed: int, count: int, bits: Bits) -> Layers:
    rng = np.random.default_rng(seed)
    noise, weights = 10 ** rng.uniform(-5, -2, count), rng.integers(LARGE // 10, LARGE, count)
    return {
        f"l{i}": NoisyLayer(float(n), bits, int(w))
        for i, (n, w) in enumerate(zip(noise, weights, strict=True))
    }


def predicted(layers: Layers, noise: float, found: Mapping[str, Bits | None]) -> float:
    """Noise by the model in the docstring; none of a layer in float."""
    scale = noise / sum(layer.noise for layer in layers.values())
    total = 0.0
    for name, layer in layers.items():
        bits = found.get(name, layer.bits)
        if bits is not None:
            total += scale * layer.noise * 4.0 ** (layer.bits.weights - bits.weights)
    return total


def size(layers: Layers, found: Mapping[str, Bits | None]) -> int:
    widths = {name: found.get(name, layer.bits) or Bits(8) for name, layer in layers.items()}
    return sum(stored_bytes(layer.weights, widths[name].weights, PACKED) for name, layer in layers.items())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ratio", [0.5, 0.1, 0.02])
def test_few_bytes_buy_what_is_allowed(seed: int, ratio: float) -> None:
    layers = random_layers(seed, 5, Bits(4, 8))
    noise = 0.7 * sum(layer.noise for layer in layers.values())
    found = allocate(layers, noise, ratio * noise, PACKED)
    assert predicted(layers, noise, found) <= ratio * noise
    choices = (
        dict(zip(layers, map(Bits, widths), strict=True))
        for widths in itertools.product(range(4, 9), repeat=5)
    )
    least = min(size(layers, c) for c in choices if predicted(layers, noise, c) <= ratio * noise)
    # the last step may be larger than what is missing, and others smaller
    last = max(
        stored_bytes(layer.weights, 8, PACKED) - stored_bytes(layer.weights, 7, PACKED)
        for layer in layers.values()
    )
    assert size(layers, found) <= least + last


def test_a_bit_goes_where_it_takes_fewest_bytes() -> None:
    layers = {
        "small": NoisyLayer(1e-3, Bits(4, 8), LARGE // 10),
        "large": NoisyLayer(1.5e-3, Bits(4, 8), LARGE),
    }
    assert allocate(layers, 2.5e-3, 1.8e-3, PACKED) == {"small": Bits(5, 8)}


def test_small_layers_take_the_bits_that_cost_nothing() -> None:
    """Codes of 5 to 8 bits of a small layer are stored alike."""
    layers = {"small": NoisyLayer(1e-3, Bits(4, 8), 500), "large": NoisyLayer(1e-5, Bits(4, 8), LARGE)}
    assert allocate(layers, 1e-3, 2e-4, PACKED) == {"small": Bits(8, 8)}


def test_both_sides_of_a_layer_grow_to_8_bits() -> None:
    layers = {"a": NoisyLayer(1e-2, Bits(6, 3), LARGE)}
    assert allocate(layers, 1e-2, 1.01e-2 / 4**3, PACKED) == {"a": Bits(8, 6)}
    assert allocate(layers, 1e-2, 1.01e-2 / 4**5, PACKED) == {"a": Bits(8, 8)}


def test_where_8_bits_do_not_do_the_noisiest_are_float() -> None:
    noise = {"a": 1e-3, "b": 5e-3, "c": 1e-5, "d": 2e-3}
    layers = {name: NoisyLayer(power, Bits(8, 8), 1000) for name, power in noise.items()}
    assert allocate(layers, sum(noise.values()), 1.5e-3, PACKED) == {"b": None, "d": None}
    assert allocate(layers, sum(noise.values()), 9e-3, PACKED) == {}


def test_a_layer_that_8_bits_would_help_is_not_float() -> None:
    layers = {"narrow": NoisyLayer(1e-2, Bits(4, 8), LARGE), "byte": NoisyLayer(1e-3, Bits(8, 8), LARGE)}
    assert allocate(layers, 1.1e-2, 5e-4, PACKED) == {"byte": None, "narrow": Bits(7, 8)}


def test_harm_that_narrow_layers_do_each_other_makes_none_float() -> None:
    """Noise of all layers together that is far above the sum of single ones says nothing about those of 8 bits."""
    layers = {"narrow": NoisyLayer(1e-2, Bits(2, 8), LARGE), "byte": NoisyLayer(1e-4, Bits(8, 8), LARGE)}
    assert None not in allocate(layers, 1.0, 5e-4, PACKED).values()


def test_noise_of_8_bits_that_is_more_than_the_sum_is_believed() -> None:
    layers = {
        name: NoisyLayer(noise, Bits(8, 8), LARGE) for name, noise in (("a", 1e-3), ("b", 2e-3), ("c", 4e-3))
    }
    assert allocate(layers, 14e-3, 7e-3, PACKED) == {"c": None}


def test_no_noise_no_bits() -> None:
    assert allocate({}, 1.0, 0.1, PACKED) == {}
    assert allocate({"a": NoisyLayer(0.0, Bits(4, 8), 10)}, 1.0, 0.1, PACKED) == {}
