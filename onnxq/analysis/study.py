"""The loss around a plan: the figures of the LAPQ paper (Nahshan et al., arXiv 1911.07190, section 3) on a model of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.choices import Choices
from onnxq.data import Dataset, ImageOptions, input_specs, open_data
from onnxq.data.sources import PLAIN_IMAGES
from onnxq.errors import DataError, unknown
from onnxq.model.load import load_model
from onnxq.model.prepare import prepare
from onnxq.pipeline import Context, Pipeline, Progress, no_progress
from onnxq.program import Program
from onnxq.scheme import BYTE
from onnxq.search.landscape import (
    Sensitivities,
    contour,
    gaussian_curvature,
    hessian,
    interaction_share,
    sensitivities,
)
from onnxq.search.objective import Vector
from onnxq.simulate import Evaluator, matched
from onnxq.simulate.norms import choose_layerwise

BEHIND = (
    "search-norm",
    "search-steps",
    "correct-bias",
    "pad-channels",
    "emit-qdq",
)  # an analysis looks in front of these
NORMS = tuple(np.linspace(1.0, 4.0, 7).tolist())
OFFSETS = tuple(np.linspace(-0.4, 0.4, 5).tolist())  # log step, of a contour
FAITHFUL_DB = 25.0  # of the outputs, from where on no class changes
PAYS = 0.05  # of the loss


@dataclass(frozen=True)
class Analysis:
    """The loss around the steps that a plan starts from. Steps are in log(step / start), losses of all samples searched on.

    Attributes:
        loss, loss_float, loss_start: name of the loss, of the float model, and of the plan.
        sqnr_db: of the outputs at the start.
        names: of the tensors whose steps are looked at.
        rise: change of the loss at steps 10 % larger or smaller, the larger of both; by name.
        gradient, curvature, gain: of each step alone; `gain` is what its parabola promises.
        norms: (p, loss) of layer-wise ranges.
        ranked: the tensors of the Hessian, those that matter most first.
        hessian: second derivatives over them, rows.
        gaussian_curvature: det(H) / (1 + |g|^2)^2 over them.
        interactions: share of the Hessian's energy that lies off its diagonal, 0 for a separable loss.
        pair, offsets, contour: two tensors, the moves of their steps, and the losses there, rows by the first tensor.
        expected: what all steps alone promise together, as a share of the loss.
        pays: whether the joint search should be worth its time.
        verdict: why, in a sentence.
        evaluations: that this took.
    """

    loss: str
    loss_float: float
    loss_start: float
    sqnr_db: float
    names: Sequence[str]
    rise: Sequence[float]
    gradient: Sequence[float]
    curvature: Sequence[float]
    gain: Sequence[float]
    norms: Sequence[tuple[float, float]]
    ranked: Sequence[str]
    hessian: Sequence[Sequence[float]]
    gaussian_curvature: float
    interactions: float
    pair: tuple[str, str]
    offsets: Sequence[float]
    contour: Sequence[Sequence[float]]
    expected: float
    pays: bool
    verdict: str
    evaluations: int

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return asdict(self)


def analyze(
    model: str | Path,
    calibration: str | Path | Dataset,
    *,
    bits: str = "w4a4",
    weights: str | None = None,
    override: Sequence[str] = (),
    skip: Sequence[str] = (),
    loss: str = "auto",
    samples: int = 128,
    largest: int = 6,
    pair: tuple[str, str] | None = None,
    images: ImageOptions = PLAIN_IMAGES,
    seed: int = 0,
    threads: int = 0,
    progress: Progress = no_progress,
) -> Analysis:
    """Look at the loss of a quantized model around the steps that its preset chooses.

    Args:
        model: a path.
        calibration: as for `compile_model`.
        bits: widths, e.g. w4a4.
        weights, override, skip: as for `compile_model`.
        loss: auto, cross-entropy, kl, mse, cosine or FILE.py:FUNCTION.
        samples: calibration samples; a quarter of them is left out, as a search does.
        largest: tensors of the Hessian: those that matter most.
        pair: two tensors whose steps the contour moves; None for those that interact most.
        images: how to read a directory of images.
        seed: of every random choice.
        threads: of sessions, 0 for onnxruntime's default.
        progress: called with a label, work done and total.

    Raises:
        UsageError: an unknown option or tensor.
        ModelError: the model cannot be read or run.
        DataError: the samples cannot be read, do not fit, or nothing is quantized.
    """
    choices = Choices(bits=bits, weights=weights, override=tuple(override), skip=tuple(skip), ranges="lapq")
    steps = Pipeline(tuple(p for p in choices.resolve(True).passes if p.name not in BEHIND))
    prepared = prepare(load_model(Path(model)), steps.opset(Context().target))[0]
    data = (
        calibration
        if isinstance(calibration, Dataset)
        else open_data(calibration, input_specs(prepared), images=images)
    )
    program, ctx = (
        Program.from_model(prepared),
        Context(data, samples=samples, seed=seed, threads=threads, progress=progress),
    )
    steps.run(program, ctx)
    if not program.plan:
        raise DataError("nothing of the model is quantized, so there are no steps to look at")
    return _Study(program, ctx, loss, samples).run(largest, pair)


class _Study:
    """An analysis under way."""

    def __init__(self, program: Program, ctx: Context, loss: str, samples: int) -> None:
        self.program, self.ctx, self.samples = program, ctx, samples
        outputs = matched(program, ctx, "auto")
        program.plan.update(outputs.plan)
        self.biases = outputs.biases
        self.evaluator = Evaluator(program, ctx, loss, samples, biases=self.biases)
        self.chosen = self.evaluator.coarse()
        self.names = [self.evaluator.variables[i].name for i in self.chosen]
        self.expected = 0

    def run(self, largest: int, pair: tuple[str, str] | None) -> Analysis:
        """All figures."""
        count = min(largest, len(self.names))
        asked = None if pair is None else (self._place(pair[0]), self._place(pair[1]))
        low = any(d.scheme.bits < BYTE for d in self.program.plan.values())
        self.expected = 2 * len(self.names) + count * (count - 1) + len(OFFSETS) ** 2 + low * len(NORMS) + 2
        zeros = np.zeros(len(self.names))
        lines = sensitivities(self._loss, zeros)
        top = np.argsort(-lines.rise, kind="stable")[:count]
        matrix = hessian(lambda x: self._loss(self._spread(x, top)), np.zeros(count), _some(lines, top))
        places = asked or _most_coupled(matrix, top)
        grid = contour(self._loss, zeros, places, OFFSETS, OFFSETS)
        norms = self._norms() if low else []
        start, expected = lines.loss, min(1.0, float(lines.gain.sum()) / max(abs(lines.loss), 1e-300))
        sqnr = self._sqnr_db()
        pays, verdict = _verdict(sqnr, expected, interaction_share(matrix))
        return Analysis(
            loss=self.evaluator.loss.name,
            loss_float=self.evaluator.float_loss(),
            loss_start=start,
            sqnr_db=sqnr,
            names=self.names,
            rise=lines.rise.tolist(),
            gradient=lines.gradient.tolist(),
            curvature=lines.curvature.tolist(),
            gain=lines.gain.tolist(),
            norms=norms,
            ranked=[self.names[i] for i in top],
            hessian=matrix.tolist(),
            gaussian_curvature=gaussian_curvature(lines.gradient[top], matrix),
            interactions=interaction_share(matrix),
            pair=(self.names[places[0]], self.names[places[1]]),
            offsets=list(OFFSETS),
            contour=grid.tolist(),
            expected=expected,
            pays=pays,
            verdict=verdict,
            evaluations=self.evaluator.evaluations,
        )

    def _place(self, name: str) -> int:
        if name not in self.names:
            raise unknown("tensor", name, self.names)
        return self.names.index(name)

    def _spread(self, values: Vector, places: NDArray[np.intp]) -> Vector:
        point = np.zeros(len(self.names))
        point[places] = values
        return point

    def _loss(self, point: Vector) -> float:
        whole = np.zeros(len(self.evaluator.variables))
        whole[self.chosen] = point
        found = self.evaluator.evaluate(whole)
        self.ctx.progress("evaluating", min(self.evaluator.evaluations, self.expected), self.expected)
        return found

    def _norms(self) -> list[tuple[float, float]]:
        """Losses of layer-wise ranges by the p-norm; the plan is as it was afterwards."""
        plan, found = dict(self.program.plan), []
        for p in NORMS:
            choose_layerwise(self.program, self.evaluator.weights, f"lp={p}")
            found.append((p, self.evaluator.evaluate_plan(dict(self.program.plan))))
            self.ctx.progress("evaluating", min(self.evaluator.evaluations, self.expected), self.expected)
        self.program.plan.update(plan)
        return found

    def _sqnr_db(self) -> float:
        squares = Evaluator(
            self.program, self.ctx, "mse", self.samples, rounding="nearest", biases=self.biases
        )
        noise = squares.evaluate(np.zeros(len(squares.variables)))
        return float(-10.0 * np.log10(max(noise, 1e-30)))


def _some(lines: Sensitivities, places: NDArray[np.intp]) -> Sensitivities:
    return Sensitivities(lines.loss, lines.stride, lines.below[places], lines.above[places])


def _most_coupled(matrix: NDArray[np.float64], top: NDArray[np.intp]) -> tuple[int, int]:
    """Two tensors of the largest interaction; with one alone it is taken twice."""
    if len(top) < 2:
        return int(top[0]), int(top[0])
    off = np.abs(np.triu(matrix, 1))
    i, j = np.unravel_index(int(off.argmax()), off.shape)
    if i == j:  # no interaction at all
        i, j = np.intp(0), np.intp(1)
    return int(top[i]), int(top[j])


def _verdict(sqnr_db: float, expected: float, interactions: float) -> tuple[bool, str]:
    if sqnr_db >= FAITHFUL_DB:
        return False, (
            f"the outputs keep {sqnr_db:.0f} dB, at which hardly anything is left to win: "
            "a joint search (--ranges lapq) will bring little"
        )
    kind = f"{interactions:.0%} of their curvature is interaction"
    if expected < PAYS:
        return False, (
            f"single steps promise {expected:.1%} of the loss and {kind}: a joint search (--ranges lapq) will bring little"
        )
    return True, (
        f"the outputs keep {sqnr_db:.0f} dB, single steps promise {expected:.0%} of the loss and {kind}: "
        "a joint search (--ranges lapq) should pay"
    )
