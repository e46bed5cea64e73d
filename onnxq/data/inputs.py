"""What a model's inputs take: names, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnxq.errors import DataError, ModelError


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: the graph input.
        dtype: element type.
        shape: sizes; a str or None is a dynamic dimension. None when the rank is unknown.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.dtype} of any rank"
        return f"{self.dtype} {shape_text(self.shape)}"


def shape_text(shape: Sequence[int | str | None]) -> str:
    """A shape for a sentence.

    >>> shape_text(["N", 3, None])
    '(N, 3, ?)'
    """
    return f"({', '.join('?' if size is None else str(size) for size in shape)})"


def input_specs(model: onnx.ModelProto) -> tuple[InputSpec, ...]:
    """The graph inputs that are no initializers, in graph order.

    Raises:
        ModelError: an input is no tensor, or has no element type.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    constants |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    return tuple(_spec(value) for value in model.graph.input if value.name not in constants)


def _spec(value: onnx.ValueInfoProto) -> InputSpec:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        found = "untyped" if kind is None else f"a {kind.removesuffix('_type')}"
        raise ModelError(f"input {value.name!r} of the model is {found}; only tensors can be fed")
    tensor = value.type.tensor_type
    if tensor.elem_type == onnx.TensorProto.UNDEFINED:
        raise ModelError(f"input {value.name!r} of the model has no element type")
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    shape = tuple(_size(dim) for dim in tensor.shape.dim) if tensor.HasField("shape") else None
    return InputSpec(value.name, dtype, shape)


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value) if dim.dim_value > 0 else None  # exporters write 0 or -1 for "any"
    return dim.dim_param or None


def fixed_batch(inputs: Sequence[InputSpec]) -> int | None:
    """The leading dimension that the model fixes, None when it is dynamic.

    Raises:
        DataError: inputs fix different leading dimensions, so that rows of arrays cannot feed them.
    """
    sizes = {spec.shape[0]: spec.name for spec in inputs if spec.shape and isinstance(spec.shape[0], int)}
    if len(sizes) > 1:
        listed = ", ".join(f"{name!r} {size}" for size, name in sizes.items())
        raise DataError(
            f"the model's inputs fix different leading dimensions ({listed}), so samples cannot be batched; "
            "give every array one more leading axis: each entry is then a whole feed"
        )
    return next(iter(sizes), None)
