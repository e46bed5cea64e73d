"""Choose the p-norm whose layer-wise ranges give the network the least loss: the first two stages of LAPQ.

The loss is evaluated at some values of p, and near its minimum a parabola says where the best lies: Nahshan et al., "Loss Aware
Post-training Quantization", arXiv 1911.07190. How the parabola is guarded: `onnxq.search.quadratic`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.cluster import spread
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program
from onnxq.search.quadratic import search_p
from onnxq.simulate import Evaluator, Rounding
from onnxq.simulate.norms import choose_by_norm


@dataclass(frozen=True)
class SearchNorm(Pass):
    """Choose steps below 8 bits by the p-norm of least loss.

    Attributes:
        loss: auto, cross-entropy, kl, mse, cosine or FILE.py:FUNCTION.
        samples: calibration samples to evaluate the loss on, those held back included.
        rounding: of weights below 8 bits: with error `feedback`, as round-weights does, or to the `nearest` code.
        least: smallest p to try at first.
        most: largest p to try at first.
        points: values of p between them.
        cluster: local:N or the address of a Dask scheduler, to evaluate the loss there.
    """

    name: ClassVar[str] = "search-norm"
    loss: str = "auto"
    samples: int = 512
    rounding: Rounding = "feedback"
    least: float = 1.0
    most: float = 4.0
    points: int = 10
    cluster: str | None = None

    def run(self, program: Program, ctx: Context) -> PassResult:
        start = dict(program.plan)
        if all(d.scheme.bits >= 8 for d in start.values()):
            return PassResult(0, {"all tensors": "8 bits leave the norm little to choose"})
        evaluator = Evaluator(program, ctx, self.loss, self.samples, rounding=self.rounding)
        done = 0

        def at(p: float) -> float:
            nonlocal done
            choose_by_norm(program, evaluator.weights, p)
            done += 1
            ctx.progress(f"p-norm {p:.2f}", done, self.points + 2)
            return losses.evaluate_plan(program.plan)

        with spread(evaluator, self.cluster) as losses:
            base = losses.evaluate_plan(start)
            chosen = search_p(at, tuple(np.linspace(self.least, self.most, self.points).tolist()))
        program.plan.update(start)
        if chosen.loss < base:
            choose_by_norm(program, evaluator.weights, chosen.p)
        facts = {
            "loss": evaluator.loss.name,
            "p_values": [p for p, _ in chosen.samples],
            "p_losses": [loss for _, loss in chosen.samples],
            "p_star": chosen.p if chosen.loss < base else None,
            "loss_float": evaluator.float_loss(),
            "loss_before": base,
            "loss_after": min(base, chosen.loss),
        }
        return PassResult(len(start) if chosen.loss < base else 0, facts={"lapq": facts})
