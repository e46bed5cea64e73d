"""The density that a histogram stands for, in units of its bin width.

In these units the edges are integers, so whatever is searched comes out the same for x and for 2^k x, and
neither 1e30 nor 1e-30 is anything special.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxq.calibration.statistics import TensorStatistics
from onnxq.errors import DataError
from onnxq.quantizers.base import Vector


@dataclass(frozen=True, eq=False)
class Density:
    """Values spread evenly over each bin, and a spike at zero.

    Attributes:
        exponent: a unit is 2^exponent.
        first: number of the first bin; bin i covers [first + i, first + i + 1).
        counts: nonzero values in each bin, int64 (B,).
        zeros: values that are exactly zero.
        low, high: smallest and largest value, in units.
    """

    exponent: int
    first: int
    counts: NDArray[np.int64]
    zeros: int
    low: float
    high: float

    @classmethod
    def of(cls, statistics: TensorStatistics) -> Density:
        """The density of a tensor; DataError without a histogram."""
        histogram = statistics.histogram
        if histogram is None:
            raise DataError(f"tensor {statistics.name!r} has no histogram")
        low, high = (math.ldexp(end, -histogram.exponent) for end in (statistics.minimum, statistics.maximum))
        return cls(histogram.exponent, histogram.first, histogram.counts, statistics.zeros, low, high)

    @property
    def nonzero(self) -> int:
        """Number of values that are not zero."""
        return int(self.counts.sum())

    @property
    def limit(self) -> float:
        """Largest magnitude."""
        return max(-self.low, self.high)

    def edges(self) -> Vector:
        """Edges of the bins, (B + 1,); the outer ones are at the smallest and the largest value."""
        edges = (self.first + np.arange(self.counts.size + 1)).astype(np.float64)
        edges[0] = max(edges[0], self.low)
        # A sliver is left when the maximum lies on an edge, so that no bin is empty of width.
        edges[-1] = min(edges[-1], max(self.high, edges[-2]) + 2.0**-10)
        return edges

    def moments(self, about: float = 0.0) -> tuple[float, float]:
        """Mean of |x - about| and of (x - about)^2 over the nonzero values, from the middles of the bins."""
        edges = self.edges()
        distance = np.abs((edges[1:] + edges[:-1]) / 2 - about)
        total = max(self.nonzero, 1)
        return float(distance @ self.counts) / total, float(distance**2 @ self.counts) / total

    def mean(self) -> float:
        """Mean of the nonzero values."""
        edges = self.edges()
        return float((edges[1:] + edges[:-1]) / 2 @ self.counts) / max(self.nonzero, 1)

    def real(self, value: float) -> float:
        """A value in units as a value of the tensor."""
        return math.ldexp(value, self.exponent)
