"""Datasets of samples along a leading axis: which rows are taken, and how they become batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from onnxq.data.dataset import Batch, Dataset
from onnxq.data.inputs import InputSpec, fixed_batch
from onnxq.errors import DataError

Take = Callable[[NDArray[np.int64]], list[Batch]]


class Samples(Protocol):
    """A source of numbered samples."""

    @property
    def count(self) -> int:
        """Samples in it."""

    @property
    def whole(self) -> bool:
        """Whether each sample is a whole feed, its leading axis included."""

    @property
    def has_labels(self) -> bool:
        """Whether samples have labels."""

    def reader(self) -> AbstractContextManager[Take]:
        """A function from ascending sample numbers, each call beyond the last, to pieces.

        Pieces are runs of those samples, in order, checked: feeds (n, ...), labels (n, ...). Samples of
        different shapes are in different pieces.
        """


class SampleDataset(Dataset):
    """Batches of rows. A model with a fixed leading dimension k gets exactly k of them and the remainder is
    dropped; whole feeds go one at a time."""

    def __init__(self, source: str, where: str, inputs: Sequence[InputSpec], samples: Samples) -> None:
        super().__init__(source, where, inputs)
        if samples.count == 0:
            raise DataError(f"{where} has no samples")
        self._samples = samples
        self.whole = samples.whole
        self._fixed = None if samples.whole else fixed_batch(inputs)

    @property
    def has_labels(self) -> bool:
        """Whether batches carry labels."""
        return self._samples.has_labels

    def count(self) -> int:
        """Samples in the source."""
        return self._samples.count

    def _batches(self, batch: int, limit: int | None) -> Iterator[Batch]:
        total = self._samples.count
        wanted = min(limit or total, total)
        step = 1 if self.whole else self._fixed or batch
        used = wanted - wanted % step if self._fixed else wanted
        if not used:
            raise DataError(
                f"{self.where} gives {wanted} samples, but the model takes batches of exactly {step}"
            )
        with self._samples.reader() as take:
            for start in range(0, used, step):
                rows = (
                    np.arange(start, min(start + step, used), dtype=np.int64) * total // wanted
                )  # evenly spaced
                pieces = joined(take(rows))
                if self._fixed and len(pieces) > 1:
                    raise DataError(
                        f"{self.where}: samples {rows[0]} to {rows[-1]} have different shapes, "
                        f"but the model takes batches of exactly {step}"
                    )
                yield from map(_whole_feed, pieces) if self.whole else pieces

    def _remarks(self, seen: int, limit: int | None) -> tuple[str, ...]:
        wanted = min(limit or self.count(), self.count())
        if seen == wanted:
            return ()
        left = f"the last {wanted - seen} of {wanted} samples are left out"
        return (f"{self.where}: {left}, as the model takes batches of exactly {self._fixed}",)


def joined(pieces: list[Batch]) -> list[Batch]:
    """Put runs of pieces together whose samples have the same shapes."""
    runs: list[list[Batch]] = []
    for piece in pieces:
        if runs and _shapes(runs[-1][0]) == _shapes(piece):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return [run[0] if len(run) == 1 else _concatenated(run) for run in runs]


def _concatenated(run: list[Batch]) -> Batch:
    feeds = {name: np.concatenate([piece.feeds[name] for piece in run]) for name in run[0].feeds}
    labels = [piece.labels for piece in run if piece.labels is not None]
    return Batch(feeds, np.concatenate(labels) if labels else None, sum(piece.size for piece in run))


def _shapes(piece: Batch) -> list[tuple[int, ...]]:
    arrays: list[NDArray[Any]] = list(piece.feeds.values())
    if piece.labels is not None:
        arrays.append(piece.labels)
    return [array.shape[1:] for array in arrays]


def _whole_feed(piece: Batch) -> Batch:
    """One sample without its axis. Labels lose theirs when what remains still has an entry per row."""
    feeds = {name: np.asarray(array[0]) for name, array in piece.feeds.items()}  # of numbers no scalar
    labels = piece.labels
    if labels is not None and labels.ndim > 1:
        leading = {array.shape[0] for array in feeds.values() if array.ndim}
        labels = labels[0] if labels.shape[1] in leading else labels
    return Batch(feeds, labels, 1)
