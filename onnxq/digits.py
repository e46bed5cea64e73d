"""Whole numbers as points at whole ratios: a positional number system whose digits are the codes of a point, both ways."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.signedinteger]


def split(codes: Integers, ratio: Integers | int, count: int, ends: tuple[int, int]) -> NDArray[np.int8]:
    """Folded codes as points, int8, (count, R, K): sum_i ratio^(count-1-i) points[i] = codes.

    Each point is the nearest to what is left that leaves no more than the finer points can make up for.

    Args:
        codes: (R, K).
        ratio: () or (R,), from 2 to the number of codes of a point, or the negative of that.
        ends: smallest and largest code of one point.

    Raises:
        ValueError: a code is out of the reach of the points.
    """
    left = codes.astype(np.int64)
    base = np.broadcast_to(np.asarray(ratio, np.int64), len(codes))[:, None]
    points = np.empty((count, *codes.shape), np.int8)
    for i in range(count):
        unit = base ** (count - 1 - i)
        low, high = reach(base, count - 1 - i, ends)  # of the finer points
        first, last = np.where(unit > 0, [left - high, left - low], [left - low, left - high])
        nearest = np.rint(left / unit).astype(np.int64)
        digit = np.clip(np.clip(nearest, -(-first // unit), last // unit), *ends)
        points[i] = digit
        left -= unit * digit
    if left.any():
        raise ValueError(f"codes do not split into {count} points from {ends[0]} to {ends[1]} at their ratio")
    return points


def reach(ratio: Integers, count: int, ends: tuple[int, int]) -> tuple[Integers, Integers]:
    """Smallest and largest sum of `count` points at each ratio."""
    units = [ratio**i for i in range(count)]
    low = sum((np.where(u > 0, u * ends[0], u * ends[1]) for u in units), np.zeros_like(ratio))
    high = sum((np.where(u > 0, u * ends[1], u * ends[0]) for u in units), np.zeros_like(ratio))
    return low, high


def join(points: Integers, ratio: Integers | int) -> NDArray[np.int64]:
    """The folded codes of points (n, R, K) at ratios () or (R,), int64, (R, K); the inverse of `split`."""
    base = np.broadcast_to(np.asarray(ratio, np.int64), points.shape[1])[:, None]
    codes = np.zeros(points.shape[1:], np.int64)
    for point in points:
        codes = codes * base + point
    return codes
