"""Checks that arrays fit a model's inputs; each failure is one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.data.inputs import InputSpec, shape_text
from onnxq.errors import DataError

LABELS = ("label", "labels")  # names of the array that holds labels, unless the model has such an input


def listed(names: Iterable[str]) -> str:
    """Names for a sentence."""
    return ", ".join(names) or "nothing"


def did_you_mean(name: str, choices: Collection[str], what: str = "") -> str:
    """A clause that names the nearest choice; empty when none is near."""
    near = difflib.get_close_matches(name, choices, n=1)
    return f"; did you mean {what}{near[0]!r}?" if near else ""


def label_name(where: str, names: Collection[str], inputs: Sequence[InputSpec]) -> str | None:
    """The name of the labels among the arrays' names.

    Raises:
        DataError: an input has no array, an array is neither input nor labels, or two arrays are labels.
    """
    wanted = [spec.name for spec in inputs]
    spare = [name for name in names if name not in wanted]
    for name in wanted:
        if name not in names:
            near = did_you_mean(name, spare, "its array ")
            raise DataError(
                f"{where} has no array {name!r}{near or ';'} {'It' if near else 'it'} has: {listed(names)}"
            )
    labels = [name for name in spare if name in LABELS]
    for name in spare:
        if name not in labels:
            near = did_you_mean(name, [*wanted, "label"])
            raise DataError(
                f"{where} has an array {name!r} that is no input of the model{near or ';'} "
                f"{'The' if near else 'the'} inputs are: {listed(wanted)} (labels are named 'label')"
            )
    if len(labels) > 1:
        raise DataError(f"{where} has both 'label' and 'labels'; keep one of them")
    return labels[0] if labels else None


def check_dtype(where: str, dtype: np.dtype[Any], spec: InputSpec) -> None:
    """Floats go to floats and integers to integers; nothing else is converted, as that needs a choice.

    Raises:
        DataError: other pairs, with what to do.
    """
    floats = "float" in dtype.name, "float" in spec.dtype.name  # bfloat16 is of no numpy kind
    if dtype == spec.dtype or all(floats) or (dtype.kind in "iu" and spec.dtype.kind in "iu"):
        return
    said = f"{where}: array {spec.name!r} is {dtype}, but the model's input is {spec.dtype}"
    if floats[1] and dtype.kind in "iu":
        raise DataError(
            f"{said}; convert and scale it as in training, for example array.astype('{spec.dtype}') / 255"
        )
    raise DataError(f"{said}; convert it with array.astype('{spec.dtype}') if its values mean the same")


def check_label_dtype(where: str, dtype: np.dtype[Any]) -> None:
    """Labels are numbers.

    Raises:
        DataError: they are not.
    """
    if dtype.kind not in "biuf":
        raise DataError(f"{where}: the labels are {dtype}; give integers or floats")


def check_shape(
    where: str, shape: tuple[int, ...], spec: InputSpec, wanted: Sequence[int | str | None]
) -> None:
    """Compare the shape of an array with sizes of which str and None fit anything.

    Raises:
        DataError: another rank, or another fixed size.
    """
    sizes = list(zip(shape, wanted, strict=False))
    if len(shape) == len(wanted) and all(not isinstance(want, int) or have == want for have, want in sizes):
        return
    raise DataError(
        f"{where}: array {spec.name!r} has shape {shape_text(shape)}, but the model's input takes "
        f"{shape_text(wanted)}{_layout_hint(shape, wanted)}"
    )


def _layout_hint(shape: tuple[int, ...], wanted: Sequence[int | str | None]) -> str:
    """A clause when images have their channels on the other side."""
    if len(shape) != 4 or len(wanted) != 4:
        return ""
    for side, order, axis in (("last", (0, 3, 1, 2), 1), ("first", (0, 2, 3, 1), 3)):
        moved = zip((shape[source] for source in order), wanted, strict=True)
        if isinstance(wanted[axis], int) and all(
            not isinstance(want, int) or have == want for have, want in moved
        ):
            return f"; its channels come {side}: use array.transpose{order}"
    return ""


def as_array(where: str, name: str, value: object) -> NDArray[Any]:
    """The value as an array.

    Raises:
        DataError: it is none, or one of Python objects.
    """
    kind = type(value).__name__
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # a ragged list, a tensor on a device
        raise DataError(f"{where}: array {name!r} is a {kind} that cannot be read: {error}") from error
    if array.dtype.hasobject:
        raise DataError(f"{where}: array {name!r} is a {kind} of Python objects; give numbers")
    return array


def as_input(where: str, array: NDArray[Any], spec: InputSpec, rows: NDArray[np.int64]) -> NDArray[Any]:
    """The array in the input's dtype, values kept.

    Args:
        array: (n, ...) whose entries are the samples `rows` (n,), or any shape with rows (1,).

    Raises:
        DataError: a NaN or infinity, or a value that the input's dtype cannot hold.
    """
    name = f"{where}: array {spec.name!r}"
    if "float" in array.dtype.name:
        _refuse(~np.isfinite(array), f"{name} has a NaN or an infinity", rows)
        if array.dtype == spec.dtype:
            return array
        with np.errstate(over="ignore"):  # found in the next line but one
            cast = array.astype(spec.dtype)
        _refuse(~np.isfinite(cast), f"{name} has a value too large for {spec.dtype}", rows)
        return cast
    if array.dtype == spec.dtype or not array.size:
        return array.astype(spec.dtype, copy=False)
    info = np.iinfo(spec.dtype)
    if int(array.min()) < info.min or int(array.max()) > info.max:
        bad = np.array((array < info.min) | (array > info.max))
        _refuse(
            bad, f"{name} is {array.dtype} and has a value that the model's {spec.dtype} cannot hold", rows
        )
    return array.astype(spec.dtype)


def as_labels(where: str, labels: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[Any]:
    """The labels (n, ...) of the samples `rows` (n,) as they are.

    Raises:
        DataError: a NaN or infinity.
    """
    _refuse(~np.isfinite(labels), f"{where}: the labels have a NaN or an infinity", rows)
    return labels


def _refuse(bad: NDArray[np.bool_], sentence: str, rows: NDArray[np.int64]) -> None:
    if bad.any():
        first = int(np.argmax(bad.reshape(len(rows), -1).any(axis=1)))
        raise DataError(f"{sentence} in sample {int(rows[first])}")


def check_feed(
    where: str, feed: Mapping[str, NDArray[Any]], inputs: Sequence[InputSpec], start: int = 0
) -> dict[str, NDArray[Any]]:
    """A whole feed in graph-input order and in the inputs' dtypes.

    Args:
        feed: an array for each input, the inputs' ranks and fixed sizes.
        start: number of its first sample, for sentences.

    Raises:
        DataError: as the other checks.
    """
    checked = {}
    for spec in inputs:
        array = feed[spec.name]
        check_dtype(where, array.dtype, spec)
        if spec.shape is not None:
            check_shape(where, array.shape, spec, spec.shape)
        if not array.size:
            raise DataError(f"{where}: array {spec.name!r} of shape {shape_text(array.shape)} is empty")
        rows = np.arange(start, start + (array.shape[0] if array.ndim else 1))
        checked[spec.name] = as_input(where, array, spec, rows)
    return checked
