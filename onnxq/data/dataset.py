"""The interface of all data sources: batches, their digest, and warnings about what was read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from onnxq.data.digest import SampleHash
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
        self._most = 0  # samples of the pass that the warnings are of
        self._digests: dict[int | None, str] = {}  # by limit

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

    def batches(self, batch: int, limit: int | None = None, *, digested: bool = False) -> Iterator[Batch]:
        """Read the source from the start.

        Args:
            batch: samples per batch; whole feeds and a model's fixed leading dimension override it.
            limit: samples to take, evenly spaced when the count is known, else the first; None takes all.
            digested: whether `digest` will be asked of the same samples: it is found on the way, and they are not read again.

        Raises:
            UsageError: batch or limit below 1.
            DataError: while iterating, samples that cannot be read or do not fit the model.
        """
        for name, value in (("batch", batch), ("limit", limit)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1 sample, not {value}")
        return self._watched(batch, limit, digested)

    def digest(self, limit: int | None = None) -> str:
        """SHA-256 (hexadecimal) of names, dtypes, shapes and bytes of the samples that `batches` yields."""
        if limit not in self._digests:
            for _ in self.batches(DIGEST_BATCH, limit, digested=True):
                pass
        return self._digests[limit]

    def warnings(self) -> tuple[str, ...]:
        """What the longest complete pass over `batches` found suspicious, a sentence each; empty before any."""
        return self._warnings

    def _watched(self, batch: int, limit: int | None, digested: bool) -> Iterator[Batch]:
        watch = ConstantWatch(self.inputs)
        seen = SampleHash(self.whole) if digested and limit not in self._digests else None
        for item in self._batches(batch, limit):
            watch.see(item.feeds, item.size)
            if seen is not None:
                _hash(seen, item)
            yield item
        if watch.size == 0:
            raise DataError(f"{self.where} has no samples")
        if watch.size >= self._most:
            self._most = watch.size
            self._warnings = (*watch.findings(self.where), *self._remarks(watch.size, limit))
        if seen is not None:
            self._digests[limit] = seen.hexdigest()

    def _remarks(self, seen: int, limit: int | None) -> tuple[str, ...]:
        """Further warnings after a complete pass that yielded `seen` samples."""
        return ()


def _hash(into: SampleHash, batch: Batch) -> None:
    for name, array in batch.feeds.items():
        into.see(f"input {name}", array)
    if batch.labels is not None:
        into.see("labels", batch.labels)
