"""The closest point, against all vectors of codes and against a bounded search of scipy."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from onnxq.points import best_point, errors

Array = NDArray[Any]


def gain(rows: Array, factor: Array, codes: Array) -> Array:
    """By how much a point lowers the squared error."""
    left = rows - factor[:, None] * codes
    return np.asarray((rows.astype(np.float64) ** 2).sum(axis=1) - (left**2).sum(axis=1))


def spread(seed: int, *shape: int) -> Array:
    """Rows from short tails to long ones, of sizes far apart."""
    rng = np.random.default_rng(seed)
    power = np.linspace(0.3, 3, shape[0])[:, None]
    rows = rng.normal(size=shape)
    scale = np.geomspace(1e-6, 1e6, shape[0])[:, None]
    return np.asarray(np.copysign(np.abs(rows) ** power, rows) * scale, np.float32)


@pytest.mark.parametrize("ends", [(-1, 1), (-2, 1), (-3, 3), (-4, 3), (-1, 2)], ids=str)
def test_no_vector_of_codes_is_closer(ends: tuple[int, int]) -> None:
    rows = spread(0, 60, 5)
    every = np.array([q for q in itertools.product(range(ends[0], ends[1] + 1), repeat=5) if any(q)])
    best = ((rows.astype(np.float64) @ every.T) ** 2 / (every**2).sum(axis=1)).max(axis=1)
    factor, codes = best_point(rows, ends)
    assert codes.dtype == np.int8
    assert ends[0] <= codes.min() < 0 < codes.max() <= ends[1]
    np.testing.assert_allclose(gain(rows, factor, codes), best, rtol=1e-5)  # breakpoints are float32


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("size", [1, 9, 300])
def test_no_factor_is_better(bits: int, size: int) -> None:
    """Of 2,000 factors, and of those that a bounded search finds between the best one's neighbours."""
    most = (1 << (bits - 1)) - 1
    rows = spread(bits, 12, size).astype(np.float64)
    factor, codes = best_point(rows, (-most, most))
    found = (rows**2).sum(axis=1) - gain(rows, factor, codes)
    for row, error in zip(rows, found, strict=True):

        def squared(a: float, row: Array = row) -> float:
            return float(((np.clip(np.rint(row / a), -most, most) * a - row) ** 2).sum())

        trials = np.abs(row).max() / most * np.geomspace(0.1, 2 * most, 2000)
        best = trials[int(np.argmin([squared(a) for a in trials]))]
        near = minimize_scalar(squared, bounds=(best * 0.995, best * 1.005), method="bounded")
        assert error <= min(squared(best), near.fun) * (1 + 1e-5) + 1e-12 * (row**2).sum()


def test_the_factor_is_that_of_least_squares() -> None:
    rows = spread(1, 20, 40).astype(np.float64)
    factor, codes = best_point(rows, (-7, 7))
    for row, a, q in zip(rows, factor, codes, strict=True):
        np.testing.assert_allclose(a, np.linalg.lstsq(q[:, None].astype(float), row, rcond=None)[0][0])


def test_signs_do_not_matter() -> None:
    """The longer end of the codes serves the side that needs it."""
    rows = spread(2, 40, 30)
    factor, codes = best_point(rows, (-4, 3))
    turned, others = best_point(-rows, (-4, 3))
    np.testing.assert_allclose(gain(rows, factor, codes), gain(-rows, turned, others), rtol=1e-6)
    assert (factor < 0).any()
    assert (factor > 0).any()


def test_equal_weights_and_zeros() -> None:
    rows = np.array([[2.0] * 5, [0.0] * 5, [0.0, 0.0, -3.0, 0.0, 0.0]], np.float32)
    factor, codes = best_point(rows, (-3, 3))
    np.testing.assert_allclose(factor[:, None] * codes, rows, rtol=1e-6)
    assert factor[1] == 0
    for shape in ((0, 4), (3, 0)):
        factor, codes = best_point(np.zeros(shape), (-3, 3))
        assert codes.shape == shape
        assert not factor.any()


def test_parts_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = spread(3, 30, 17)
    factor, codes = best_point(rows, (-7, 7))
    monkeypatch.setattr(errors, "CHUNK", 40)
    parts = best_point(rows, (-7, 7))
    np.testing.assert_array_equal(parts[0], factor)
    np.testing.assert_array_equal(parts[1], codes)
