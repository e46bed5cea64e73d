"""Arrays side by side, one per input: `.npz` files, `.npy` files and arrays in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from onnxq.data.checks import as_input, as_labels, check_dtype, check_label_dtype, check_shape, label_name
from onnxq.data.dataset import Batch
from onnxq.data.inputs import InputSpec
from onnxq.data.npy import open_npy, open_npz
from onnxq.data.samples import Take
from onnxq.errors import DataError


class Rows(Protocol):
    """Rows of one array, taken in ascending order."""

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """The rows with the given numbers."""


class Column(Protocol):
    """One array of a table, (count, ...)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(count, ...)."""

    def open(self) -> AbstractContextManager[Rows]:
        """Start reading."""


@dataclass(frozen=True, eq=False)
class MemoryColumn:
    """An array in memory."""

    array: NDArray[Any]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""
        return self.array.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """(count, ...)."""
        return self.array.shape

    def open(self) -> AbstractContextManager[Rows]:
        """The column itself."""
        return nullcontext(self)

    def take(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Copies of the rows."""
        return np.ascontiguousarray(self.array[rows])


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of the same length, each checked against its input.

    Attributes:
        where: for the start of a sentence.
        inputs: the model's inputs.
        columns: input name -> array.
        labels: the labels, or None.
        whole: whether rows are whole feeds.
    """

    where: str
    inputs: tuple[InputSpec, ...]
    columns: Mapping[str, Column]
    labels: Column | None
    whole: bool

    @property
    def count(self) -> int:
        """Rows."""
        return self.columns[self.inputs[0].name].shape[0]

    @property
    def has_labels(self) -> bool:
        """Whether there are labels."""
        return self.labels is not None

    @contextmanager
    def reader(self) -> Iterator[Take]:
        """See `Samples.reader`; gives one piece."""
        with ExitStack() as stack:
            columns = {name: stack.enter_context(column.open()) for name, column in self.columns.items()}
            labels = None if self.labels is None else stack.enter_context(self.labels.open())

            def take(rows: NDArray[np.int64]) -> list[Batch]:
                feeds = {
                    spec.name: as_input(self.where, columns[spec.name].take(rows), spec, rows)
                    for spec in self.inputs
                }
                if labels is None:
                    return [Batch(feeds, None, len(rows))]
                return [Batch(feeds, as_labels(self.where, labels.take(rows), rows), len(rows))]

            yield take


def make_table(where: str, arrays: Mapping[str, Column], inputs: Sequence[InputSpec]) -> Table:
    """Check what can be known before reading values.

    Args:
        arrays: name -> (count, ...); the inputs, and `label` or `labels`. Entries are samples, or, when every
            array has one axis more than its input, whole feeds.

    Raises:
        DataError: names, dtypes, shapes or counts do not fit.
    """
    label = label_name(where, arrays, inputs)
    count = arrays[inputs[0].name].shape[:1]
    for name, column in arrays.items():
        if column.shape[:1] != count:
            first = f"{inputs[0].name!r} has {_samples(count)}"
            raise DataError(
                f"{where}: arrays differ in samples: {first}, {name!r} has {_samples(column.shape[:1])}"
            )
    if not count:
        raise DataError(
            f"{where}: array {inputs[0].name!r} is a single number; its leading axis must be the samples"
        )
    axes = {spec.name: _has_own_axis(where, arrays[spec.name], spec) for spec in inputs}
    known = {extra for extra in axes.values() if extra is not None}
    if len(known) > 1:
        feeds, rows = (", ".join(repr(n) for n, own in axes.items() if own is kind) for kind in (True, False))
        raise DataError(
            f"{where}: whole feeds (one more axis than the input) in {feeds} but not in {rows}; "
            f"give {rows} one more leading axis too, so that each entry is a whole feed"
        )
    if label is not None:
        check_label_dtype(where, arrays[label].dtype)
    columns = {spec.name: arrays[spec.name] for spec in inputs}
    return Table(where, tuple(inputs), columns, None if label is None else arrays[label], known == {True})


def _samples(count: tuple[int, ...]) -> str:
    return str(count[0]) if count else "none"


def _has_own_axis(where: str, column: Column, spec: InputSpec) -> bool | None:
    """Whether each entry is a whole feed of the input; None when the input's rank is unknown."""
    check_dtype(where, column.dtype, spec)
    if spec.shape is None:
        return None
    own = len(column.shape) == len(spec.shape) + 1
    if own or not spec.shape:
        check_shape(where, column.shape, spec, ("samples", *spec.shape))
        return True
    leading = spec.shape[0] if isinstance(spec.shape[0], str) else "samples"
    check_shape(where, column.shape, spec, (leading, *spec.shape[1:]))
    return False


def npz_table(path: Path, inputs: Sequence[InputSpec]) -> Table:
    """The arrays of a `.npz` file."""
    return make_table(f"'{path}'", open_npz(path), inputs)


def npy_table(path: Path, inputs: Sequence[InputSpec]) -> Table:
    """A `.npy` file as the samples of the only input."""
    where = f"'{path}'"
    return make_table(where, {only_input(where, inputs): open_npy(path)}, inputs)


def npy_shard(path: Path, inputs: Sequence[InputSpec]) -> Table:
    """A `.npy` file among others: samples, or a single one without an axis for the batch."""
    name, file = only_input(f"'{path}'", inputs), open_npy(path)
    rank = None if inputs[0].shape is None else len(inputs[0].shape)
    single = rank is not None and len(file.shape) == rank - 1
    return make_table(f"'{path}'", {name: replace(file, shape=(1, *file.shape)) if single else file}, inputs)


def only_input(where: str, inputs: Sequence[InputSpec], instead: str = "use a .npz file") -> str:
    """Name of the input that a single array is for.

    Raises:
        DataError: the model has several.
    """
    if len(inputs) > 1:
        names = ", ".join(spec.name for spec in inputs)
        raise DataError(f"{where} is for one input, but the model has {len(inputs)}: {names}; {instead}")
    return inputs[0].name
