"""Writing a model file: whole or not at all, the same bytes for the same model."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import EncodeError
from onnx import ModelProto, TensorProto, external_data_helper

from onnxq.errors import ModelError
from onnxq.files import flush, flush_directory, new_file, obstacle, reason, replacing
from onnxq.model.disk import PAGE, DataFile
from onnxq.model.skeleton import LARGE, PROTOBUF_LIMIT, copy_fields
from onnxq.model.tensors import all_tensors, data_files, in_memory, tensor_bytes, tensor_nbytes

INLINE_LIMIT = PROTOBUF_LIMIT - 2**24  # bytes; leaves room for the nodes

Written = Callable[[int, int], None]


def _unheard(done: int, total: int) -> None:
    pass


def write_model(
    model: ModelProto,
    path: str | Path,
    *,
    external: bool | None = None,
    spared: Iterable[DataFile] = (),
    progress: Written = _unheard,
) -> tuple[Path, ...]:
    """Write a model, replacing what is at `path` only once the new files are whole and on disk.

    Args:
        external: put the large initializers into `<name>.data` beside the model; None does so when one file cannot
            hold them, or some of them are on disk (`onnxq.model.disk`).
        spared: files that are not replaced, besides those that the model is read from.
        progress: called with the bytes of large initializers that are written and those there are.

    Returns:
        The files written, the model first.

    Raises:
        ModelError: the files cannot be written; what was there before is untouched.
    """
    given = Path(path)
    try:
        target = given.resolve()  # a link stays a link
        files = data_files(model)
        spared = {*spared, *files}
        _refuse(target, spared)
        stored = sum(tensor_nbytes(t) for t in all_tensors(model))
        if external or (external is None and (files or stored > INLINE_LIMIT)):
            return _write_pair(model, target, spared, progress)
        return _write_one(_internalized(model) if files else model, target)
    except ModelError as error:
        raise ModelError(f"cannot write {given}: {error}") from None
    except (OSError, RuntimeError, ValueError) as error:  # links in a loop, a null byte in the name
        raise ModelError(f"cannot write {given}: {reason(error)}") from None


def _refuse(target: Path, spared: Iterable[DataFile]) -> None:
    problem = obstacle(target)
    if problem is None and any(file.is_at(target) for file in spared):
        problem = f"{target} holds weights of the model that is compiled"
    if problem is not None:
        raise ModelError(problem)


def _write_one(model: ModelProto, target: Path) -> tuple[Path, ...]:
    with replacing(target) as file:
        file.write(_serialized(model))
    return (target,)


def _write_pair(
    model: ModelProto, target: Path, spared: Iterable[DataFile], progress: Written
) -> tuple[Path, ...]:
    data_path = target.with_name(target.name + ".data")
    _refuse(data_path, spared)
    with new_file(data_path) as (data, new_data), new_file(target) as (file, new_model):
        file.write(_serialized(_externalized(model, data, data_path.name, progress)))
        flush(data)
        flush(file)
        with _restored_unless_gone(data_path, new_model):
            os.replace(new_data, data_path)
            os.replace(new_model, target)
    flush_directory(target.parent)
    return target, data_path


def _serialized(model: ModelProto) -> bytes:
    try:
        data: bytes = model.SerializeToString(deterministic=True)
    except (EncodeError, ValueError, MemoryError):
        raise ModelError(
            "it does not fit one file; only initializers of the main graph can be external"
        ) from None
    return data


def _internalized(model: ModelProto) -> ModelProto:
    """A copy that holds what is on disk."""
    whole = ModelProto()
    copy_fields(model, whole, skip=("graph",))
    copy_fields(model.graph, whole.graph, skip=("initializer",))
    whole.graph.initializer.extend(in_memory(tensor) for tensor in model.graph.initializer)
    return whole


def _externalized(model: ModelProto, data: BinaryIO, location: str, progress: Written) -> ModelProto:
    """A copy whose large top-level initializers refer to the data file, which is written on the way."""
    bare = ModelProto()
    copy_fields(model, bare, skip=("graph",))
    copy_fields(model.graph, bare.graph, skip=("initializer",))
    sizes = {t.name: tensor_nbytes(t) for t in model.graph.initializer if _is_apart(t)}
    done, total = 0, sum(sizes.values())
    for tensor in model.graph.initializer:
        if tensor.name not in sizes:
            bare.graph.initializer.append(tensor)
            continue
        size = sizes[tensor.name]
        data.write(bytes(-data.tell() % PAGE))
        entry = bare.graph.initializer.add(
            name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=b""
        )
        external_data_helper.set_external_data(entry, location, data.tell(), size)
        entry.ClearField("raw_data")
        data.write(tensor_bytes(tensor))
        done += size
        progress(done, total)
    return bare


def _is_apart(tensor: TensorProto) -> bool:
    return tensor_nbytes(tensor) > LARGE and tensor.data_type != TensorProto.STRING


@contextmanager
def _restored_unless_gone(data_path: Path, new_model: Path) -> Iterator[None]:
    """Put the old data file back when the block fails before the new model has moved to its place."""
    backup = data_path.with_name(f".onnxq-{secrets.token_hex(6)}.tmp")
    existed = data_path.exists()
    if existed:
        os.link(data_path, backup)
    try:
        yield
    except BaseException:
        if new_model.exists() and existed:
            os.replace(backup, data_path)
        elif new_model.exists():
            data_path.unlink(missing_ok=True)
        raise
    finally:
        backup.unlink(missing_ok=True)
