"""The emitted graph walked through one segment after the other on all samples, while layers of it change.

What lies between two segments (`onnxq.simulate.segments`) are codes, which are kept for all samples. So a layer can be changed by
the codes that arrive at it before anything behind it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto, helper, numpy_helper

from onnxq.measure.compare import run
from onnxq.model.names import read_names
from onnxq.model.session import make_session
from onnxq.pipeline import Context
from onnxq.program import Program
from onnxq.simulate.emitted import emit
from onnxq.simulate.segments import Segment, cut_into_segments

Array = NDArray[Any]

MEMORY = 128 << 20  # bytes of what lies between two segments
RUNS = 8  # of segments as far as a layer inside them, that all samples are worth


class Walk:
    """One way through the emitted graph of a program, which is not changed.

    Attributes:
        plan: by which what has not run yet is made; may be changed on the way.
        biases: of units, (C,), by the unit's name, to take instead of those that follow from the plan; likewise.
    """

    def __init__(self, program: Program, ctx: Context, sources: Mapping[str, str]) -> None:
        """Nothing has run yet.

        Args:
            program: its plan is complete, its graph still float.
            sources: tensors that layers multiply, by the name of the layer's node.
        """
        self.plan = dict(program.plan)
        self.biases: dict[str, NDArray[np.float32]] = {}
        self._ctx, self._sources = ctx, sources
        self._emitted = emit(program, ctx.target, correct=True, biases=self.biases)
        self._segments = cut_into_segments(self._emitted.model, list(sources), len(sources) + 1)
        # what each array was made of, by the place of its segment and its name; units by their weight
        self._made: dict[tuple[int, str], list[object]] = {}
        self._readers: dict[str, list[str]] = {}
        for unit in program.units.values():
            self._readers.setdefault(unit.weight or "", []).append(unit.name)

    def affordable(self, samples: int) -> int:
        """Samples of which all that lies between any two segments fits into MEMORY, at most so many; fewer for many RUNS."""
        data = self._ctx.data
        assert data is not None
        inside = [{codes for codes, _ in self._read_by(s)} - set(s.inputs) for s in self._segments]
        runs = sum(len(codes) for codes in inside)
        wanted = max(self._ctx.up_to(samples) * RUNS // max(runs, RUNS), data.least)
        batch = next(data.batches(1, wanted))
        known, most = dict(batch.feeds), 1
        for place in range(len(self._segments)):
            most = max(most, sum(values.nbytes for values in known.values()))
            known = self._behind(place, known, self._session(place))
        return max(min(wanted, MEMORY * batch.size // most), data.least)

    def layers(self, feeds: Sequence[Mapping[str, Array]]) -> Iterator[tuple[str, Sequence[Array]]]:
        """Layers in order by the names of their nodes, with the codes that arrive, batch by batch.

        Args:
            feeds: inputs of the network, batch by batch.

        Raises:
            ModelError: a segment cannot be run.
        """
        known = [dict(batch) for batch in feeds]
        for place, segment in enumerate(self._segments):
            self._ctx.progress("matching outputs", place, len(self._segments))
            held: tuple[str, Sequence[Array]] = ("", ())  # several layers may read the same codes
            for codes, layer in self._read_by(segment):
                if codes != held[0]:
                    held = codes, self._arriving(place, codes, known)
                yield layer, held[1]
            if place + 1 < len(self._segments):
                session = self._session(place)
                known = [self._behind(place, values, session) for values in known]

    def _read_by(self, segment: Segment) -> list[tuple[str, str]]:
        """Codes that layers of a segment multiply, with the names of the layers, in order."""
        layers = [node.name for node in segment.model.graph.node if node.name in self._sources]
        found = [(self._emitted.program.codes.get(self._sources[layer]), layer) for layer in layers]
        return [(codes, layer) for codes, layer in found if codes is not None]

    def _arriving(self, place: int, codes: str, known: Sequence[Mapping[str, Array]]) -> Sequence[Array]:
        """Codes of a tensor, batch by batch, which an earlier segment wrote or this one does."""
        if codes in known[0]:
            return [values[codes] for values in known]
        session = self._session(place, codes)
        return [run(session, values, [codes])[codes] for values in known]

    def _session(self, place: int, wanted: str | None = None) -> ort.InferenceSession:
        """Of a segment, by the plan and the biases as they are; only as far as a tensor that is wanted."""
        model = self._segments[place].model
        for tensor in model.graph.initializer:
            if tensor.name not in self._emitted.recipes:
                continue
            parts, before = self._parts(tensor.name), self._made.get((place, tensor.name), [])
            if before and all(a is b for a, b in zip(before, parts, strict=True)):
                continue
            array = np.array(self._emitted.array(tensor.name, self.plan), order="C")
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            self._made[place, tensor.name] = parts
        if wanted is not None:
            model = _as_far_as(model, wanted)
        return make_session(model, threads=self._ctx.threads, provider=self._ctx.provider)

    def _parts(self, name: str) -> list[object]:
        """What an array is made of now: decisions, and biases of the units that read the weights."""
        reads = self._emitted.recipes[name].reads
        biases = (self.biases.get(unit) for tensor in reads for unit in self._readers.get(tensor, ()))
        return [*(self.plan[tensor] for tensor in reads), *biases]

    def _behind(
        self, place: int, known: Mapping[str, Array], session: ort.InferenceSession
    ) -> dict[str, Array]:
        """What later segments read."""
        later = {name for segment in self._segments[place + 1 :] for name in segment.inputs}
        return {name: values for name, values in {**known, **run(session, known)}.items() if name in later}


def _as_far_as(model: ModelProto, wanted: str) -> ModelProto:
    """The part of a model that writes a tensor, which becomes its output."""
    read, nodes = {wanted}, []
    for node in reversed(model.graph.node):
        if read.intersection(node.output):
            nodes.append(node)
            read.update(read_names(node))
    graph = helper.make_graph(
        nodes[::-1],
        model.graph.name,
        [i for i in model.graph.input if i.name in read],
        [ValueInfoProto(name=wanted)],
        [t for t in model.graph.initializer if t.name in read],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
