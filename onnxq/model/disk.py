"""Data of tensors that stays in files until it is asked for.

A tensor on disk has `data_location` EXTERNAL, as in a model file, but its `location` is a key that this process made for a file
that it has checked. Nobody else can know a key, so a model from elsewhere cannot make us read a file. No key is ever written.

Data is mapped rather than read: pages come when they are touched and go with the array, and there is no copy of them.
"""

from __future__ import annotations

import mmap
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO
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


class DataFile:
    """A file that tensors on disk refer to by its key, as long as somebody keeps this object."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.key = f"onnxq-{secrets.token_hex(16)}"
        _FILES[self.key] = self

    def check(self) -> None:
        """Nothing here.

        Raises:
            ModelError: the file is not there any more, or was changed.
        """

    def is_at(self, path: Path) -> bool:
        """Whether a path leads to this file."""
        try:
            return path.samefile(self.path)
        except OSError:
            return False

    def map(self, offset: int, length: int) -> Bytes:
        """Bytes of the file, read when they are touched.

        Raises:
            ModelError: the file is not there any more, or was changed.
        """
        self.check()
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        try:
            with self.path.open("rb") as file:
                pages = mmap.mmap(
                    file.fileno(), offset - start + length, access=mmap.ACCESS_READ, offset=start
                )
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read the data file {self.path}: {reason(error)}") from None
        return np.frombuffer(pages, np.uint8, length, offset - start)


_FILES: WeakValueDictionary[str, DataFile] = WeakValueDictionary()
_SOURCES: dict[tuple[Path, tuple[int, ...]], SourceFile] = {}


class SourceFile(DataFile):
    """A data file of a model, refused once it has changed."""

    def __init__(self, path: Path, identity: tuple[int, ...]) -> None:
        super().__init__(path)
        self._identity = identity

    @classmethod
    def at(cls, path: Path) -> SourceFile:
        """The file at a path, known until the end of the process: models do not tell when they are done with it.

        Raises:
            OSError: the file cannot be looked at.
        """
        key = path, _identity(path)
        if key not in _SOURCES:
            _SOURCES[key] = cls(*key)
        return _SOURCES[key]

    def check(self) -> None:
        """See `DataFile.check`."""
        try:
            now = _identity(self.path)
        except OSError as error:
            raise ModelError(f"cannot read the data file {self.path}: {reason(error)}") from None
        if now != self._identity:
            raise ModelError(f"the data file {self.path} was changed while its model was used")


class Spool(DataFile):
    """A temporary file that takes tensors as they are made. It goes with this object, at the latest with the process."""

    def __init__(self, directory: str | Path | None = None) -> None:
        try:
            descriptor, name = tempfile.mkstemp(".tmp", ".onnxq-", directory)
        except OSError as error:
            raise ModelError(f"cannot make a temporary file in {directory}: {reason(error)}") from None
        super().__init__(Path(name).resolve())
        self._file = open(descriptor, "wb")  # noqa: SIM115 - closed with this object
        finalize(self, _discard, self._file, self.path)

    def append(self, data: bytes | memoryview) -> int:
        """Take bytes in; where they start.

        Raises:
            ModelError: they cannot be written.
        """
        try:
            self._file.write(bytes(-self._file.tell() % PAGE))
            offset = self._file.tell()
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise ModelError(
                f"cannot write to a temporary file in {self.path.parent}: {reason(error)}"
            ) from None
        return offset


def _discard(file: BinaryIO, path: Path) -> None:
    with suppress(OSError):  # what could not be flushed is not needed
        file.close()
    path.unlink(missing_ok=True)


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
    if not is_converted(tensor):
        tensor.external_data.add(key=ELEMENT, value=str(tensor.data_type))
    tensor.data_type = element


def is_converted(tensor: TensorProto) -> bool:
    """Whether the elements of a tensor on disk have another type in the file."""
    return any(entry.key == ELEMENT for entry in tensor.external_data)


def disk_bytes(tensor: TensorProto) -> Bytes:
    """The elements of a tensor on disk, read when they are touched.

    Raises:
        ModelError: the file was never opened by this process, or is not there any more.
    """
    file = file_of(tensor)
    if file is None:
        raise ModelError(f"the data of tensor {tensor.name!r} is in a file that was not loaded")
    entries = {entry.key: entry.value for entry in tensor.external_data}
    data = file.map(int(entries["offset"]), int(entries["length"]))
    if ELEMENT not in entries:
        return data
    given, wanted = (helper.tensor_dtype_to_np_dtype(n) for n in (int(entries[ELEMENT]), tensor.data_type))
    return np.frombuffer(data, given).astype(wanted).view(np.uint8)


def as_written(tensor: TensorProto, folder: Path) -> TensorProto:
    """A tensor on disk as a model file in a folder refers to it.

    Raises:
        ModelError: the file is not there any more, or was changed.
    """
    file = file_of(tensor)
    assert file is not None
    file.check()
    written = TensorProto()
    written.CopyFrom(tensor)
    written.external_data[0].value = file.path.relative_to(folder).as_posix()
    return written


def _identity(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
