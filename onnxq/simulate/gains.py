"""How much the loss of a network gains from each of several changes of its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from onnxq.pipeline import Context
from onnxq.program import Program, QuantDecision
from onnxq.simulate.evaluator import Evaluator

Vector = NDArray[np.float64]


def loss_gains(
    program: Program,
    ctx: Context,
    changes: Sequence[Mapping[str, QuantDecision]],
    loss: str = "auto",
    samples: int = 128,
) -> Vector:
    """By how much the mean loss falls with each change alone, (changes,); the program is not changed.

    Args:
        program: its plan is complete, its graph still float.
        ctx: calibration samples, target, threads.
        changes: decisions by tensor.
        loss: name of a loss; see `onnxq.simulate.find_loss`.
        samples: calibration samples to evaluate on.

    Raises:
        DataError: there are no samples, or the loss does not fit them.
        UsageError: there is no such loss.
    """
    if not changes:
        return np.zeros(0)
    plan = dict(program.plan)
    evaluator = Evaluator(program, ctx, loss, samples, rounding="nearest")
    base, gains = evaluator.evaluate_plan(plan), np.empty(len(changes))
    for i, change in enumerate(changes):
        gains[i] = base - evaluator.evaluate_plan(plan | dict(change))
        ctx.progress("loss of each layer", i + 1, len(changes))
    return gains
