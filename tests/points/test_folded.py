"""Points at whole ratios, against all pairs of codes and all steps."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq.affine import dequantize, quantize, sqnr_db
from onnxq.digits import join, split
from onnxq.points import Folded, Grid, errors, fold_fixed, fold_free, output_errors
from onnxq.quantizers import weight_params
from onnxq.saturation import excess, partners
from onnxq.scheme import QuantScheme

Array = NDArray[Any]
FULL = {bits: (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) for bits in range(2, 9)}
NARROW = {bits: (-high, high) for bits, (_, high) in FULL.items()}


def normal(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def alike(size: int, groups: int = 1) -> Array:
    """E[x x^T] of inputs whose neighbours are much alike, (groups, size, size)."""
    near = 0.9 ** np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    scale = np.random.default_rng(size).uniform(0.3, 3, (groups, size))
    return np.asarray(near * scale[:, None] * scale[:, :, None], np.float32)


def values(folded: Folded) -> Array:
    return np.asarray(folded.step.astype(np.float64)[:, None] * folded.codes)


def check(folded: Folded, rows: Array, grid: Grid, count: int, moment: Array | None = None) -> None:
    """What holds of all points that fold."""
    assert folded.codes.dtype == folded.points.dtype == np.int8
    assert folded.points.shape == (count, *rows.shape)
    assert folded.points.min() >= grid.ends[0]
    assert folded.points.max() <= grid.ends[1]
    unit = folded.ratio[:, None] ** np.arange(count)[::-1]
    summed = np.einsum("rn,nrk->rk", unit, folded.points.astype(np.int64))
    np.testing.assert_array_equal(summed, folded.codes)
    assert np.abs(folded.codes.astype(int)).max() <= 127
    expected = output_errors(rows - values(folded), moment)
    np.testing.assert_allclose(folded.error, expected, rtol=1e-3)  # differences of float32 weights


@pytest.mark.parametrize("ends", [*FULL.values(), *NARROW.values()], ids=str)
@pytest.mark.parametrize("count", [2, 3])
def test_every_whole_number_of_the_reach_splits(ends: tuple[int, int], count: int) -> None:
    levels = ends[1] - ends[0] + 1
    for ratio in {2, 3, levels // 2 + 1, levels, -2, -3, -levels}:
        units = [ratio**i for i in range(count)]
        low, high = (sum(pick(u * ends[0], u * ends[1]) for u in units) for pick in (min, max))
        codes = np.arange(max(low, -128), min(high, 127) + 1)[None]
        points = split(codes, ratio, count, ends)
        assert points.min() >= ends[0]
        assert points.max() <= ends[1]
        np.testing.assert_array_equal(join(points, ratio), codes)


def test_what_is_out_of_reach_does_not_split() -> None:
    for codes, ratio in (
        ([[36]], 4),
        ([[-41]], 4),
        ([[8 * 20 + 8]], 20),
    ):  # 17 is the largest ratio without gaps
        with pytest.raises(ValueError, match="do not split into 2 points from -8 to 7"):
            split(np.array(codes), ratio, 2, (-8, 7))


def test_rows_split_at_their_own_ratios() -> None:
    codes, ratio = np.array([[35, -40], [63, -72]]), np.array([4, 8])
    points = split(codes, ratio, 2, (-8, 7))
    np.testing.assert_array_equal(points, [[[7, -8], [7, -8]], [[7, -8], [7, -8]]])
    np.testing.assert_array_equal(join(points, ratio), codes)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("weighed", [False, True])
def test_with_a_fixed_step_no_points_are_better(bits: int, count: int, weighed: bool) -> None:
    """All ratios, and all combinations of codes for each weight."""
    rows, ends = normal(12, 20), NARROW[bits]
    moment = np.geomspace(0.1, 10, 20) if weighed else None
    step = np.linspace(0.4, 1.6, 12)
    found = fold_fixed(rows, step, Grid(ends), count, moment)
    check(found, rows, Grid(ends), count, moment)
    np.testing.assert_allclose(found.step, step / found.ratio ** (count - 1), rtol=1e-6)  # float32
    errors_of_ratios = []
    for ratio in range(2, ends[1] - ends[0] + 2):
        digits = itertools.product(range(ends[0], ends[1] + 1), repeat=count)
        brackets = [sum(d * ratio**-i for i, d in enumerate(digit)) for digit in digits]
        allowed = np.array([b for b in brackets if abs(b) * ratio ** (count - 1) < 127.5])
        nearest = np.abs(rows[:, :, None] - step[:, None, None] * allowed).min(axis=2)
        errors_of_ratios.append(nearest**2 @ (np.ones(20) if moment is None else moment))
    np.testing.assert_allclose(found.error, np.min(errors_of_ratios, axis=0), rtol=1e-4)  # float32


@pytest.mark.parametrize(("ends", "count"), [(FULL[2], 2), (FULL[2], 3), (NARROW[3], 2), (FULL[4], 2)])
@pytest.mark.parametrize("size", [9, 27, 150, 576])
def test_a_free_step_is_close_to_the_best_of_all(ends: tuple[int, int], count: int, size: int) -> None:
    rows = normal(24, size)
    found = fold_free(rows, Grid(ends), count)
    check(found, rows, Grid(ends), count)
    low, high = Grid(ends).folded_ends(ends[1] - ends[0] + 1, count)
    peak = np.maximum(rows.max(axis=1) / high, rows.min(axis=1) / low)
    best = np.full(24, np.inf)
    for part in np.linspace(0.2, 1.1, 2000):
        step = (peak * part)[:, None]
        best = np.minimum(best, ((np.clip(np.rint(rows / step), low, high) * step - rows) ** 2).sum(axis=1))
    # Short rows are solved exactly; the dips of long ones are narrower than the steps that are tried, and not deep.
    assert np.all(found.error < best * (1 + 1e-3 if size < 64 else 1.35))
    assert found.error.sum() < best.sum() * (1 + 1e-3 if size < 64 else 1.1)


@pytest.mark.parametrize(("count", "gain_db"), [(2, 1.0), (3, 1.0)])
def test_a_negative_ratio_evens_out_the_reach(count: int, gain_db: float) -> None:
    """The shorter side of two points of 2 bits grows from 5 to 6 steps (1.6 dB), that of three from 21 to 25 (1.5 dB)."""
    rows = normal(64, 576)
    plain, turned = (Grid(FULL[2], turned=turned) for turned in (False, True))
    found, other = fold_free(rows, plain, count), fold_free(rows, turned, count)
    check(other, rows, turned, count)
    assert np.all(other.error <= found.error)
    assert np.all(found.ratio == 4)
    assert set(other.ratio.tolist()) <= {4, -4}
    assert np.mean(other.ratio == -4) > 0.8
    assert sqnr_db(rows, values(other)) > sqnr_db(rows, values(found)) + gain_db
    assert np.all(fold_free(rows, Grid(NARROW[3], turned=True), count).ratio > 0)  # even as they are


def test_two_points_of_4_bits_are_worth_one_of_8() -> None:
    rows = normal(64, 576)
    params = weight_params("minmax", rows, 0, QuantScheme.parse("int8:channel"))
    eight = sqnr_db(rows, dequantize(quantize(rows, params), params))
    assert sqnr_db(rows, values(fold_free(rows, Grid(FULL[4])))) > eight - 1


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("fixed", [False, True])
def test_more_points_and_more_bits_never_hurt(bits: int, fixed: bool) -> None:
    rows = normal(16, 100)

    def total(bits: int, count: int) -> float:
        grid = Grid(FULL[bits])
        step = np.abs(rows).max(axis=1) / (1 << (bits - 1))
        return float(
            (fold_fixed(rows, step, grid, count) if fixed else fold_free(rows, grid, count)).error.sum()
        )

    if bits < 5:  # beyond, the reach of 8 bits ends before that of three points
        assert total(bits, 3) <= total(bits, 2) * (1 + 1e-6)
    assert total(bits + 1, 2) <= total(bits, 2) * (1 + 1e-6)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("limit", [0, 128])
def test_error_feedback_never_hurts(groups: int, limit: int) -> None:
    rows = normal(24, 60)
    rows[:, :4] = np.abs(rows[:, :4]) + 3  # neighbours that together pass the limit
    moment, grid = alike(60, groups), Grid(FULL[4], partners((24, 60), "Gemm", 0), limit)
    plain, fed = (fold_free(rows, grid, 2, moment, feed=feed) for feed in (False, True))
    check(fed, rows, grid, 2, moment)
    assert np.all(fed.error <= plain.error)
    assert fed.error.sum() < 0.5 * plain.error.sum()  # inputs so much alike leave a fraction of the error
    for folded in (plain, fed):
        assert bool(excess(folded.codes, "Gemm", 0, 128).any()) == (limit == 0)


def test_pairs_keep_the_limit_with_a_fixed_step() -> None:
    rows = np.abs(normal(24, 60)) + 1
    grid = Grid(FULL[4], partners((24, 60), "Gemm", 0), 128)
    found = fold_fixed(rows, rows.max() / 7, grid)
    check(found, rows, grid, 2)
    assert not excess(found.codes, "Gemm", 0, 128).any()
    assert excess(fold_fixed(rows, rows.max() / 7, Grid(grid.ends)).codes, "Gemm", 0, 128).any()


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_parts_do_not_matter(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, moment = normal(12, 20), alike(20, groups)
    whole = fold_free(rows, Grid(FULL[3]), 2, moment)
    for chunk in (1, 50, 100):
        monkeypatch.setattr(errors, "CHUNK", chunk)
        found = fold_free(rows, Grid(FULL[3]), 2, moment)
        np.testing.assert_array_equal(found.codes, whole.codes)
        np.testing.assert_allclose(found.error, whole.error, rtol=1e-4)  # sums in float32 of differences


def test_a_bias_may_ask_for_a_wider_step() -> None:
    rows, least = normal(6, 40), np.array([0, 0, 0.01, 0.1, 0.5, 0.5])
    for found in (
        fold_free(rows, Grid(FULL[4]), least=least),
        fold_fixed(rows, 0.4, Grid(FULL[4]), least=least),
    ):
        check(found, rows, Grid(FULL[4]), 2)
        assert np.all(found.step >= least.astype(np.float32))


@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (3, 0)])
def test_rows_of_zeros_and_no_rows(shape: tuple[int, int]) -> None:
    for found in (
        fold_free(np.zeros(shape, np.float32), Grid(FULL[3])),
        fold_fixed(np.zeros(shape), 0.1, Grid(FULL[3])),
    ):
        assert not found.codes.any()
        assert not found.error.any()
        assert found.points.shape == (2, *shape)
        assert np.all(found.step > 0)


def test_moments_have_to_fit() -> None:
    rows = normal(6, 8)
    whole = alike(8)[0]
    np.testing.assert_allclose(
        output_errors(rows, whole), np.einsum("rk,kl,rl->r", rows, whole, rows), rtol=1e-5
    )
    np.testing.assert_allclose(output_errors(rows), (rows**2).sum(axis=1), rtol=1e-6)
    for shape in ((7,), (8, 7), (4, 8, 8), (1, 1, 8, 8)):
        with pytest.raises(ValueError, match="does not fit rows of shape"):
            output_errors(rows, np.zeros(shape))
