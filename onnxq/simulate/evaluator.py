"""The loss of a network at given step sizes, evaluated many times on the same samples.

What is evaluated is the graph that would be deployed, in the runtime's own integer kernels (`onnxq.simulate.emitted`), of which
only what a step changes is run again (`onnxq.simulate.engine`). Full and partial evaluations run the same kernels on the same
codes: they are equal to the bit, and so are the losses evaluated and deployed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto

from onnxq.data import Batch
from onnxq.errors import DataError
from onnxq.measure.compare import run
from onnxq.model.session import make_session
from onnxq.pipeline import Context
from onnxq.program import Program
from onnxq.rounded import WeightRounder, weight_rounders
from onnxq.simulate.emitted import NO_BIASES, Biases, Plan, emit
from onnxq.simulate.engine import Engine
from onnxq.simulate.losses import Loss, find_loss
from onnxq.simulate.variables import Steps, Variable, Weights

Array = NDArray[Any]
Vector = NDArray[np.float64]
Rounding = Literal["feedback", "nearest"]
Part = Literal["search", "coarse", "held"]
PARTS: tuple[Part, ...] = ("search", "coarse", "held")

MEMORY = 512 << 20  # bytes that are kept at the cuts
SEGMENTS = 8
BATCH = 32
EVERY = 4  # one batch of so many is held back, and one of so many others is the coarse part


@dataclass(frozen=True, eq=False)
class Sample:
    """A batch with the outputs of the float model."""

    batch: Batch
    reference: dict[str, Array]


@dataclass(frozen=True)
class BatchSum:
    """The sum of the loss over one batch, the batch's number and its samples."""

    number: int
    total: float
    count: int


def mean(sums: Iterable[BatchSum]) -> float:
    """The mean over samples, added up in the order of the batches: whoever evaluated them, the result is the same bits."""
    total, count = _added(sums)
    return total / count


def _added(sums: Iterable[BatchSum]) -> tuple[float, int]:
    total, count = 0.0, 0
    for found in sorted(sums, key=lambda s: s.number):
        total += found.total
        count += found.count
    return total, count


@dataclass(frozen=True, eq=False)
class Known:
    """What an evaluator found out, from which another one of the same program is made without data.

    Attributes:
        samples: by the number of their batch; some of them for an evaluator of a shard.
        batches: how many there are in all.
        loss: resolved, from all samples.
        rounders: what makes codes of weights.
        biases: that belong to the plan at the start, by unit; none where they follow from the float weights.
    """

    samples: Mapping[int, Sample]
    batches: int
    loss: Loss
    rounders: Mapping[str, WeightRounder]
    biases: Biases = field(default_factory=dict)


class Evaluator:
    """Losses of a plan at multiples of its steps.

    A *point* is a vector of natural logarithms of factors on the steps that the plan had at the start, in the order of
    `variables`: zeros are the plan itself.

    Args:
        program: its plan is complete, its graph still float.
        ctx: calibration samples, target, threads; see `Context`.
        loss: name of a loss; see `find_loss`.
        samples: how many to evaluate on, the held-back ones included.
        correct: whether the shift that quantized weights cause is taken out of the biases, as the pass correct-bias does.
        rounding: of coarse weights whose steps change: with error `feedback`, as the pass round-weights does, or to the
            `nearest` code.
        biases: that belong to the plan at the start, by unit, as `match_outputs` finds them; others follow from the float
            weights.
        memory: bytes to keep at the cuts.
        segments: to cut the network into, at most.
        known: what another evaluator found out; then `ctx` needs no data, and `loss`, `samples`, `rounding` and
            `biases` are those it had.

    Raises:
        DataError: there are no samples, or the loss does not fit them.
        UsageError: there is no such loss.
        ModelError: the model cannot be run.
    """

    def __init__(
        self,
        program: Program,
        ctx: Context,
        loss: str = "auto",
        samples: int = 512,
        *,
        correct: bool = True,
        rounding: Rounding = "feedback",
        biases: Biases = NO_BIASES,
        memory: int = MEMORY,
        segments: int = SEGMENTS,
        known: Known | None = None,
    ) -> None:
        if ctx.data is None and known is None:
            raise DataError("there is no calibration data to evaluate a loss on; give some with --calib")
        self.program, self.ctx, self.correct = program, ctx, correct
        self.evaluations = 0
        self.known = known or self._find_out(loss, samples, rounding, biases)
        self._samples, self.loss = self.known.samples, self.known.loss
        self._steps = Steps(program, ctx.target, self.known.rounders)
        self._engine = self._engine_of(segments, memory)

    def _engine_of(self, segments: int, memory: int) -> Engine:
        layers = [u.name for u in self.program.units.values() if u.weight is not None and not u.is_table]
        emitted = emit(self.program, self.ctx.target, correct=self.correct, starts=self.known.biases)
        engine = Engine(emitted, layers, self._session, segments=segments)
        sizes = [s.batch.size for s in self._samples.values()]
        first = next(iter(self._samples.values()))
        engine.bound(memory, first.batch.feeds, self._steps.plan, sum(sizes) / sizes[0])
        return engine

    def _session(self, model: ModelProto) -> ort.InferenceSession:
        return make_session(model, threads=self.ctx.threads, provider=self.ctx.provider)

    # ---- what a search asks for

    @property
    def variables(self) -> tuple[Variable, ...]:
        """The steps, in the order of a point."""
        return self._steps.variables

    @property
    def weights(self) -> Weights:
        """How codes of weights are made."""
        return self._steps.weights

    @property
    def costs(self) -> Mapping[Part, float]:
        """Samples of each part, relative to those searched on."""
        sizes = {part: sum(self._samples[i].batch.size for i in self._members(part)) for part in PARTS}
        return {part: sizes[part] / sizes["search"] for part in PARTS}

    def evaluate(self, point: Vector, part: Part = "search", changed: int | None = None) -> float:
        """The mean loss over a part of the samples; the point alone says what to run again."""
        return self.evaluate_plan(self.plan_at(point), part)

    def validate(self, point: Vector) -> float:
        """The mean loss over the samples held back."""
        return self.evaluate(point, "held")

    def evaluate_plan(self, plan: Plan, part: Part = "search") -> float:
        """The mean loss of any plan of the same tensors."""
        return mean(self.sums(plan, part))

    def partial(self, point: Vector, part: Part) -> tuple[float, int]:
        """The sum of the loss over a part of the samples, and their number."""
        return _added(self.sums(self.plan_at(point), part))

    def plan_at(self, point: Vector) -> Plan:
        """The plan at a point."""
        return self._steps.at(point)

    def sums(self, plan: Plan, part: Part) -> list[BatchSum]:
        """The loss of each batch of a part: shards are put together by `mean`."""
        self.evaluations += 1
        found = []
        for number in self._members(part):
            sample = self._samples[number]
            outputs = self._engine.run(number, sample.batch.feeds, plan)
            total = self.loss(outputs, sample.reference, sample.batch.labels)
            found.append(BatchSum(number, total, sample.batch.size))
        return found

    def coarse(self) -> list[int]:
        """Places of the variables that scale what loses much, all where nothing does; see `Weights.coarse`."""
        return self._steps.coarse() or list(range(len(self.variables)))

    def float_loss(self, part: Part = "search") -> float:
        """The loss of the float model."""
        members = [self._samples[i] for i in self._members(part)]
        total = sum(self.loss(s.reference, s.reference, s.batch.labels) for s in members)
        return total / sum(s.batch.size for s in members)

    def deployed_loss(self, model: ModelProto, part: Part = "search") -> float:
        """The loss of an emitted model on the same samples, in onnxruntime's own kernels."""
        session = make_session(model, threads=self.ctx.threads, provider=self.ctx.provider)
        members = [self._samples[i] for i in self._members(part)]
        total = sum(self.loss(run(session, s.batch.feeds), s.reference, s.batch.labels) for s in members)
        return total / sum(s.batch.size for s in members)

    def apply(self, point: Vector) -> None:
        """Write the steps of a point into the program's plan."""
        self.program.plan.clear()
        self.program.plan.update(self.plan_at(point))

    @property
    def kept_bytes(self) -> int:
        """Memory of what is kept at the cuts."""
        return self._engine.kept_bytes

    @property
    def runs(self) -> int:
        """Runs of segments on batches so far."""
        return self._engine.runs

    # ---- samples

    def _find_out(self, loss: str, samples: int, rounding: Rounding, biases: Biases) -> Known:
        rounders = weight_rounders(self.program, self.ctx) if rounding == "feedback" else {}
        read = self._read(samples)
        if ":" not in loss:
            read = _with_rows(read)
        return Known(dict(enumerate(read)), len(read), _find_loss(loss, read), rounders, dict(biases))

    def _read(self, samples: int) -> list[Sample]:
        assert self.ctx.data is not None
        session = self._session(self.program.to_model())
        limit = self.ctx.up_to(samples)
        size = max(1, min(BATCH, limit // EVERY**2))
        batches = list(self.ctx.data.batches(size, limit))
        return [Sample(b, run(session, b.feeds)) for b in batches]

    def _members(self, part: Part) -> list[int]:
        """Numbers of the batches of a part that are here; with a single batch all parts are that."""
        everything = range(self.known.batches)
        held = [i for i in everything if i % EVERY == EVERY - 1]
        search = [i for i in everything if i % EVERY != EVERY - 1]
        wanted = {"held": held or search, "search": search, "coarse": search[::EVERY]}[part]
        return [i for i in wanted if i in self._samples]


def _with_rows(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with the outputs that have a row for each, as boxes of a detector have not; with all where none has."""
    names = [
        name
        for name in samples[0].reference
        if all(np.shape(s.reference[name])[:1] == (s.batch.size,) for s in samples)
    ]
    return [replace(s, reference={name: s.reference[name] for name in names or s.reference}) for s in samples]


def _find_loss(name: str, samples: Sequence[Sample]) -> Loss:
    """The loss, chosen by the samples whose outputs have the shapes of the first one's."""
    shapes = {n: v.shape[1:] for n, v in samples[0].reference.items()}
    alike = [s for s in samples if {n: v.shape[1:] for n, v in s.reference.items()} == shapes]
    reference = {n: np.concatenate([s.reference[n] for s in alike]) for n in shapes}
    labels = [s.batch.labels for s in alike if s.batch.labels is not None]
    return find_loss(name, reference, np.concatenate(labels) if len(labels) == len(alike) else None)
