"""The joint search against losses of known minimum, scipy's Powell, and its own promises."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxq.errors import DataError, UsageError
from onnxq.search import Budget, Checkpoint, LineRules, Part, Progress, Rules, StepLoss, estimate, minimize
from onnxq.search.reference import scipy_powell

Vector = NDArray[np.float64]
ALONE = Rules(hold="none")


@dataclass
class Recorded:
    """A loss over points that keeps what it was asked."""

    loss: Callable[[Vector], float]
    held: Callable[[Vector], float] | None = None
    coarse: Callable[[Vector], float] | None = None
    costs: Mapping[Part, float] = field(default_factory=lambda: {"search": 1.0, "coarse": 0.25, "held": 0.5})
    asked: list[tuple[str, tuple[float, ...], int | None]] = field(default_factory=list)

    def evaluate(self, point: Vector, part: Part = "search", changed: int | None = None) -> float:
        self.asked.append((part, tuple(point), changed))
        return (self.coarse or self.loss)(point) if part == "coarse" else self.loss(point)

    def validate(self, point: Vector) -> float:
        self.asked.append(("held", tuple(point), None))
        return (self.held or self.loss)(point)


def quadratic(n: int, coupling: float, seed: int = 0, floor: float = 0.02) -> Callable[[Vector], float]:
    """A bowl with its minimum `floor` about 0.3 away in each log step, curvatures over a decade."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=n) * 0.3
    root = np.diag(10.0 ** rng.uniform(-0.5, 0.0, n))
    matrix = root @ ((1 - coupling) * np.eye(n) + coupling * np.ones((n, n))) @ root

    def loss(point: Vector) -> float:
        away = point - centre
        return float(floor + 0.5 * away @ matrix @ away)

    return loss


def rippled(loss: Callable[[Vector], float], height: float = 0.01) -> Callable[[Vector], float]:
    """With ripples of that share of the loss, shorter than a width."""
    return lambda point: (
        loss(point) * (1.0 + height * math.sin(float(np.sum(np.arange(7, 7 + len(point)) * point * 9))))
    )


def rosenbrock(point: Vector) -> float:
    """A curved valley whose minimum 0.05 is at log step 0.5 in every coordinate."""
    x = 2.0 * point
    return float(0.05 + np.sum(5.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2))


def test_a_separable_bowl_takes_three_evaluations_a_variable() -> None:
    loss = quadratic(20, 0.0)
    found = minimize(Recorded(loss), 20, ALONE)
    assert found.loss_end < 1.01 * 0.02
    assert found.history[-1][1] == found.loss_end == loss(found.point)
    one = minimize(Recorded(loss), 20, replace(ALONE, sweeps=1))
    assert one.evaluations <= 1 + 3 * 20 + 2
    assert one.loss_end < 1.06 * 0.02  # one parabola a variable, about points up to 0.6 from its minimum


LOSSES = {
    "separable": quadratic(16, 0.0),
    "coupled": quadratic(16, 0.5),
    "strongly coupled": quadratic(16, 0.9),
    "rippled": rippled(quadratic(16, 0.5)),
    "valley": rosenbrock,
}


@pytest.mark.parametrize("name", LOSSES)
def test_no_worse_than_one_iteration_of_scipys_powell_with_far_fewer_evaluations(name: str) -> None:
    n = 4 if name == "valley" else 16
    _, loss, evaluations = scipy_powell(Recorded(LOSSES[name]), n)
    found = minimize(Recorded(LOSSES[name]), n, replace(ALONE, sweeps=12))
    # 2 % of the loss is the accuracy of the line searches
    reached = [spent for spent, level in found.history if level <= 1.02 * loss]
    assert reached
    assert (
        reached[0] <= 0.75 * evaluations
    )  # smooth losses suit scipy's interpolation; see the network for others


def test_the_displacement_joins_the_directions_of_a_valley() -> None:
    """Sweeps along coordinates alone creep in a strongly coupled bowl."""
    loss = quadratic(6, 0.97, floor=0.001)
    seen: list[int | None] = []
    objective = Recorded(loss)
    found = minimize(objective, 6, replace(ALONE, sweeps=8, tolerance=1e-4))
    seen = [changed for _, _, changed in objective.asked[-20:]]
    assert None in seen
    assert found.loss_end < 1.5 * 0.001


def test_powells_rule_says_which_direction_the_displacement_replaces(tmp_path: Path) -> None:
    """Recomputed from the points that were asked for, in the form of Numerical Recipes (10.5)."""
    outcomes = set()
    for seed in range(30):
        loss = quadratic(4, (seed % 10) / 10, seed)
        objective, checkpoint = Recorded(loss), Checkpoint(tmp_path / f"{seed}.json", {})
        minimize(objective, 4, replace(ALONE, sweeps=1, order="forward"), checkpoint=checkpoint)
        lowest = [loss(np.zeros(4))]  # the best after each coordinate
        for coordinate in range(4):
            tried = [loss(np.array(p)) for _, p, changed in objective.asked if changed == coordinate]
            lowest.append(min([lowest[-1], *tried]))
        beyond = next(p for _, p, changed in objective.asked[1:] if changed is None)
        before, after, extrapolated = lowest[0], lowest[-1], loss(np.array(beyond))
        assert loss(np.array(beyond) / 2) == pytest.approx(after)  # the start is 0
        drops = -np.diff(lowest)
        biggest = float(drops.max())
        curved = 2 * (before - 2 * after + extrapolated) * (before - after - biggest) ** 2
        adds = extrapolated < before and curved < biggest * (before - extrapolated) ** 2
        directions = json.loads(checkpoint.path.read_text())["state"]["directions"]
        assert isinstance(directions[-1], list) == adds
        if adds:
            assert directions[:-1] == [i for i in range(4) if i != int(np.argmax(drops))]
            np.testing.assert_allclose(directions[-1], np.array(beyond) / np.linalg.norm(beyond), atol=1e-12)
        outcomes.add(adds)
    assert outcomes == {True, False}


def test_downward_parabolas_are_followed_as_far_as_the_reach() -> None:
    found = minimize(
        Recorded(lambda p: float(2.0 - p[0] ** 2 * (abs(p[0]) < 5))), 1, replace(ALONE, sweeps=1)
    )
    assert found.loss_end < 2.0
    assert abs(found.point[0]) <= 2 * 3 * 0.2 + 1e-9


def jagged(seed: int, walls: float) -> Callable[[Vector], float]:
    """Any numbers at all, the same for the same point; a share of them not finite."""

    def loss(point: Vector) -> float:
        rng = np.random.default_rng([seed, *np.frombuffer(np.asarray(point).tobytes(), np.uint32)])
        return (
            float(rng.choice([np.nan, np.inf]))
            if point.any() and rng.random() < walls
            else float(rng.normal())
        )

    return loss


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    walls=st.sampled_from([0.0, 0.3, 1.0]),
    hold=st.sampled_from(["step", "sweep", "none"]),
    coarse=st.integers(0, 2),
    order=st.sampled_from(["forward", "backward"]),
    budget=st.none() | st.integers(2, 40),
    interrupt=st.none() | st.integers(3, 40),
)
def test_never_worse_than_the_start_on_search_and_held_samples(
    n: int,
    seed: int,
    walls: float,
    hold: str,
    coarse: int,
    order: str,
    budget: int | None,
    interrupt: int | None,
) -> None:
    objective = Recorded(jagged(seed, walls), jagged(seed + 1, walls), jagged(seed + 2, walls))
    rules = Rules(hold=hold, coarse_sweeps=coarse, order=order)  # type: ignore[arg-type]
    plain = objective.loss
    if interrupt:
        objective.loss = Stop(objective.loss, interrupt)
    found = minimize(objective, n, rules, Budget(budget))
    assert found.loss_end <= found.loss_start
    assert plain(found.point) == found.loss_end
    if hold == "none":
        assert found.held_end is None
    else:
        assert found.held_start is not None
        assert found.held_end is not None
        assert found.held_end <= found.held_start
        assert objective.validate(found.point) == found.held_end
    assert budget is None or found.evaluations <= budget
    searched = [loss for _, loss in found.history]
    assert hold == "sweep" or searched == sorted(searched, reverse=True)


def test_a_step_that_loses_on_held_back_samples_is_refused() -> None:
    def loss(p: Vector) -> float:
        return float(1 + (p[0] - 0.3) ** 2 + (p[1] - 0.3) ** 2)

    def held(p: Vector) -> float:
        return float(1 + (p[0] - 0.3) ** 2 + (p[1] + 0.3) ** 2)

    for hold in ("step", "sweep"):
        found = minimize(Recorded(loss, held), 2, Rules(hold=hold))
        assert found.held_end is not None
        assert found.held_start is not None
        assert found.held_end <= found.held_start
    step = minimize(Recorded(loss, held), 2, Rules(hold="step"))
    np.testing.assert_allclose(step.point, [0.3, 0.0], atol=0.02)
    assert step.rejected > 0
    free = minimize(Recorded(loss, held), 2, ALONE)
    np.testing.assert_allclose(free.point, [0.3, 0.3], atol=0.02)


def test_a_sweep_cut_short_is_checked_within_the_budget() -> None:
    """The held-back check of a sweep comes at its end; one that never gets there has it as well."""

    def loss(p: Vector) -> float:
        return float(1 + np.sum((p - 0.3) ** 2))

    def opposite(p: Vector) -> float:
        return float(1 + np.sum((p + 0.3) ** 2))

    for held, kept in ((loss, True), (opposite, False)):
        objective = Recorded(loss, held)
        found = minimize(objective, 9, Rules(hold="sweep"), Budget(12.5))
        assert found.stopped == "evaluations"
        assert found.evaluations <= 12.5
        assert bool(found.point.any()) == kept
        assert (found.held_end, found.loss_end) == (objective.validate(found.point), loss(found.point))


def test_coarse_samples_bracket_and_all_samples_decide() -> None:
    loss = quadratic(8, 0.2)
    objective = Recorded(loss, coarse=rippled(loss, 0.02))
    found = minimize(objective, 8, replace(ALONE, coarse_sweeps=1, sweeps=1))
    assert found.calls["coarse"] > found.calls["search"]
    assert found.evaluations == found.calls["search"] + 0.25 * found.calls["coarse"]
    assert found.loss_end < 0.5 * found.loss_start
    assert found.evaluations < minimize(Recorded(loss), 8, replace(ALONE, sweeps=1)).evaluations

    misled = Recorded(loss, coarse=lambda p: -loss(p))
    assert minimize(misled, 8, replace(ALONE, coarse_sweeps=1, sweeps=1)).loss_end <= loss(np.zeros(8))


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_order_and_the_hint_of_what_changed(order: str) -> None:
    objective = Recorded(quadratic(5, 0.3))
    minimize(objective, 5, replace(ALONE, order=order, sweeps=1))  # type: ignore[arg-type]
    visited = [changed for _, _, changed in objective.asked if changed is not None]
    expected = sorted(visited, reverse=order == "backward")
    assert visited == expected
    assert set(visited) == set(range(5))
    best, lowest = objective.asked[0][1], objective.loss(np.zeros(5))
    hinted: int | None = None
    for _, point, changed in objective.asked:
        if changed is not None and changed != hinted:  # a new line starts at the best of those before
            seen = [p for _, p, _ in objective.asked[: objective.asked.index(("search", point, changed))]]
            best = min(seen, key=lambda p: objective.loss(np.array(p)))
            hinted = changed
        if changed is not None:
            assert [i for i in range(5) if point[i] != best[i]] in ([changed], [])
    assert lowest >= objective.loss(np.array(best))


class Stop:
    """A loss that raises KeyboardInterrupt at one evaluation."""

    def __init__(self, loss: Callable[[Vector], float], at: int) -> None:
        self.loss, self.at, self.count = loss, at, 0

    def __call__(self, point: Vector) -> float:
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt
        return self.loss(point)


def test_interrupted_keeps_the_best_so_far() -> None:
    loss = quadratic(8, 0.5)
    found = minimize(Recorded(Stop(loss, 20)), 8, ALONE)
    assert found.stopped == "interrupted"
    assert found.evaluations == 19
    assert found.loss_end == loss(found.point) < found.loss_start
    with pytest.raises(KeyboardInterrupt):
        minimize(Recorded(Stop(loss, 1)), 8, ALONE)


@pytest.mark.parametrize("hold", ["none", "step", "sweep"])
@pytest.mark.parametrize("coarse", [0, 1])
def test_a_resumed_search_asks_for_the_same_points(tmp_path: Path, hold: str, coarse: int) -> None:
    loss, held = rippled(quadratic(6, 0.5)), quadratic(6, 0.5, floor=1.0)
    rules = Rules(hold=hold, coarse_sweeps=coarse, tolerance=1e-9)  # type: ignore[arg-type]
    whole = Recorded(loss, held)
    expected = minimize(whole, 6, rules)
    assert len(expected.gains) > 1
    for at in range(2, expected.calls["search"], 5):
        checkpoint = Checkpoint(tmp_path / f"{hold}{coarse}{at}.json", {"model": "m", "seed": 0})
        first = Recorded(Stop(loss, at), held)
        first.coarse = loss
        minimize(first, 6, rules, checkpoint=checkpoint)
        second = Recorded(loss, held)
        found = minimize(second, 6, rules, checkpoint=checkpoint)
        np.testing.assert_array_equal(found.point, expected.point)
        assert replace(found, point=expected.point, seconds=0.0) == replace(expected, seconds=0.0)
        assert second.asked == whole.asked[len(whole.asked) - len(second.asked) :]
        again = Recorded(loss, held)
        assert minimize(again, 6, rules, checkpoint=checkpoint).loss_end == expected.loss_end
        assert not again.asked


def test_a_larger_budget_goes_on_where_the_smaller_ended(tmp_path: Path) -> None:
    loss = quadratic(6, 0.9)
    checkpoint = Checkpoint(tmp_path / "state.json", {"seed": 0})
    small = minimize(Recorded(loss), 6, ALONE, Budget(20), checkpoint=checkpoint)
    assert (small.stopped, small.evaluations <= 20) == ("evaluations", True)
    assert json.loads(checkpoint.path.read_text())["identity"] == {"seed": 0}
    large = minimize(Recorded(loss), 6, ALONE, checkpoint=checkpoint)
    assert large.loss_end == minimize(Recorded(loss), 6, ALONE).loss_end


def test_checkpoints_of_other_searches_are_refused(tmp_path: Path) -> None:
    loss, path = quadratic(3, 0.5), tmp_path / "state.json"
    identity = {"model": "a" * 8, "seed": 0, "variables": ["x", "y", "z"]}
    minimize(Recorded(loss), 3, ALONE, checkpoint=Checkpoint(path, identity))
    for key, value, said in (
        ("model", "b" * 8, 'its model is "aaaaaaaa", here it is "bbbbbbbb"'),
        ("seed", 1, "its seed is 0, here it is 1"),
        ("variables", ["x", "y"], r"its variables is a list of 3 .*, here it is a list of 2"),
    ):
        with pytest.raises(DataError, match=said):
            minimize(Recorded(loss), 3, ALONE, checkpoint=Checkpoint(path, identity | {key: value}))
    with pytest.raises(DataError, match="has 3 variables, here there are 4"):
        minimize(Recorded(loss), 4, ALONE, checkpoint=Checkpoint(path, identity))
    for content in ("{", "[]", '{"format": "other"}', ""):
        path.write_text(content)
        with pytest.raises(DataError, match="checkpoint"):
            minimize(Recorded(loss), 3, ALONE, checkpoint=Checkpoint(path, identity))
    with pytest.raises(DataError, match="cannot write the checkpoint"):
        minimize(Recorded(loss), 3, ALONE, checkpoint=Checkpoint(tmp_path / "no" / "s.json", identity))


def test_seconds_are_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("onnxq.search.meter.time.monotonic", lambda: now[0])
    loss = quadratic(16, 0.5)

    def slow(point: Vector) -> float:
        now[0] += 2.0
        return loss(point)

    seen: list[Progress] = []
    found = minimize(Recorded(slow), 16, ALONE, Budget(seconds=21.0), progress=seen.append)
    assert found.stopped == "seconds"
    assert found.seconds == 22.0  # the evaluation under way when they ended was finished
    assert found.evaluations == 11
    assert seen[0].seconds_left == 21.0 - 4.0
    assert seen[-1].seconds_left == 0.0


def test_progress_counts_to_what_was_expected() -> None:
    seen: list[Progress] = []
    found = minimize(Recorded(quadratic(10, 0.3)), 10, ALONE, progress=seen.append)
    assert [p.evaluations for p in seen] == list(range(2, int(found.evaluations) + 1))
    assert all(p.evaluations <= p.expected for p in seen)
    assert [p.loss for p in seen] == sorted((p.loss for p in seen), reverse=True)
    limited: list[Progress] = []
    minimize(Recorded(quadratic(10, 0.3)), 10, ALONE, Budget(12), progress=limited.append)
    assert {p.expected for p in limited} == {12.0}


def test_the_estimate_is_near_what_is_spent(quantized: StepLoss) -> None:
    n = len(quantized.steps)
    for rules in (Rules(), ALONE, Rules(coarse_sweeps=1)):
        found = minimize(quantized, n, rules)
        assert found.evaluations == pytest.approx(estimate(quantized, n, rules, len(found.gains)), rel=0.35)


def test_a_quantized_network(quantized: StepLoss) -> None:
    """One sweep costs three evaluations a variable; all of them stay far below scipy's."""
    n = len(quantized.steps)
    _, loss, evaluations = scipy_powell(quantized, n)
    found = minimize(quantized, n, ALONE)
    assert found.evaluations < 0.6 * evaluations
    start = quantized.evaluate(np.zeros(n))
    # landscapes this rippled have many minima, and the order decides which one is found: most of scipy's gain, or more than all
    other = minimize(quantized, n, replace(ALONE, order="backward"))
    assert start - min(found.loss_end, other.loss_end) >= 0.8 * (start - loss)
    assert found.loss_end < start
    again = minimize(quantized, n, ALONE)
    np.testing.assert_array_equal(found.point, again.point)
    held = minimize(quantized, n)
    assert held.held_end is not None
    assert held.held_end <= quantized.validate(np.zeros(n))


def test_a_start_that_is_not_finite() -> None:
    with pytest.raises(DataError, match="the loss at the start of the search is inf"):
        minimize(Recorded(lambda _: math.nan), 2, ALONE)


def test_step_losses_start_at_their_steps_exactly() -> None:
    steps = {"a": 0.1, "b": 3.7e-5}
    objective = StepLoss(steps, lambda s, part: s["a"] + (part == "held"), {"coarse": 0.25})
    assert objective.at(np.zeros(2)) == steps
    assert objective.at(np.log([2.0, 0.5])) == pytest.approx({"a": 0.2, "b": 1.85e-5})
    assert objective.costs == {"search": 1.0, "coarse": 0.25, "held": 1.0}
    assert (objective.evaluate(np.zeros(2)), objective.validate(np.zeros(2))) == (0.1, 1.1)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="the step size of 'b' is"):
            StepLoss(steps | {"b": bad}, lambda s, part: 0.0, {})


def test_a_line_rule_is_obeyed() -> None:
    objective = Recorded(quadratic(3, 0.0))
    minimize(objective, 3, replace(ALONE, line=LineRules(width=0.07), sweeps=1))
    assert max(map(abs, objective.asked[1][1])) == 0.07
