"""The tensors stored in a model: walking over them, their bytes and sizes, and a digest of all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TypeProto,
    ValueInfoProto,
    numpy_helper,
)

from onnxq.errors import ModelError
from onnxq.model.disk import DataFile, disk_bytes, file_of

# Name and bits of one element; strings have no fixed size.
ELEMENTS: dict[int, tuple[str, int]] = {
    TensorProto.FLOAT: ("float32", 32),
    TensorProto.UINT8: ("uint8", 8),
    TensorProto.INT8: ("int8", 8),
    TensorProto.UINT16: ("uint16", 16),
    TensorProto.INT16: ("int16", 16),
    TensorProto.INT32: ("int32", 32),
    TensorProto.INT64: ("int64", 64),
    TensorProto.STRING: ("string", 0),
    TensorProto.BOOL: ("bool", 8),
    TensorProto.FLOAT16: ("float16", 16),
    TensorProto.DOUBLE: ("float64", 64),
    TensorProto.UINT32: ("uint32", 32),
    TensorProto.UINT64: ("uint64", 64),
    TensorProto.COMPLEX64: ("complex64", 64),
    TensorProto.COMPLEX128: ("complex128", 128),
    TensorProto.BFLOAT16: ("bfloat16", 16),
    TensorProto.FLOAT8E4M3FN: ("float8e4m3fn", 8),
    TensorProto.FLOAT8E4M3FNUZ: ("float8e4m3fnuz", 8),
    TensorProto.FLOAT8E5M2: ("float8e5m2", 8),
    TensorProto.FLOAT8E5M2FNUZ: ("float8e5m2fnuz", 8),
    TensorProto.UINT4: ("uint4", 4),
    TensorProto.INT4: ("int4", 4),
    TensorProto.FLOAT4E2M1: ("float4e2m1", 4),
    TensorProto.FLOAT8E8M0: ("float8e8m0", 8),
    TensorProto.UINT2: ("uint2", 2),
    TensorProto.INT2: ("int2", 2),
    TensorProto.FLOAT6E2M3: ("float6e2m3", 6),
    TensorProto.FLOAT6E3M2: ("float6e3m2", 6),
}


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """Bodies of a control-flow node."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and every body inside it, outer graphs first."""
    yield graph
    for node in graph.node:
        for body in subgraphs(node):
            yield from all_graphs(body)


def infos(graph: GraphProto) -> tuple[ValueInfoProto, ...]:
    """Declarations of tensors in one graph: inputs, outputs and inner ones."""
    return *graph.input, *graph.output, *graph.value_info


def tensor_types(value: TypeProto) -> Iterator[TypeProto.Tensor | TypeProto.SparseTensor]:
    """The tensor types that a type is made of, at any depth."""
    kind = value.WhichOneof("value")
    if kind in ("tensor_type", "sparse_tensor_type"):
        yield getattr(value, kind)
    elif kind in ("sequence_type", "optional_type"):
        yield from tensor_types(getattr(value, kind).elem_type)
    elif kind == "map_type":
        yield from tensor_types(value.map_type.value_type)


def attribute_tensors(node: NodeProto) -> Iterator[TensorProto]:
    """Tensors in the attributes of one node; a sparse tensor gives its values and its indices."""
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
        for part in (*sparse, *attribute.sparse_tensors):
            yield part.values
            yield part.indices


def all_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every stored tensor: initializers and attributes, those in bodies and in local functions too."""
    for graph in all_graphs(model.graph):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield sparse.values
            yield sparse.indices
        for node in graph.node:
            yield from attribute_tensors(node)
    for function in model.functions:
        for node in function.node:
            yield from attribute_tensors(node)
            for body in subgraphs(node):
                for graph in all_graphs(body):
                    yield from graph.initializer
                    for inner in graph.node:
                        yield from attribute_tensors(inner)


def data_files(model: ModelProto) -> frozenset[DataFile]:
    """The files that hold data of the model's tensors.

    Raises:
        ModelError: the data of a tensor is in a file that was not loaded.
    """
    external = [t for t in all_tensors(model) if t.data_location == TensorProto.EXTERNAL]
    files = {tensor.name: file_of(tensor) for tensor in external}
    for name, file in files.items():
        if file is None:
            raise ModelError(f"the data of tensor {name!r} is in a file that was not loaded")
    return frozenset(file for file in files.values() if file is not None)


def tensor_nbytes(tensor: TensorProto) -> int:
    """Bytes of the elements as the shape and the type say, packed types counted packed.

    Raises:
        ModelError: the element type is unknown or a dimension is negative.
    """
    if tensor.data_type not in ELEMENTS:
        raise ModelError(f"tensor {tensor.name!r} has the unknown element type {tensor.data_type}")
    if any(dim < 0 for dim in tensor.dims):
        raise ModelError(f"tensor {tensor.name!r} has a negative dimension: {list(tensor.dims)}")
    if tensor.data_type == TensorProto.STRING:
        return sum(len(text) for text in tensor.string_data)
    return -(-int(math.prod(tensor.dims)) * ELEMENTS[tensor.data_type][1] // 8)


def tensor_bytes(tensor: TensorProto) -> bytes | memoryview:
    """The elements as little-endian bytes, whatever field or file holds them; strings one by one after their lengths.

    Those of a tensor on disk are read when they are touched.

    Raises:
        ModelError: the data is in a file that was not loaded, or does not fit the shape and the type.
    """
    data: bytes | memoryview
    if tensor.data_location == TensorProto.EXTERNAL:
        data = disk_bytes(tensor).data
    elif tensor.data_type == TensorProto.STRING:
        return b"".join(len(text).to_bytes(8, "little") + text for text in tensor.string_data)
    elif tensor.HasField("raw_data"):
        data = tensor.raw_data
    else:
        data = _typed_bytes(tensor)
    wanted = tensor_nbytes(tensor)
    if len(data) != wanted:
        raise ModelError(
            f"tensor {tensor.name!r} holds {len(data)} bytes where its shape and type need {wanted}"
        )
    return data


def tensor_array(tensor: TensorProto) -> NDArray[Any]:
    """The elements as an array, which may be read-only; see `tensor_bytes`.

    Raises:
        ModelError: as `tensor_bytes`.
    """
    if tensor.data_type not in ELEMENTS or ELEMENTS[tensor.data_type][1] < 8:  # strings, packed types
        array: NDArray[Any] = numpy_helper.to_array(in_memory(tensor))
        return array
    values = np.frombuffer(tensor_bytes(tensor), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return np.require(values, requirements="A").reshape(tensor.dims)


def in_memory(tensor: TensorProto) -> TensorProto:
    """The tensor itself, or a copy that holds its data when that is on disk.

    Raises:
        ModelError: as `tensor_bytes`.
    """
    if file_of(tensor) is None:
        return tensor
    held = TensorProto()
    held.CopyFrom(tensor)
    for field in ("data_location", "external_data"):
        held.ClearField(field)
    held.raw_data = bytes(tensor_bytes(tensor))
    return held


def _typed_bytes(tensor: TensorProto) -> bytes:
    try:
        return bytes(numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data)
    except (ValueError, TypeError, KeyError, OverflowError, MemoryError):
        raise ModelError(f"the data of tensor {tensor.name!r} does not fit its shape and type") from None


def storage_bytes(model: ModelProto) -> dict[str, int]:
    """Bytes of the stored tensors by element type (`float32`, `int4`, …), largest first; packed types packed."""
    sizes: dict[str, int] = {}
    for tensor in all_tensors(model):
        name = ELEMENTS[tensor.data_type][0] if tensor.data_type in ELEMENTS else f"type {tensor.data_type}"
        sizes[name] = sizes.get(name, 0) + (tensor_nbytes(tensor) if tensor.data_type in ELEMENTS else 0)
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))


def weight_bytes(model: ModelProto) -> int:
    """Bytes of all stored tensors, in memory or on disk."""
    return sum(storage_bytes(model).values())


def element_type(dtype: Any) -> int:
    """The ONNX element type of a numpy dtype or scalar type, or the number itself when it is one already."""
    if isinstance(dtype, int):
        return dtype
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
