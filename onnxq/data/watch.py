"""Finds inputs that never change while batches go by: a sign of a wrong file or a broken loader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.data.inputs import InputSpec


@dataclass
class _Seen:
    """The first sample of an input, and what all samples so far have in common with it."""

    first: NDArray[Any] | None = None
    same: bool = True  # every sample equals the first
    constant: bool = True  # every value equals the first value

    def see(self, rows: NDArray[Any]) -> None:
        """Compare samples (n, ...) with the first; a property once lost is not looked at again."""
        if not rows.size or not (self.same or self.constant):
            return
        if self.first is None:
            self.first = np.array(rows[0])  # a copy; also where rows[0] is a bare string
        self.same = self.same and rows.shape[1:] == self.first.shape and bool((rows == self.first).all())
        self.constant = self.constant and bool((rows == self.first.flat[0]).all())


class ConstantWatch:
    """Looks at every batch once; keeps one sample per input."""

    def __init__(self, inputs: Sequence[InputSpec]) -> None:
        self.size = 0
        self._floats = {spec.name for spec in inputs if "float" in spec.dtype.name}
        self._seen = {spec.name: _Seen() for spec in inputs}

    def see(self, feeds: Mapping[str, NDArray[Any]], size: int) -> None:
        """Take in a batch of `size` samples; an array with another leading axis is looked at as one."""
        self.size += size
        for name, array in feeds.items():
            rows = array if array.shape[:1] == (size,) else array[None]
            self._seen[name].see(rows)

    def findings(self, where: str) -> tuple[str, ...]:
        """A sentence for each float input that does not change.

        Integer inputs may well be constant (a mask of ones), so they count only when no input at all changes.
        """
        if self.size < 2:
            return ()
        floats = {name: seen for name, seen in self._seen.items() if name in self._floats}
        found = [
            f"{where}: every value of input {name!r} is {seen.first.flat[0]:g} in all {self.size} samples"
            for name, seen in floats.items()
            if seen.constant and seen.first is not None
        ]
        if all(seen.same for seen in self._seen.values()):
            return tuple(found) or (f"{where}: all {self.size} samples are identical",)
        found += [
            f"{where}: input {name!r} is the same in all {self.size} samples"
            for name, seen in floats.items()
            if seen.same and not seen.constant
        ]
        return tuple(found)
