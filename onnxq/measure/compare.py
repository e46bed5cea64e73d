"""Outputs of two models side by side, streamed over samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from onnxq.data import Dataset
from onnxq.errors import ModelError
from onnxq.measure.axes import class_axis
from onnxq.model.messages import one_sentence
from onnxq.model.session import RUNTIME_ERRORS

Outputs = Mapping[str, NDArray[Any]]


@dataclass
class OutputDifference:
    """Running difference of one output.

    Attributes:
        signal: sum of squares of the reference.
        noise: sum of squares of the difference.
        max_abs: largest absolute difference.
        agreeing: rows, or places of a sequence or an image, whose largest entry along the axis of classes is the same in both.
        rows: rows compared for that; 0 when the output holds no class scores.
        values: values compared.
        is_float: whether it holds floats, not indices or classes.
    """

    signal: float = 0.0
    noise: float = 0.0
    max_abs: float = 0.0
    agreeing: int = 0
    rows: int = 0
    values: int = 0
    is_float: bool = True

    def update(self, reference: NDArray[Any], other: NDArray[Any]) -> None:
        """Add a batch; arrays of the same shape. Equal non-finite values count as equal."""
        a, b = (np.asarray(x).astype(np.float64) for x in (reference, other))
        with np.errstate(invalid="ignore"):
            difference = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, a - b)
        finite = np.where(np.isfinite(a), a, 0.0)
        with np.errstate(over="ignore"):
            self.signal += float(np.sum(finite**2))
            self.noise += float(np.sum(np.where(np.isnan(difference), np.inf, difference) ** 2))
        if difference.size:
            self.max_abs = max(
                self.max_abs, float(np.max(np.where(np.isnan(difference), np.inf, np.abs(difference))))
            )
        self.values += a.size
        self.is_float = np.issubdtype(np.asarray(reference).dtype, np.floating)
        if a.ndim < 2 or not a.size or not self.is_float:
            return
        axis = class_axis(a.shape)
        if a.shape[axis] > 1:
            same = a.argmax(axis) == b.argmax(axis)
            self.agreeing += int(same.sum())
            self.rows += same.size

    @property
    def sqnr_db(self) -> float | None:
        """Signal to noise ratio in dB; None when both are equal or the reference is all zero."""
        if self.noise == 0.0 or self.signal == 0.0:
            return None
        return 10.0 * math.log10(self.signal / self.noise) if math.isfinite(self.noise) else -math.inf

    @property
    def agreement(self) -> float | None:
        """Share of rows or places whose most likely class is the same; None for outputs without classes."""
        return self.agreeing / self.rows if self.rows else None

    def as_json(self) -> dict[str, Any]:
        """Figures of this output."""
        return {
            "sqnr_db": self.sqnr_db,
            "agreement": self.agreement,
            "max_abs": self.max_abs,
            "equal": self.noise == 0.0,
        }


@dataclass
class Difference:
    """Differences of all outputs over the samples compared.

    Attributes:
        samples: run.
        outputs: by name.
        apart: samples in which an output has another shape, which are not compared, by name: how many boxes a detector finds or
            how long a decoded text is follows from values.
    """

    samples: int = 0
    outputs: dict[str, OutputDifference] = field(default_factory=dict)
    apart: dict[str, int] = field(default_factory=dict)

    def update(self, reference: Outputs, other: Outputs, samples: int) -> None:
        """Add one batch of outputs, by name.

        Raises:
            ModelError: an output is missing or has another rank.
        """
        for name, value in reference.items():
            if not _is_numeric(value):
                continue
            if name not in other:
                raise ModelError(f"the second model has no output {name!r}; it has: {', '.join(other)}")
            if np.ndim(value) != np.ndim(other[name]):
                shapes = f"{np.shape(value)} and {np.shape(other[name])}"
                raise ModelError(f"output {name!r} has different shapes in the two models: {shapes}")
            if np.shape(value) != np.shape(other[name]):
                self.apart[name] = self.apart.get(name, 0) + samples
                continue
            self.outputs.setdefault(name, OutputDifference()).update(value, other[name])
        self.samples += samples

    def remarks(self) -> tuple[str, ...]:
        """A sentence for each output whose shape differs."""
        return tuple(
            f"the shape of output {name!r} follows from values and differs in {count} of {self.samples} samples,"
            " which are not compared"
            for name, count in self.apart.items()
        )

    @property
    def main(self) -> OutputDifference | None:
        """The first output of floats whose shape is never another; else the first of floats, else the first."""
        found = [output for name, output in self.outputs.items() if name not in self.apart]
        ranked = [*found, *self.outputs.values()]
        return next((output for output in ranked if output.is_float), next(iter(ranked), None))


def _is_numeric(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "biuf"


def run(
    session: ort.InferenceSession, feeds: Outputs, outputs: Sequence[str] | None = None
) -> dict[str, Any]:
    """Outputs of one batch by name, all of them unless some are named; feeds that the model does not take are left out.

    Raises:
        ModelError: onnxruntime cannot run the model on these feeds.
    """
    names = [o.name for o in session.get_outputs()] if outputs is None else list(outputs)
    if not names:
        return {}
    wanted = {i.name for i in session.get_inputs()}
    try:
        return dict(
            zip(names, session.run(names, {k: v for k, v in feeds.items() if k in wanted}), strict=True)
        )
    except RUNTIME_ERRORS as error:
        raise ModelError(f"onnxruntime failed to run the model: {one_sentence(error)}") from error


def compare_sessions(
    reference: ort.InferenceSession,
    other: ort.InferenceSession,
    data: Dataset,
    *,
    limit: int | None = None,
    batch: int = 32,
    progress: Callable[[int], None] = lambda done: None,
) -> Difference:
    """Run both sessions over the samples; one by one where a batch takes the shape of an output from the values of all.

    Raises:
        ModelError: a model cannot be run, or the outputs do not match in name or rank.
        DataError: the samples cannot be read.
    """
    result = Difference()
    for part in data.batches(batch, limit):
        result.update(run(reference, part.feeds), run(other, part.feeds), part.size)
        if result.apart and batch > 1:
            return compare_sessions(reference, other, data, limit=limit, batch=1, progress=progress)
        progress(result.samples)
    return result
