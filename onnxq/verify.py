"""Proof that a compiled model is sound: it passes the checker, loads, gives what the float model gives, and runs in integers.

Models for other runtimes are checked and compared in onnxruntime as well, which reads the same file. Coverage and speed would be
onnxruntime's, not theirs, and are left out; what becomes of each node is what the plan says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
import onnxruntime as ort

from onnxq.calibration.collect import at_once
from onnxq.data import Batch
from onnxq.errors import ModelError
from onnxq.measure.compare import Difference, compare_sessions, run
from onnxq.measure.coverage import Coverage, read_coverage
from onnxq.measure.macs import count_macs, guessed_feeds
from onnxq.measure.speed import Speed, race
from onnxq.model.load import check_model
from onnxq.model.session import make_session, session_and_optimized
from onnxq.model.tensors import weight_bytes
from onnxq.pipeline import Context
from onnxq.program import Program
from onnxq.report.model import NodeRow

if TYPE_CHECKING:
    from onnxq.measure.layers import LayerNoise

COMPARED = 64  # samples that are compared: enough for a figure in dB, cheap next to calibration
RACE_SECONDS = 0.3
RUN_LIMIT = 2**30  # bytes of weights, which each session rearranges in memory for its kernels
SLOWER = 0.97  # a ratio below this is more than noise


@dataclass(frozen=True)
class Verification:
    """What the checks found, noise by layer if asked for; no coverage and no speed where onnxruntime is not the target."""

    nodes: Sequence[NodeRow]
    coverage: Coverage | None
    difference: Difference | None
    speed: Speed | None
    warnings: Sequence[str]
    layers: LayerNoise | None = None


def verify(
    reference: onnx.ModelProto, compiled: onnx.ModelProto, program: Program, ctx: Context, *, speed: bool
) -> Verification:
    """Check, load and measure a compiled model.

    A model that stays on disk (`program.spool`) and has more than `RUN_LIMIT` bytes of weights is not run, and a warning says so.

    Args:
        reference: the prepared float model; its nodes have names.
        compiled: what the pipeline made of it.
        program: with the units that were emitted and the reasons of those that were not.

    Raises:
        ModelError: the compiled model fails the checker, onnxruntime cannot load or run it, or an output has another shape.
    """
    check_model(compiled)
    if program.spool is not None and weight_bytes(reference) > RUN_LIMIT:
        return _verify_unrun(reference, compiled, program, ctx)
    session, optimized = session_and_optimized(compiled, threads=ctx.threads, provider=ctx.provider)
    sample = next(ctx.data.batches(1), None) if ctx.data is not None else None
    feeds = sample.feeds if sample is not None else guessed_feeds(reference)
    coverage = read_coverage(optimized, _macs(reference, feeds, sample)) if ctx.target.local else None
    difference = _difference(reference, session, program, ctx)
    del session  # one pair of sessions at a time: each may hold the weights twice
    timed = feeds if speed and ctx.target.local else None
    raced = _race(reference, compiled, timed, ctx) if timed is not None else None
    layers = _layers(program, compiled, ctx) if ctx.layers else None
    rows = node_rows(reference, program, coverage)
    expected = coverage if program.units else None  # of stored weights alone nothing runs in integers
    remarks = () if difference is None else difference.remarks()
    return Verification(rows, coverage, difference, raced, (*remarks, *_warnings(expected, raced)), layers)


def _verify_unrun(
    reference: onnx.ModelProto, compiled: onnx.ModelProto, program: Program, ctx: Context
) -> Verification:
    """Load the compiled model in a way in which the runtime maps weights and neither reads, folds nor rearranges them."""
    config = {"session.disable_prepacking": "1"}
    make_session(compiled, threads=ctx.threads, provider=ctx.provider, optimize=False, config=config)
    size, limit = (f"{count / 1e9:.1f} GB" for count in (weight_bytes(reference), RUN_LIMIT))
    left_out = (
        f"the model has {size} of weights, more than the {limit} up to which models are run here: "
        "the compiled one was checked and loaded, but not optimized by onnxruntime, compared with it or timed"
    )
    return Verification(node_rows(reference, program, None), None, None, None, (left_out,))


def _difference(
    reference: onnx.ModelProto, session: ort.InferenceSession, program: Program, ctx: Context
) -> Difference | None:
    if ctx.judged is None:
        return None
    float_session = make_session(reference, threads=ctx.threads, provider=ctx.provider)
    batch = at_once(program, ctx)
    found = compare_sessions(float_session, session, ctx.judged, limit=ctx.up_to(COMPARED), batch=batch)
    broken = next((name for name in found.apart if name in _settled(reference.graph)), None)
    if broken is not None:
        raise ModelError(f"output {broken!r} of the compiled model has another shape than in float")
    return found


def _settled(graph: onnx.GraphProto) -> set[str]:
    """Outputs whose shape follows from the shapes of the inputs: each dimension is a number, or a name that an input has."""
    named = {d.dim_param for value in graph.input for d in value.type.tensor_type.shape.dim} - {""}
    return {
        value.name
        for value in graph.output
        if value.type.tensor_type.HasField("shape")
        and all(d.HasField("dim_value") or d.dim_param in named for d in value.type.tensor_type.shape.dim)
    }


def _layers(program: Program, compiled: onnx.ModelProto, ctx: Context) -> LayerNoise | None:
    from onnxq.measure.layers import layer_noise  # for a report alone

    return layer_noise(program, compiled, ctx)


def _macs(model: onnx.ModelProto, feeds: Mapping[str, Any] | None, sample: Batch | None) -> dict[str, int]:
    if feeds is None:
        return {}
    try:
        return count_macs(model, feeds, sample.size if sample is not None else 1)
    except ModelError:
        if sample is not None:
            raise
        return {}  # the guessed shapes do not fit the model


def _race(
    reference: onnx.ModelProto, compiled: onnx.ModelProto, feeds: Mapping[str, Any], ctx: Context
) -> Speed | None:
    pair = [make_session(m, threads=1, provider=ctx.provider) for m in (reference, compiled)]
    try:
        run(pair[0], feeds)
    except ModelError:
        return None  # guessed feeds need not fit
    return race(pair[0], pair[1], feeds, seconds=RACE_SECONDS, least=3)


def _warnings(coverage: Coverage | None, speed: Speed | None) -> tuple[str, ...]:
    """What the user should know about the deployed model."""
    found = []
    if coverage is not None and coverage.share == 0.0:
        found.append("onnxruntime runs no multiply-adds of this model in integers")
    if speed is not None and speed.speedup < SLOWER:
        found.append(
            f"on this CPU the compiled model is slower than float ({speed.speedup:.2f}x); see the slow part with `onnxq inspect`"
        )
    return tuple(found)


def node_rows(reference: onnx.ModelProto, program: Program, coverage: Coverage | None) -> list[NodeRow]:
    """What became of each node of the reference that computes in float, in graph order.

    Args:
        coverage: what the runtime made of the units; None to go by the plan.
    """
    absorbed = {name: unit for unit in program.units.values() for name in unit.nodes}
    rows = []
    for node in reference.graph.node:
        unit = absorbed.get(node.name)
        if unit is not None:
            if coverage is None or unit.moves_codes or unit.name in coverage.integer:
                rows.append(NodeRow(node.name, node.op_type, "integer"))
            else:
                rows.append(
                    NodeRow(
                        node.name, node.op_type, "float", "onnxruntime did not fuse it into an integer kernel"
                    )
                )
        elif node.name in program.stored and coverage is not None and node.name in coverage.integer:
            rows.append(NodeRow(node.name, node.op_type, "integer"))
        elif node.name in program.stored:
            rows.append(NodeRow(node.name, node.op_type, "storage", program.stored[node.name]))
        elif node.name in program.floats:
            rows.append(NodeRow(node.name, node.op_type, "float", program.floats[node.name]))
    rows += [
        NodeRow(node.name, node.op_type, "float", program.floats[node.name])
        for node in _body_nodes(reference.graph)
        if node.name in program.floats
    ]
    return rows


def _body_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes of all bodies of control-flow nodes of the graph."""
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from body.node
                yield from _body_nodes(body)
