"""What the search asks of a loss: its value at a point, on all search samples, on a few of them, or on held-back ones.

A *point* is a float64 vector (n,) of natural logarithms of step sizes over their start, so the start is 0 and
0.1 means a step 10.5 % larger, whatever the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import UsageError

Vector = NDArray[np.float64]
Part = Literal["search", "coarse", "held"]


class Objective(Protocol):
    """A loss over points. The same point gives the same loss every time."""

    @property
    def costs(self) -> Mapping[Part, float]:
        """What one evaluation of a part costs, in evaluations of `search` (1.0): its share of samples."""

    def evaluate(self, point: Vector, part: Part = "search", changed: int | None = None) -> float:
        """The mean loss of `search` samples, or of the `coarse` subset of them.

        `changed` names the one coordinate in which the point differs from the best point so far, so that an
        evaluator can keep what lies before it; None when several differ.
        """

    def validate(self, point: Vector) -> float:
        """The mean loss of `held` samples, on which no direction or step is chosen."""


@dataclass(frozen=True)
class StepLoss:
    """The objective of a loss over named step sizes, such as a simulator's.

    Attributes:
        steps: name -> step size at the start, positive; the order is that of execution.
        loss: (name -> step size, part) -> mean loss.
        shares: samples of `coarse` and `held` as fractions of those of `search`.
    """

    steps: Mapping[str, float]
    loss: Callable[[Mapping[str, float], Part], float]
    shares: Mapping[Part, float]

    def __post_init__(self) -> None:
        for name, step in self.steps.items():
            if not (np.isfinite(step) and step > 0):
                raise UsageError(f"the step size of {name!r} is {step}; a search needs positive ones")

    @property
    def costs(self) -> Mapping[Part, float]:
        """Fractions of an evaluation on all search samples."""
        whole: dict[Part, float] = {"search": 1.0, "coarse": 1.0, "held": 1.0}
        return whole | dict(self.shares)

    def at(self, point: Vector) -> dict[str, float]:
        """The step sizes of a point; exactly the start's at 0."""
        scales = np.exp(np.asarray(point, dtype=np.float64))
        return {name: step * float(s) for (name, step), s in zip(self.steps.items(), scales, strict=True)}

    def evaluate(self, point: Vector, part: Part = "search", changed: int | None = None) -> float:
        """The loss there. The step sizes alone say what changed."""
        return float(self.loss(self.at(point), part))

    def validate(self, point: Vector) -> float:
        """The loss of the held-back samples."""
        return float(self.loss(self.at(point), "held"))
