"""Streaming statistics of one activation tensor, in constant memory, that merge.

The histogram is dyadic: its bins are 2^k wide with edges at integer multiples of 2^k, and k is the smallest
exponent at which [minimum, maximum] touches at most 4096 bins. When the data grow, k grows and bins join,
which is exact. So count, zeros, minimum, maximum and histogram depend on the values alone: not on the order
or size of batches, nor on the order of merges. The sums agree to rounding only; of channels see `onnxq.calibration.channels`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.calibration.channels import CHUNK, ChannelStatistics
from onnxq.errors import DataError

BINS = 4096
MIN_EXPONENT = -126  # the smallest normal float32; 2^126 is still a finite factor
TINY = np.finfo(np.float32).tiny

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Needs:
    """What is gathered beyond count, minimum and maximum.

    Attributes:
        histogram: the distribution, at most 4096 bins, exact zeros, and the sums of x, |x| and x^2.
        channels: axis (may be negative) whose channels each get a minimum, maximum and mean; None for none.
        power: E[x^2] of each channel as well; it needs `channels`.
    """

    histogram: bool = False
    channels: int | None = None
    power: bool = False

    def __post_init__(self) -> None:
        if self.power and self.channels is None:
            raise DataError("the power of channels needs a channel axis")

    def __or__(self, other: Needs) -> Needs:
        """Both needs at once; DataError when they differ in the channel axis."""
        axes = {self.channels, other.channels} - {None}
        if len(axes) > 1:
            raise DataError(
                f"one tensor cannot be gathered over two channel axes, {self.channels} and {other.channels}"
            )
        axis = axes.pop() if axes else None
        return Needs(self.histogram or other.histogram, axis, self.power or other.power)


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of the values that are not exactly zero.

    Attributes:
        exponent: k; a bin is 2^k wide.
        first: bin i covers [(first + i) 2^k, (first + i + 1) 2^k).
        counts: int64, (bins,), at most 4096; the first bin holds the minimum, the last one the maximum.
    """

    exponent: int
    first: int
    counts: NDArray[np.int64]

    @property
    def width(self) -> float:
        """Width of a bin, in the units of the tensor."""
        return math.ldexp(1.0, self.exponent)

    @property
    def edges(self) -> NDArray[np.float64]:
        """Edges of the bins, (bins + 1,), exact."""
        numbers = np.arange(self.first, self.first + self.counts.size + 1, dtype=np.float64)
        return numbers * self.width

    @classmethod
    def covering(cls, low: float, high: float) -> Histogram:
        """The empty histogram of the finest bins for values in [low, high]."""
        largest = max(abs(low), abs(high))
        exponent = max(
            math.frexp(largest)[1] - 24
            if largest
            else MIN_EXPONENT,  # bin numbers below 2^24: exact in float32
            math.frexp(high - low)[1] - 13
            if high > low
            else MIN_EXPONENT,  # the difference may have rounded up
            MIN_EXPONENT,
        )
        while True:
            first, last = (math.floor(math.ldexp(end, -exponent)) for end in (low, high))
            if last - first < BINS:
                return cls(exponent, first, np.zeros(last - first + 1, np.int64))
            exponent += 1

    def add(self, other: Histogram) -> None:
        """Add the counts of a histogram that is not coarser and not wider, in place."""
        bins = (other.first + np.arange(other.counts.size)) >> min(self.exponent - other.exponent, 63)
        np.add.at(self.counts, bins - self.first, other.counts)


class TensorStatistics:
    """Statistics of one activation tensor, fed batch by batch.

    Attributes:
        name: the tensor, for messages.
        needs: what is gathered.
        count: values seen.
        minimum, maximum: inf and -inf before the first value.
        zeros: how many values are exactly zero; the histogram does not hold them. 0 without a histogram.
        total, total_absolute, total_squares: sums of x, |x|, x^2; 0 without a histogram.
        histogram: None unless needed, or before the first value.
        channels: None unless needed, or before the first value.
    """

    def __init__(self, name: str, needs: Needs = Needs()) -> None:
        self.name, self.needs = name, needs
        self.count, self.zeros = 0, 0
        self.minimum, self.maximum = math.inf, -math.inf
        self.total, self.total_absolute, self.total_squares = 0.0, 0.0, 0.0
        self.histogram: Histogram | None = None
        self.channels: ChannelStatistics | None = None

    @property
    def mean(self) -> float:
        """Mean of the values, nan when there are none or no histogram is needed."""
        return self.total / self.count if self.count and self.needs.histogram else math.nan

    @property
    def variance(self) -> float:
        """Mean squared distance from the mean, nan where the mean is."""
        mean = self.mean
        return mean if math.isnan(mean) else max(self.total_squares / self.count - mean**2, 0.0)

    def update(self, values: NDArray[Any]) -> None:
        """Take in one batch of any shape and a real type; it is read as float32.

        Raises:
            DataError: a value is NaN or infinite (also when it overflows float32), or channels do not fit.
                The statistics are then unchanged.
        """
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            x = np.ascontiguousarray(values, np.float32).reshape(np.shape(values))
            if x.size == 0:
                return
            batch = TensorStatistics(self.name, self.needs)
            batch._gather(x)
        self._absorb(batch)

    def part(self, name: str, needs: Needs, channels: slice) -> TensorStatistics:
        """The statistics of a tensor that holds some of the channels and needs no histogram."""
        found = TensorStatistics(name, needs)
        if self.channels is None:
            return found
        own = self.channels.part(channels)
        found.count = own.count * own.total.size
        found.minimum, found.maximum = float(own.minimum.min()), float(own.maximum.max())
        found.channels = None if needs.channels is None else own
        return found

    def merge(self, other: TensorStatistics) -> TensorStatistics:
        """The statistics of the values of both.

        Raises:
            DataError: the tensors, their needs or their channels differ.
        """
        if (self.name, self.needs) != (other.name, other.needs):
            raise DataError(
                f"cannot merge statistics of {self.name!r} ({self.needs}) with {other.name!r} ({other.needs})"
            )
        merged = TensorStatistics(self.name, self.needs)
        for part in (self, other):
            merged._absorb(part)
        return merged

    @classmethod
    def pooled(cls, name: str, parts: Iterable[TensorStatistics]) -> TensorStatistics:
        """The distribution of the values of several tensors, without their channels.

        Raises:
            DataError: a part has no histogram.
        """
        found = cls(name, Needs(histogram=True))
        for part in parts:
            if not part.needs.histogram:
                raise DataError(f"tensor {part.name!r} has no histogram to be pooled in {name!r}")
            found._absorb(part)
        return found

    def to_arrays(self) -> Arrays:
        """Everything as a dict of arrays, for saving; keys that do not apply are absent."""
        arrays: Arrays = {
            "counts": np.array([self.count, self.zeros, self.needs.histogram], np.int64),
            "sums": np.array(
                [self.minimum, self.maximum, self.total, self.total_absolute, self.total_squares]
            ),
        }
        if self.needs.channels is not None:
            arrays["axis"] = np.array([self.needs.channels, self.needs.power], np.int64)
        if self.histogram is not None:
            arrays["grid"] = np.array([self.histogram.exponent, self.histogram.first], np.int64)
            arrays["bins"] = self.histogram.counts
        if self.channels is not None:
            found = {f"channel_{f.name}": getattr(self.channels, f.name) for f in fields(self.channels)}
            arrays |= {name: np.asarray(value) for name, value in found.items() if value is not None}
        return arrays

    @classmethod
    def from_arrays(cls, name: str, arrays: Arrays) -> TensorStatistics:
        """The inverse of `to_arrays`; DataError when keys are missing or do not fit together."""
        try:
            count, zeros, histogram = map(int, arrays["counts"])
            axis, power = map(int, arrays["axis"]) if "axis" in arrays else (None, 0)
            found = cls(name, Needs(bool(histogram), axis, bool(power)))
            found.count, found.zeros = count, zeros
            sums = map(float, arrays["sums"])
            found.minimum, found.maximum, found.total, found.total_absolute, found.total_squares = sums
            if count and histogram:
                exponent, first = map(int, arrays["grid"])
                found.histogram = Histogram(exponent, first, arrays["bins"])
            if count and axis is not None:
                kept = fields(ChannelStatistics)[: None if power else -1]
                parts = [arrays[f"channel_{f.name}"] for f in kept]
                found.channels = ChannelStatistics(int(parts[0]), *parts[1:])
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"the saved statistics of tensor {name!r} are damaged: {error}") from error
        if found.histogram is not None and int(found.histogram.counts.sum()) != count - zeros:
            raise DataError(
                f"the saved statistics of tensor {name!r} are damaged: the histogram lacks values"
            )
        return found

    def _gather(self, x: NDArray[np.float32]) -> None:
        """Fill these empty statistics from one batch."""
        flat = x.reshape(-1)
        self.count = flat.size
        if self.needs.channels is not None:
            self.channels = self._of_channels(x, self.needs.channels)
        ends = (flat, flat) if self.channels is None else (self.channels.minimum, self.channels.maximum)
        self.minimum, self.maximum = float(ends[0].min()), float(ends[1].max())
        if not math.isfinite(self.minimum) or not math.isfinite(self.maximum):
            nan, infinite = int(np.isnan(flat).sum()), int(np.isinf(flat).sum())
            raise DataError(
                f"tensor {self.name!r} has {nan} NaN and {infinite} infinite values among {flat.size}"
            )
        if not self.needs.histogram:
            return
        self.histogram = Histogram.covering(self.minimum, self.maximum)
        for start in range(0, flat.size, CHUNK):
            self._gather_chunk(flat[start : start + CHUNK], self.histogram)
        if self.zeros:
            self.histogram.counts[-self.histogram.first] -= self.zeros

    def _gather_chunk(self, chunk: NDArray[np.float32], histogram: Histogram) -> None:
        wide = chunk.astype(np.float64)
        total = float(wide.sum())
        self.total += total
        self.total_squares += float(np.dot(wide, wide))
        self.total_absolute += total if self.minimum >= 0.0 else float(np.abs(wide, out=wide).sum())
        self.zeros += int(np.count_nonzero(chunk == 0.0))
        bins = chunk * np.float32(math.ldexp(1.0, -histogram.exponent))
        if histogram.exponent > 0 and self.minimum < 0.0:
            np.minimum(bins, -TINY, out=bins, where=chunk < 0.0)  # what underflows to -0 belongs to bin -1
        np.floor(bins, out=bins)
        np.subtract(bins, np.float32(histogram.first), out=bins)
        histogram.counts[:] += np.bincount(bins.astype(np.intp), minlength=histogram.counts.size)

    def _of_channels(self, x: NDArray[np.float32], axis: int) -> ChannelStatistics:
        if not -x.ndim <= axis < x.ndim:
            raise DataError(f"tensor {self.name!r} of shape {x.shape} has no channel axis {axis}")
        return ChannelStatistics.of(x, axis % x.ndim, self.needs.power)

    def _absorb(self, other: TensorStatistics) -> None:
        """Add statistics that hold at least what is needed here, in place."""
        if other.count == 0:
            return
        if self.needs.channels is not None:
            self._absorb_channels(other)
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        if self.needs.histogram:
            joined = Histogram.covering(self.minimum, self.maximum)
            for part in (self.histogram, other.histogram):
                if part is not None:
                    joined.add(part)
            self.histogram = joined
        for name in ("count", "zeros", "total", "total_absolute", "total_squares"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def _absorb_channels(self, other: TensorStatistics) -> None:
        if self.channels is not None and other.channels is not None:
            sizes = self.channels.total.size, other.channels.total.size
            if sizes[0] != sizes[1]:
                raise DataError(
                    f"tensor {self.name!r} has {sizes[1]} channels where it had {sizes[0]} before"
                )
        self.channels = _sum_channels(self.channels, other.channels)


def _sum_channels(a: ChannelStatistics | None, b: ChannelStatistics | None) -> ChannelStatistics | None:
    return a.merged(b) if a is not None and b is not None else a or b
