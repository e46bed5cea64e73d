"""How a search goes, what it is expected to cost, and what it tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from onnxq.search.line import LineRules
from onnxq.search.objective import Objective, Vector

Order = Literal["forward", "backward"]
Hold = Literal["step", "sweep", "none"]


@dataclass(frozen=True)
class Rules:
    """How the search goes.

    Attributes:
        sweeps: at most so many.
        tolerance: a sweep that gains less than this share of the loss is the last.
        order: the first sweep's order of coordinates; `forward` lets each layer make up for those before it.
        coarse_sweeps: sweeps in which the coarse subset brackets; all search samples decide in every sweep.
        hold: whether each step, each sweep or nothing is checked on the held-back samples.
        slack: share of the held-back loss that a step may lose and still count as not losing.
        line: how a line is searched.
    """

    sweeps: int = 4
    tolerance: float = 0.01
    order: Order = "forward"
    coarse_sweeps: int = 0
    hold: Hold = "step"
    slack: float = 0.0
    line: LineRules = field(default_factory=LineRules)


@dataclass(frozen=True)
class Progress:
    """Where a search stands: evaluations done and expected in all, the best loss, seconds left by the pace so far."""

    evaluations: float
    expected: float
    loss: float
    sweep: int
    seconds_left: float


@dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
        point: the best point (n,), log(step / start).
        loss_start, loss_end: on all search samples.
        held_start, held_end: on held-back samples; None if `hold` is `none`.
        evaluations: spent, those on parts of the samples as their share.
        calls: part -> number of evaluations.
        seconds: wall time, of all runs that a checkpoint joined.
        history: (evaluations spent, best accepted loss), one entry for each change.
        gains: decrease of the loss in each finished sweep.
        rejected: steps that lost on the held-back samples.
        stopped: `converged`, `sweeps`, `held-back`, `evaluations`, `seconds` or `interrupted`.
    """

    point: Vector
    loss_start: float
    loss_end: float
    held_start: float | None
    held_end: float | None
    evaluations: float
    calls: Mapping[str, int]
    seconds: float
    history: tuple[tuple[float, float], ...]
    gains: tuple[float, ...]
    rejected: int
    stopped: str


def estimate(objective: Objective, variables: int, rules: Rules | None = None, sweeps: int = 2) -> float:
    """Expected evaluations of a search that `sweeps` sweeps end: three a line at first, two later.

    Checks on held-back samples and coarse brackets count as their share.
    """
    rules, costs = rules or Rules(), objective.costs
    total = 1.0 + (costs["held"] if rules.hold != "none" else 0.0)
    for sweep in range(min(sweeps, rules.sweeps)):
        coarse = sweep < rules.coarse_sweeps
        samples = 2.0 if sweep == 0 else 1.0
        line = 1.0 + costs["coarse"] * (samples + 1.0) if coarse else 0.8 + samples
        line += 0.6 * costs["held"] if rules.hold == "step" else 0.0
        total += variables * line + 2.0 + (costs["held"] if rules.hold == "sweep" else 0.0)
    return total
