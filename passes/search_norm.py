"""Choose the p-norm whose layer-wise ranges give the network the least loss: the first two stages of LAPQ.

The loss is evaluated at some values of p, and near its minimum a parabola says where the best lies: Nahshan et al., "Loss Aware
Post-training Quantization", arXiv 1911.07190. How the parabola is guarded: `onnxq.search.quadratic`. Other methods are
tried too: where tensors have few large values, one of those may be ahead of every norm. The best one is tried once more for the
activations alone: weights may have found better steps by the errors at their outputs (`onnxq.rounded`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from onnxq.bias import BiasCorrection, matches_outputs
from onnxq.cluster import spread
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program
from onnxq.search.quadratic import search_p
from onnxq.simulate import Evaluator, Rounding, matched, matched_model
from onnxq.simulate.emitted import Plan
from onnxq.simulate.norms import choose_layerwise

RIVALS = ("minmax", "percentile", "entropy", "aciq")


@dataclass(frozen=True)
class SearchNorm(Pass):
    """Choose steps of coarse tensors by the p-norm, or another range method, of least loss.

    Attributes:
        loss: auto, cross-entropy, kl, mse, cosine or FILE.py:FUNCTION.
        samples: calibration samples to evaluate the loss on, those held back included.
        correction: of biases, as correct-bias makes it afterwards; `exact` is searched as `output`. Where outputs are matched,
            the method found, for all tensors and for activations alone, and what was there before are matched, and the best
            stays.
        rounding: of coarse weights: with error `feedback`, as round-weights does, or to the `nearest` code.
        least: smallest p to try at first.
        most: largest p to try at first.
        points: values of p between them.
        cluster: local:N or the address of a Dask scheduler, to evaluate the loss there.
    """

    name: ClassVar[str] = "search-norm"
    loss: str = "auto"
    samples: int = 512
    correction: BiasCorrection = "auto"
    rounding: Rounding = "feedback"
    least: float = 1.0
    most: float = 4.0
    points: int = 10
    cluster: str | None = None

    def run(self, program: Program, ctx: Context) -> PassResult:
        start = dict(program.plan)
        if all(d.scheme.bits >= 8 for d in start.values()):
            return PassResult(0, {"all tensors": "8 bits leave the norm little to choose"})
        evaluator = Evaluator(
            program, ctx, self.loss, self.samples, rounding=self.rounding, correct=self.correction != "none"
        )
        done = 0

        def at(method: str, weights: bool = True) -> float:
            nonlocal done
            program.plan.update(start)
            choose_layerwise(program, evaluator.weights, method, weights=weights)
            done += 1
            ctx.progress(f"ranges by {method}", done, self.points + 3 + len(RIVALS))
            return losses.evaluate_plan(program.plan)

        with spread(evaluator, self.cluster) as losses:
            base = losses.evaluate_plan(start)
            norm = search_p(
                lambda p: at(f"lp={p:.6g}"), tuple(np.linspace(self.least, self.most, self.points).tolist())
            )
            rivals = {} if norm.interrupted else _until_interrupted(RIVALS, at)
            found = {f"lp={norm.p:.6g}": norm.loss} | rivals
            best = min(found, key=found.__getitem__)
            stopped = norm.interrupted or len(rivals) < len(RIVALS)
            alone = {} if stopped else _until_interrupted((best,), lambda method: at(method, weights=False))
        ends = {"before": base, "all": found[best]}
        if best in alone:
            ends["activations"] = alone[best]
        plans = {}
        for which in ends:
            program.plan.update(start)
            if which != "before":
                choose_layerwise(program, evaluator.weights, best, weights=which == "all")
            plans[which] = dict(program.plan)
        if matches_outputs(program, ctx, self.correction):
            ends = {which: self._matched_loss(program, ctx, evaluator, plan) for which, plan in plans.items()}
        chosen = min(ends, key=ends.__getitem__)
        program.plan.update(plans[chosen])
        is_better = chosen != "before"
        facts = {
            "loss": evaluator.loss.name,
            "p_values": [p for p, _ in norm.samples],
            "p_losses": [loss for _, loss in norm.samples],
            "p_star": norm.p if is_better and best not in rivals else None,
            "range_losses": rivals,
            "ranges": best if is_better else None,
            "loss_float": evaluator.float_loss(),
            "loss_before": ends["before"],
            "keeps_weights": chosen != "all",
            "loss_after": ends[chosen],
        }
        return PassResult(len(start) if is_better else 0, facts={"lapq": facts})

    def _matched_loss(self, program: Program, ctx: Context, evaluator: Evaluator, plan: Plan) -> float:
        """The loss of a plan as correct-bias will leave it."""
        view = replace(program, plan=dict(plan))
        return evaluator.deployed_loss(matched_model(view, ctx, matched(view, ctx, self.correction)))


def _until_interrupted(methods: Sequence[str], loss: Callable[[str], float]) -> dict[str, float]:
    """Losses of methods, of those that were tried when Ctrl-C ended it."""
    found: dict[str, float] = {}
    with suppress(KeyboardInterrupt):
        for method in methods:
            found[method] = loss(method)
    return found
