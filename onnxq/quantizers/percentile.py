"""Percentile: the same share of the values is cut off at each end.

An asymmetric scheme takes the quantiles 1 - q and q of x, a symmetric one the quantile q of |x|, both as
`numpy.quantile` defines them (linear). From a histogram they are right to within one bin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxq.calibration.statistics import TensorStatistics
from onnxq.errors import UsageError
from onnxq.quantizers.base import RangeMethod, Rows, Vector
from onnxq.quantizers.density import Density
from onnxq.scheme import QuantScheme


@dataclass(frozen=True)
class Percentile(RangeMethod):
    """The range between two percentiles.

    Attributes:
        percentile: share of the values, in percent, that lie below the upper end; above 50, at most 100.
    """

    name: ClassVar[str] = "percentile"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if not 50.0 < self.percentile <= 100.0:
            raise UsageError(f"percentile is {self.percentile}; it must be above 50 and at most 100")

    def tensor_range(self, statistics: TensorStatistics, scheme: QuantScheme) -> tuple[float, float]:
        """The quantiles; the whole range when they leave nothing, as when nearly all values are zero."""
        density = Density.of(statistics)
        if scheme.symmetric:
            density = _folded(density)
        q = self.percentile / 100.0
        low, high = (density.real(_quantile(density, share)) for share in (1.0 - q, q))
        if scheme.symmetric:
            low = 0.0
        return (low, high) if low or high else (statistics.minimum, statistics.maximum)

    def row_ranges(self, rows: Rows, scheme: QuantScheme) -> tuple[Vector, Vector]:
        """The quantiles of every row; the whole range where they leave nothing."""
        q = self.percentile / 100.0
        if scheme.symmetric:
            rows = np.abs(rows)
        low, high = np.quantile(rows, [1.0 - q, q], axis=1).astype(np.float64)
        if scheme.symmetric:
            low = np.zeros_like(low)
        nothing = (low == 0.0) & (high == 0.0)
        return np.where(nothing, rows.min(axis=1), low), np.where(nothing, rows.max(axis=1), high)


def _folded(density: Density) -> Density:
    """The density of |x|."""
    bins = density.first + np.arange(density.counts.size)
    magnitude = np.where(bins < 0, -bins - 1, bins)
    first = int(magnitude.min())
    counts = np.zeros(int(magnitude.max()) - first + 1, np.int64)
    np.add.at(counts, magnitude - first, density.counts)
    # The smallest magnitude is known only to its bin when there are values of both signs.
    smallest = float(magnitude[density.counts > 0].min(initial=int(magnitude.max())))
    low = 0.0 if density.zeros else max(density.low, -density.high, smallest)
    return Density(density.exponent, first, counts, density.zeros, low, density.limit)


def _quantile(density: Density, q: float) -> float:
    """The quantile between the two neighbouring order statistics, each placed inside its bin."""
    rank = q * (density.nonzero + density.zeros - 1)
    below = math.floor(rank)
    first, second = _order_statistics(density, np.array([below, math.ceil(rank)]))
    return float(first + (second - first) * (rank - below))


def _order_statistics(density: Density, ranks: NDArray[np.int64]) -> Vector:
    """Values of the given ranks (from 0), with zeros in their place; the first and the last are exact."""
    counts, size = density.counts, density.counts.size
    before = int(counts[: min(max(-density.first, 0), size)].sum())  # negative values
    zero = (ranks >= before) & (ranks < before + density.zeros)
    nonzero = np.where(ranks < before, ranks, ranks - density.zeros)
    ends = np.cumsum(counts)
    bins = np.minimum(np.searchsorted(ends, nonzero, side="right"), size - 1)
    inside = (nonzero - (ends[bins] - counts[bins]) + 0.5) / np.maximum(counts[bins], 1)
    values = np.where(zero, 0.0, np.clip(density.first + bins + inside, density.low, density.high))
    last = density.nonzero + density.zeros - 1
    return np.where(ranks == 0, density.low, np.where(ranks == last, density.high, values))
