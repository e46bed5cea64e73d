"""The choice of channels, against all choices of small networks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnxq.points import (
    Candidates,
    at_random,
    below_error,
    budget_curve,
    even_error,
    total_cost,
    total_error,
    within_budget,
)
from onnxq.points.budget import Counts


def network(seed: int, most: int = 3, channels: tuple[int, ...] = (3, 2, 2)) -> list[Candidates]:
    """Layers of different costs and weights; some channels gain nothing, some only from two points on."""
    rng = np.random.default_rng(seed)
    costs, weights = (9.0, 4.0, 16.0), (1.0, 0.3, 2.5)
    return [
        Candidates(rng.exponential(size=(n, most)) * 0.3 ** np.arange(most), cost, weight)
        for n, cost, weight in zip(channels, costs, weights, strict=True)
    ]


def every_choice(layers: list[Candidates]) -> tuple[list[float], list[float]]:
    """Cost and error of all choices."""
    sizes = [len(layer.errors) for layer in layers]
    costs, errors = [], []
    for flat in itertools.product(range(1, layers[0].errors.shape[1] + 1), repeat=sum(sizes)):
        counts: list[Counts] = np.split(np.array(flat), np.cumsum(sizes)[:-1])
        costs.append(total_cost(layers, counts))
        errors.append(total_error(layers, counts))
    return costs, errors


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("most", [2, 3])
def test_no_choice_of_the_same_cost_is_better(seed: int, most: int) -> None:
    layers = network(seed, most)
    costs, errors = (np.array(a) for a in every_choice(layers))
    one_segment = max(float(np.ptp(x.errors, axis=1).max()) * x.weight for x in layers)
    for budget in np.linspace(0, max(costs), 25):
        counts = within_budget(layers, budget)
        best = errors[costs <= budget].min()
        assert total_cost(layers, counts) <= budget
        assert best * (1 - 1e-12) <= total_error(layers, counts) <= best + one_segment
    assert total_error(layers, within_budget(layers, max(costs))) == pytest.approx(errors.min())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("most", [2, 3])
def test_the_curve_is_the_best_of_all_choices_at_its_budgets(seed: int, most: int) -> None:
    layers = network(seed, most)
    costs, errors = (np.array(a) for a in every_choice(layers))
    curve = budget_curve(layers)
    assert curve[0][0] == 0.0
    assert curve[-1][1] == pytest.approx(errors.min())
    for budget, error in curve:
        assert error == pytest.approx(errors[costs <= budget * (1 + 1e-12)].min())
    assert len(budget_curve(layers, 3)) == 3
    assert {*budget_curve(layers, 3)} <= {*curve}
    assert budget_curve([]) == [(0.0, 0.0)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("most", [2, 3])
def test_budgets_that_a_price_spends_are_spent_exactly_as_well(seed: int, most: int) -> None:
    """At a price per cost, what minimises error + price * cost is the best of all choices of its cost."""
    layers = network(seed, most)
    costs, errors = (np.array(a) for a in every_choice(layers))
    for price in np.geomspace(1e-4, 1, 40):
        best = int(np.argmin(errors + price * costs))
        counts = within_budget(layers, costs[best])
        assert total_error(layers, counts) == pytest.approx(errors[best])
        assert total_cost(layers, counts) == pytest.approx(costs[best])


@pytest.mark.parametrize("seed", range(4))
def test_equal_costs_are_chosen_exactly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    falls = np.sort(rng.exponential(size=(7, 2)), axis=1)[:, ::-1]  # of convex errors
    errors = np.pad(np.cumsum(falls[:, ::-1], axis=1)[:, ::-1], ((0, 0), (0, 1)))
    layers = [Candidates(errors[:4], 5.0), Candidates(errors[4:], 5.0)]
    costs, left = (np.array(a) for a in every_choice(layers))
    for budget in range(0, 75, 5):
        counts = within_budget(layers, budget)
        assert total_cost(layers, counts) == min(budget, 70)
        assert total_error(layers, counts) == pytest.approx(left[costs <= budget].min())


def test_a_share_of_nothing_leaves_one_point_each() -> None:
    for counts in (within_budget(network(0), 0.0), at_random(network(0), 3.9, np.random.default_rng(0))):
        assert all(np.array_equal(c, np.ones_like(c)) for c in counts)
    assert within_budget([], 10.0) == []


def test_points_that_gain_nothing_are_not_bought() -> None:
    layer = Candidates(np.array([[1.0, 1.0, 1.0], [1.0, 2.0, 0.5], [1.0, 0.2, 0.3]]), 2.0)
    (counts,) = within_budget([layer], 1e9)
    np.testing.assert_array_equal(counts, [1, 3, 2])


def test_what_does_not_fit_leaves_room_for_the_next() -> None:
    layers = [Candidates(np.array([[10.0, 0.0]]), 8.0), Candidates(np.array([[3.0, 0.0], [2.0, 0.0]]), 4.0)]
    assert [c.tolist() for c in within_budget(layers, 7.0)] == [[1], [2, 1]]


def test_a_later_step_waits_for_the_earlier_one() -> None:
    """The step from 3 to 4 points costs 2 and fits; the one to 3, which costs 4, does not."""
    layer = Candidates(np.array([[9.0, 9.0, 1.0, 0.0]]), 2.0)
    assert within_budget([layer], 3.0)[0].tolist() == [1]
    assert within_budget([layer], 4.0)[0].tolist() == [3]
    assert within_budget([layer], 6.0)[0].tolist() == [4]


def test_the_loss_decides_between_layers() -> None:
    errors = np.array([[1.0, 0.0]])
    for weights in ((1.0, 2.0), (2.0, 1.0)):
        layers = [Candidates(errors, 1.0, weight) for weight in weights]
        counts = within_budget(layers, 1.0)
        assert [int(c[0]) for c in counts] == [2 if w == 2.0 else 1 for w in weights]


def test_each_channel_gets_the_fewest_points_below_the_error() -> None:
    errors = np.array([[0.5, 0.1, 0.0], [3.0, 0.9, 0.0], [3.0, 2.0, 1.0], [4.0, 2.0, 3.0]])
    assert below_error([Candidates(errors, 7.0)], 1.0)[0].tolist() == [1, 2, 3, 2]
    assert below_error([Candidates(errors, 7.0, 2.0)], 1.0)[0].tolist() == [1, 3, 3, 2]


def test_random_channels_spend_the_budget() -> None:
    layers = network(0, 3, (30, 20, 10))
    found = [at_random(layers, 200.0, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert all(196 < total_cost(layers, counts) <= 200 for counts in found)  # the cheapest costs 4
    flat = [np.concatenate(counts).tolist() for counts in found]
    assert flat[0] == flat[1] != flat[2]
    assert set(flat[0]) == {1, 2}
    single = [Candidates(np.ones((5, 1)), 1.0), Candidates(np.ones((5, 2)), 1.0)]
    assert [c.tolist() for c in at_random(single, 99.0, np.random.default_rng(0))] == [[1] * 5, [2] * 5]


def test_many_channels_take_no_time() -> None:
    """ResNet-50 has 26,560 channels; a loop over all choices would not end."""
    rng = np.random.default_rng(0)
    errors = rng.exponential(size=(50_000, 3)) * [1, 0.1, 0.01]
    layers = [Candidates(part, float(cost)) for cost, part in enumerate(np.split(errors, 50), start=1)]
    counts = within_budget(layers, 100_000.5)
    assert 99_999 < total_cost(layers, counts) <= 100_000.5


def test_even_error_is_the_least_limit_that_fits() -> None:
    rng = np.random.default_rng(5)
    layers = [Candidates(np.sort(rng.random((20, 2)))[:, ::-1].copy(), cost) for cost in (3.0, 7.0)]
    for budget in (0.0, 25.0, 60.0, 200.0):
        counts = even_error(layers, budget)
        limits = np.unique(np.concatenate([layer.errors.ravel() for layer in layers]))
        fitting = [e for e in limits if total_cost(layers, below_error(layers, e)) <= budget]
        for found, best in zip(counts, below_error(layers, fitting[0]), strict=True):
            np.testing.assert_array_equal(found, best)
