"""Entropy: the clip whose quantized histogram is nearest to the original in Kullback-Leibler divergence.

Migacz, "8-bit Inference with TensorRT", GTC 2017: for a clip t, P is the histogram inside [-t, t] with the
rest added to its end bins, and Q is the histogram inside, where every code's bins share its values evenly
(empty bins stay empty). What the slides leave open is settled so:

- Q is mixed with a trace of the uniform density over the bins that P fills, so an end bin that holds nothing
  but outliers costs much, not infinity;
- zeros are exact in every grid and stay out of both;
- a clip is no narrower than one bin a code, below which Q = P and only chance decides;
- the range is [max(-t, min), min(t, max)], so tensors of one sign and of both are the same problem.

All clips are evaluated at once: within a code log Q is constant, so prefix sums over the histogram suffice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxq.calibration.statistics import Needs, TensorStatistics
from onnxq.quantizers.base import RangeMethod, Rows, Vector
from onnxq.quantizers.density import Density
from onnxq.scheme import QuantScheme

CLIPS = 192
SMOOTHING = 1e-4
MOST_BINS = 2048  # finer bins hold more chance than shape


@dataclass(frozen=True)
class Entropy(RangeMethod):
    """The range of least Kullback-Leibler divergence."""

    name: ClassVar[str] = "entropy"

    def tensor_range(self, statistics: TensorStatistics, scheme: QuantScheme) -> tuple[float, float]:
        """The range of the best clip; the whole range when there are fewer bins than codes."""
        density = Density.of(statistics)
        clip = density.limit * best_share(density, scheme)
        return density.real(max(density.low, -clip)), density.real(min(density.high, clip))

    def row_ranges(self, rows: Rows, scheme: QuantScheme) -> tuple[Vector, Vector]:
        """Every row is clipped at the same share of its largest magnitude.

        A row holds too few values for a divergence between histograms; the rows together, each scaled to its
        largest magnitude, have one.
        """
        low, high = rows.min(axis=1).astype(np.float64), rows.max(axis=1).astype(np.float64)
        limit = np.maximum(-low, high)
        scaled = np.divide(
            rows, limit[:, None], out=np.zeros_like(rows), where=limit[:, None] > 0.0, dtype=np.float64
        )
        pooled = TensorStatistics("weights", Needs(histogram=True))
        pooled.update(scaled)
        clip = limit * best_share(Density.of(pooled), scheme)
        return np.maximum(low, -clip), np.minimum(high, clip)


def best_share(density: Density, scheme: QuantScheme) -> float:
    """The best clip as a share of the largest magnitude, in (0, 1]."""
    codes = scheme.qmax - scheme.qmin + 1
    counts, first, width = _coarser(density)
    last = first + counts.size
    largest = max(-first, last)
    least = max((codes + 1) // 2 if scheme.symmetric else codes, largest - counts.size + 1)
    if least >= largest or density.nonzero == 0:
        return 1.0
    clips = np.unique(np.rint(np.geomspace(least, largest, CLIPS)).astype(np.int64))
    divergence = _divergences(counts.astype(np.float64), first, clips, codes, scheme.symmetric)
    return min(float(clips[np.argmin(divergence)]) * width / density.limit, 1.0)


def _coarser(density: Density) -> tuple[NDArray[np.int64], int, int]:
    """Counts, first bin, and how many units wide a bin is, with at most MOST_BINS bins or one more."""
    width = -(-density.counts.size // MOST_BINS)
    bins = (density.first + np.arange(density.counts.size)) // width
    counts = np.zeros(bins[-1] - bins[0] + 1, np.int64)
    np.add.at(counts, bins - bins[0], density.counts)
    return counts, int(bins[0]), width


def _divergences(
    counts: Vector, first: int, clips: NDArray[np.int64], codes: int, symmetric: bool
) -> NDArray[np.float64]:
    """KL(P || Q) for every clip, (N,), in nats."""
    low = -clips if symmetric else np.maximum(-clips, first)
    high = clips if symmetric else np.minimum(clips, first + counts.size)
    bounds = low[:, None] + (high - low)[:, None] * np.arange(codes + 1) / codes  # (N, codes + 1)
    # A bin belongs to the code that holds its middle.
    bounds = np.clip(np.ceil(bounds - 0.5).astype(np.int64) - first, 0, counts.size)
    start, end = bounds[:, 0], bounds[:, -1]
    mass, filled, logs = (_prefix(a) for a in (counts, counts > 0, _xlogx(counts)))
    below, above, total = mass[start], mass[-1] - mass[end], mass[-1]
    inside = np.diff(mass[bounds], axis=1)  # (N, codes)
    support = np.diff(filled[bounds], axis=1)
    entropy = logs[end] - logs[start]
    outside = np.zeros_like(inside)
    rows = np.arange(clips.size)
    for bin_, extra in ((start, below), (end - 1, above)):
        code = np.clip((bounds[:, 1:] <= bin_[:, None]).sum(axis=1), 0, codes - 1)
        held = counts[np.clip(bin_, 0, counts.size - 1)]
        outside[rows, code] += extra
        support[rows, code] += (held == 0) & (extra > 0)
        entropy += _xlogx(held + extra) - _xlogx(held)
    kept = np.maximum(inside.sum(axis=1, keepdims=True), 1.0)
    q = (1.0 - SMOOTHING) * inside / np.maximum(support, 1) / kept
    q += SMOOTHING / np.maximum(support.sum(axis=1, keepdims=True), 1)
    cross = ((inside + outside) * np.log(q)).sum(axis=1)
    return np.asarray((entropy - cross) / total - np.log(total))


def _prefix(values: NDArray[np.generic]) -> Vector:
    """Sums of the values before each position, (B + 1,)."""
    return np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))


def _xlogx(values: Vector) -> Vector:
    """x log x, 0 at 0."""
    return values * np.log(np.maximum(values, 1.0))
