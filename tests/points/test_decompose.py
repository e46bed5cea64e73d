"""Points with free factors, against least squares of numpy and all sums of codes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq.affine import sqnr_db
from onnxq.errors import UsageError
from onnxq.points import Points, best_point, decompose, decompose_until, errors, output_errors
from onnxq.points.decompose import CONSTRUCTIONS, Choice, nearest_codes

Array = NDArray[Any]
CHOICES: tuple[Choice, ...] = (*CONSTRUCTIONS, "best")


def normal(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def alike(size: int, groups: int = 1) -> Array:
    """E[x x^T] of inputs whose neighbours are much alike, (groups, size, size)."""
    near = 0.9 ** np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    return np.asarray(np.broadcast_to(near, (groups, size, size)), np.float32)


def error(rows: Array, points: Points, moment: Array | None = None) -> Array:
    return np.asarray(output_errors(rows - points.values(), moment))


def test_one_point_is_the_closest() -> None:
    rows = normal(10, 40)
    factor, codes = best_point(rows, (-7, 7))
    for construction in CONSTRUCTIONS:
        found = decompose(rows, (-7, 7), 1, construction)
        np.testing.assert_array_equal(found.codes[0], codes)
        np.testing.assert_allclose(found.factors[0], factor, rtol=1e-9)


@pytest.mark.parametrize("construction", CHOICES)
@pytest.mark.parametrize("moment", [None, np.geomspace(0.1, 10, 50), alike(50), alike(50, 4)])
def test_factors_are_those_of_least_squares(construction: Choice, moment: Array | None) -> None:
    rows = normal(8, 50).astype(np.float64)
    found = decompose(rows, (-3, 3), 2, construction, moment)
    assert found.codes.dtype == np.int8
    assert np.abs(found.codes).max() == 3
    whole = np.zeros((1, 50, 50)) + (
        np.eye(50) if moment is None else np.diag(moment) if moment.ndim == 1 else moment
    )
    for i, row in enumerate(rows):
        root = np.linalg.cholesky(whole[i // (8 // len(whole))].astype(np.float64)).T
        best = np.linalg.lstsq(root @ found.codes[:, i].T, root @ row, rcond=None)[0]
        np.testing.assert_allclose(found.factors[:, i], best, rtol=1e-5)  # moments are float32


@pytest.mark.parametrize("moment", [None, np.geomspace(0.1, 10, 150)])
def test_more_points_are_closer_and_the_best_is_as_good_as_each(moment: Array | None) -> None:
    rows = np.random.default_rng(0).standard_t(4, (12, 150)).astype(np.float32)
    before = error(rows, decompose(rows, (-3, 3), 1), moment)
    for count in (2, 3):
        best = error(rows, decompose(rows, (-3, 3), count, moment=moment), moment)
        assert np.all(best < before / 2)
        for construction in CONSTRUCTIONS:
            one = error(rows, decompose(rows, (-3, 3), count, construction, moment), moment)
            assert best.sum() <= one.sum() * 1.02  # the best is chosen before codes are rounded anew
        before = best


@pytest.mark.parametrize("factors", [(1.0, 0.19), (0.24, -1.0), (1.0, 0.19, 0.045)])
def test_codes_are_those_of_the_nearest_sum(factors: tuple[float, ...]) -> None:
    """Where the finer points reach less far than a step of the coarser one, only two codes of each can be in it."""
    ordered = sorted(factors, key=abs, reverse=True)
    rows = np.random.default_rng(0).uniform(-5, 5, (2, 300))
    codes = nearest_codes(rows, np.repeat(np.array(ordered)[:, None], 2, axis=1), (-3, 3))
    sums = np.array(list(itertools.product(range(-3, 4), repeat=len(ordered)))) @ ordered
    distance = np.abs(np.tensordot(ordered, codes, 1) - rows)
    np.testing.assert_allclose(distance, np.abs(rows[..., None] - sums).min(axis=2), atol=1e-12)


def test_no_factors_nearby_are_much_better() -> None:
    """Short rows of 2 bits: all pairs of factors of a fine grid, each weight with its best sum of codes."""
    rows = normal(20, 6).astype(np.float64)
    sums = np.array(list(itertools.product((-1, 0, 1), repeat=2)))
    scale = np.abs(rows).max(axis=1)
    grid = np.linspace(0.02, 1, 50)
    best = np.full(20, np.inf)
    for pair in itertools.product(grid, grid):
        levels = scale[:, None, None] * (sums @ pair)
        best = np.minimum(best, (np.abs(rows[:, :, None] - levels).min(axis=2) ** 2).sum(axis=1))
    found = error(rows, decompose(rows, (-1, 1), 2))
    assert found.sum() < 1.5 * best.sum()  # six weights have many combinations; a greedy start misses some
    greedy = error(rows, decompose(rows, (-1, 1), 2, "greedy"))
    assert found.sum() <= greedy.sum()


@pytest.mark.parametrize(("bits", "least"), [(2, 14), (3, 27.5), (4, 40.5)])
def test_two_points_of_gaussian_rows(bits: int, least: float) -> None:
    """The most that a first point that clips nothing, a greedy one and one that looks ahead give."""
    rows, most = normal(32, 576), (1 << (bits - 1)) - 1
    found = {c: sqnr_db(rows, decompose(rows, (-most, most), 2, c).values()) for c in CHOICES}
    assert found["best"] >= max(found.values()) - 0.05
    assert found["best"] > least
    assert (found["greedy"] > found["absmax"]) == (bits == 2)
    factor, codes = best_point(rows, (-127, 127))
    assert bits < 4 or found["best"] > sqnr_db(rows, factor[:, None] * codes) - 2  # one point of 8 bits


def test_points_until_the_error_is_met() -> None:
    rows = normal(30, 60) * np.geomspace(0.01, 10, 30, dtype=np.float32)[:, None]
    limit = 0.05
    found, number = decompose_until(rows, (-3, 3), limit, 3)
    left = error(rows, found)
    assert set(number) == {1, 2, 3}
    assert np.all(np.diff(number) >= 0)
    assert np.all((left <= limit) | (number == 3))
    for i, count in enumerate(number):
        assert not found.factors[count:, i].any()
        assert count == 1 or error(rows, decompose(rows, (-3, 3), count - 1))[i] > limit
    few, ones = decompose_until(rows, (-3, 3), np.full(30, 1e9), 3)
    assert len(few.codes) == 1
    assert np.all(ones == 1)


def test_zeros_and_no_rows() -> None:
    for shape in ((3, 5), (0, 5), (3, 0)):
        for construction in CONSTRUCTIONS:
            assert not decompose(np.zeros(shape), (-3, 3), 2, construction).values().any()


@pytest.mark.parametrize("groups", [1, 4])
def test_parts_do_not_matter(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, moment = normal(12, 20), alike(20, groups)
    whole = decompose(rows, (-3, 3), 2, moment=moment)
    monkeypatch.setattr(errors, "CHUNK", 30)
    np.testing.assert_array_equal(decompose(rows, (-3, 3), 2, moment=moment).codes, whole.codes)


def test_an_unknown_construction_is_an_error() -> None:
    with pytest.raises(UsageError, match="did you mean 'greedy'"):
        decompose(normal(2, 3), (-3, 3), 2, "gredy")  # type: ignore[arg-type]
