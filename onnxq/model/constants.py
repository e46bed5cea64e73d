"""Constants in one form: dense initializers."""

from __future__ import annotations

import numpy as np
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper, numpy_helper

from onnxq.errors import ModelError


def densify(graph: GraphProto) -> None:
    """Turn sparse initializers into dense ones."""
    for sparse in graph.sparse_initializer:
        graph.initializer.append(_dense(sparse.values, sparse.indices, list(sparse.dims), sparse.values.name))
    graph.ClearField("sparse_initializer")


def _dense(values: TensorProto, indices: TensorProto, shape: list[int], name: str) -> TensorProto:
    """Values (n,) at linear indices (n,) or coordinates (n, rank), zero elsewhere, as a dense tensor."""
    numbers, where = numpy_helper.to_array(values), numpy_helper.to_array(indices)
    dense = np.zeros(shape, numbers.dtype)
    try:
        if where.ndim == 2:
            dense[tuple(where.T)] = numbers
        else:
            dense.reshape(-1)[where] = numbers
    except (IndexError, ValueError):
        raise ModelError(f"the indices of the sparse tensor {name!r} do not fit its shape") from None
    return numpy_helper.from_array(dense, name)


def lift_constants(graph: GraphProto) -> None:
    """Turn Constant nodes into initializers, except those that write an output of the graph."""
    outputs = {o.name for o in graph.output}
    kept = []
    for node in graph.node:
        tensor = _constant(node) if node.op_type == "Constant" and not node.domain else None
        if tensor is None or node.output[0] in outputs:
            kept.append(node)
        else:
            graph.initializer.append(tensor)
    if len(kept) < len(graph.node):
        del graph.node[:]
        graph.node.extend(kept)
    lifted = {t.name for t in graph.initializer}
    infos = [i for i in graph.value_info if i.name not in lifted]
    del graph.value_info[:]
    graph.value_info.extend(infos)


def _constant(node: NodeProto) -> TensorProto | None:
    """The value of a Constant node as a tensor with the name of its output, None when it is not known here."""
    if len(node.attribute) != 1 or node.attribute[0].ref_attr_name:
        return None
    attribute, name = node.attribute[0], node.output[0]
    match attribute.name:
        case "value":
            tensor = TensorProto()
            tensor.CopyFrom(attribute.t)
            tensor.name = name
            return tensor
        case "sparse_value":
            sparse = attribute.sparse_tensor
            return _dense(sparse.values, sparse.indices, list(sparse.dims), name)
        case "value_string" | "value_strings":
            texts = [attribute.s] if attribute.type == AttributeProto.STRING else list(attribute.strings)
            dims = [] if attribute.type == AttributeProto.STRING else [len(texts)]
            return TensorProto(name=name, data_type=TensorProto.STRING, dims=dims, string_data=texts)
        case "value_float" | "value_floats" | "value_int" | "value_ints":
            value = helper.get_attribute_value(attribute)
            dtype = np.float32 if attribute.name.startswith("value_float") else np.int64
            return numpy_helper.from_array(np.asarray(value, dtype), name)
    return None
