"""What quantization costs by layer: noise of activations in the deployed network, and of the output with one layer quantized."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxq.affine import dequantize
from onnxq.bias import set_bias
from onnxq.borders import Borders
from onnxq.calibration.collect import activations, at_once
from onnxq.graph import Names, Uses, constant
from onnxq.hard_sigmoid import useful_range
from onnxq.measure.compare import Difference, run
from onnxq.model.session import make_session
from onnxq.pipeline import Context
from onnxq.program import Program, Unit
from onnxq.rules import WEIGHTED
from onnxq.target import Target

SAMPLES = 64
ALONE_SAMPLES = 32
PLAIN = {
    "session.disable_quant_qdq": "1"
}  # else the runtime quantizes float layers behind a DequantizeLinear


@dataclass(frozen=True)
class LayerNoise:
    """Noise by layer, in dB below the signal.

    Attributes:
        deployed: SQNR of each activation in the deployed network, with the noise of all layers before it, by tensor.
        alone: SQNR of the network's main output when only this layer is quantized, by layer: its weights, its output and what
            it reads that no quantized layer writes, without what makes up for the noise of others. None where that changes
            nothing. Layers that the time did not suffice for are absent.
        layers: how many there are.
        samples: behind `alone`.
    """

    deployed: Mapping[str, float]
    alone: Mapping[str, float | None]
    layers: int
    samples: int

    def as_json(self) -> dict[str, Any]:
        """The figures."""
        return {
            "deployed_db": dict(self.deployed),
            "alone_db": dict(self.alone),
            "count": self.layers,
            "samples": self.samples,
        }


def layer_noise(program: Program, compiled: ModelProto, ctx: Context) -> LayerNoise | None:
    """Both figures on the samples that tell how good a result is; None without samples or without quantized activations.

    After `ctx.alone_seconds` no further layer is quantized alone.

    Args:
        program: emitted, with its float `reference`.
        compiled: what it became.
        ctx: calibration samples, target, threads.

    Raises:
        ModelError: a model cannot be run.
        DataError: the samples cannot be read.
    """
    ctx = replace(ctx, data=ctx.judged)
    if program.reference is None or ctx.data is None:
        return None
    layers = [u for u in program.reference.units.values() if not u.is_layout]
    batches = list(ctx.data.batches(at_once(program, ctx), ctx.up_to(ALONE_SAMPLES)))
    model = program.reference.to_model()
    session = make_session(model, threads=ctx.threads, provider=ctx.provider)
    wanted = [run(session, batch.feeds) for batch in batches]
    alone: dict[str, float | None] = {}
    end = time.perf_counter() + ctx.alone_seconds
    for unit in layers:
        if time.perf_counter() > end:
            break
        changed = quantized_alone(model, program, unit, ctx.target)
        session = make_session(changed, threads=ctx.threads, provider=ctx.provider, config=PLAIN)
        found = Difference()
        for batch, reference in zip(batches, wanted, strict=True):
            found.update(reference, run(session, batch.feeds), batch.size)
        alone[unit.name] = found.main.sqnr_db if found.main is not None else None
        ctx.progress("each layer alone", len(alone), len(layers))
    samples = sum(batch.size for batch in batches)
    return LayerNoise(_deployed(program, program.reference, compiled, ctx), alone, len(layers), samples)


def _deployed(program: Program, reference: Program, compiled: ModelProto, ctx: Context) -> dict[str, float]:
    """SQNR in dB of each activation that the compiled model holds as codes, by tensor.

    Tensors that the float model does not have, or has in another shape, are left out, and so are those without noise. Values that
    readers do not tell apart count as equal.
    """
    assert ctx.data is not None
    uses = Uses(reference.graph)
    written = {name for node in compiled.graph.node for name in node.output}
    known = reference.graph.tensors()
    codes = {tensor: name for tensor, name in program.codes.items() if name in written and tensor in known}
    seen = {tensor: useful_range(uses, known[tensor]) for tensor in codes}
    session = make_session(
        compiled, threads=ctx.threads, provider=ctx.provider, extra_outputs=list(codes.values())
    )
    powers = {tensor: np.zeros(2) for tensor in codes}
    for batch, values in activations(reference, ctx, list(codes), ctx.up_to(SAMPLES), "noise by layer"):
        found = run(session, batch.feeds, list(codes.values()))
        for tensor, name in codes.items():
            wanted = np.clip(values[tensor], *seen[tensor])
            given = np.clip(dequantize(found[name], program.params(tensor)), *seen[tensor])
            if wanted.shape == given.shape:
                powers[tensor] += _power(wanted), _power(given - wanted)
    ratios = {tensor: _decibels(*power) for tensor, power in powers.items()}
    return {tensor: ratio for tensor, ratio in ratios.items() if math.isfinite(ratio)}


def _power(values: NDArray[Any]) -> float:
    return float(np.sum(np.square(values), dtype=np.float64))


def _decibels(signal: float, noise: float) -> float:
    return 10.0 * math.log10(signal / noise) if signal > 0.0 < noise else math.inf


def quantized_alone(model: ModelProto, program: Program, unit: Unit, target: Target) -> ModelProto:
    """The float model with one layer rounded as the plan says: weights, output, and inputs that no quantized layer writes.

    Args:
        model: the float reference of the program, which is not changed.
        program: its plan is complete.
        unit: of the reference.
        target: for which the program was emitted.
    """
    assert program.reference is not None
    view = Program.from_model(model)
    view.plan = program.plan
    names, nodes = Names(view.graph), {n.name: n for n in view.graph.nodes}
    weight, node = program.units[unit.name].weight, nodes[unit.name]
    plan, biases = program.plan | program.reference.plan, program.biases | program.reference.biases
    decision = plan.get(weight) if weight is not None else None
    if decision is not None and decision.codes is not None and program.sides != "activations":
        place = WEIGHTED[node.op]
        kept = tuple(slice(size) for size in node.inputs[place].shape)  # without channels that were padded
        node.inputs[place] = constant(names, f"{weight}_rounded", decision.values[kept])
    if unit.name in biases:
        set_bias(view, names, nodes, unit, biases[unit.name])
    if program.sides == "weights":
        return view.to_model()
    borders = Borders(view, target)
    written = {tensor for other in program.reference.units.values() for tensor in other.outputs}
    for part in (nodes[name] for name in unit.nodes):
        for place, tensor in enumerate(part.inputs):
            if tensor.name in unit.inputs and tensor.name not in written and tensor.name in program.plan:
                part.inputs[place] = borders.values(tensor.name)
    if unit.output in program.plan:
        nodes[unit.nodes[-1]].outputs = [borders.quantize_output(unit.output)]
    borders.finish()
    return view.to_model()
