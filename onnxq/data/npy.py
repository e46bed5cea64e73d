"""Reads `.npy` files and members of `.npz` archives forward, a few rows at a time.

The memory does not depend on their length (`numpy.load` holds a whole member). Rows that are not asked for are not read, unless
the archive is compressed. Format: NumPy enhancement proposal 1.
"""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from onnxq.data.inputs import shape_text
from onnxq.errors import DataError

CHUNK = 1 << 18  # bytes read at once, or one row when that is more

NAME_SIZES = 26  # bytes in front of them in a member's header, which ends behind the names

UNREADABLE = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,  # an encrypted member, or (NotImplementedError) an unknown compression
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    tokenize.TokenError,  # numpy's header parser
)


@dataclass(frozen=True)
class ArrayFile:
    """An array in a file: rows along its leading axis.

    Attributes:
        where: the array, for the start of a sentence.
        path, member: the file, and the entry inside when it is an archive.
        dtype: native byte order; `stored` is the file's.
        shape: (rows, ...).
        offset: bytes before the first value.
    """

    where: str
    path: Path
    member: str | None
    dtype: np.dtype[Any]
    stored: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @contextmanager
    def open(self) -> Iterator[RowReader]:
        """A reader at the first row."""
        with ExitStack() as stack:
            try:
                stream = _open(stack, self.path, self.member)
                stream.read(self.offset)
            except UNREADABLE as error:
                raise unreadable(self.where, error) from error
            yield RowReader(self, stream)


class Stream(Protocol):
    """What is read forward."""

    def read(self, size: int, /) -> bytes:
        """The next bytes."""

    def seek(self, size: int, whence: int, /) -> Any:
        """Pass over bytes."""


class _Stored:
    """An uncompressed member of an archive, read from the file itself; its checksum counts when no byte was passed over."""

    def __init__(self, archive: IO[bytes], info: zipfile.ZipInfo) -> None:
        archive.seek(info.header_offset + NAME_SIZES)
        archive.seek(sum(struct.unpack("<2H", archive.read(4))), 1)
        self._archive, self._info = archive, info
        self._left, self._crc = info.file_size, 0
        self._whole = True

    def read(self, size: int) -> bytes:
        data = self._archive.read(min(size, self._left))
        self._left -= len(data)
        if not self._whole:
            return data
        self._crc = zlib.crc32(data, self._crc)
        if not self._left and self._crc != self._info.CRC:
            raise zipfile.BadZipFile(f"Bad CRC-32 for file {self._info.filename!r}")
        return data

    def seek(self, size: int, _: int) -> None:
        self._whole = self._whole and not size
        self._left -= size
        self._archive.seek(size, 1)


class RowReader:
    """Hands out rows of an array file in ascending order."""

    def __init__(self, file: ArrayFile, stream: Stream) -> None:
        self._file = file
        self._stream = stream
        self._row = 0  # the next one in the stream
        self._bytes = file.stored.itemsize * prod(file.shape[1:])  # of a row

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """The rows with the given ascending numbers (n,), none before the ones already taken: (n, ...)."""
        out = np.empty((len(rows), *self._file.shape[1:]), self._file.dtype)
        block_rows = max(1, CHUNK // max(1, self._bytes))
        done = 0
        while done < len(rows):
            start = int(rows[done])
            stop = int(np.searchsorted(rows, start + block_rows))
            self._skip(start - self._row)
            block = self._read(int(rows[stop - 1]) + 1 - start)
            out[done:stop] = block[rows[done:stop] - start]
            done = stop
        return out

    def _skip(self, rows: int) -> None:
        self._row += rows
        left = rows * self._bytes
        try:
            if not isinstance(self._stream, zipfile.ZipExtFile):
                self._stream.seek(left, 1)
                return
            while left:  # its own seek would read 16 MiB at once
                left -= len(self._get(min(left, CHUNK)))
        except UNREADABLE as error:
            raise unreadable(self._file.where, error) from error

    def _read(self, rows: int) -> NDArray[Any]:
        self._row += rows
        try:
            data = self._get(rows * self._bytes)
        except UNREADABLE as error:
            raise unreadable(self._file.where, error) from error
        return np.frombuffer(data, self._file.stored).reshape(rows, *self._file.shape[1:])

    def _get(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) < size:
            raise EOFError("the file ends early")
        return data


def open_npy(path: Path) -> ArrayFile:
    """Read the header of a `.npy` file.

    Raises:
        DataError: unreadable, truncated, in Fortran order, of objects or records, or without a leading axis.
    """
    where = f"'{path}'"
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            return _array_file(where, path, None, stream, size)
    except UNREADABLE as error:
        raise unreadable(where, error) from error


def open_npz(path: Path) -> dict[str, ArrayFile]:
    """Read the headers of all arrays of a `.npz` file: name -> array.

    Raises:
        DataError: as `open_npy`.
    """
    where = f"'{path}'"
    files = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename.endswith(".npy"):
                    name = info.filename.removesuffix(".npy")
                    where = f"'{path}': array {name!r}"
                    with archive.open(info) as stream:
                        files[name] = _array_file(where, path, info.filename, stream, info.file_size)
    except UNREADABLE as error:
        raise unreadable(where, error) from error
    return files


def unreadable(where: str, error: Exception) -> DataError:
    """The error for bytes that cannot be read."""
    reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    return DataError(f"{where} cannot be read: {reason}")


def _open(stack: ExitStack, path: Path, member: str | None) -> Stream:
    if member is None:
        return stack.enter_context(path.open("rb"))
    archive = stack.enter_context(zipfile.ZipFile(path))
    stream, info = stack.enter_context(archive.open(member)), archive.getinfo(member)
    if info.compress_type != zipfile.ZIP_STORED:
        return stream
    return _Stored(stack.enter_context(path.open("rb")), info)


def _array_file(where: str, path: Path, member: str | None, stream: IO[bytes], size: int) -> ArrayFile:
    """Parse the header at the start of a stream of `size` bytes."""
    version = npy_format.read_magic(stream)
    read = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}.get(version)
    if read is None:  # 3.0 is for records with names beyond Latin-1
        raise DataError(f"{where} is of npy version {version[0]}.{version[1]}; 1.0 and 2.0 can be read")
    shape, fortran, stored = read(stream)
    if stored.hasobject or stored.names is not None:
        raise DataError(f"{where} holds Python objects or records; save a plain array of numbers")
    if not shape:
        raise DataError(f"{where} is a single number; its leading axis must be the samples")
    if min(shape) < 0:
        raise ValueError("its shape has a negative size")
    if fortran:
        raise DataError(
            f"{where} is in Fortran order, which cannot be streamed; save numpy.ascontiguousarray(array)"
        )
    offset = stream.tell()
    if offset + stored.itemsize * prod(shape) > size:
        raise DataError(
            f"{where} ends early: its shape {shape_text(shape)} needs more bytes than the file has"
        )
    return ArrayFile(where, path, member, stored.newbyteorder("="), stored, shape, offset)
