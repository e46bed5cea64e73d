"""A hash of samples: which they are, however they were stored or put together in batches."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


class SampleHash:
    """SHA-256 of names, dtypes, shapes and bytes of arrays that arrive in pieces.

    Args:
        whole: whether the pieces are feeds as the source holds them, whose leading axis counts too.
    """

    def __init__(self, whole: bool) -> None:
        self._whole = whole
        self._arrays: dict[str, _ArrayHash] = {}

    def see(self, name: str, array: NDArray[Any]) -> None:
        """Take in the next piece of an array."""
        self._arrays.setdefault(name, _ArrayHash()).see(
            array, array.shape if self._whole else array.shape[1:]
        )

    def hexdigest(self) -> str:
        """The hash of all arrays so far, hexadecimal."""
        total = hashlib.sha256()
        for name in sorted(self._arrays):
            total.update(f"{name!r} {self._arrays[name].sha.hexdigest()}\n".encode())
        return total.hexdigest()


@dataclass
class _ArrayHash:
    """Hash of one array over all pieces: a header when the shape of a sample changes, and the bytes."""

    sha: hashlib._Hash = field(default_factory=hashlib.sha256)
    header: str = ""

    def see(self, array: NDArray[Any], shape: tuple[int, ...]) -> None:
        header = f"{array.dtype} {shape}"
        if header != self.header:
            self.sha.update(f"[{header}]".encode())
        self.header = header
        self.sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
