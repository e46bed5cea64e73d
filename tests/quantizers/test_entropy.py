"""Entropy against a direct evaluation of the divergence, clip by clip and bin by bin."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from onnxq.calibration.statistics import TensorStatistics
from onnxq.quantizers.density import Density
from onnxq.quantizers.entropy import SMOOTHING, Entropy, _divergences, best_share
from onnxq.scheme import QuantScheme

Gather = Callable[[NDArray[Any]], TensorStatistics]
Draw = Callable[[str], NDArray[np.float32]]


def divergence(counts: NDArray[np.float64], first: int, clip: int, codes: int, symmetric: bool) -> float:
    """KL(P || Q) of one clip, written out."""
    low = -clip if symmetric else max(-clip, first)
    high = clip if symmetric else min(clip, first + counts.size)
    inside = [i for i in range(counts.size) if low <= first + i < high]
    if not inside:
        return math.inf
    p = counts[inside].copy()
    p[0] += counts[: inside[0]].sum()
    p[-1] += counts[inside[-1] + 1 :].sum()
    code = np.array([int((first + i + 0.5 - low) / (high - low) * codes) for i in inside])
    q = np.zeros(len(inside))
    for c in np.unique(code):
        members = (code == c) & (p > 0)
        q[members] = counts[inside][code == c].sum() / max(members.sum(), 1)
    q = (1 - SMOOTHING) * q / max(q.sum(), 1.0) + SMOOTHING * (p > 0) / (p > 0).sum()
    return float(stats.entropy(p[p > 0], q[p > 0]))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("first", [0, -37, -10, 12])
@pytest.mark.parametrize("codes", [4, 7, 16])
def test_divergences(symmetric: bool, first: int, codes: int) -> None:
    rng = np.random.default_rng(codes)
    counts = rng.poisson(40 * np.exp(-(((np.arange(60) + first) / 15.0) ** 2))).astype(np.float64)
    counts[[0, -1]] += 2  # outliers, beyond bins that are empty
    clips = np.arange(max(codes, first + 1), 61 + max(first, 0))
    found = _divergences(counts, first, clips, codes, symmetric)
    # stats.entropy normalises q, which is already of unit sum; float64 sums of 60 terms
    for clip, value in zip(clips, found, strict=True):
        assert value == pytest.approx(divergence(counts, first, int(clip), codes, symmetric), abs=1e-9)


@pytest.mark.parametrize("kind", ["normal", "relu", "student", "skewed", "outlier"])
@pytest.mark.parametrize("scheme", ["uint8", "int8", "uint4", "int4"])
def test_the_clip_is_sane(kind: str, scheme: str, gather: Gather, draw: Draw) -> None:
    values = draw(kind)
    low, high = Entropy().tensor_range(gather(values), QuantScheme.parse(scheme))
    assert values.min() <= low <= high <= values.max()
    if kind == "outlier":
        # One value in 20,001, at 300. No clip is below one bin a code, 256 of at least 1025 bins.
        assert high <= 300.0 / 4.0
    inside = np.mean((values >= low) & (values <= high))
    assert inside > 0.9


def test_a_uniform_density_is_not_clipped(gather: Gather) -> None:
    values = np.linspace(0.0, 1.0, 400_001)
    for scheme in ("uint8", "uint4", "int8"):
        assert best_share(Density.of(gather(values)), QuantScheme.parse(scheme)) > 0.98


def test_rows_share_one_clip(draw: Draw) -> None:
    rows = draw("student").reshape(10, -1) * (np.arange(10, dtype=np.float32)[:, None] + 1.0)
    low, high = Entropy().row_ranges(rows, QuantScheme.parse("int8"))
    shares = np.maximum(-low, high) / np.abs(rows).max(axis=1)
    # a side may end before the clip, so only the larger side counts
    assert shares.max() == pytest.approx(shares.min(), rel=1e-6)
    assert 0.0 < shares.max() <= 1.0
