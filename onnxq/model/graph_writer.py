"""Writing graphsurgeon graphs as protobuf messages, with all that they and the model that they came from hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    defs,
    helper,
    numpy_helper,
)
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from onnxq.model.skeleton import copy_fields
from onnxq.model.tensors import all_graphs, element_type

PLAIN = {"tensor_type", None}  # kinds of types that graphsurgeon can hold


def gs_nodes(graph: gs.Graph) -> Iterator[gs.Node]:
    """Nodes in the order in which `all_graphs` meets them."""
    yield from graph.nodes
    for node in graph.nodes:
        for body in node.subgraphs():
            yield from gs_nodes(body)


class GraphWriter:
    """Writes graphs into protobuf messages in place, so that weights are copied once."""

    def __init__(self, like: ModelProto, versions: Mapping[str, int]) -> None:
        self._versions = versions
        nodes = [node for graph in all_graphs(like.graph) for node in graph.node]
        counts = Counter(node.name for node in nodes)
        self._like = {node.name: node for node in nodes if node.name and counts[node.name] == 1}

    def graph(
        self, target: GraphProto, graph: gs.Graph, like: GraphProto, outer: Mapping[str, gs.Tensor]
    ) -> None:
        """Write a graph; `outer` holds the constants that enclosing graphs write."""
        target.name = graph.name
        if graph.doc_string:
            target.doc_string = graph.doc_string
        target.metadata_props.extend(like.metadata_props)
        constants: dict[str, gs.Constant] = {}
        for tensor in _own_constants(graph):
            if outer.get(tensor.name) is tensor:
                continue
            if constants.setdefault(tensor.name, tensor) is not tensor:
                raise ValueError(f"two constants are named {tensor.name!r}")
        for tensor in _captured_constants(graph, like):
            if outer.get(tensor.name) is not tensor:
                constants.setdefault(tensor.name, tensor)
        for tensor in constants.values():
            _write_constant(target, tensor)
        scope = {**outer, **constants}
        for node in graph.nodes:
            self.node(target.node.add(), node, scope)
        infos = {i.name: i for i in (*like.value_info, *like.input, *like.output)}
        target.input.extend(_info(t, infos.get(t.name)) for t in graph.inputs)
        target.output.extend(_info(t, infos.get(t.name)) for t in graph.outputs)
        written = {t.name: t for node in graph.nodes for t in node.outputs if not t.is_empty()}
        inner = [
            t for name, t in written.items() if name not in {t.name for t in (*graph.inputs, *graph.outputs)}
        ]
        target.value_info.extend(
            i for i in (_info(t, infos.get(t.name)) for t in inner) if i.HasField("type")
        )
        there = written.keys() | scope.keys() | {t.name for t in graph.inputs}
        target.quantization_annotation.extend(
            a for a in like.quantization_annotation if a.tensor_name in there
        )

    def node(self, target: NodeProto, node: gs.Node, scope: Mapping[str, gs.Tensor]) -> None:
        """Write a node; what graphsurgeon does not keep comes from the node of the same name and operator."""
        like = self._like.get(node.name, NodeProto())
        if like.op_type != node.op or like.domain != (node.domain or ""):
            like = NodeProto()
        copy_fields(like, target, skip=("input", "output", "name", "op_type", "domain", "attribute"))
        target.op_type, target.name = node.op, node.name
        if node.domain is not None:
            target.domain = node.domain
        target.input.extend(t.name for t in node.inputs)
        target.output.extend(t.name for t in node.outputs)
        attributes = {a.name: a for a in like.attribute}
        for name, value in node.attrs.items():
            if isinstance(value, gs.Graph):
                attribute = target.attribute.add(name=name, type=AttributeProto.GRAPH)
                self.graph(attribute.g, value, attributes.get(name, AttributeProto()).g, scope)
            else:
                target.attribute.append(self._attribute(name, value, node, attributes.get(name)))

    def _attribute(self, name: str, value: Any, node: gs.Node, like: AttributeProto | None) -> AttributeProto:
        if isinstance(value, gs.Node.AttributeRef):
            raise ValueError(f"attribute {name!r} of node {node.name!r} refers to a function")
        if isinstance(value, gs.Tensor):
            return helper.make_attribute(name, tensor_proto(value))
        if isinstance(value, (type, np.dtype)):
            return helper.make_attribute(name, element_type(np.dtype(value)))
        kind: Any = like.type if like else self._declared_type(node, name)
        if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and not value:
            return AttributeProto(name=name, type=kind or AttributeProto.INTS)
        if kind == AttributeProto.FLOAT and isinstance(value, (int, np.integer)):
            value = float(value)
        if kind == AttributeProto.FLOATS:
            value = [float(v) for v in value]
        return helper.make_attribute(name, value)

    def _declared_type(self, node: gs.Node, name: str) -> int:
        """Type of the attribute in the operator's schema, 0 when there is none."""
        try:
            schema = defs.get_schema(node.op, self._versions.get(node.domain or "", 1), node.domain or "")
        except defs.SchemaError:
            return 0
        declared_type = schema.attributes.get(name)
        return int(declared_type.type) if declared_type else 0  # type: ignore[call-overload]


def _own_constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    """Constants that nodes of the graph read or that it returns."""
    for node in graph.nodes:
        yield from (t for t in node.inputs if isinstance(t, gs.Constant))
    yield from (t for t in graph.outputs if isinstance(t, gs.Constant))


def _captured_constants(graph: gs.Graph, like: GraphProto) -> Iterator[gs.Constant]:
    """Constants that the graph's bodies read and that `like` holds in the graph itself."""
    held = {t.name for t in like.initializer} | {s.values.name for s in like.sparse_initializer}
    for node in graph.nodes:
        for body in node.subgraphs():
            inner = (t for n in gs_nodes(body) for t in n.inputs)
            yield from (t for t in inner if isinstance(t, gs.Constant) and t.name in held)


def _write_constant(target: GraphProto, tensor: gs.Constant) -> None:
    if isinstance(tensor._values, SparseValues):
        target.sparse_initializer.add().CopyFrom(tensor._values.tensor)
        target.sparse_initializer[-1].values.name = tensor.name
        return
    target.initializer.append(tensor_proto(tensor))
    target.initializer[-1].name = tensor.name


def tensor_proto(tensor: gs.Constant) -> TensorProto:
    """The stored message while the values were not read, else one made of the values."""
    if isinstance(tensor._values, LazyValues):
        stored: TensorProto = tensor._values.tensor
        return stored
    values = np.asarray(tensor._values)
    element = element_type(tensor.export_dtype)
    if element != element_type(values.dtype):
        values = values.astype(helper.tensor_dtype_to_np_dtype(element))
    return numpy_helper.from_array(values, tensor.name)


def _info(tensor: gs.Tensor, like: ValueInfoProto | None) -> ValueInfoProto:
    info = ValueInfoProto(name=tensor.name)
    if like is not None:
        copy_fields(like, info, skip=("name", "type"))
    if tensor.dtype is not None:
        shape = (
            None
            if tensor.shape is None
            else [int(n) if isinstance(n, np.integer) else n for n in tensor.shape]
        )
        info.type.CopyFrom(helper.make_tensor_type_proto(element_type(tensor.dtype), shape))
    elif like is not None and like.type.WhichOneof("value") not in PLAIN:
        info.type.CopyFrom(like.type)
    return info
