"""Finite differences against quadratics whose derivatives are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq.errors import DataError
from onnxq.search.landscape import (
    contour,
    gaussian_curvature,
    hessian,
    interaction_share,
    sensitivities,
    separability,
)

Vector = NDArray[np.float64]


def quadratic(
    matrix: Vector, slope: Vector, floor: float = 1.0
) -> tuple[Callable[[Vector], float], list[Vector]]:
    """A loss with that Hessian and gradient at 0, and the points it was asked for."""
    asked: list[Vector] = []

    def loss(point: Vector) -> float:
        asked.append(point.copy())
        return float(floor + slope @ point + 0.5 * point @ matrix @ point)

    return loss, asked


def coupled(n: int, strength: float) -> Vector:
    """A positive definite matrix with diagonal over four decades and interactions of neighbours."""
    root = np.diag(np.logspace(-1, 1, n))
    return np.asarray(root @ (np.eye(n) + strength * (np.eye(n, k=1) + np.eye(n, k=-1))) @ root)


def test_derivatives_of_a_quadratic_are_exact() -> None:
    matrix, slope = coupled(5, 0.4), np.linspace(-1.5, 2.5, 5)
    loss, asked = quadratic(matrix, slope)
    lines = sensitivities(loss, np.zeros(5))
    assert len(asked) == 11
    np.testing.assert_allclose(lines.gradient, slope, atol=1e-12)
    np.testing.assert_allclose(lines.curvature, np.diag(matrix), rtol=1e-9)  # 1e-16 over squares of 0.1
    np.testing.assert_allclose(hessian(loss, np.zeros(5), lines), matrix, atol=1e-10)
    assert len(asked) == 11 + 5 * 4
    expected = np.linalg.det(matrix) / (1 + slope @ slope) ** 2
    assert gaussian_curvature(lines.gradient, matrix) == pytest.approx(expected)


def test_the_promised_gain_is_that_of_each_coordinate_alone() -> None:
    loss, _ = quadratic(np.diag([100.0, 50.0]), np.array([5.0, -2.0]))
    np.testing.assert_allclose(sensitivities(loss, np.zeros(2)).gain, [5**2 / 200, 2**2 / 100], rtol=1e-9)
    hill, _ = quadratic(np.diag([-1.0, 1e-9]), np.array([3.0, 3.0]))
    # no further than one stride down a hill, two along a line
    np.testing.assert_allclose(sensitivities(hill, np.zeros(2)).gain, [0.3, 0.6], rtol=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.3, 0.45])
def test_probes_estimate_the_share_of_interactions(strength: float) -> None:
    n = 20
    matrix = coupled(n, strength)
    energy = 2 * (n - 1) * strength**2
    true = energy / (energy + n)
    assert interaction_share(matrix) == pytest.approx(true)
    loss, asked = quadratic(matrix, np.zeros(n))
    found = separability(loss, np.zeros(n), probes=400)
    assert len(asked) == found.evaluations == 2 * n + 1 + 800
    # the estimate of a variance from 400 draws is off by sqrt(2 / 400) = 7 % and somewhat more for heavy tails
    assert found.share == pytest.approx(true, rel=0.3, abs=1e-9)
    assert found.gain == pytest.approx(0.0, abs=1e-9)
    assert not found.pays


def test_a_few_dozen_evaluations_tell_coupled_from_separable() -> None:
    for seed in range(5):
        shares = [
            separability(quadratic(coupled(20, s), np.zeros(20))[0], np.zeros(20), seed=seed).share
            for s in (0.0, 0.45)
        ]
        assert shares[0] < 0.01 < 0.1 < shares[1]


def test_the_verdict_names_what_it_rests_on() -> None:
    loss, _ = quadratic(np.eye(2) + 0.9 * np.eye(2)[::-1], np.array([0.5, 0.5]), floor=0.5)
    found = separability(loss, np.zeros(2))
    assert found.pays
    assert found.verdict.startswith("the steps are coupled (interactions ")
    assert found.verdict.endswith("a joint search should pay")
    calm, _ = quadratic(np.eye(2), np.zeros(2))
    assert separability(calm, np.zeros(2)).verdict.endswith("a joint search will bring little")


def test_without_positive_curvature_nothing_interacts() -> None:
    loss, _ = quadratic(-np.eye(3), np.zeros(3))
    assert separability(loss, np.zeros(3)).share == 0.0
    assert interaction_share(-np.eye(3)) == 0.0


def test_contour() -> None:
    loss, _ = quadratic(np.diag([1.0, 2.0, 4.0]), np.zeros(3), floor=0.0)
    grid = contour(loss, np.zeros(3), (0, 2), [-1.0, 0.0], [0.0, 1.0, 2.0])
    np.testing.assert_allclose(grid, [[0.5, 2.5, 8.5], [0.0, 2.0, 8.0]])


def test_a_loss_that_is_not_finite() -> None:
    with pytest.raises(DataError, match="the loss at the analysed point is nan"):
        sensitivities(lambda _: float("nan"), np.zeros(2))
