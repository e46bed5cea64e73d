"""Data of tensors that stays in files until it is asked for.

A tensor on disk has `data_location` EXTERNAL, as in a model file, but its `location` is a key that this process made for a file
that it has checked. Nobody else can know a key, so a model from elsewhere cannot make us read a file. No key is ever written.

Data is mapped rather than read: pages come when they are touched and go with the array, and there is no copy of them.
"""

from __future__ import annotations

import mmap
import os
import secrets
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from weakref import WeakValueDictionary, finalize

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from onnxq.errors import ModelError
from onnxq.files import reason

WORTHWHILE = 2**16  # bytes; a smaller tensor is kept in memory
PAGE = 4096  # bytes; where data starts in files that are written, so that it can be mapped and is aligned for any type
ELEMENT = "element"  # type of the elements in the file where they become another one when they are read

Bytes = NDArray[np.uint8]


class DataFile(ABC):
    """A file that tensors on disk refer to by its key, as long as somebody keeps this object."""

    def __init__(self) -> None:
        self.key = f"onnxq-{secrets.token_hex(16)}"
        _FILES[self.key] = self

    @abstractmethod
    def _descriptor(self) -> int:
        """A new descriptor of the file, open for reading."""

    def map(self, offset: int = 0, length: int | None = None) -> Bytes:
        """Bytes of the file up to its end or as many as given, read when they are touched.

        Raises:
            ModelError: the file is not there any more, or was changed.
        """
        descriptor = self._descriptor()
        try:
            count = os.fstat(descriptor).st_size - offset if length is None else length
            start = offset - offset % mmap.ALLOCATIONGRANULARITY
            pages = mmap.mmap(descriptor, offset - start + count, access=mmap.ACCESS_READ, offset=start)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot map a data file into memory: {reason(error)}") from None
        finally:
            os.close(descriptor)
        return np.frombuffer(pages, np.uint8, count, offset - start)


_FILES: WeakValueDictionary[str, DataFile] = WeakValueDictionary()
_SOURCES: dict[tuple[Path, tuple[int, ...]], SourceFile] = {}


class SourceFile(DataFile):
    """A data file of a model, opened anew for each tensor; a file that has changed since is refused."""

    def __init__(self, path: Path, identity: tuple[int, ...]) -> None:
        super().__init__()
        self.path, self._identity = path, identity

    @classmethod
    def at(cls, path: Path) -> SourceFile:
        """The file at a path, kept until the end of the process: models do not tell when they are done with it.

        Raises:
            OSError: the file cannot be looked at.
        """
        key = path, _identity(path.stat())
        if key not in _SOURCES:
            _SOURCES[key] = cls(*key)
        return _SOURCES[key]

    def is_at(self, path: Path) -> bool:
        """Whether a path leads to this file."""
        try:
            return path.samefile(self.path)
        except OSError:
            return False

    def _descriptor(self) -> int:
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise ModelError(f"cannot read the data file {self.path}: {reason(error)}") from None
        if _identity(os.fstat(descriptor)) == self._identity:
            return descriptor
        os.close(descriptor)
        raise ModelError(f"the data file {self.path} was changed while its model was used")


class Spool(DataFile):
    """A temporary file that takes tensors as they are made. It has no name: nothing stays behind, whatever ends the process."""

    def __init__(self, directory: str | Path | None = None) -> None:
        super().__init__()
        try:
            self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed with this object
        except OSError as error:
            raise ModelError(f"cannot make a temporary file in {directory}: {reason(error)}") from None
        finalize(self, self._file.close)

    def append(self, data: bytes | memoryview) -> int:
        """Take bytes in; where they start.

        Raises:
            ModelError: they cannot be written.
        """
        try:
            self._file.seek(0, os.SEEK_END)
            offset = self._file.tell() + -self._file.tell() % PAGE
            self._file.seek(offset)
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise ModelError(f"cannot write to a temporary file: {reason(error)}") from None
        return offset

    def _descriptor(self) -> int:
        return os.dup(self._file.fileno())


def put_on_disk(tensor: TensorProto, file: DataFile, offset: int, length: int) -> None:
    """Let the data of a tensor be what a file holds there, in place."""
    for field in ("raw_data", "external_data"):
        tensor.ClearField(field)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", file.key), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def file_of(tensor: TensorProto) -> DataFile | None:
    """The file that holds the data of a tensor, None when it is in memory or in a file that was never opened."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    return next((_FILES.get(e.value) for e in tensor.external_data if e.key == "location"), None)


def retype(tensor: TensorProto, element: int) -> None:
    """Turn the elements of a tensor on disk into another type when they are read, in place."""
    if all(entry.key != ELEMENT for entry in tensor.external_data):
        tensor.external_data.add(key=ELEMENT, value=str(tensor.data_type))
    tensor.data_type = element


def disk_bytes(tensor: TensorProto, mapped: dict[str, Bytes] | None = None) -> Bytes:
    """The elements of a tensor on disk, read when they are touched.

    Args:
        mapped: whole files by key, filled on the way, for who reads many tensors at once: a mapping keeps a file open. Then pages
            stay as long as any array of the file does.

    Raises:
        ModelError: the file was never opened by this process, or is not there any more.
    """
    file = file_of(tensor)
    if file is None:
        raise ModelError(f"the data of tensor {tensor.name!r} is in a file that was not loaded")
    entries = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = int(entries["offset"]), int(entries["length"])
    if mapped is None:
        data = file.map(offset, length)
    else:
        if file.key not in mapped:
            mapped[file.key] = file.map()
        data = mapped[file.key][offset : offset + length]
    if ELEMENT not in entries:
        return data
    given, wanted = (helper.tensor_dtype_to_np_dtype(n) for n in (int(entries[ELEMENT]), tensor.data_type))
    return np.frombuffer(data, given).astype(wanted).view(np.uint8)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
