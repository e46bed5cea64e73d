"""Reading a model file with its external data, and the digest that identifies a model."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from onnx import ModelProto, NodeProto, TensorProto

from onnxq.errors import ModelError
from onnxq.model.disk import WORTHWHILE, SourceFile, file_of, put_on_disk
from onnxq.model.skeleton import PROTOBUF_LIMIT, check, split
from onnxq.model.tensors import (
    ELEMENTS,
    all_graphs,
    all_tensors,
    infos,
    tensor_bytes,
    tensor_nbytes,
    tensor_types,
)

HELD = 2**28  # bytes of external data that are read into memory; beyond, several copies of it would be felt

EQUATION = re.compile(rb"(?:[A-Za-z ,]|\.\.\.|->)*")


def load_model(path: str | Path) -> ModelProto:
    """Read and check a model; see `read_model` for its external data.

    Raises:
        ModelError: the file, or one it refers to, is missing, unreadable or malformed, or the model is not valid.
    """
    path = Path(path)
    model = read_model(path)
    try:
        check_model(model)
    except ModelError as error:
        raise ModelError(f"cannot use {path}: {error}") from None
    return model


def read_model(path: str | Path) -> ModelProto:
    """Read a model without checking the graph.

    Data in other files, which must lie in the model's directory or below, links included, is read into the model. Where it is
    more than `HELD` bytes, large initializers of the main graph stay on disk (`onnxq.model.disk`).

    Raises:
        ModelError: a file is missing, unreadable or malformed.
    """
    path = Path(path)
    model = parse_model(path)
    external = [t for t in all_tensors(model) if t.data_location == TensorProto.EXTERNAL]
    is_large = sum(tensor_nbytes(t) for t in external) > HELD
    initializers = {id(t) for t in model.graph.initializer} if is_large else set()
    for tensor in external:
        stays = id(tensor) in initializers and tensor_nbytes(tensor) > WORTHWHILE
        _take_external(tensor, path, stays)
    return model


def check_model(model: ModelProto) -> None:
    """Check the graph, the operator sets and that every tensor's data fits its shape and type.

    Raises:
        ModelError: with the first complaint.
    """
    newest = onnx.defs.onnx_opset_version()
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and not 1 <= entry.version <= newest:
            raise ModelError(f"opset {entry.version} is not known; the known ones are 1 to {newest}")
    for graph in all_graphs(model.graph):
        for info in infos(graph):
            if any(t.elem_type not in ELEMENTS for t in tensor_types(info.type) if t.elem_type):
                raise ModelError(f"tensor {info.name!r} is declared with an unknown element type")
        for node in graph.node:
            _check_equation(node)
    for function in model.functions:
        for node in function.node:
            _check_equation(node)
    for tensor in all_tensors(model):
        if file_of(tensor) is None:  # what is on disk was checked when it was found there
            tensor_bytes(tensor)
    check(*split(model))


def model_digest(model: ModelProto) -> str:
    """SHA-256 of the graph, the local functions, the operator sets and all tensor data, in hexadecimal.

    It is the same whether data was inline or in files, raw or in typed fields, and whatever the metadata of the
    model says. One tensor at a time is held.

    Raises:
        ModelError: a tensor's data is missing or does not fit.
    """
    bare, weights = split(model, threshold=0)
    digest = hashlib.sha256()
    for tensor in (*weights, *all_tensors(bare)):
        data = tensor_bytes(tensor)
        digest.update(f"{tensor.name}|{tensor.data_type}|{list(tensor.dims)}|{len(data)}|".encode())
        digest.update(data)
    for tensor in all_tensors(bare):
        _clear_data(tensor)
    kept = ModelProto(graph=bare.graph, functions=bare.functions, opset_import=bare.opset_import)
    digest.update(kept.SerializeToString(deterministic=True))
    return digest.hexdigest()


def _check_equation(node: NodeProto) -> None:
    """Refuse an Einsum equation with other signs than an equation has: onnx's inference would never return from it."""
    for attribute in node.attribute:
        if node.op_type == "Einsum" and attribute.name == "equation" and not EQUATION.fullmatch(attribute.s):
            raise ModelError(f"Einsum node {node.name!r} has the malformed equation {attribute.s[:60]!r}")


def _clear_data(tensor: TensorProto) -> None:
    for field, _ in tensor.ListFields():
        if field.name not in ("name", "dims", "data_type"):
            tensor.ClearField(field.name)


def parse_model(path: Path) -> ModelProto:
    """Read a model file and nothing that it refers to.

    Raises:
        ModelError: it is missing, unreadable or malformed.
    """
    try:
        if path.is_dir():
            raise ModelError(f"{path} is a directory, not a model file")
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} is not a regular file")
        if path.stat().st_size > PROTOBUF_LIMIT:
            raise ModelError(
                f"{path} is larger than 2 GB, more than one ONNX file can hold without external data"
            )
        data = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"there is no model file {path}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ModelError(f"cannot read {path}: {_reason(error)}") from None
    if not data:
        raise ModelError(f"the model file {path} is empty")
    try:
        model: ModelProto = ModelProto.FromString(data)
    except DecodeError:
        raise ModelError(f"{path} is not an ONNX model, or it is truncated") from None
    if not model.ir_version and not model.opset_import and not model.graph.node:
        raise ModelError(f"{path} is not an ONNX model")
    if not _is_text(model):
        raise ModelError(f"{path} holds a name or a text that is not UTF-8")
    return model


def _is_text(message: Message) -> bool:
    """Whether every text in a message is UTF-8; protobuf hands out others as bytes."""
    if isinstance(message, TensorProto):  # without touching its data
        entries = (text for entry in message.external_data for text in (entry.key, entry.value))
        return all(isinstance(text, str) for text in (message.name, message.doc_string, *entries))
    for field, value in message.ListFields():
        values = (value,) if isinstance(value, (str, bytes, Message)) else value
        if field.message_type and not all(_is_text(part) for part in values):
            return False
        if field.type == FieldDescriptor.TYPE_STRING and not all(isinstance(text, str) for text in values):
            return False
    return True


def _take_external(tensor: TensorProto, model_path: Path, stays: bool) -> None:
    """Check where another file holds a tensor's data, and put it into the tensor unless it stays there."""
    where = f"tensor {tensor.name!r} of {model_path}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    path = _data_path(entries.get("location", ""), model_path.parent, where)
    wanted = tensor_nbytes(tensor)
    offset, length = _number(entries, "offset", 0, where), _number(entries, "length", wanted, where)
    if tensor.data_type == TensorProto.STRING or length != wanted:
        raise ModelError(
            f"{where} declares {length} bytes of external data where its shape and type need {wanted}"
        )
    try:
        if path.stat().st_size < offset + wanted:
            raise ModelError(f"the data file {path} is too short for {where}")
        if stays:
            put_on_disk(tensor, SourceFile.at(path), offset, wanted)
            return
        with path.open("rb") as file:
            file.seek(offset)
            tensor.raw_data = file.read(wanted)
    except OSError as error:
        raise ModelError(f"cannot read the data file {path}: {_reason(error)}") from None
    tensor.ClearField("data_location")
    del tensor.external_data[:]


def _data_path(location: str, directory: Path, where: str) -> Path:
    """The data file, which must be a regular file that really lies below the directory."""
    refused = ModelError(f"{where} refers to the data file {location!r} outside the model's directory")
    try:
        base = directory.resolve()
        path = (base / location).resolve()
        if Path(location).is_absolute() or not path.is_relative_to(base):
            raise refused
        if location and path.is_file():
            return path
    except (OSError, ValueError, RuntimeError):  # RuntimeError: links in a loop
        raise refused from None
    if path.exists():
        raise ModelError(f"{where} refers to {location!r}, which is not a regular file")
    raise ModelError(f"the data file {location!r} that {where} refers to is missing")


def _number(entries: dict[str, str], key: str, default: int, where: str) -> int:
    text = entries.get(key) or str(default)
    if not text.isascii() or not text.isdecimal() or len(text) > 19:
        raise ModelError(
            f"{where} has the {key} {text[:40]!r} of its external data, which is not a number of bytes"
        )
    return int(text)


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)).lower()
