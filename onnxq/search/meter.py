"""Counting evaluations and seconds, stopping where the budget ends; an objective along a line."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from onnxq.search.budget import Budget
from onnxq.search.objective import Objective, Part, Vector
from onnxq.search.state import State


class ExhaustedError(Exception):
    """The budget allows no further evaluation; the message is the limit, `evaluations` or `seconds`."""


@dataclass
class Meter:
    """An objective that counts.

    Attributes:
        state: what a resumed search had spent before; None for a new one.
        spent: evaluations, those on parts of the samples as their share.
        calls: part -> evaluations.
        reserve: evaluations of the budget kept for a last check.
        watch: called after each evaluation.
    """

    objective: Objective
    budget: Budget
    state: State | None = None
    spent: float = field(init=False, default=0.0)
    calls: dict[str, int] = field(init=False, default_factory=dict)
    reserve: float = field(init=False, default=0.0)
    watch: Callable[[], None] | None = field(init=False, default=None)
    earlier: float = field(init=False, default=0.0)
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        if self.state:
            self.spent, self.calls = self.state.spent, dict(self.state.calls)
            self.earlier = self.state.seconds

    @property
    def seconds(self) -> float:
        """Wall time of this run and those before."""
        return self.earlier + time.monotonic() - self.began

    def evaluate(
        self, point: Vector, part: Part = "search", changed: int | None = None, free: bool = False
    ) -> float:
        """The loss; infinite when it is not a number.

        Raises:
            ExhaustedError: the budget does not allow it, unless `free`.
        """
        self._pay(part, free)
        loss = self.objective.evaluate(point, part, changed)
        return self._count(part, loss)

    def validate(self, point: Vector, free: bool = False) -> float:
        """The held-back loss; raises as `evaluate` does."""
        self._pay("held", free)
        return self._count("held", self.objective.validate(point))

    def stamp(self, state: State) -> State:
        """The state with what was spent until now."""
        return replace(state, spent=self.spent, calls=dict(self.calls), seconds=self.seconds)

    def left(self, expected: float) -> float:
        """Seconds until `expected` evaluations are done, by the pace so far, or until the budget ends."""
        pace = self.seconds / self.spent if self.spent else 0.0
        left = max(0.0, expected - self.spent) * pace
        return (
            left if self.budget.seconds is None else min(left, max(0.0, self.budget.seconds - self.seconds))
        )

    def _pay(self, part: Part, free: bool) -> None:
        if free:
            return
        limit, cost = self.budget.evaluations, self.objective.costs[part]
        if (
            limit is not None and self.spent + cost + self.reserve > limit + 1e-9
        ):  # sums of shares such as 0.1 are not exact
            raise ExhaustedError("evaluations")
        if self.budget.seconds is not None and self.seconds >= self.budget.seconds:
            raise ExhaustedError("seconds")

    def _count(self, part: Part, loss: float) -> float:
        self.spent += self.objective.costs[part]
        self.calls[part] = self.calls.get(part, 0) + 1
        if self.watch:
            self.watch()
        return float(loss) if loss == loss else math.inf


@dataclass(frozen=True)
class Along:
    """The objective along a line.

    Attributes:
        origin, direction: point (n,) and unit vector (n,).
        name: the coordinate, or anything else.
    """

    meter: Meter
    origin: Vector
    direction: Vector
    name: object

    def at(self, place: float) -> Vector:
        """A point (n,)."""
        return self.origin + place * self.direction

    def search(self, place: float, part: Part = "search") -> float:
        """The loss of all search samples there."""
        return self.meter.evaluate(self.at(place), part, self.name if isinstance(self.name, int) else None)

    def coarse(self, place: float) -> float:
        """The loss of the coarse subset there."""
        return self.search(place, "coarse")

    def moved(self, state: State) -> float:
        """How far a state's point is along the line."""
        return float((np.array(state.point) - self.origin) @ self.direction)
