"""Find all step sizes together by the network's loss: the joint stage of LAPQ.

From the steps that the plan has, Powell's method minimises the loss over one factor for each coarse tensor (over all tensors
where none is): Nahshan et al., "Loss Aware Post-training Quantization", arXiv 1911.07190. The search is
`onnxq.search`, the loss `onnxq.simulate`. A step is taken only if it does not lose on calibration samples that are held back.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from onnxq.bias import BiasCorrection
from onnxq.cluster import spread
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program
from onnxq.search import Budget, Checkpoint, Progress, Result, Rules, estimate, minimize
from onnxq.search.objective import Objective, Part
from onnxq.simulate import Evaluator, Rounding, matched, moved_biases

Vector = NDArray[np.float64]

SWEPT = 0.5  # of the network, that an evaluation runs on average when steps change one by one


@dataclass(frozen=True)
class SearchSteps(Pass):
    """Lower the network's loss by choosing all steps together.

    Attributes:
        loss: auto, cross-entropy, kl, mse, cosine or FILE.py:FUNCTION.
        samples: calibration samples to evaluate the loss on, those held back included.
        correction: of biases, as correct-bias makes it afterwards; `exact` is searched as `output`. Outputs that are matched are
            matched before the search too, and its biases are those, less what other weights shift.
        rounding: of coarse weights: with error `feedback`, as round-weights does, or to the `nearest` code.
        budget: most evaluations, such as 200, or time, such as 90s or 2m; none for as long as it pays.
        sweeps: most sweeps over all steps.
        variables: the steps of `coarse` tensors, those below 8 bits and weights that 8 bits serve badly, where there are any;
            or of `all`.
        hold: check each `step`, each `sweep` or nothing (`none`) on the samples held back.
        checkpoint: file that keeps the state of the search, to go on from.
        cluster: local:N or the address of a Dask scheduler, to evaluate the loss there.
    """

    name: ClassVar[str] = "search-steps"
    loss: str = "auto"
    samples: int = 512
    correction: BiasCorrection = "auto"
    rounding: Rounding = "feedback"
    budget: str | None = None
    sweeps: int = 3
    variables: Literal["coarse", "all"] = "coarse"
    hold: Literal["step", "sweep", "none"] = "step"
    checkpoint: str | None = None
    cluster: str | None = None

    def run(self, program: Program, ctx: Context) -> PassResult:
        outputs = matched(program, ctx, self.correction)
        program.plan.update(outputs.plan)
        start = dict(program.plan)
        correct = self.correction != "none"
        evaluator = Evaluator(
            program,
            ctx,
            self.loss,
            self.samples,
            rounding=self.rounding,
            correct=correct,
            biases=outputs.biases,
        )
        chosen = list(range(len(evaluator.variables))) if self.variables == "all" else evaluator.coarse()
        with spread(evaluator, self.cluster) as losses:
            result = self._search(_Chosen(losses, len(evaluator.variables), chosen), evaluator, ctx)
        evaluator.apply(_full(result.point, len(evaluator.variables), chosen))
        program.searched = moved_biases(program, outputs.biases, start)
        program.deployed["search-steps"] = evaluator.deployed_loss
        names = [evaluator.variables[i].name for i in chosen]
        facts: dict[str, Any] = {
            "loss": evaluator.loss.name,
            "variables": len(chosen),
            "evaluations": result.evaluations,
            "seconds": result.seconds,
            "loss_float": evaluator.float_loss(),
            "loss_start": result.loss_start,
            "loss_end": result.loss_end,
            "held_start": result.held_start,
            "held_end": result.held_end,
            "history": [list(entry) for entry in result.history],
            "stopped": result.stopped,
            "factors": dict(zip(names, np.exp(result.point).tolist(), strict=True)),
        }
        return PassResult(int(np.count_nonzero(result.point)), facts={"lapq": facts})

    def _search(self, objective: _Chosen, evaluator: Evaluator, ctx: Context) -> Result:
        count, rules = len(objective.chosen), Rules(sweeps=self.sweeps, hold=self.hold)
        expected = estimate(objective, count, rules)
        begun = time.perf_counter()
        objective.evaluate(np.zeros(count))
        seconds = expected * SWEPT * (time.perf_counter() - begun)
        label = f"joint search of {count} steps, about {expected:.0f} evaluations in {seconds:.0f} s"
        ctx.progress(label, 0, None)
        return minimize(
            objective,
            count,
            rules,
            None if self.budget is None else Budget.parse(self.budget),
            checkpoint=self._checkpoint(evaluator, objective.chosen, ctx),
            progress=lambda p: _show(ctx, p),
        )

    def _checkpoint(self, evaluator: Evaluator, chosen: list[int], ctx: Context) -> Checkpoint | None:
        if self.checkpoint is None:
            return None
        identity = {
            "variables": [evaluator.variables[i].name for i in chosen],
            "loss": evaluator.loss.name,
            "samples": self.samples,
            "seed": ctx.seed,
            "loss_start": evaluator.evaluate(np.zeros(len(evaluator.variables))),
        }
        return Checkpoint(Path(self.checkpoint), identity)


@dataclass(frozen=True)
class _Chosen:
    """The losses over some of the variables."""

    losses: Objective
    variables: int
    chosen: list[int]

    @property
    def costs(self) -> Any:
        return self.losses.costs

    def evaluate(self, point: Vector, part: Part = "search", changed: int | None = None) -> float:
        return self.losses.evaluate(_full(point, self.variables, self.chosen), part)

    def validate(self, point: Vector) -> float:
        return self.losses.validate(_full(point, self.variables, self.chosen))


def _full(point: Vector, variables: int, chosen: list[int]) -> Vector:
    """The point (variables,) with zeros for the variables that stay."""
    whole = np.zeros(variables)
    whole[chosen] = point
    return whole


def _show(ctx: Context, progress: Progress) -> None:
    label = f"joint search, loss {progress.loss:.4g}, {progress.seconds_left:.0f} s left"
    ctx.progress(label, int(progress.evaluations), int(progress.expected))
