"""The interface of all data sources: batches, their digest, and warnings about what was read."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.data.inputs import InputSpec, fixed_batch
from onnxq.data.watch import ConstantWatch
from onnxq.errors import DataError, UsageError

DIGEST_BATCH = 32  # samples held at once while a digest is computed


@dataclass(frozen=True, eq=False)
class Batch:
    """What one run of the model takes.

    Attributes:
        feeds: input name -> array of the input's dtype.
        labels: leading axis as the feeds', None without labels.
        size: samples in it.
    """

    feeds: dict[str, NDArray[Any]]
    labels: NDArray[Any] | None
    size: int


class Dataset(ABC):
    """Samples that fit a model's inputs. Each call of `batches` starts over and gives the same samples.

    Attributes:
        source: what was opened, as the user gave it.
        where: the same, for the start of a sentence.
        inputs: the model's inputs.
    """

    whole = False  # True when a batch is a feed as the source holds it, not rows put together

    def __init__(self, source: str, where: str, inputs: Sequence[InputSpec]) -> None:
        self.source = source
        self.where = where
        self.inputs = tuple(inputs)
        self._warnings: tuple[str, ...] = ()

    @property
    @abstractmethod
    def has_labels(self) -> bool:
        """Whether batches carry labels."""

    @abstractmethod
    def _batches(self, batch: int, limit: int | None) -> Iterator[Batch]:
        """The checked batches of one pass over the source."""

    @property
    def least(self) -> int:
        """Samples of the smallest batch: a limit below it leaves nothing."""
        return 1 if self.whole else fixed_batch(self.inputs) or 1

    def count(self) -> int | None:
        """Samples in the source, None when that takes reading it."""
        return None

    def batches(self, batch: int, limit: int | None = None) -> Iterator[Batch]:
        """Read the source from the start.

        Args:
            batch: samples per batch; whole feeds and a model's fixed leading dimension override it.
            limit: samples to take, evenly spaced when the count is known, else the first; None takes all.

        Raises:
            UsageError: batch or limit below 1.
            DataError: while iterating, samples that cannot be read or do not fit the model.
        """
        for name, value in (("batch", batch), ("limit", limit)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1 sample, not {value}")
        return self._watched(batch, limit)

    def digest(self, limit: int | None = None) -> str:
        """SHA-256 (hexadecimal) of names, dtypes, shapes and bytes of the samples that `batches` yields."""
        sums: dict[str, _ArrayHash] = {}
        for batch in self.batches(DIGEST_BATCH, limit):
            for name, array in batch.feeds.items():
                sums.setdefault(f"input {name}", _ArrayHash()).update(array, self.whole)
            if batch.labels is not None:
                sums.setdefault("labels", _ArrayHash()).update(batch.labels, self.whole)
        total = hashlib.sha256()
        for name in sorted(sums):
            total.update(f"{name!r} {sums[name].sha.hexdigest()}\n".encode())
        return total.hexdigest()

    def warnings(self) -> tuple[str, ...]:
        """What the last complete pass over `batches` found suspicious, a sentence each; empty before it."""
        return self._warnings

    def _watched(self, batch: int, limit: int | None) -> Iterator[Batch]:
        watch = ConstantWatch(self.inputs)
        for item in self._batches(batch, limit):
            watch.see(item.feeds, item.size)
            yield item
        if watch.size == 0:
            raise DataError(f"{self.where} has no samples")
        self._warnings = (*watch.findings(self.where), *self._remarks(watch.size, limit))

    def _remarks(self, seen: int, limit: int | None) -> tuple[str, ...]:
        """Further warnings after a complete pass that yielded `seen` samples."""
        return ()


@dataclass
class _ArrayHash:
    """Hash of one array over all batches: a header when the shape of a sample changes, and the bytes."""

    sha: hashlib._Hash = field(default_factory=hashlib.sha256)
    header: str = ""

    def update(self, array: NDArray[Any], whole: bool) -> None:
        header = f"{array.dtype} {array.shape if whole else array.shape[1:]}"
        if header != self.header:
            self.sha.update(f"[{header}]".encode())
        self.header = header
        self.sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
