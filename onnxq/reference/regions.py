"""Operators that stay float: handed to onnxruntime in groups, since float results depend on how a runtime orders sums.

A group holds all operators that can run before the next integer kernel, so that the runtime fuses them as in the whole
model. Its weights are constants there, its quantized inputs have been dequantized by the reference. Codes behind a group
may differ from those of the whole model where float sums are ordered otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from onnxq.measure.compare import run as run_session
from onnxq.model.names import read_names
from onnxq.model.session import make_session
from onnxq.model.tensors import element_type
from onnxq.reference.kernels import Step
from onnxq.reference.lowering import Lowered

Array = NDArray[Any]
FLAT = "flat shape"  # of the second readers


@dataclass
class Region:
    """Nodes that run together.

    Attributes:
        nodes: in order.
        inputs, outputs: names of the tensors it takes and gives.
        constants: known arrays that it reads.
        reads: how often the whole model reads each tensor.
        infos: types and shapes of the whole model's tensors, where these are known.
        model: whose opsets and functions hold here.
    """

    nodes: list[NodeProto]
    inputs: list[str]
    outputs: list[str]
    constants: Mapping[str, Array]
    reads: Mapping[str, int]
    infos: Mapping[str, ValueInfoProto]
    model: ModelProto
    threads: int
    sessions: dict[bytes, ort.InferenceSession] = field(default_factory=dict)

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Its outputs by name.

        Raises:
            ModelError: onnxruntime cannot run these nodes.
        """
        feeds = {name: arrays[name] for name in self.inputs}
        infos = typed(feeds, self.infos)
        key = b"".join(info.SerializeToString() for info in infos)
        if key not in self.sessions:
            self.sessions[key] = make_session(self.model_for(infos), threads=self.threads)
        return run_session(self.sessions[key], feeds, self.outputs)

    def model_for(self, infos: Sequence[ValueInfoProto]) -> ModelProto:
        """The nodes as a model whose inputs are declared so."""
        guards = self._guards()
        graph = helper.make_graph(
            [*self.nodes, *guards],
            "floats",
            infos,
            [ValueInfoProto(name=name) for name in (*self.outputs, *(g.output[0] for g in guards))],
            [numpy_helper.from_array(np.asarray(x), n) for n, x in {**self.constants, FLAT: [-1]}.items()],
            value_info=[self.infos[n] for node in self.nodes for n in node.output if n in self.infos],
        )
        found = helper.make_model(graph, opset_imports=list(self.model.opset_import))
        found.ir_version = self.model.ir_version
        found.functions.extend(self.model.functions)
        return found

    def _guards(self) -> list[NodeProto]:
        """A second reader for each tensor that others read as well in the whole model: fusions ask for a single one."""
        inside = Counter(name for node in self.nodes for name in read_names(node))
        made = [name for node in self.nodes for name in node.output if name]
        own = {o.name for o in self.model.graph.output}
        return [
            helper.make_node("Reshape", [name, FLAT], [f"{name} again"])
            for name in made
            if 0 < inside[name] < self.reads.get(name, 0) and name not in own
        ]


def typed(feeds: Mapping[str, Array], infos: Mapping[str, ValueInfoProto]) -> list[ValueInfoProto]:
    """Declarations of inputs as the runtime infers them in the whole model; where nothing is known, the leading size is open."""
    found = []
    for name, x in feeds.items():
        kind, info = element_type(x.dtype), infos.get(name)
        own = None if info is None else info.type.tensor_type
        if info is not None and own is not None and own.elem_type == kind and len(own.shape.dim) == x.ndim:
            found.append(info)
        else:
            open_shape = [None if axis == 0 else size for axis, size in enumerate(x.shape)]
            found.append(helper.make_tensor_value_info(name, kind, open_shape))
    return found


def schedule(lowered: Lowered, wanted: Iterable[str], model: ModelProto, threads: int) -> list[Step | Region]:
    """Steps and regions that compute the wanted tensors, in an order in which they can run."""
    needed = _needed(lowered.work, set(wanted))
    waiting = [item for item, is_needed in zip(lowered.work, needed, strict=True) if is_needed]
    made = {name for item in waiting for name in _outputs(item)}
    ready: set[str] = set()
    plan: list[Step | Region] = []
    while waiting:
        steps, waiting = _runnable(waiting, ready, made, Step)
        plan += [s for s in steps if isinstance(s, Step)]
        nodes, waiting = _runnable(waiting, ready, made, NodeProto)
        if nodes:
            group = [n for n in nodes if isinstance(n, NodeProto)]
            plan.append(_region(group, lowered, model, threads))
        assert steps or nodes, "the model's nodes are in a circle"
    _set_outputs(plan, set(wanted))
    return plan


def _outputs(item: Step | NodeProto) -> list[str]:
    return [name for name in (item.outputs if isinstance(item, Step) else item.output) if name]


def _inputs(item: Step | NodeProto) -> list[str]:
    return [n for n in item.inputs if n] if isinstance(item, Step) else read_names(item)


def _needed(work: Sequence[Step | NodeProto], wanted: set[str]) -> list[bool]:
    """Whether each item serves a wanted tensor."""
    flags = []
    for item in reversed(work):
        flags.append(not wanted.isdisjoint(_outputs(item)))
        if flags[-1]:
            wanted |= set(_inputs(item))
    return flags[::-1]


def _runnable(
    waiting: Sequence[Step | NodeProto], ready: set[str], made: set[str], kind: type
) -> tuple[list[Step | NodeProto], list[Step | NodeProto]]:
    """Items of a kind whose inputs are ready or come from items before them, and the others; marks what they make as ready."""
    now: list[Step | NodeProto] = []
    later: list[Step | NodeProto] = []
    for item in waiting:
        if isinstance(item, kind) and all(n in ready or n not in made for n in _inputs(item)):
            now.append(item)
            ready |= set(_outputs(item))
        else:
            later.append(item)
    return now, later


def _region(nodes: list[NodeProto], lowered: Lowered, model: ModelProto, threads: int) -> Region:
    made = {name for node in nodes for name in node.output}
    read = dict.fromkeys(name for node in nodes for name in read_names(node) if name not in made)
    known = {name: lowered.constants[name] for name in read if name in lowered.constants}
    return Region(
        nodes, [n for n in read if n not in known], [], known, lowered.reads, lowered.infos, model, threads
    )


def _set_outputs(plan: Sequence[Step | Region], wanted: set[str]) -> None:
    """Let each region give what is wanted or read by others."""
    for region in plan:
        if not isinstance(region, Region):
            continue
        read = set(wanted)
        for other in plan:
            if other is not region:
                read |= set(other.inputs)
        made = [name for node in region.nodes for name in node.output if name]
        region.outputs = [name for name in made if name in read]
