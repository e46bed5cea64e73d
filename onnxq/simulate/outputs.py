"""Outputs of layers in the deployed network, matched with those in the float network channel by channel.

Quantization shifts the mean of a layer's outputs and changes their spread: weights are rounded, inputs clipped and rounded, and
what earlier layers left over arrives with them. Each output channel has a bias and, where weights have a scale for each, a
scale to put both right, for no bytes and no time:

    scale'_c = scale_c std(y_c) / std(y_hat_c),     bias'_c = bias_c + E[y_c] - scale'_c / scale_c E[y_hat_c]

with y the products of the float layer and y_hat those of the quantized one with the codes that arrive, in front of biases and
activations, over the same random places. Weights with one scale get the factor of all channels together.

Layers come in order (`onnxq.simulate.walk`), and what a layer became holds for those behind it: they see what is left of earlier
errors, as they will when deployed. Measured all at once, an error would be corrected again in every layer that it reaches. For
means this is the sequential bias correction of Nagel et al., arXiv 1906.04721; with spreads it is what estimating batch
normalizations anew would do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import ModelProto

from onnxq.affine import dequantize
from onnxq.bias import BiasCorrection, corrected_bias, least_scales, matches_outputs, uncorrectable
from onnxq.calibration.collect import activations, at_once
from onnxq.graph import float_values
from onnxq.measure.compare import compare_sessions
from onnxq.model.session import make_session
from onnxq.patches import input_patches
from onnxq.pipeline import Context
from onnxq.program import Program, QuantDecision, Unit
from onnxq.saturation import as_rows
from onnxq.simulate.emitted import emit
from onnxq.simulate.walk import Walk

Array = NDArray[Any]
Vector = NDArray[np.float64]
Biases = dict[str, NDArray[np.float32]]

FURTHEST = 2.0  # that a spread is changed by
JUDGED = 64  # samples that tell whether matching helps
CLEAR_DB = 1.0  # by which matching anew must be worse than what a search ended with: its steps were chosen by another loss
ENOUGH = 32  # places that tell a spread


@dataclass(frozen=True, eq=False)
class Matched:
    """What makes up for the errors.

    Attributes:
        plan: decisions of weights with other scales, by name.
        biases: of units, (C,), by the unit's name.
        sqnr_db: of the network's output without and with them, whichever was taken; None where that says nothing.
    """

    plan: dict[str, QuantDecision]
    biases: Biases
    sqnr_db: tuple[float, float] | None = None


def matched(
    program: Program, ctx: Context, correction: BiasCorrection, samples: int = 128, patches: int = 16
) -> Matched:
    """What `match_outputs` finds where a bias correction matches outputs, else nothing.

    `auto` and `better` take it only if the network's output then has less noise on samples: where normalizations in float set
    spreads right anyway, matching them amplifies noise for nothing. What a search ended with stays where matching anew is
    clearly worse.

    Args:
        program, ctx, samples, patches: as for `match_outputs`.
        correction: of biases.

    Raises:
        DataError: `deployed` or `better` without data.
        UsageError: `deployed` or `better` where one side alone is quantized.
        ModelError: the model cannot be run.
    """
    nothing, searched = Matched({}, {}), Matched({}, program.searched)
    if not matches_outputs(program, ctx, correction):
        return nothing
    found = match_outputs(program, ctx, samples, patches)
    if correction == "deployed" and not program.searched:
        return found
    best, with_it = found, _sqnr_db(program, ctx, found)
    if program.searched and (kept := _sqnr_db(program, ctx, searched)) > with_it + CLEAR_DB:
        best, with_it = searched, kept
    if correction == "deployed":
        return best
    without = _sqnr_db(program, ctx, nothing)
    # the scales that a search ended with fit to its biases alone, so that their noise without them says nothing
    compared = None if program.searched else (without, with_it)
    return replace(best if with_it >= without else nothing, sqnr_db=compared)


def matched_model(program: Program, ctx: Context, outputs: Matched) -> ModelProto:
    """The emitted graph with these scales and biases; other biases are those of correction=output. The program is not changed."""
    view = replace(program, plan=program.plan | outputs.plan)
    return emit(view, ctx.target, correct=True, biases=outputs.biases).model


def _sqnr_db(program: Program, ctx: Context, outputs: Matched) -> float:
    """SQNR of the network's main output in dB with these scales and biases."""
    assert ctx.data is not None
    models = program.to_model(), matched_model(program, ctx, outputs)
    plain, quantized = (make_session(m, threads=ctx.threads, provider=ctx.provider) for m in models)
    noise = compare_sessions(
        plain, quantized, ctx.data, limit=ctx.up_to(JUDGED), batch=at_once(program, ctx)
    ).main
    return math.inf if noise is None or noise.sqnr_db is None else noise.sqnr_db


def match_outputs(program: Program, ctx: Context, samples: int = 128, patches: int = 16) -> Matched:
    """Scales and biases at which each layer's outputs have the means and spreads of the float layer's.

    Args:
        program: its plan is complete, its graph still float, its biases are those of the float model.
        ctx: its data are read.
        samples: to look at; fewer where what lies between two layers would take more than 128 MB, or where many layers have
            floats between them, so that the network cannot be cut there and runs once for each.
        patches: random inputs of each kernel from one sample.

    Raises:
        DataError: there is no data.
        ModelError: the model cannot be run.
    """
    layers = _layers(program, ctx)
    walk = Walk(program, ctx, {name: layer.source for name, layer in layers.items()})
    wanted = walk.affordable(samples)
    float_sums = {name: _Sums() for name in layers}
    feeds: list[dict[str, Array]] = []
    names = list(dict.fromkeys(layer.source for layer in layers.values()))
    for batch, values in activations(program, ctx, names, wanted, "float outputs"):
        for name, layer in layers.items():
            float_sums[name].add(layer.outputs(layer.weights, values[layer.source], len(feeds), patches))
        feeds.append(dict(batch.feeds))
    for name, arriving in walk.layers(feeds):
        found = _sums(layers[name], walk, arriving, patches)
        _match(layers[name], walk, float_sums[name], found)
    return Matched({n: d for n, d in walk.plan.items() if d is not program.plan[n]}, walk.biases)


def moved_biases(program: Program, biases: Mapping[str, Array], plan: Mapping[str, QuantDecision]) -> Biases:
    """Biases that belong to the weights of a plan, for those of the program: less what these shift means by beyond those.

    Args:
        program: its plan is complete.
        biases: (C,), by the name of a unit.
        plan: decisions of the weights that they belong to.
    """
    nodes, found = {n.name: n for n in program.graph.nodes}, {}
    for name, bias in biases.items():
        unit, group = program.units[name], nodes[name].attrs.get("group", 1)
        weights, movable = plan[unit.weight or ""].values, uncorrectable(unit, program) is None
        found[name] = corrected_bias(program, unit, bias, weights, group) if movable else bias
    return found


@dataclass(frozen=True, eq=False)
class _Layer:
    """A unit that multiplies by weights.

    Attributes:
        node: its main node.
        weights: in float, in the operator's layout.
        bias: (C,), zeros where there is none.
        least: smallest scales of the weights, () or (C,), at which biases fit into int32.
        alone: whether no other unit reads the weights.
        place: its number.
    """

    unit: Unit
    node: gs.Node
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    least: Vector
    alone: bool
    place: int

    @property
    def weight(self) -> str:
        """Name of its weights."""
        assert self.unit.weight is not None
        return self.unit.weight

    @property
    def source(self) -> str:
        """The tensor that it multiplies."""
        return self.unit.inputs[0]

    @property
    def takes_bias(self) -> bool:
        """Whether it has, or can get, a bias."""
        return self.unit.bias is not None or self.unit.kind != "MatMul"

    def outputs(self, weights: Array, x: Array, batch: int, patches: int) -> Vector:
        """Products of weights with random inputs of the kernel, (places, C); the same places for the same batch."""
        rng = np.random.default_rng([self.place, batch])
        inputs = input_patches(self.node, x, rng, patches)  # (groups, places, K)
        rows = as_rows(weights, self.node.op, self.unit.channel_axis)
        rows = rows.reshape(len(inputs), -1, inputs.shape[2])
        found = np.moveaxis(inputs @ rows.transpose(0, 2, 1), 0, 1)  # (places, groups, C / groups)
        flat: Vector = found.reshape(len(found), -1).astype(np.float64)
        return flat


@dataclass
class _Sums:
    """Sums over places, of the values of each channel and their squares, (C,)."""

    count: int = 0
    total: Vector = field(default_factory=lambda: np.zeros(()))
    squares: Vector = field(default_factory=lambda: np.zeros(()))

    def add(self, values: Vector) -> None:
        self.count += len(values)
        self.total = self.total + values.sum(axis=0)
        self.squares = self.squares + (values**2).sum(axis=0)

    @property
    def mean(self) -> Vector:
        return self.total / self.count

    @property
    def variance(self) -> Vector:
        return np.maximum(self.squares / self.count - self.mean**2, 0.0)


def _sums(layer: _Layer, walk: Walk, batches: Sequence[Array], patches: int) -> _Sums:
    """Of what a quantized layer makes of codes."""
    params, weights, sums = walk.plan[layer.source].params, walk.plan[layer.weight].values, _Sums()
    assert params is not None
    for number, codes in enumerate(batches):
        sums.add(layer.outputs(weights, dequantize(codes, params), number, patches))
    return sums


def _match(layer: _Layer, walk: Walk, wanted: _Sums, found: _Sums) -> None:
    """Change the scale and the bias of a layer so that what is found becomes what is wanted."""
    decision, factor = walk.plan[layer.weight], np.ones(len(wanted.mean))
    if layer.alone and wanted.count >= ENOUGH:
        params = decision.params
        assert params is not None
        together = params.scale.ndim == 0
        ratio = np.clip(_ratio(wanted.variance, found.variance, together), 1.0 / FURTHEST, FURTHEST)
        least = layer.least.max() if together else layer.least
        scale = np.maximum(params.scale * ratio, least).astype(np.float32)
        factor = factor * (scale / params.scale)
        walk.plan[layer.weight] = replace(decision, params=replace(params, scale=scale))
    if layer.takes_bias:
        shifted = layer.bias + wanted.mean - factor * found.mean
        walk.biases[layer.unit.name] = shifted.astype(np.float32)


def _layers(program: Program, ctx: Context) -> dict[str, _Layer]:
    """Layers by the names of their nodes."""
    nodes, tensors = {n.name: n for n in program.graph.nodes}, program.graph.tensors()
    units = [u for u in program.units.values() if u.weight is not None and u.inputs]
    weights = [u.weight for u in units]
    found = {}
    for place, unit in enumerate(units):
        values = float_values(tensors[unit.weight or ""])
        bias = None if unit.bias is None else float_values(tensors[unit.bias])
        assert values is not None
        start = np.zeros(values.shape[unit.channel_axis], np.float32) if bias is None else bias.ravel()
        least = least_scales(program, [unit]) if ctx.target.bias == "int32" else np.zeros(())
        alone = weights.count(unit.weight) == 1
        found[unit.name] = _Layer(unit, nodes[unit.name], values, start, least, alone, place)
    return found


def _ratio(wanted: Vector, found: Vector, together: bool) -> Vector:
    """What takes spreads of these squares to those wanted, () or (C,); 1 where there is none."""
    if together:
        wanted, found = wanted.sum(), found.sum()
    some = (wanted > 0.0) & (found > 0.0)
    ratio: Vector = np.sqrt(np.where(some, wanted, 1.0) / np.where(some, found, 1.0))
    return ratio
