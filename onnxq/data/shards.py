"""Folders of `.npz` or `.npy` files as one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onnxq.data.dataset import Batch
from onnxq.data.inputs import InputSpec
from onnxq.data.samples import Take
from onnxq.data.tables import Table
from onnxq.errors import DataError


class Shards:
    """Tables one after the other. Names and lengths are kept; each is opened when its turn comes."""

    def __init__(
        self,
        paths: Sequence[Path],
        inputs: Sequence[InputSpec],
        table: Callable[[Path, Sequence[InputSpec]], Table],
    ) -> None:
        self._folder = paths[0].parent
        self._names = [path.name for path in paths]
        self._inputs, self._table = inputs, table
        first = table(paths[0], inputs)
        self.whole, self.has_labels = first.whole, first.has_labels
        sizes = [first.count]
        for path in paths[1:]:
            shard = table(path, inputs)
            if shard.has_labels != first.has_labels:
                bare = shard if first.has_labels else first
                raise DataError(f"{bare.where} has no array 'label', but other files of its folder have")
            if shard.whole != first.whole:
                raise DataError(
                    f"{shard.where} and {first.where} differ in rank; one of them holds whole feeds"
                )
            sizes.append(shard.count)
        self._ends = np.cumsum(sizes)
        self.count = int(self._ends[-1])

    @contextmanager
    def reader(self) -> Iterator[Take]:
        """See `Samples.reader`; gives a piece per shard."""
        with ExitStack() as stack:
            current, shard_take = -1, None

            def take(rows: NDArray[np.int64]) -> list[Batch]:
                nonlocal current, shard_take
                owners = np.searchsorted(self._ends, rows, side="right")
                pieces = []
                for shard in np.unique(owners).tolist():
                    if shard != current or shard_take is None:
                        stack.close()
                        shard_take = stack.enter_context(self._open(shard).reader())
                        current = shard
                    start = self._ends[shard - 1] if shard else 0
                    pieces += shard_take(rows[owners == shard] - start)
                return pieces

            yield take

    def _open(self, shard: int) -> Table:
        table = self._table(self._folder / self._names[shard], self._inputs)
        start = self._ends[shard - 1] if shard else 0
        if table.count != self._ends[shard] - start:
            raise DataError(f"{table.where} changed while it was read")
        return table
