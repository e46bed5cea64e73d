"""An emitted graph run at many plans, doing again only what a plan changes.

The graph is cut into segments (`onnxq.simulate.segments`). Scales, codes and biases are constants of each segment's session,
as in the deployed model, so that the runtime's own integer kernels run; a session is made again when one of them changes. What is
live at the cuts is kept for every batch, with the decisions that it depends on, and a run starts behind the last cut that still
holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper

from onnxq.measure.compare import run
from onnxq.program import QuantDecision
from onnxq.simulate.emitted import Emitted, Plan
from onnxq.simulate.segments import Segment, cut_into_segments

Array = NDArray[Any]
Feeds = Mapping[str, Array]
Decisions = tuple[QuantDecision, ...]  # compared by identity


@dataclass
class _Stage:
    """A segment with its session and what it kept.

    Attributes:
        reads: tensors of the plan on which its initializers depend.
        upstream: those of it and of all segments before.
        stored: its initializers that follow from the plan.
        kept: batch -> (decisions of `upstream`, tensors that are read later).
    """

    segment: Segment
    reads: tuple[str, ...]
    upstream: tuple[str, ...]
    stored: Mapping[str, TensorProto]
    session: ort.InferenceSession | None = None
    loaded: Decisions = ()
    keeps: bool = True
    kept: dict[int, tuple[Decisions, dict[str, Array]]] = field(default_factory=dict)


class Engine:
    """Outputs of an emitted graph by any plan of the same tensors.

    Attributes:
        runs: of segments on batches, so far.
        loads: sessions made, so far.
    """

    def __init__(
        self,
        emitted: Emitted,
        anchors: Sequence[str],
        make_session: Callable[[ModelProto], ort.InferenceSession],
        *,
        segments: int,
    ) -> None:
        """Nothing is loaded yet, and everything is kept.

        Args:
            anchors: names of nodes each of which should be in a segment of its own.
            make_session: a session over a model.
            segments: to cut the graph into, at most.
        """
        self.runs, self.loads = 0, 0
        self._emitted, self._make = emitted, make_session
        self._stages: list[_Stage] = []
        upstream: dict[str, None] = {}
        for segment in cut_into_segments(emitted.model, anchors, segments):
            stored = {t.name: t for t in segment.model.graph.initializer if t.name in emitted.recipes}
            reads = tuple(dict.fromkeys(t for name in stored for t in emitted.recipes[name].reads))
            upstream |= dict.fromkeys(reads)
            self._stages.append(_Stage(segment, reads, tuple(upstream), stored))
        self._wanted = [self._read_later(place) for place in range(len(self._stages))]

    @property
    def segments(self) -> int:
        """How many there are."""
        return len(self._stages)

    @property
    def kept_bytes(self) -> int:
        """Memory of what is kept at the cuts."""
        return sum(a.nbytes for s in self._stages for _, kept in s.kept.values() for a in kept.values())

    def bound(self, memory: int, feeds: Feeds, plan: Plan, batches: float) -> None:
        """Keep nothing at some of the cuts, evenly spread, where all would take more than so many bytes.

        Args:
            memory: bytes.
            feeds: a batch, which is run to learn the sizes.
            plan: any.
            batches: so large in all.
        """
        self.run(0, feeds, plan)
        sizes = [int(batches * sum(a.nbytes for a in stage.kept[0][1].values())) for stage in self._stages]
        inner = list(range(len(self._stages) - 1))
        while inner and sum(sizes[i] for i in inner) > memory:
            inner = inner[1::2] if len(inner) > 1 else []
        for place, stage in enumerate(self._stages):
            stage.keeps = place in inner
            stage.kept.clear()

    def run(self, batch: int, feeds: Feeds, plan: Plan) -> dict[str, Array]:
        """Outputs of a batch.

        Args:
            batch: its number, under which it is kept.
            feeds: its inputs.
            plan: a decision for each tensor of the plan that was emitted; what has not changed is the same object.
        """
        first, known = self._resume(batch, plan)
        known = {**feeds, **known}
        for place in range(first, len(self._stages)):
            stage = self._stages[place]
            self._load(stage, plan)
            assert stage.session is not None
            self.runs += 1
            known |= run(stage.session, {n: known[n] for n in stage.segment.inputs})
            if stage.keeps:
                kept = {n: known[n] for n in self._wanted[place]}
                stage.kept[batch] = tuple(plan[t] for t in stage.upstream), kept
        return {name: known[name] for stage in self._stages for name in stage.segment.outputs}

    def _resume(self, batch: int, plan: Plan) -> tuple[int, dict[str, Array]]:
        """The first segment to run, and what is known in front of it."""
        for place in range(len(self._stages) - 1, -1, -1):
            stage = self._stages[place]
            decisions, kept = stage.kept.get(batch, (None, {}))
            if decisions == tuple(plan[t] for t in stage.upstream):
                return place + 1, kept
        return 0, {}

    def _load(self, stage: _Stage, plan: Plan) -> None:
        """A session with the parameters of the plan."""
        wanted = tuple(plan[t] for t in stage.reads)
        if stage.session is not None and stage.loaded == wanted:
            return
        before = dict(zip(stage.reads, stage.loaded, strict=True)) if stage.session is not None else {}
        for name, tensor in stage.stored.items():
            if any(before.get(t) is not plan[t] for t in self._emitted.recipes[name].reads):
                array = np.array(self._emitted.array(name, plan), order="C")
                tensor.CopyFrom(numpy_helper.from_array(array, name))
        stage.session, stage.loaded = self._make(stage.segment.model), wanted
        self.loads += 1

    def _read_later(self, place: int) -> tuple[str, ...]:
        """What must be known behind a segment: tensors that later ones read, and outputs written so far."""
        later = {n for stage in self._stages[place + 1 :] for n in stage.segment.inputs}
        made = [n for stage in self._stages[: place + 1] for n in stage.segment.live if n in later]
        written = [n for stage in self._stages[: place + 1] for n in stage.segment.outputs]
        return tuple(dict.fromkeys((*made, *written)))
