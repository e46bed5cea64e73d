"""A model without its large initializers, which are set aside without a copy.

The C++ parts of onnx take serialized models of at most 2 GB. They see the skeleton with the large initializers declared
as graph inputs: name, type and shape are there, the numbers are not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from google.protobuf.message import Message
from onnx import ModelProto, TensorProto, checker, helper

from onnxq.errors import ModelError
from onnxq.model.disk import file_of
from onnxq.model.messages import one_sentence
from onnxq.model.tensors import ELEMENTS, tensor_nbytes

LARGEST_MESSAGE = 2**30  # bytes of weights that surely fit into one protobuf message, which ends at 2 GB
LARGE = 4096  # bytes; axes, shapes, pads and scalars, whose values type inference reads, are far smaller
PROTOBUF_LIMIT = 2**31 - 1

M = TypeVar("M", bound=Message)


def copy_fields(source: M, target: M, *, skip: Sequence[str] = ()) -> None:
    """Copy every set field of a message into another of its type, except those to skip."""
    for field, value in source.ListFields():
        if field.name in skip:
            continue
        kept = getattr(target, field.name)
        if hasattr(kept, "MergeFrom"):
            kept.MergeFrom(value)
        else:
            setattr(target, field.name, value)


def split(model: ModelProto, threshold: int = LARGE) -> tuple[ModelProto, list[TensorProto]]:
    """A copy without the top-level initializers of more than `threshold` bytes, and those, which are not copied."""
    bare = ModelProto()
    copy_fields(model, bare, skip=("graph",))
    bare.graph.SetInParent()
    copy_fields(model.graph, bare.graph, skip=("initializer",))
    weights = []
    for tensor in model.graph.initializer:
        if tensor.data_type in ELEMENTS and tensor_nbytes(tensor) > threshold:
            weights.append(tensor)
        else:
            bare.graph.initializer.append(tensor)
    return bare, weights


def set_aside(model: ModelProto, threshold: int = LARGE) -> list[TensorProto]:
    """Take the top-level initializers of more than `threshold` bytes out of a model, in place."""
    every = list(model.graph.initializer)
    weights = [t for t in every if t.data_type in ELEMENTS and tensor_nbytes(t) > threshold]
    if weights:
        large = {id(t) for t in weights}
        small = [t for t in every if id(t) not in large]
        del model.graph.initializer[:]
        model.graph.initializer.extend(small)
    return weights


def declared(bare: ModelProto, weights: Sequence[TensorProto]) -> ModelProto:
    """A copy of the skeleton with the weights declared as graph inputs, unless they are inputs already."""
    model = ModelProto()
    model.CopyFrom(bare)
    inputs = {i.name for i in bare.graph.input}
    model.graph.input.extend(
        helper.make_tensor_value_info(w.name, w.data_type, list(w.dims))
        for w in weights
        if w.name not in inputs
    )
    return model


def undeclare(model: ModelProto, weights: Sequence[TensorProto]) -> None:
    """Take the declarations of the weights out of the graph inputs again, in place."""
    names = {w.name for w in weights}
    kept = [i for i in model.graph.input if i.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(kept)


def check(bare: ModelProto, weights: Sequence[TensorProto]) -> None:
    """Run the onnx checker over a skeleton.

    Raises:
        ModelError: the checker's first complaint.
    """
    model = declared(bare, weights)
    if not model.graph.name:
        model.graph.name = "graph"  # the checker asks for a name, runtimes do not
    for info in (*model.graph.input, *model.graph.output):
        if info.type.HasField("tensor_type") and not info.type.tensor_type.HasField("shape"):
            info.type.tensor_type.shape.SetInParent()  # and for a rank
    try:
        checker.check_model(model)
    except (checker.ValidationError, ValueError, RuntimeError, MemoryError) as error:
        raise ModelError(f"the model is not valid ONNX: {one_sentence(error)}") from None


def model_bytes(model: ModelProto) -> int:
    """Bytes of the serialized model; to within a few for each large tensor when it is too large to be one message."""
    weights = sum(tensor_nbytes(tensor) for tensor in model.graph.initializer if tensor.data_type in ELEMENTS)
    if weights < LARGEST_MESSAGE and all(file_of(tensor) is None for tensor in model.graph.initializer):
        return int(model.ByteSize())
    bare, large = split(model)
    return int(bare.ByteSize()) + sum(tensor_nbytes(tensor) for tensor in large)
