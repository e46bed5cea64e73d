"""Models as graphsurgeon graphs and back, without loss.

graphsurgeon reads the graph; attributes that it has no reader for are put into its nodes as the protobuf values that
they are. It does not write it: its exporter drops metadata, writes packed types unpacked, and repeats outer
initializers inside bodies.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import (
    AttributeProto,
    ModelProto,
    NodeProto,
    OperatorSetIdProto,
    TensorProto,
    helper,
    numpy_helper,
)
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER
from onnx_graphsurgeon.util.exception import OnnxGraphSurgeonException

from onnxq.errors import ModelError
from onnxq.model.disk import WORTHWHILE, Spool, file_of, put_on_disk
from onnxq.model.graph_writer import PLAIN, GraphWriter, gs_nodes, tensor_proto
from onnxq.model.messages import one_sentence
from onnxq.model.skeleton import copy_fields, declared, split
from onnxq.model.tensors import all_graphs, element_type, infos, tensor_array, tensor_bytes

RAW_ATTRIBUTES = {
    AttributeProto.SPARSE_TENSOR,
    AttributeProto.SPARSE_TENSORS,
    AttributeProto.TYPE_PROTO,
    AttributeProto.TYPE_PROTOS,
    AttributeProto.TENSORS,
}
PACKED = {
    (2, True): ml_dtypes.int2,
    (2, False): ml_dtypes.uint2,
    (4, True): ml_dtypes.int4,
    (4, False): ml_dtypes.uint4,
}


def packed_constant(name: str, codes: NDArray[np.integer[Any]], bits: int) -> gs.Constant:
    """An initializer of type INT4, UINT4, INT2 or UINT2, signed as the codes are, packed low bits first.

    Args:
        codes: int8 or uint8, any shape, each within the range of the type.
        bits: 2 or 4.

    Raises:
        ValueError: there is no such type, or a code is out of its range.
    """
    signed = codes.dtype == np.int8
    if (bits, signed) not in PACKED or codes.dtype not in (np.int8, np.uint8):
        raise ValueError(f"no packed type holds {codes.dtype} codes in {bits} bits")
    element = PACKED[bits, signed]
    low = -(1 << (bits - 1)) if signed else 0
    if codes.size and not low <= codes.min() <= codes.max() < low + (1 << bits):
        raise ValueError(f"codes of {name!r} lie outside {np.dtype(element).name}")
    return gs.Constant(name, LazyValues(numpy_helper.from_array(codes.astype(element), name)))


class StoredValues(LazyValues):  # type: ignore[misc]
    """Values of a stored tensor. Those on disk come as a mapping that cannot be written to."""

    @property
    def is_on_disk(self) -> bool:
        """Whether a file holds the values."""
        return file_of(self.tensor) is not None

    def load(self) -> NDArray[Any]:
        """The values: a copy of those in memory, a mapping of those on disk."""
        return tensor_array(self.tensor) if self.is_on_disk else np.asarray(super().load())


def constant_values(tensor: gs.Constant) -> NDArray[Any]:
    """Values of an initializer. Those on disk are mapped at each call and go with the array; `tensor.values` would keep them."""
    lazy = tensor._values
    return lazy.load() if isinstance(lazy, StoredValues) and lazy.is_on_disk else np.asarray(tensor.values)


def shelve(tensor: gs.Constant, spool: Spool) -> None:
    """Move the values of an initializer to a spool, unless they are few or on disk already.

    Raises:
        ModelError: they cannot be written.
    """
    values = tensor._values
    if values.nbytes <= WORTHWHILE or (isinstance(values, StoredValues) and values.is_on_disk):
        return
    data: bytes | memoryview
    if (
        isinstance(values, np.ndarray)
        and values.dtype.kind in "biufc"
        and tensor.export_dtype == values.dtype
    ):
        kept = TensorProto(data_type=element_type(values.dtype), dims=values.shape)
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data  # no copy of what may be large
    else:
        kept = tensor_proto(tensor)
        data = tensor_bytes(kept)
        kept = TensorProto(data_type=kept.data_type, dims=kept.dims)
    kept.name = tensor.name
    put_on_disk(kept, spool, spool.append(data), len(data))
    tensor.values = StoredValues(kept)


def to_graph(model: ModelProto) -> gs.Graph:
    """The model's graph; its large constants share the model's memory, or stay on disk, until their values are read.

    Inputs, outputs and tensors that are sequences, optionals, maps or sparse have no `dtype` there.

    Raises:
        ModelError: graphsurgeon cannot represent the model.
    """
    bare, weights = split(model)
    bare.ClearField("functions")
    bare = declared(bare, weights)
    raw = [_take_raw(node) for graph in all_graphs(bare.graph) for node in graph.node]
    for graph in all_graphs(bare.graph):
        for info in infos(graph):
            if info.type.WhichOneof("value") not in PLAIN:
                info.ClearField("type")
    try:
        with G_LOGGER.suppress():
            graph = gs.import_onnx(bare)
            _attach(graph, weights)
    except (OnnxGraphSurgeonException, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"graphsurgeon cannot represent the model: {one_sentence(error)}") from None
    for node, attributes in zip(gs_nodes(graph), raw, strict=True):
        node.attrs.update(attributes)
    graph.import_domains = [helper.make_opsetid(e.domain, e.version) for e in model.opset_import]
    return graph


def to_model(graph: gs.Graph, like: ModelProto) -> ModelProto:
    """The graph as a model.

    Metadata of the model comes from `like`; metadata of nodes, tensors and bodies from those of the same names there.
    Constants that `like` holds outside a body stay outside. The default operator set is the graph's `opset`; other
    domains are added at version 1.

    Raises:
        ModelError: a constant or an attribute has no form in ONNX.
    """
    model = ModelProto()
    copy_fields(like, model, skip=("graph", "opset_import"))
    model.opset_import.extend(_opsets(graph, like))
    needed = helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    model.ir_version = max(like.ir_version, needed)
    writer = GraphWriter(like, {e.domain: e.version for e in model.opset_import})
    try:
        writer.graph(model.graph, graph, like.graph, {})
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"the graph has no form in ONNX: {one_sentence(error)}") from None
    return model


def _take_raw(node: NodeProto) -> dict[str, object]:
    """Take out of a node the attributes that graphsurgeon would lose, as values that `make_attribute` takes."""
    taken: dict[str, object] = {}
    for attribute in list(node.attribute):
        if attribute.type == AttributeProto.GRAPHS:
            raise ModelError(f"graphsurgeon cannot represent node {node.name!r}, which has a list of bodies")
        if attribute.type in RAW_ATTRIBUTES or _is_binary(attribute):
            taken[attribute.name] = helper.get_attribute_value(attribute)
            node.attribute.remove(attribute)
    return taken


def _is_binary(attribute: AttributeProto) -> bool:
    try:
        for text in (attribute.s, *attribute.strings):
            text.decode()
    except UnicodeDecodeError:
        return True
    return False


def _attach(graph: gs.Graph, weights: list[TensorProto]) -> None:
    """Turn the inputs that stand for the weights into constants."""
    stored = {w.name: w for w in weights}
    for tensor in graph.inputs:
        if tensor.name in stored:
            tensor.to_constant(StoredValues(stored[tensor.name]))
    graph.inputs = [t for t in graph.inputs if t.name not in stored]


def _opsets(graph: gs.Graph, like: ModelProto) -> list[OperatorSetIdProto]:
    imports = like.opset_import if graph.import_domains is None else graph.import_domains
    versions = {entry.domain: entry.version for entry in imports}
    versions[""] = graph.opset
    for node in gs_nodes(graph):
        versions.setdefault(node.domain or "", 1)
    return [helper.make_opsetid(domain, version) for domain, version in versions.items()]
