"""The choice of p against parabolas of known vertex, and everything that can go wrong with one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.errors import DataError, UsageError
from onnxq.search.quadratic import LIMITS, PS, quadratic_minimum, search_p


@given(vertex=st.floats(1.0, 4.0), curvature=st.floats(1e-3, 1e3), floor=st.floats(-10, 10))
def test_the_vertex_of_a_parabola(vertex: float, curvature: float, floor: float) -> None:
    losses = [curvature * (p - vertex) ** 2 + floor for p in PS]
    # losses near 10 that differ by 1e-3 keep about 12 digits of the difference
    assert quadratic_minimum(PS, losses).p == pytest.approx(vertex, abs=1e-6)


def test_fallbacks_take_the_best_sample() -> None:
    down = quadratic_minimum([1, 2, 3, 4], [1.0, 3.0, 3.0, 0.5])
    assert (down.p, down.fallback) == (4, "the parabola opens downward or is flat")
    flat = quadratic_minimum([1, 2, 3], [1.0, 1.0, 1.0])
    assert flat.fallback
    outside = quadratic_minimum([1, 2, 3], [9.0, 4.0, 1.0])
    assert outside.p == 3
    assert outside.fallback == "the vertex 4 is outside 1 to 3"
    few = quadratic_minimum([1, 2, 3], [2.0, math.nan, 1.0])
    assert (few.p, few.fallback) == (3, "fewer than three samples")
    with pytest.raises(DataError, match="not finite at any p"):
        quadratic_minimum([1, 2], [math.inf, math.nan])


def test_infinite_losses_do_not_count() -> None:
    found = quadratic_minimum([1, 2, 3, 4, 5], [math.inf, 1.0, 0.0, 1.0, math.nan])
    assert (found.p, found.fallback) == (3.0, "")


@pytest.mark.parametrize(("vertex", "evaluations"), [(2.2, 11), (5.0, 12), (0.8, 12)])
def test_search_p_widens_until_the_best_is_inside(vertex: float, evaluations: int) -> None:
    asked: list[float] = []

    def loss(p: float) -> float:
        asked.append(p)
        return (p - vertex) ** 2

    chosen = search_p(loss)
    assert chosen.p == pytest.approx(vertex, abs=1e-6)
    assert len(asked) == len(set(asked)) == len(chosen.samples)
    assert len(asked) <= evaluations + 2
    assert not chosen.interrupted


def test_search_p_stays_inside_the_limits() -> None:
    assert search_p(lambda p: p, widenings=20).p == LIMITS[0]
    assert search_p(lambda p: -p, widenings=20).p == LIMITS[1]


def test_a_wide_parabola_misled_by_one_end_is_saved_by_the_neighbours_of_the_best() -> None:
    def loss(p: float) -> float:
        return (p - 2.9) ** 2 + 40.0 * math.exp(-8.0 * (p - 1.0))

    chosen = search_p(loss)
    grid = np.linspace(1, 4, 2001)
    assert chosen.loss == pytest.approx(min(map(loss, grid)), abs=0.005)


@given(st.lists(st.floats(0, 10) | st.just(math.inf), min_size=20, max_size=20), st.randoms())
def test_never_worse_than_the_best_sample(losses: list[float], random: object) -> None:
    seen: dict[float, float] = {}

    def loss(p: float) -> float:
        seen[p] = losses[len(seen)]
        return seen[p]

    if all(map(math.isinf, losses[: len(PS)])):
        return
    chosen = search_p(loss)
    assert chosen.loss == min(seen.values()) == seen[chosen.p]


def test_interrupted_keeps_the_samples() -> None:
    def loss(p: float) -> float:
        if p > 2:
            raise KeyboardInterrupt
        return 5 - p

    chosen = search_p(loss)
    assert chosen.interrupted
    assert chosen.p == 2.0

    def at_once(p: float) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_p(at_once)


def test_what_is_refused() -> None:
    for ps in ([2.0], [2.0, 2.0], [0.1, 2.0], [1.0, 99.0]):
        with pytest.raises(UsageError, match=r"give two or more from 0\.5 to 16"):
            search_p(lambda p: p, ps)
    with pytest.raises(DataError, match="not finite"):
        search_p(lambda p: math.nan)
