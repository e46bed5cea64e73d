"""Factors of channel classes that minimise the noise of 8-bit layers at a network's outputs.

With steps of R / 255 for a layer's input and s_o for its weights, the noise power is, in the units of the unscaled
network, about

    sum_o g_o [ R^2 / (12 255^2) sum_c |w_oc|^2 / f_c^2  +  s_o^2 / (12 f_o^2) sum_c T f_c^2 E[x_c^2] ]

    R = max_c f_c max|x_c|        s_o = max_c max|w_oc| f_o / f_c / 127  (per tensor: the largest of all o)

where T is the number of taps and g_o the power gain from output channel o to the outputs of the network, errors
being independent. Such gains grow with depth as signals do not. So those of a layer are divided by the power with
which its own signal would arrive, sum_o g_o sum_c |w_oc|^2 E[x_c^2]: noise counts as a part of the signal. With the
maxima replaced by p-norms the sum over all layers is smooth and convex in log f; L-BFGS takes a few dozen steps
with the exact gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.channel_classes import Channels, Ids, Layer
from onnxq.graph import Uses

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

POWER = 12.0  # of the norms that stand for maxima
RANGE = (1e-3, 1e3)  # of factors
GAINS = (1e-100, 1e100)
TINY = 1e-12
ACTIVATION_STEPS, WEIGHT_STEPS = 255, 127


def output_gains(graph: gs.Graph, channels: Channels) -> dict[str, Vector]:
    """Power gains of noise from each layer's output channels, (C_out,) by node name, to the graph's outputs.

    Activations count as identities. Ops that do not move channels hand the mean gain of their outputs on to all
    their inputs.
    """
    uses = Uses(graph)
    gains: dict[str, Vector] = {}

    def gain(tensor: gs.Tensor) -> Vector:
        size = len(channels.tensors.get(tensor.name, (0,)))
        return np.clip(gains.get(tensor.name, np.zeros(size)) + float(uses.escapes(tensor)), *GAINS)

    def add(tensor: str, amount: Vector) -> None:
        if tensor not in channels.tensors:
            amount = amount.mean(keepdims=True)
        gains[tensor] = gains[tensor] + amount if tensor in gains else amount

    found: dict[str, Vector] = {}
    for node in reversed(graph.nodes):
        if node.name in channels.layers:
            layer, out = channels.layers[node.name], gain(node.outputs[0])
            found[node.name] = out
            amounts = (layer.weight**2).sum(axis=2, dtype=np.float64) * out[:, None]
            add(node.inputs[0].name, _summed(layer.columns, amounts, len(layer.source)))
        elif node.name in channels.moves:
            move, out = channels.moves[node.name], gain(node.outputs[0])
            for tensor, index in move.inputs:
                known = index >= 0
                add(tensor, _summed(index[known], out[known] * move.share, len(channels.tensors[tensor])))
        else:
            mean = np.mean([gain(t).mean() for t in node.outputs], keepdims=True)
            for tensor in {t.name for t in node.inputs if isinstance(t, gs.Variable)}:
                add(tensor, np.repeat(mean, len(channels.tensors.get(tensor, (0,)))))
    return found


@dataclass(frozen=True, eq=False)
class Site:
    """What the noise of one layer depends on.

    Attributes:
        squares: sum of squared weights over the taps, (C_out, C_in / group).
        largest: log of the largest magnitude over the taps, the same shape.
        columns: input channel of each entry, the same shape.
        source, target: classes of input and output channels, (C_in,) and (C_out,).
        peak: log of the largest magnitude of each input channel, (C_in,).
        power: E[x_c^2] times the number of taps, (C_in,).
        gain: of each output channel, a part of the signal for a noise power of 1, (C_out,).
    """

    squares: Matrix
    largest: Matrix
    columns: Ids
    source: Ids
    target: Ids
    peak: Vector
    power: Vector
    gain: Vector

    @classmethod
    def of(cls, layer: Layer, peak: Vector, power: Vector, gain: Vector) -> Site:
        """The site of a layer.

        Args:
            layer: its weights and classes.
            peak: max |x_c| of its input channels, (C_in,).
            power: E[x_c^2] of its input channels, (C_in,).
            gain: power gains of its output channels, (C_out,).
        """
        magnitudes = np.abs(layer.weight)
        squares = (magnitudes**2).sum(axis=2, dtype=np.float64)
        signal = gain @ (squares * power[layer.columns]).sum(axis=1)
        return cls(
            squares,
            np.log(np.maximum(magnitudes.max(axis=2), TINY).astype(np.float64)),
            layer.columns,
            layer.source,
            layer.target,
            np.log(np.maximum(peak, TINY)),
            power * magnitudes.shape[2],
            gain / max(signal, TINY**2),
        )

    def noise(self, logs: Vector, together: bool) -> tuple[float, Vector]:
        """Noise power and its gradient in the logs of all factors, (classes,).

        Args:
            logs: log factors of the classes; that of channels of zeros does not matter.
            together: one step for all weights instead of one for each output channel.
        """
        inner = np.where(self.source >= 0, logs[self.source], 0.0)
        outer, entry = logs[self.target][:, None], inner[self.columns]
        slope_in, slope_out = np.zeros(len(inner)), np.zeros(len(self.target))

        top, share = _soft_max((self.peak + inner)[None])
        gain = self.gain[:, None]
        part = np.exp(2.0 * (top - entry)) / (12.0 * ACTIVATION_STEPS**2) * gain * self.squares
        cost = float(part.sum())
        slope_in += 2.0 * cost * share[0]
        np.add.at(slope_in, self.columns, -2.0 * part)

        ratio = self.largest + outer - entry
        top, share = _soft_max(ratio.reshape(1, -1) if together else ratio)
        inputs = (self.power * np.exp(2.0 * inner))[self.columns]
        total = np.maximum(inputs.sum(axis=1, keepdims=True), TINY**2)
        part = np.exp(2.0 * (top - outer)) / (12.0 * WEIGHT_STEPS**2) * gain * total  # (C_out, 1)
        cost += float(part.sum())
        moved = (part.sum() if together else part) * share.reshape(ratio.shape)
        slope_out += 2.0 * (moved.sum(axis=1) - part[:, 0])
        np.add.at(slope_in, self.columns, 2.0 * (part * inputs / total - moved))

        slope = np.zeros(len(logs))
        np.add.at(slope, self.target, slope_out)
        np.add.at(slope, self.source[self.source >= 0], slope_in[self.source >= 0])
        return cost, slope


def balance(
    sites: Sequence[Site], lower: Vector, upper: Vector, together: bool, iterations: int
) -> tuple[Vector, float]:
    """Factors of least noise.

    Args:
        sites: layers; those whose classes are all held by their limits add a constant and may be left out.
        lower, upper: least and largest factor of each class, (classes,), around 1.
        together: one scale for all weights of a layer instead of one for each output channel.
        iterations: of L-BFGS.

    Returns:
        Factors, (classes,), and the noise power with them as a part of that without.
    """
    import scipy

    def noise(logs: Vector) -> tuple[float, Vector]:
        costs, slopes = zip(*(site.noise(logs, together) for site in sites), strict=True)
        cost = float(sum(costs))
        return float(np.log(cost)), np.sum(slopes, axis=0) / cost

    bounds = np.log(np.clip([lower, upper], *RANGE)).T
    start = np.zeros(len(lower))
    best = scipy.optimize.minimize(
        noise, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": iterations}
    )
    return np.exp(best.x), float(np.exp(best.fun - noise(start)[0]))


def _summed(index: Ids, amounts: Matrix, size: int) -> Vector:
    """Sum of the amounts at each index, (size,)."""
    sums: Vector = np.bincount(index.ravel(), amounts.ravel(), size).astype(np.float64)
    return sums


def _soft_max(logs: Matrix) -> tuple[Matrix, Matrix]:
    """Log of the p-norm of exp(x) in each row, (rows, 1), and its gradient, (rows, n)."""
    top = logs.max(axis=1, keepdims=True)
    powers = np.exp(POWER * (logs - top))
    total = powers.sum(axis=1, keepdims=True)
    return top + np.log(total) / POWER, powers / total
