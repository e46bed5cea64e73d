"""Line searches against parabolas whose minimum is known, and guards against those that have none."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.search.line import (
    Curve,
    Fit,
    LineRules,
    Look,
    Memory,
    look,
    onward,
    remember,
    sloped,
    target,
    through,
)

RULES = LineRules()


def bowl(centre: float, curvature: float, floor: float = 1.0) -> Curve:
    return lambda t: floor + 0.5 * curvature * (t - centre) ** 2


@given(
    centre=st.floats(-3, 3),
    curvature=st.floats(0.1, 100),
    floor=st.floats(-5, 5),
    a=st.floats(0.05, 0.5),
    b=st.floats(-0.5, -0.05),
)
def test_three_points_or_slope_and_curvature_give_the_parabola(
    centre: float, curvature: float, floor: float, a: float, b: float
) -> None:
    f = bowl(centre, curvature, floor)
    three, two = through(f(0), (a, f(a)), (b, f(b))), sloped(f(0), (a, f(a)), curvature)
    for fit in (three, two):
        # differences of losses near 500 over squares of 0.05 keep about nine digits
        assert fit.curvature == pytest.approx(curvature, rel=1e-6, abs=1e-7)
        assert fit.vertex == pytest.approx(centre, rel=1e-4, abs=1e-5)


def test_a_hill_has_no_vertex() -> None:
    assert Fit(1.0, -2.0).vertex is None
    assert Fit(1.0, 0.0).vertex is None
    assert Fit(math.inf, 1.0).vertex is None
    assert Fit(1.0, 5e-324).vertex is None


def counted(curve: Curve) -> tuple[Curve, list[float]]:
    places: list[float] = []

    def f(t: float) -> float:
        places.append(t)
        return curve(t)

    return f, places


@pytest.mark.parametrize("centre", [-0.5, -0.13, 0.0, 0.13, 0.5])
def test_a_parabola_takes_three_evaluations_at_first_and_two_later(centre: float) -> None:
    memory = Memory(0.2)
    curve, places = counted(bowl(centre, 4.0))
    found = look(curve, curve(0.0), memory)
    place = target(found, memory, RULES)
    assert len(places) == 3
    near = min(abs(centre - t) for t, _ in found.samples) < RULES.tolerance
    assert near if place is None else place == pytest.approx(centre)
    memory = remember(found, memory, RULES, found.best[0] if place is None else place)
    assert memory.curvature == pytest.approx(4.0)
    curve, places = counted(bowl(0.1, 4.0))
    found = look(curve, curve(0.0), memory)
    assert len(places) == 2
    assert target(found, memory, RULES) == pytest.approx(0.1)


def test_the_first_sample_goes_on_where_it_fell_and_back_where_it_rose() -> None:
    curve, places = counted(bowl(1.0, 1.0))
    look(curve, curve(0.0), Memory(0.2))
    assert places == [0.0, 0.2, 0.4]
    curve, places = counted(bowl(-1.0, 1.0))
    look(curve, curve(0.0), Memory(0.2))
    assert places == [0.0, 0.2, -0.2]
    curve, places = counted(bowl(-1.0, 1.0))
    look(curve, curve(0.0), Memory(0.2, side=-1))
    assert places == [0.0, -0.2, -0.4]


def test_the_move_is_limited() -> None:
    memory = Memory(0.2)
    found = look(bowl(50.0, 1.0), bowl(50.0, 1.0)(0.0), memory)
    assert found.fit.vertex == pytest.approx(50.0)
    assert target(found, memory, RULES) == pytest.approx(RULES.reach * 0.2)


def test_no_evaluation_where_little_is_promised() -> None:
    flat = bowl(0.1, 1e-4)
    memory = Memory(0.2)
    assert target(look(flat, flat(0.0), memory), memory, RULES) is None
    steep = bowl(0.1, 10.0)
    assert target(look(steep, steep(0.0), memory), memory, RULES) == pytest.approx(0.1)


def test_the_remembered_width_is_where_the_bowl_has_risen_by_the_share() -> None:
    f = bowl(0.0, 5.0)
    memory = remember(look(f, f(0.0), Memory(0.2)), Memory(0.2), RULES, 0.0)
    assert f(memory.width) - f(0.0) == pytest.approx(RULES.rise * f(0.0))
    steep, flat = bowl(0.0, 1e4), bowl(0.0, 1e-3)
    assert remember(look(steep, 1.0, Memory(0.2)), Memory(0.2), RULES, 0.0).width == RULES.narrowest
    assert remember(look(flat, 1.0, Memory(0.2)), Memory(0.2), RULES, 0.0).width == RULES.widest


def hill(t: float) -> float:
    return 1.0 - 2.0 * t * t - t


def wall(t: float) -> float:
    return math.inf if t else 1.0


def test_a_hill_is_descended_as_far_as_the_reach_and_leaves_no_curvature() -> None:
    found = look(hill, 1.0, Memory(0.2))
    assert target(found, Memory(0.2), RULES) == pytest.approx(RULES.reach * 0.2)
    assert remember(found, Memory(0.2, 3.0), RULES, 0.4) == Memory(0.2, None, 1)


def test_walls_halve_the_width() -> None:
    found = look(wall, 1.0, Memory(0.2, 3.0))
    assert target(found, Memory(0.2), RULES) is None
    assert remember(found, Memory(0.2, 3.0), RULES, 0.0) == Memory(0.1, None, 1)


def test_once_more_where_the_reach_ended() -> None:
    memory, far, near = Memory(0.2), bowl(50.0, 1.0), bowl(0.3, 1.0)
    found = look(far, far(0.0), memory)
    end = RULES.reach * 0.2
    assert onward(found.plus((end, far(end))), memory, RULES) == pytest.approx(2 * end)
    assert onward(found.plus((end, 1e9)), memory, RULES) is None
    inside = look(near, near(0.0), memory)
    assert onward(inside.plus((0.3, near(0.3))), memory, RULES) is None


def test_samples_close_together_do_not_renew_the_curvature() -> None:
    samples = ((0.0, 1.0), (0.2, 1.1), (0.201, 1.4))  # a ripple between the last two
    found = Look(samples, sloped(1.0, (0.2, 1.1), 4.0))
    assert remember(found, Memory(0.2, 4.0), RULES, 0.0).curvature == 4.0
