"""The loss of a network at given step sizes, evaluated many times on the same samples.

The fake-quantized network is cut into segments (`onnxq.simulate.segments`), each with a session of its own. Activation steps are
inputs of the sessions; when a weight's step changes, its codes are made anew in numpy and the one segment that holds it is loaded
again. What is live at the cuts is kept for every batch, with the steps that it depends on, so that an evaluation runs only the
segments behind the first step that differs. Full and partial evaluations run the same sessions on the same numbers: they are
equal to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from onnxq.affine import QuantParams
from onnxq.data import Batch
from onnxq.errors import DataError
from onnxq.measure.compare import run
from onnxq.model.session import make_session
from onnxq.pipeline import Context
from onnxq.program import Program, QuantDecision
from onnxq.simulate.graph import bias_array, simulate, unit_bias, weight_array
from onnxq.simulate.losses import Loss, find_loss
from onnxq.simulate.segments import Segment, cut_into_segments
from onnxq.simulate.variables import Variable, Weights, find_variables, names, scaled, write_factors

Array = NDArray[Any]
Vector = NDArray[np.float64]
Part = Literal["search", "coarse", "held"]
PARTS: tuple[Part, ...] = ("search", "coarse", "held")

MEMORY = 512 << 20  # bytes that are kept at the cuts
SEGMENTS = 24
BATCH = 32
EVERY = 4  # one batch of so many is held back, and one of so many others is the coarse part
CONFIG = {"session.disable_quant_qdq": "1", "session.disable_double_qdq_remover": "1"}


@dataclass
class _Stage:
    """A segment with its session, the weights in it, and what it kept.

    Attributes:
        variables: indices of the variables that its nodes depend on directly.
        upstream: of those and all before, sorted.
        weights: variables whose change needs a new session.
        kept: batch number -> (factors of `upstream`, tensors that later segments read).
    """

    segment: Segment
    variables: tuple[int, ...]
    upstream: tuple[int, ...]
    weights: tuple[int, ...]
    session: ort.InferenceSession | None = None
    loaded: tuple[float, ...] = ()
    keeps: bool = True
    kept: dict[int, tuple[tuple[float, ...], dict[str, Array]]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Sample:
    """A batch with the outputs of the float model."""

    batch: Batch
    reference: dict[str, Array]


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
        memory: bytes to keep at the cuts.
        segments: to cut the network into, at most.
        like: another evaluator of the same network, whose samples and loss are taken.

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
        memory: int = MEMORY,
        segments: int = SEGMENTS,
        like: Evaluator | None = None,
    ) -> None:
        if ctx.data is None:
            raise DataError("there is no calibration data to evaluate a loss on; give some with --calib")
        self.program, self.ctx, self.correct, self.memory = program, ctx, correct, memory
        self.variables: tuple[Variable, ...] = find_variables(program)
        self.evaluations = 0
        self.runs = 0  # of segments on batches
        self._weights = Weights.of(program, ctx.target)
        self._plan = dict(program.plan)
        self._simulation = simulate(program, ctx.target)
        self._nodes = {n.name: n for n in program.graph.nodes}
        self._samples: list[_Sample] = self._read(samples) if like is None else like._samples
        self.loss: Loss = self._find_loss(loss) if like is None else like.loss
        self._stages = self._cut(segments)

    # ---- what a search asks for

    @property
    def costs(self) -> Mapping[Part, float]:
        """Samples of each part, relative to those searched on."""
        sizes = {part: sum(self._samples[i].batch.size for i in self._members(part)) for part in PARTS}
        return {part: sizes[part] / sizes["search"] for part in PARTS}

    def evaluate(self, point: Vector, part: Part = "search", changed: int | None = None) -> float:
        """The mean loss over a part of the samples; the point alone says what to run again."""
        total, count = self.partial(np.asarray(point, np.float64), part)
        return total / count

    def validate(self, point: Vector) -> float:
        """The mean loss over the samples held back."""
        return self.evaluate(point, "held")

    def partial(self, point: Vector, part: Part) -> tuple[float, int]:
        """The sum of the loss over a part of the samples, and their number: shards add up."""
        factors = tuple(float(f) for f in np.exp(point))
        self.evaluations += 1
        self._load(factors)
        total = 0.0
        count = 0
        for number in self._members(part):
            sample = self._samples[number]
            outputs = self._run(number, sample.batch, factors)
            total += self.loss(outputs, sample.reference, sample.batch.labels)
            count += sample.batch.size
        return total, count

    def widths(self) -> list[int]:
        """Bits of the codes that each variable scales."""
        bits: dict[str, int] = {}
        for tensor, decision in self._plan.items():
            bits[tensor if tensor in self._weights.sites else decision.group] = decision.scheme.bits
        return [bits[v.name] for v in self.variables]

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
        self.program.plan.update(self._plan)
        factors = dict(zip(names(self.variables), np.exp(point), strict=True))
        write_factors(self.program, self._weights, {n: float(f) for n, f in factors.items()})

    @property
    def kept_bytes(self) -> int:
        """Memory of what is kept at the cuts."""
        return sum(a.nbytes for s in self._stages for _, kept in s.kept.values() for a in kept.values())

    # ---- samples

    def _read(self, samples: int) -> list[_Sample]:
        assert self.ctx.data is not None
        session = make_session(self.program.to_model(), threads=self.ctx.threads, provider=self.ctx.provider)
        limit = max(min(samples, self.ctx.samples), self.ctx.data.least)
        size = max(1, min(BATCH, limit // EVERY**2))
        batches = list(self.ctx.data.batches(size, limit))
        return [_Sample(b, run(session, b.feeds)) for b in batches]

    def _find_loss(self, name: str) -> Loss:
        reference = {
            n: np.concatenate([s.reference[n] for s in self._alike]) for n in self._alike[0].reference
        }
        labels = [s.batch.labels for s in self._alike if s.batch.labels is not None]
        return find_loss(name, reference, np.concatenate(labels) if len(labels) == len(self._alike) else None)

    @property
    def _alike(self) -> list[_Sample]:
        """Samples whose outputs have the shapes of the first one's, by which the loss is chosen."""
        shapes = {n: v.shape[1:] for n, v in self._samples[0].reference.items()}
        return [s for s in self._samples if {n: v.shape[1:] for n, v in s.reference.items()} == shapes]

    def _members(self, part: Part) -> list[int]:
        """Numbers of the batches of a part; with a single batch all parts are that."""
        everything = range(len(self._samples))
        held = [i for i in everything if i % EVERY == EVERY - 1]
        search = [i for i in everything if i % EVERY != EVERY - 1]
        if part == "held":
            return held or search
        return search if part == "search" else search[::EVERY]

    # ---- segments

    def _cut(self, most: int) -> list[_Stage]:
        anchors = [u.name for u in self.program.units.values() if u.weight is not None and not u.is_table]
        sim = self._simulation
        segments = cut_into_segments(sim.model, anchors, list(sim.scales.values()), most)
        places = {name: i for i, name in enumerate(names(self.variables))}
        by_scale = {scale: places[group] for group, scale in sim.scales.items() if group in places}
        stages: list[_Stage] = []
        upstream: set[int] = set()
        for segment in segments:
            stored = {t.name for t in segment.model.graph.initializer}
            held = {self._variable(w) for w, found in sim.weights.items() if stored & set(found)}
            direct = {by_scale[s] for s in segment.scales if s in by_scale} | {places[v] for v in held}
            direct |= self._bias_variables(stored, places)
            upstream |= direct
            reload = {places[v] for v in held} | self._bias_variables(stored, places)
            stages.append(
                _Stage(segment, tuple(sorted(direct)), tuple(sorted(upstream)), tuple(sorted(reload)))
            )
        self._bound(stages)
        return stages

    def _bias_variables(self, stored: set[str], places: Mapping[str, int]) -> set[int]:
        """Variables that biases in these initializers depend on: the steps of the layer's input and weight."""
        found = set()
        for unit in self.program.units.values():
            if self._simulation.biases.get(unit.name) in stored and unit.weight is not None:
                found |= {places[self._variable(unit.weight)], places[self._plan[unit.inputs[0]].group]}
        return found

    def _variable(self, weight: str) -> str:
        """Name of the variable that scales a weight; a table shares that of the activations it becomes."""
        return weight if weight in self._weights.sites else self._plan[weight].group

    def _bound(self, stages: list[_Stage]) -> None:
        """Keep nothing at some of the cuts, evenly spread, when all would take more than the memory."""
        sizes = self._sizes(stages)
        inner = list(range(len(stages) - 1))
        while inner and sum(sizes[i] for i in inner) > self.memory:
            inner = inner[1::2] if len(inner) > 1 else []
        for i, stage in enumerate(stages):
            stage.keeps = i in inner

    def _sizes(self, stages: list[_Stage]) -> list[int]:
        """Bytes that each stage would keep for all batches, by running the first."""
        factors = (1.0,) * len(self.variables)
        self._stages = stages
        self._load(factors)
        known: dict[str, Array] = dict(self._samples[0].batch.feeds)
        sizes = []
        share = sum(s.batch.size for s in self._samples) / self._samples[0].batch.size
        for stage in stages:
            known |= self._outputs(stage, known, factors)
            sizes.append(int(share * sum(known[n].nbytes for n in stage.segment.live)))
        return sizes

    def _load(self, factors: tuple[float, ...]) -> None:
        """Sessions whose weights and biases are those of the factors."""
        for stage in self._stages:
            wanted = tuple(factors[i] for i in stage.weights)
            if stage.session is None or stage.loaded != wanted:
                stage.session = self._session(stage, factors)
                stage.loaded = wanted

    def _session(self, stage: _Stage, factors: tuple[float, ...]) -> ort.InferenceSession:
        fresh = self._arrays({t.name for t in stage.segment.model.graph.initializer}, factors)
        model = ModelProto()
        model.CopyFrom(stage.segment.model)
        for tensor in model.graph.initializer:
            if tensor.name in fresh:
                tensor.CopyFrom(
                    numpy_helper.from_array(np.ascontiguousarray(fresh[tensor.name]), tensor.name)
                )
        return make_session(model, threads=self.ctx.threads, provider=self.ctx.provider, config=CONFIG)

    def _arrays(self, stored: set[str], factors: tuple[float, ...]) -> dict[str, Array]:
        """Values of the initializers that depend on the factors."""
        by_name = dict(zip(names(self.variables), factors, strict=True))
        decisions: dict[str, QuantDecision] = {}
        found: dict[str, Array] = {}
        for weight, places in self._simulation.weights.items():
            if not stored & set(places):
                continue
            decisions[weight] = self._weights.at(weight, by_name[self._variable(weight)])
            array = weight_array(decisions[weight], weight not in self._weights.sites)
            found |= dict.fromkeys(places, array)
        for unit in self.program.units.values():
            place = self._simulation.biases.get(unit.name)
            if place not in stored or unit.weight is None:
                continue
            bias = unit_bias(self.program, unit)
            assert bias is not None
            assert place is not None
            source = self._plan[unit.inputs[0]]
            assert source.params is not None
            grid: QuantParams = scaled(source.params, by_name[source.group])
            view = Program(
                self.program.graph,
                self.program.source,
                {
                    unit.inputs[0]: _with(source, grid),
                    unit.weight: self._decision(unit.weight, decisions, by_name),
                },
                statistics=self.program.statistics,
            )
            weights = self._weights.values[unit.weight] if self.correct else None
            found[place] = bias_array(view, unit, bias, weights, self._nodes[unit.name].attrs.get("group", 1))
        return found

    def _decision(
        self, weight: str, known: dict[str, QuantDecision], by_name: Mapping[str, float]
    ) -> QuantDecision:
        if weight not in known:
            known[weight] = self._weights.at(weight, by_name[self._variable(weight)])
        return known[weight]

    # ---- running

    def _run(self, number: int, batch: Batch, factors: tuple[float, ...]) -> dict[str, Array]:
        """Outputs of a batch, from the last cut whose steps are the same."""
        first = self._first(number, factors)
        known: dict[str, Array] = dict(batch.feeds)
        outputs: dict[str, Array] = {}
        for stage in self._stages[:first]:
            if stage.keeps and number in stage.kept:
                known |= stage.kept[number][1]
        for place, stage in enumerate(self._stages[first:], first):
            known |= self._outputs(stage, known, factors)
            if stage.keeps:
                wanted = self._wanted(place)
                key = tuple(factors[i] for i in stage.upstream)
                stage.kept[number] = key, {n: known[n] for n in wanted if n in known}
        for stage in self._stages:
            outputs |= {n: known[n] for n in stage.segment.outputs if n in known}
        return outputs

    def _wanted(self, place: int) -> tuple[str, ...]:
        """What must be known behind a stage: all that is live there, and outputs written so far."""
        written = [n for s in self._stages[: place + 1] for n in s.segment.outputs]
        return (*self._live_at(place), *written)

    def _live_at(self, place: int) -> tuple[str, ...]:
        later = {n for s in self._stages[place + 1 :] for n in s.segment.inputs}
        made = [n for s in self._stages[: place + 1] for n in s.segment.live]
        return tuple(n for n in made if n in later)

    def _first(self, number: int, factors: tuple[float, ...]) -> int:
        """The stage to start from."""
        for place in range(len(self._stages) - 1, -1, -1):
            stage = self._stages[place]
            kept = stage.kept.get(number)
            if stage.keeps and kept is not None and kept[0] == tuple(factors[i] for i in stage.upstream):
                return place + 1
        return 0

    def _outputs(
        self, stage: _Stage, known: Mapping[str, Array], factors: tuple[float, ...]
    ) -> dict[str, Array]:
        assert stage.session is not None
        self.runs += 1
        feeds = {n: known[n] for n in stage.segment.inputs} | dict(self._steps(stage, factors))
        return run(stage.session, feeds)

    def _steps(self, stage: _Stage, factors: tuple[float, ...]) -> Iterator[tuple[str, Array]]:
        places = {name: i for i, name in enumerate(names(self.variables))}
        groups = {scale: group for group, scale in self._simulation.scales.items()}
        tensors = {d.group: d for d in self._plan.values() if not d.is_weight}
        for scale in stage.segment.scales:
            group = groups[scale]
            params = tensors[group].params
            assert params is not None
            yield scale, scaled(params, factors[places[group]]).scale


def _with(decision: QuantDecision, params: QuantParams) -> QuantDecision:
    return QuantDecision(decision.scheme, decision.group, params=params)
