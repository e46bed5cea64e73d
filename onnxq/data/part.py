"""A part of the samples of a dataset: each k-th of them, or all others, to fit on one and to judge by the other."""

from __future__ import annotations

from collections.abc import Iterator

from onnxq.data.dataset import Batch, Dataset
from onnxq.data.inputs import fixed_batch
from onnxq.data.samples import joined


class Part(Dataset):
    """Some of the samples that a pass over another dataset takes.

    A model with a fixed leading dimension k gets k samples at a time, so that they go into one part together. Each pass over a
    part reads the samples of the other too.
    """

    def __init__(self, data: Dataset, samples: int, every: int, *, held: bool) -> None:
        """Of the first `samples` of the data, evenly spaced where their number is known.

        Args:
            data: to read.
            samples: how many of it are divided.
            every: 2 or more: one in so many is held back.
            held: whether this is the part that is held back, or what remains.
        """
        super().__init__(data.source, data.where, data.inputs)
        self.whole = data.whole
        self._data, self._samples, self._every, self._held = data, max(samples, data.least), every, held

    @property
    def has_labels(self) -> bool:
        """Whether batches carry labels."""
        return self._data.has_labels

    def count(self) -> int | None:
        """Samples in this part."""
        total = self._data.count()
        if total is None:
            return None
        units = min(total, self._samples) // self.least
        held = -(-units // self._every)
        return (held if self._held else units - held) * self.least

    def _batches(self, batch: int, limit: int | None) -> Iterator[Batch]:
        alone = self.whole or fixed_batch(self.inputs) is not None
        pending: list[Batch] = []
        for unit in self._taken(limit):
            pending.append(unit)
            if alone or sum(item.size for item in pending) >= batch:
                yield from pending if self.whole else joined(pending)
                pending = []
        yield from joined(pending)

    def _taken(self, limit: int | None) -> Iterator[Batch]:
        """Units of this part within the limit."""
        total = self.count()
        units = None if total is None else total // self.least
        most = units if limit is None else max(limit // self.least, 1)
        wanted = (
            None
            if units is None or most is None
            else {i * units // min(most, units) for i in range(min(most, units))}
        )
        own = (
            item for number, item in enumerate(self._data.batches(1, self._samples)) if self._is_own(number)
        )
        for number, item in enumerate(own):
            if wanted is None and most is not None and number >= most:
                return
            if wanted is None or number in wanted:
                yield item

    def _is_own(self, number: int) -> bool:
        return (number % self._every == 0) == self._held
