"""Balance the channels of the float graph, so that each of them uses the 8-bit grids that it shares with others.

A channel of an activation may be multiplied by f > 0 where what reads it divides again (`onnxq.channels`); the
network computes the same. That layers can be equalized against each other is due to Nagel et al., Data-Free
Quantization, ICCV 2019, section 4.1. Here all factors of a network are chosen together, with measured activations,
as those of least noise at its outputs (`onnxq.balance`).

A channel in front of Clip(0, 6) may grow until its largest value, with a margin, reaches 6; where it saturates
already, it keeps f = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.affine import dequantize, quantize
from onnxq.balance import Site, balance, output_gains
from onnxq.calibration.channels import ChannelStatistics
from onnxq.calibration.collect import collect
from onnxq.calibration.statistics import Needs
from onnxq.channel_classes import FIXED, ZERO, Channels, Layer
from onnxq.channels import find_channels
from onnxq.errors import DataError
from onnxq.graph import Names, constant, float_values, is_standard, present, set_input
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program
from onnxq.quantizers import weight_params
from onnxq.scheme import QuantScheme
from onnxq.weights import typical_sqnr_db

MARGIN = 1.1  # how far values that calibration has not seen may lie beyond those that it has
UNSEEN = 0.01  # of a tensor's largest value: what a channel may reach that calibration saw at less
TINY = 1e-12
ENOUGH_DB = 20.0
ENOUGH_BITS = 8
Vector = NDArray[np.float64]

LAYERS = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class Equalize(Pass):
    """Scale channels of float activations against the weights around them, to lower the noise of quantization.

    Attributes:
        weights: scheme that weights will have, e.g. int8:channel or int8:tensor.
        activations: scheme that activations will have; below 8 bits there are no levels to waste on uneven channels.
        when: `needed` leaves networks with activations of 8 bits in whose layers half of the channels keep 20 dB on their grid;
            `always` balances all.
        iterations: of the search.
    """

    name: ClassVar[str] = "equalize"
    weights: QuantScheme = QuantScheme.parse("int8:channel")
    activations: QuantScheme = QuantScheme.parse("uint8")
    when: Literal["needed", "always"] = "needed"
    iterations: int = 50

    def run(self, program: Program, ctx: Context) -> PassResult:
        layers = [n for n in program.graph.nodes if n.op in LAYERS and is_standard(n)]
        enough = self.activations.bits >= ENOUGH_BITS and not any(_drowns(n, self.weights) for n in layers)
        if self.when == "needed" and enough:
            return PassResult(
                0, {n.name: f"half of its channels keep {ENOUGH_DB:.0f} dB as they are" for n in layers}
            )
        channels = find_channels(program.graph)
        free = {
            name: s for name, s in channels.layers.items() if s.source.max() > FIXED or s.target.max() > FIXED
        }
        if not free:
            return PassResult(0, channels.reasons)
        statistics = _statistics(program, ctx, channels, list(free.values()))
        gains = output_gains(program.graph, channels)
        sites = []
        for name, layer in free.items():
            seen = statistics[layer.node.inputs[0].name]
            sites.append(Site.of(layer, _peak(seen), seen.power, gains[name]))
        together = self.weights.granularity == "tensor"
        factors, left = balance(sites, *_limits(channels, statistics), together, self.iterations)
        changed = _apply(program, channels, factors, f"equalized_{self.weights.granularity}")
        facts = {"noise_db": 10.0 * math.log10(left), "factors": [float(factors.min()), float(factors.max())]}
        return PassResult(changed, channels.reasons, facts)


def _drowns(node: gs.Node, scheme: QuantScheme) -> bool:
    """Whether half of a layer's output channels keep less than ENOUGH_DB on a grid of this granularity."""
    values = float_values(node.inputs[1])
    if values is None or values.ndim < 2 or not np.isfinite(values).all():
        return False
    axis = 0 if node.op == "Conv" or node.attrs.get("transB", 0) else values.ndim - 1
    params = weight_params("minmax", values, axis if scheme.granularity == "channel" else None, scheme)
    return typical_sqnr_db(values, dequantize(quantize(values, params), params), axis) < ENOUGH_DB


def _statistics(
    program: Program, ctx: Context, channels: Channels, layers: Sequence[Layer]
) -> dict[str, ChannelStatistics]:
    """Statistics of the layers' inputs and of what Clips write, by tensor; from a loaded table where it has them."""
    wanted = {name: Needs(channels=channels.axes[name], power=True) for name in channels.clips}
    for layer in layers:
        wanted[layer.node.inputs[0].name] = Needs(channels=-1 if layer.node.op == "MatMul" else 1, power=True)
    missing = {name: need for name, need in wanted.items() if _key(name) not in program.statistics}
    if missing and ctx.data is None and program.statistics:
        first = _key(next(iter(missing)))
        raise DataError(f"the calibration table lacks {first!r}; it was saved with other options")
    if missing:
        for name, found in collect(program, ctx, missing, "equalizing").items():
            found.name = _key(name)
            program.statistics[found.name] = found
    gathered = {}
    for name in wanted:
        channel = program.statistics[_key(name)].channels
        if channel is None:
            raise DataError(f"the calibration samples hold no value of tensor {name!r}")
        gathered[name] = channel
    return gathered


def _key(tensor: str) -> str:
    return f"{Equalize.name}/{tensor}"


def _peak(seen: ChannelStatistics) -> Vector:
    """Largest magnitude to expect in each channel, (C,)."""
    peak: Vector = np.maximum(seen.maximum, -seen.minimum).astype(np.float64)
    floor: Vector = np.maximum(peak, UNSEEN * peak.max())
    return floor


def _limits(channels: Channels, statistics: dict[str, ChannelStatistics]) -> tuple[Vector, Vector]:
    """Smallest and largest factor of each class, (classes,), that leave every Clip as it is."""
    lower, upper = np.zeros(channels.count), np.full(channels.count, np.inf)
    lower[FIXED] = upper[FIXED] = 1.0
    for name, ends in channels.clips.items():
        seen, ids = statistics[name], channels.tensors[name]
        for end, reached in zip(ends, (-seen.minimum, seen.maximum), strict=True):
            if end == 0.0:
                continue
            reached = np.maximum(reached.astype(np.float64), UNSEEN * reached.max(initial=TINY)) * MARGIN
            np.minimum.at(upper, ids[ids != ZERO], np.maximum(abs(end) / reached, 1.0)[ids != ZERO])
            lower[ids[(reached >= abs(end)) & (ids != ZERO)]] = 1.0
    return lower, np.where(lower == 1.0, 1.0, upper)


def _apply(program: Program, channels: Channels, factors: Vector, suffix: str) -> int:
    """Scale weights and biases, and give every tensor whose values change a new name; returns how many do."""
    names, tensors = Names(program.graph), program.graph.tensors()
    for layer in channels.layers.values():
        before, after = factors[layer.source], factors[layer.target]
        before[layer.source == ZERO] = 1.0
        if np.any(before != 1.0) or np.any(after != 1.0):
            _scale(program, names, layer, before, after)
    scaled = [name for name, ids in channels.tensors.items() if np.any(factors[ids[ids != ZERO]] != 1.0)]
    for name in scaled:  # statistics and reports go by name, and these values are no longer the model's
        tensors[name].name = names.fresh(f"{name}_{suffix}")
    return len(scaled)


def _scale(program: Program, names: Names, layer: Layer, before: Vector, after: Vector) -> None:
    """W_oc f_o / f_c and b_o f_o, for factors of the input's and the output's channels."""
    node = layer.node
    weight, bias = node.inputs[1], present(node, 2)
    matrix = layer.weight * (after[:, None] / before[layer.columns])[:, :, None]
    is_transposed = node.op != "Conv" and not node.attrs.get("transB", 0)
    values = matrix[:, :, 0].T if is_transposed else matrix.reshape(weight.shape)
    node.inputs[1] = constant(names, f"{weight.name}_eq", values.astype(np.float32))
    if weight.name in program.folded:
        program.folded[node.inputs[1].name] = program.folded[weight.name] * after
    if bias is not None:
        old = float_values(bias)
        assert old is not None
        new = constant(names, f"{bias.name}_eq", (old.ravel() * after).astype(np.float32))
        set_input(node, 2, new)
