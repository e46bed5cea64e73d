"""Turning float16 and bfloat16 graphs into float32 ones behind the same interface.

Inside, every half-precision type becomes float32: initializers, attributes, declared types, bodies of control flow.
The inputs and outputs of the model keep their names, types and shapes; a Cast node stands at each half-precision one.
"""

from __future__ import annotations

import numpy as np
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TypeProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)

from onnxq.model.disk import file_of, retype
from onnxq.model.names import FreshNames, rename_reads, tensor_names
from onnxq.model.tensors import all_graphs, all_tensors, infos, tensor_array, tensor_types

HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)

# Integer attributes that hold an element type, wherever they occur in the standard operator sets: of an output,
# and of what is computed inside an operator.
OUTPUT_TYPES = {"to", "dtype", "output_dtype", "output_datatype"}
INNER_TYPES = {"stash_type", "softmax_precision", "precision"}


def half_types(model: ModelProto) -> tuple[str, ...]:
    """Which of `float16` and `bfloat16` occur in the model (with its types inferred), in that order."""
    found = {t.data_type for t in all_tensors(model)}
    for graph in all_graphs(model.graph):
        for info in infos(graph):
            found |= {t.elem_type for t in tensor_types(info.type)}
        for node in graph.node:
            found |= {a.i for a in node.attribute if _holds_type(a, OUTPUT_TYPES)}
    return tuple(name for name, number in (("float16", HALF[0]), ("bfloat16", HALF[1])) if number in found)


def only_at_the_border(model: ModelProto) -> bool:
    """Whether half precision is nothing but Cast nodes at the inputs and outputs, as `promote_floats` leaves them."""
    if any(t.data_type in HALF for t in all_tensors(model)):
        return False
    half = {i.name for graph in all_graphs(model.graph) for i in infos(graph) if _is_half(i)}
    touching = (n for graph in all_graphs(model.graph) for n in graph.node if half & {*n.input, *n.output})
    border = {i.name for i in (*model.graph.input, *model.graph.output)}
    return half <= border and all(node.op_type == "Cast" for node in touching)


def obstacle(model: ModelProto) -> str:
    """Why the model cannot be turned into float32, empty when nothing is in the way."""
    for info in (*model.graph.input, *model.graph.output):
        kind = info.type.WhichOneof("value")
        if kind != "tensor_type" and any(t.elem_type in HALF for t in tensor_types(info.type)):
            return f"{info.name!r} is not a plain tensor"
    for graph in all_graphs(model.graph):
        for node in graph.node:
            if node.op_type == "BitCast":
                return f"node {node.name!r} reads the bits of its input"
            if any(
                a.type in (AttributeProto.SPARSE_TENSOR, AttributeProto.SPARSE_TENSORS)
                for a in node.attribute
            ):
                return f"node {node.name!r} holds a sparse tensor"
    return ""


def promote_floats(model: ModelProto) -> dict[str, str]:
    """Turn half-precision types into float32 in place; the model has its types inferred and no obstacle.

    Returns:
        The new names of the float32 tensors behind half-precision inputs and outputs.
    """
    fresh = FreshNames(tensor_names(model.graph))
    inputs = {i.name: i.type.tensor_type.elem_type for i in model.graph.input if _is_half(i)}
    outputs = {
        o.name: o.type.tensor_type.elem_type
        for o in model.graph.output
        if _is_half(o) and o.name not in inputs
    }
    interface = GraphProto(input=model.graph.input, output=model.graph.output)
    for graph in all_graphs(model.graph):
        _promote_graph(graph)
    for side in ("input", "output"):
        model.graph.ClearField(side)
    model.graph.MergeFrom(interface)
    return _cast_interface(model.graph, inputs, outputs, fresh)


def promote_tensor(tensor: TensorProto) -> None:
    """Turn the elements of a half-precision tensor into float32, in place; the values stay the same.

    What is on disk stays there and becomes float32 when it is read.
    """
    if tensor.data_type not in HALF:
        return
    if file_of(tensor) is not None:
        retype(tensor, TensorProto.FLOAT)
        return
    values = tensor_array(tensor).astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _promote_graph(graph: GraphProto) -> None:
    for info in infos(graph):
        _promote_type(info.type)
    for tensor in graph.initializer:
        promote_tensor(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            _promote_attribute(attribute)


def _promote_attribute(attribute: AttributeProto) -> None:
    if _holds_type(attribute, OUTPUT_TYPES | INNER_TYPES) and attribute.i in HALF:
        attribute.i = TensorProto.FLOAT
    for tensor in (*((attribute.t,) if attribute.HasField("t") else ()), *attribute.tensors):
        promote_tensor(tensor)
    for tensor_type in (*((attribute.tp,) if attribute.HasField("tp") else ()), *attribute.type_protos):
        _promote_type(tensor_type)


def _promote_type(value: TypeProto) -> None:
    for tensor_type in tensor_types(value):
        if tensor_type.elem_type in HALF:
            tensor_type.elem_type = TensorProto.FLOAT


def _cast_interface(
    graph: GraphProto, inputs: dict[str, int], outputs: dict[str, int], fresh: FreshNames
) -> dict[str, str]:
    inner = {name: fresh(f"{name}_float32") for name in (*inputs, *outputs)}
    rename_reads(graph, inner)
    for node in graph.node:
        node.output[:] = [inner.get(name, name) for name in node.output]
    for tensor in graph.initializer:
        tensor.name = inner.get(tensor.name, tensor.name)
    for info in graph.value_info:
        info.name = inner.get(info.name, info.name)
    nodes = [_cast(name, inner[name], TensorProto.FLOAT) for name in inputs]
    nodes += [*graph.node, *(_cast(inner[name], name, half) for name, half in outputs.items())]
    del graph.node[:]
    graph.node.extend(nodes)
    return inner


def _cast(source: str, target: str, element: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], to=element)


def _is_half(info: ValueInfoProto) -> bool:
    return info.type.HasField("tensor_type") and info.type.tensor_type.elem_type in HALF


def _holds_type(attribute: AttributeProto, names: set[str]) -> bool:
    return attribute.type == AttributeProto.INT and attribute.name in names
