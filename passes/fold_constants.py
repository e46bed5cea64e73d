"""Evaluate everything that does not depend on the inputs, and take out Identity nodes, which keep layers from what they absorb.

Foldable nodes are run together in onnxruntime, so a fold means exactly what the runtime would compute. When
that fails, or their results would take much memory at once, each half is tried by itself, until the nodes that must
stay are found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.errors import ModelError
from onnxq.graph import Names, Uses, constant, is_constant, is_standard, remove_node, replace_reads
from onnxq.model.messages import one_sentence
from onnxq.model.session import RUNTIME_ERRORS, make_session
from onnxq.model.surgeon import to_model
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program

RANDOM = {
    "RandomNormal",
    "RandomUniform",
    "RandomNormalLike",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
    "Dropout",
}
KEPT = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Evaluate nodes whose inputs are all constant; take out Identity nodes.

    Attributes:
        limit_mb: results larger than this many megabytes stay computed at run time.
    """

    name: ClassVar[str] = "fold-constants"
    limit_mb: int = 64

    def run(self, program: Program, ctx: Context) -> PassResult:
        shapes = _drop_identities(program.graph) + _fold_shapes(program.graph)
        folder = _Folder(program, self.limit_mb << 20)
        folded = folder.fold(list(program.graph.nodes))
        if shapes + folded:
            program.graph.cleanup(remove_unused_graph_inputs=False)
        return PassResult(shapes + folded, folder.skipped)


def _drop_identities(graph: gs.Graph) -> int:
    """Take out each Identity but one that an output of the graph or a body needs: weights that layers share stay shared."""
    dropped, uses = 0, Uses(graph)
    for node in list(graph.nodes):
        if node.op != "Identity" or not is_standard(node) or uses.escapes(node.outputs[0]):
            continue
        source, result = node.inputs[0], node.outputs[0]
        replace_reads(uses.readers(result), result, source)
        remove_node(graph, node)
        dropped += 1
    return dropped


def _fold_shapes(graph: gs.Graph) -> int:
    """Replace Shape of a tensor whose dimensions are all known by the shape itself."""
    folded, uses = 0, Uses(graph)
    for node in list(graph.nodes):
        if node.op != "Shape" or not is_standard(node) or uses.escapes(node.outputs[0]):
            continue
        shape = node.inputs[0].shape
        if shape is None or not all(isinstance(d, int) and d >= 0 for d in shape):
            continue
        dims = shape[node.attrs.get("start", 0) : node.attrs.get("end")]
        result = node.outputs[0]
        remove_node(graph, node)
        result.to_constant(np.asarray(dims, np.int64))
        folded += 1
    return folded


@dataclass
class _Folder:
    """Folds nodes and notes why others stay.

    Attributes:
        program: the program, whose graph it changes.
        limit: largest result in bytes.
        skipped: reason of each node that stays although its inputs are constant, by name.
    """

    program: Program
    limit: int
    skipped: dict[str, str] = field(default_factory=dict)

    def fold(self, candidates: list[gs.Node]) -> int:
        """Fold those of the nodes, which are in graph order, that can be; how many there were."""
        nodes = list(self._foldable(candidates))
        if not nodes:
            return 0
        uses, inner = Uses(self.program.graph), {id(n) for n in nodes}
        wanted = [
            tensor
            for node in nodes
            for tensor in node.outputs
            if uses.escapes(tensor) or any(id(r) not in inner for r in uses.readers(tensor))
        ]
        if len(nodes) > 1 and sum(map(_bytes, wanted)) > self.limit:
            return self._fold_halves(nodes)
        try:
            values = self._evaluate(nodes, wanted)
        except ModelError as error:
            if len(nodes) > 1:
                return self._fold_halves(nodes)
            self.skipped[nodes[0].name] = str(error)
            return 0
        self._replace(nodes, wanted, values, uses)
        return len(nodes)

    def _fold_halves(self, nodes: list[gs.Node]) -> int:
        half = len(nodes) // 2
        return self.fold(nodes[:half]) + self.fold(nodes[half:])

    def _foldable(self, candidates: list[gs.Node]) -> Iterator[gs.Node]:
        """Nodes whose inputs are constant or come from nodes before, and that nothing forbids to fold."""
        known: set[int] = set()
        for node in candidates:
            inputs = [t for t in node.inputs if not t.is_empty()]
            if not all(is_constant(t) or id(t) in known for t in inputs) or self._is_returned_constant(node):
                continue
            reason = _refusal(node, self.limit)
            if reason is not None:
                self.skipped[node.name] = reason
                continue
            known |= {id(t) for t in node.outputs}
            yield node

    def _is_returned_constant(self, node: gs.Node) -> bool:
        """Whether the node does nothing but write a constant into an output of the graph."""
        if node.op not in ("Identity", "Constant") or not is_standard(node):
            return False
        return any(node.outputs[0] is t for t in self.program.graph.outputs)

    def _evaluate(self, nodes: list[gs.Node], wanted: list[gs.Tensor]) -> list[NDArray[Any]]:
        """Values of the wanted outputs of the nodes; ModelError when there is none or it is too large."""
        if not wanted:
            return []
        part = gs.Graph(nodes=nodes, inputs=[], outputs=wanted, opset=self.program.graph.opset)
        session = make_session(to_model(part, self.program.source), threads=1, optimize=False)
        try:
            values: list[NDArray[Any]] = session.run([t.name for t in wanted], {})
        except RUNTIME_ERRORS as error:
            raise ModelError(f"onnxruntime cannot evaluate it: {one_sentence(error)}") from None
        if any(v.nbytes > self.limit for v in values):
            raise ModelError(_too_large(self.limit))
        return values

    def _replace(
        self, nodes: list[gs.Node], wanted: list[gs.Tensor], values: list[NDArray[Any]], uses: Uses
    ) -> None:
        """Turn the wanted tensors into constants; an output of the graph still needs a node to write it."""
        graph = self.program.graph
        outputs, names = {t.name for t in graph.outputs}, Names(graph)
        for node in nodes:
            remove_node(graph, node)
        for tensor, value in zip(wanted, values, strict=True):
            if tensor.name not in outputs:
                tensor.to_constant(value)
                self.program.shelve(uses.readers(tensor))
                continue
            source = constant(names, f"{tensor.name}_value", value)
            replace_reads(uses.readers(tensor), tensor, source)
            name = names.fresh(f"{tensor.name}_identity")
            graph.nodes.insert(0, gs.Node("Identity", name, inputs=[source], outputs=[tensor]))


def _refusal(node: gs.Node, limit: int) -> str | None:
    """Why a node is not evaluated although its inputs are known, None when it is."""
    if not is_standard(node):
        return f"{node.op} is no standard operator"
    if node.op in RANDOM:
        return "its result is random"
    if node.op in KEPT:
        return "it would undo quantization"
    if any(node.subgraphs()):
        return "it has a body"
    tensors = [t for t in (*node.inputs, *node.outputs) if not t.is_empty()]
    if not all(isinstance(t.dtype, np.dtype | type) and np.dtype(t.dtype).kind in "biuf" for t in tensors):
        return "it works on something other than numbers"
    return _too_large(limit) if any(_bytes(t) > limit for t in node.outputs) else None


def _too_large(limit: int) -> str:
    return f"its result is larger than {limit >> 20} MB"


def _bytes(tensor: gs.Tensor) -> int:
    """Size of the tensor, 0 when it is not known."""
    if tensor.shape is None or not all(isinstance(d, int) for d in tensor.shape):
        return 0
    return int(math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize)
