"""Minimum, maximum and sums of each channel of an activation tensor, which merge.

Sums are float64. Where a channel has many values in a row they are put together from sums of at most 8192 values in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CHUNK = 8192  # values: the work arrays stay in cache, and BLAS keeps a dot product this short on one thread
ONES = np.ones(CHUNK, np.float32)
RUN = 16  # values of a channel in a row from which dot products pay


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """Statistics of every channel.

    Attributes:
        count: values in each.
        minimum, maximum: float32, (C,).
        total: sum of x, float64, (C,).
        total_squares: sum of x^2, float64, (C,); None unless needed.
    """

    count: int
    minimum: NDArray[np.float32]
    maximum: NDArray[np.float32]
    total: NDArray[np.float64]
    total_squares: NDArray[np.float64] | None = None

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean of every channel, (C,)."""
        return self.total / self.count

    @property
    def power(self) -> NDArray[np.float64]:
        """E[x^2] of every channel, (C,); it must have been needed."""
        assert self.total_squares is not None
        return self.total_squares / self.count

    @classmethod
    def of(cls, x: NDArray[np.float32], axis: int, power: bool) -> ChannelStatistics:
        """Statistics of one batch; `axis` is not negative."""
        stacked = x.reshape(math.prod(x.shape[:axis]), x.shape[axis], -1)  # (outer, C, inner)
        axes = (0, 2)
        return cls(
            stacked.shape[0] * stacked.shape[2],
            stacked.min(axis=axes),
            stacked.max(axis=axes),
            _sums(stacked),
            np.einsum("ocs,ocs->c", stacked, stacked, dtype=np.float64) if power else None,
        )

    def part(self, channels: slice) -> ChannelStatistics:
        """The statistics of some of the channels."""
        squares = None if self.total_squares is None else self.total_squares[channels]
        ends = self.minimum[channels], self.maximum[channels]
        return ChannelStatistics(self.count, *ends, self.total[channels], squares)

    def merged(self, other: ChannelStatistics) -> ChannelStatistics:
        """The statistics of both together."""
        return ChannelStatistics(
            self.count + other.count,
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
            self.total + other.total,
            _added(self.total_squares, other.total_squares),
        )


def _sums(stacked: NDArray[np.float32]) -> NDArray[np.float64]:
    """Sums over the first and last axis of (outer, C, inner), (C,); dot products are several times as fast as sums in float64."""
    inner = stacked.shape[2]
    if inner < RUN:
        return np.asarray(stacked.sum(axis=(0, 2), dtype=np.float64))
    total = np.zeros(stacked.shape[1])
    for start in range(0, inner, CHUNK):
        piece = stacked[:, :, start : start + CHUNK]
        total += np.vecdot(piece, ONES[: piece.shape[2]]).sum(axis=0, dtype=np.float64)
    return total


def _added(a: NDArray[np.float64] | None, b: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
    return None if a is None or b is None else a + b
