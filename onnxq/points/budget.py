"""Which output channels get further points: one knapsack over all layers.

Each channel of each layer may have 1, 2, ... points. A further point costs as much as the channel has weights and lowers its
error at the output. What buys the most lies on the lower convex hull of a channel's error over its cost; along it the gain
per cost falls, so taking the hull segments of all channels by falling gain per cost is optimal for every budget that they
meet exactly, and within the gain of one segment for all others (Sinha and Zoltners, "The Multiple-Choice Knapsack Problem",
Operations Research 27(3), 1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Vector = NDArray[np.float64]

HALVINGS = 60


@dataclass(frozen=True, eq=False)
class Candidates:
    """What further points would do to one layer.

    Attributes:
        errors: at the output, of each channel with 1, 2, ... points, (channels, most).
        cost: of one further point of one channel, positive, in the unit of the budget: weights, or bytes.
        weight: how much the loss feels the layer's error.
    """

    errors: Vector
    cost: float
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class _Steps:
    """Segments of hulls, all (N,): of which channel (numbered through all layers), to how many points, cost, gain."""

    channel: Counts
    count: Counts
    cost: Vector
    gain: Vector

    def __getitem__(self, at: NDArray[np.intp] | NDArray[np.bool_] | slice) -> _Steps:
        return _Steps(self.channel[at], self.count[at], self.cost[at], self.gain[at])


def within_budget(layers: Sequence[Candidates], budget: float) -> list[Counts]:
    """Points of each channel, (channels,) for each layer, of least weighed error at no more than the budget.

    A step that no longer fits is left, with all later ones of its channel, and the next ones are tried.
    """
    return _taken(layers, _best_first(layers), budget)


def budget_curve(layers: Sequence[Candidates], most: int = 100) -> list[tuple[float, float]]:
    """Cost and weighed error left, as budgets grow from nothing to all that lowers the error.

    Args:
        most: pairs; further ones in between are left out.
    """
    steps, alone = _best_first(layers), [np.ones(len(layer.errors), np.int64) for layer in layers]
    costs = np.append(0.0, np.cumsum(steps.cost))
    errors = total_error(layers, alone) - np.append(0.0, np.cumsum(steps.gain))
    shown = np.unique(np.linspace(0, len(costs) - 1, min(most, len(costs))).astype(int))
    return [(float(costs[i]), max(float(errors[i]), 0.0)) for i in shown]


def below_error(layers: Sequence[Candidates], limit: float) -> list[Counts]:
    """The fewest points with which each channel's weighed error is at most the limit; those of least error where none is.

    This is the criterion of Liu et al., "Post-training Quantization with Multiple Points", arXiv 2002.09049.
    """
    found = []
    for layer in layers:
        errors = layer.errors * layer.weight
        meets = errors <= limit
        found.append(np.where(meets.any(axis=1), meets.argmax(axis=1), errors.argmin(axis=1)) + 1)
    return found


def even_error(layers: Sequence[Candidates], budget: float) -> list[Counts]:
    """The same criterion with the least limit that the budget can buy, by halving an interval of its logarithm."""
    weighed = np.concatenate([np.zeros(0), *((layer.errors * layer.weight).ravel() for layer in layers)])
    positive = weighed[weighed > 0.0]
    if not positive.size:
        return [np.ones(len(layer.errors), np.int64) for layer in layers]
    low, high = np.log(positive.min()) - 1.0, np.log(positive.max()) + 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2.0
        fits = total_cost(layers, below_error(layers, np.exp(middle))) <= budget
        low, high = (low, middle) if fits else (middle, high)
    return below_error(layers, np.exp(high))


def at_random(layers: Sequence[Candidates], budget: float, rng: np.random.Generator) -> list[Counts]:
    """Two points in channels drawn at random until the budget is spent, to compare with."""
    sizes = [len(layer.errors) for layer in layers]
    can = [np.arange(n if layer.errors.shape[1] > 1 else 0) for n, layer in zip(sizes, layers, strict=True)]
    two = [
        _steps(c, np.full(len(c), 2), layer, np.ones(len(c))) for c, layer in zip(can, layers, strict=True)
    ]
    steps = _joined(two, sizes)
    return _taken(layers, steps[rng.permutation(len(steps.cost))], budget)


def total_cost(layers: Sequence[Candidates], counts: Sequence[Counts]) -> float:
    """What the points beyond each channel's first cost."""
    return float(sum(layer.cost * (count - 1).sum() for layer, count in zip(layers, counts, strict=True)))


def total_error(layers: Sequence[Candidates], counts: Sequence[Counts]) -> float:
    """The weighed error that is left."""
    rows = (
        layer.weight * np.take_along_axis(layer.errors, count[:, None] - 1, 1).sum()
        for layer, count in zip(layers, counts, strict=True)
    )
    return float(sum(rows))


def _best_first(layers: Sequence[Candidates]) -> _Steps:
    """The segments of all channels' hulls by falling gain per cost."""
    steps = _joined([_hull(layer) for layer in layers], [len(layer.errors) for layer in layers])
    return steps[np.argsort(-steps.gain / steps.cost, kind="stable")]


def _hull(layer: Candidates) -> _Steps:
    """The segments of the lower convex hull of each channel's error over its points, where the error falls."""
    channels, most = layer.errors.shape
    here, place = np.ones(channels, np.int64), np.arange(channels)
    found = []
    for _ in range(most - 1):
        ahead = np.arange(1, most + 1) - here[:, None]  # further points, (channels, most)
        fall = layer.errors[place, here - 1][:, None] - layer.errors[place]
        slope = np.where(ahead > 0, fall / np.maximum(ahead, 1), -np.inf)
        last = most - 1 - slope[:, ::-1].argmax(axis=1)  # the farthest of equals
        falls = slope[np.arange(len(place)), last] > 0
        place, here, last = place[falls], here[falls], last[falls]
        found.append(_steps(place, last + 1, layer, fall[falls, last], last + 1 - here))
        here = last + 1
    return _joined(found, [0] * len(found))


def _steps(
    channel: Counts, count: Counts, layer: Candidates, gain: Vector, further: Counts | int = 1
) -> _Steps:
    cost = np.broadcast_to(np.asarray(further * layer.cost, np.float64), channel.shape)
    return _Steps(channel, count, cost, gain * layer.weight)


def _joined(parts: Sequence[_Steps], sizes: Sequence[int]) -> _Steps:
    """Steps of several layers of so many channels each, channels numbered through."""
    first = np.cumsum([0, *sizes])[: len(parts)]
    channel = [part.channel + start for part, start in zip(parts, first, strict=True)]
    whole, real = np.zeros(0, np.int64), np.zeros(0)
    return _Steps(
        np.concatenate([whole, *channel]),
        np.concatenate([whole, *(part.count for part in parts)]),
        np.concatenate([real, *(part.cost for part in parts)]),
        np.concatenate([real, *(part.gain for part in parts)]),
    )


def _taken(layers: Sequence[Candidates], steps: _Steps, budget: float) -> list[Counts]:
    """Points of each channel after the steps that fit, in their order."""
    sizes = [len(layer.errors) for layer in layers]
    counts = np.ones(sum(sizes), np.int64)
    left = budget * (1 + 1e-12)  # a sum of costs that equals the budget fits
    while len(steps.cost):
        fits = int(np.searchsorted(np.cumsum(steps.cost), left, side="right"))
        np.maximum.at(counts, steps.channel[:fits], steps.count[:fits])
        left -= float(steps.cost[:fits].sum())
        rest = steps[fits:]
        steps = rest[_open(rest, len(counts), left)]
    return np.split(counts, np.cumsum(sizes))[: len(sizes)]


def _open(steps: _Steps, channels: int, left: float) -> NDArray[np.bool_]:
    """Which steps neither cost more than is left nor follow one of their channel that does."""
    place = np.arange(len(steps.cost))
    stop = np.full(channels, len(place))
    dear = steps.cost > left
    np.minimum.at(stop, steps.channel[dear], place[dear])
    return place < stop[steps.channel]
