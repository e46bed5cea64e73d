"""A network in consecutive segments, each a model of its own, so that a change runs only what comes after it.

Between two nodes in order, the tensors that are written before and read after are *live*. A network is cut only where all of them
are codes: those cost a byte a value to keep, and no integer kernel is cut from the DequantizeLinear and QuantizeLinear around it,
by which a runtime knows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from onnxq.model.names import read_names

MOST_LIVE = 6
CODES = (TensorProto.UINT8, TensorProto.INT8)


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes of a network.

    Attributes:
        model: of these nodes, with the initializers that they read.
        inputs: live tensors and inputs of the network that they read.
        live: tensors to keep for the segments after this one.
        outputs: outputs of the network that they write.
    """

    model: ModelProto
    inputs: tuple[str, ...]
    live: tuple[str, ...]
    outputs: tuple[str, ...]


def cut_into_segments(model: ModelProto, anchors: Sequence[str], most: int) -> tuple[Segment, ...]:
    """Cut a model in front of its anchors where nothing but few codes are live.

    A DequantizeLinear is no reason to keep floats: the segment that reads its result has one of its own.

    Args:
        model: its nodes are in order and its inner tensors have types.
        anchors: names of nodes each of which should be in a segment of its own.
        most: segments; with more anchors, evenly spaced cuts are taken.
    """
    nodes, known = list(model.graph.node), set(anchors)
    decoders = {n.output[0]: n for n in nodes if n.op_type == "DequantizeLinear"}
    plain = [n for n in nodes if n.op_type != "DequantizeLinear"]
    spans, types = _spans(model, plain, decoders), _types(model)
    places = [i for i, node in enumerate(plain) if node.name in known]
    cuts = []
    for before, place in pairwise([0, *places]):
        lives = {i: _live(spans, i) for i in range(before + 1, place + 1)}
        options = [i for i, live in lives.items() if len(live) <= MOST_LIVE and _are_codes(types, live)]
        if options:
            cuts.append(min(options, key=lambda i: (len(lives[i]), -i)))
    if len(cuts) > most - 1:
        cuts = [cuts[i * len(cuts) // (most - 1)] for i in range(most - 1)] if most > 1 else []
    ends = [0, *cuts, len(plain)]
    return tuple(
        _segment(model, plain[a:b], decoders, _live(spans, a), _live(spans, b) if b < len(plain) else ())
        for a, b in pairwise(ends)
    )


def _are_codes(types: Mapping[str, ValueInfoProto], names: Sequence[str]) -> bool:
    return all(n in types and types[n].type.tensor_type.elem_type in CODES for n in names)


def _spans(
    model: ModelProto, nodes: Sequence[NodeProto], decoders: Mapping[str, NodeProto]
) -> dict[str, tuple[int, int]]:
    """Where each tensor is written (-1 for an input) and last read, by name; initializers are left out.

    What reads a decoded tensor reads its codes.
    """
    fixed = {t.name for t in model.graph.initializer}
    written = {i.name: -1 for i in model.graph.input if i.name not in fixed}
    last = dict(written)
    for place, node in enumerate(nodes):
        for name in read_names(node):
            source = decoders[name].input[0] if name in decoders else name
            if source in last:
                last[source] = place
        for name in node.output:
            if name:
                written[name] = last[name] = place
    for output in model.graph.output:  # a decoded output is written by the last segment
        if output.name in decoders:
            last[decoders[output.name].input[0]] = len(nodes)
    return {name: (written[name], last[name]) for name in written}


def _live(spans: Mapping[str, tuple[int, int]], place: int) -> tuple[str, ...]:
    """Tensors that nodes before a place write and nodes from it on read; inputs of the network are at hand anyway."""
    return tuple(name for name, (a, b) in spans.items() if 0 <= a < place <= b)


def _types(model: ModelProto) -> dict[str, ValueInfoProto]:
    return {i.name: i for i in (*model.graph.value_info, *model.graph.output, *model.graph.input)}


def _segment(
    model: ModelProto,
    plain: Sequence[NodeProto],
    decoders: Mapping[str, NodeProto],
    before: Sequence[str],
    after: Sequence[str],
) -> Segment:
    types, graph_outputs = _types(model), [o.name for o in model.graph.output]
    is_last = not after
    decoded = {name for node in plain for name in read_names(node) if name in decoders}
    decoded |= {name for name in graph_outputs if name in decoders and is_last}
    nodes = _with_decoders(plain, decoders, decoded)
    read = {name for node in nodes for name in read_names(node)}
    written = {name for node in nodes for name in node.output if name}
    stored = [t for t in model.graph.initializer if t.name in read]
    fixed = {t.name for t in stored}
    given = [i.name for i in model.graph.input if i.name in read and i.name not in fixed]
    inputs = (*given, *(name for name in before if name in read))
    outputs = tuple(name for name in graph_outputs if name in written)
    live = tuple(name for name in after if name in written)
    wanted = dict.fromkeys((*live, *outputs))
    graph = helper.make_graph(
        nodes, "segment", [types[n] for n in inputs], [_typed(types, n) for n in wanted], stored
    )
    return Segment(
        helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version),
        inputs,
        live,
        outputs,
    )


def _with_decoders(
    plain: Sequence[NodeProto], decoders: Mapping[str, NodeProto], decoded: set[str]
) -> list[NodeProto]:
    """The nodes with each DequantizeLinear that they need, in front of what first reads it."""
    placed: set[str] = set()
    nodes: list[NodeProto] = []
    for node in plain:
        for name in read_names(node):
            if name in decoded and name not in placed:
                placed.add(name)
                nodes.append(decoders[name])
        nodes.append(node)
    return [*nodes, *(decoders[name] for name in sorted(decoded - placed))]


def _typed(types: Mapping[str, ValueInfoProto], name: str) -> ValueInfoProto:
    return types.get(name, ValueInfoProto(name=name))


def typed(model: ModelProto) -> ModelProto:
    """The model with the types of its inner tensors inferred."""
    return onnx.shape_inference.infer_shapes(model, data_prop=True)
