"""Which nodes passes may touch, and the reasons of those that stay float."""

from __future__ import annotations

from collections.abc import Callable, Collection
from fnmatch import fnmatchcase

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.errors import UsageError, unknown
from onnxq.graph import Uses, all_nodes, float_values
from onnxq.program import Program
from onnxq.rules import WEIGHTED


def skipped_nodes(program: Program, patterns: Collection[str]) -> dict[str, str]:
    """Reason of each node of the graph that a pattern names.

    A node that a pass has rewritten answers to its op in the source model too: `MatMul` names the Gemm made of one. A pattern
    that only names nodes that are gone, such as a folded BatchNormalization, names nothing that is left.

    Args:
        patterns: as `matching_nodes` reads them.

    Raises:
        UsageError: a pattern matches no node, neither of the graph nor of the source model.
    """
    left = {n.name for n in program.graph.nodes}
    reasons: dict[str, str] = {}
    for pattern in patterns:
        hits = matching_nodes(program, pattern, "skip pattern")
        reasons |= dict.fromkeys(hits & left, f"skipped by pattern {pattern!r}")
    return reasons


def matching_nodes(program: Program, pattern: str, kind: str) -> set[str]:
    """Names of the nodes, of the graph or of the source model, that a pattern names.

    Args:
        pattern: a node name or the end of one behind a slash, in which * and ? match as in file names, or an op type:
            `layer1.*` names /layer1/layer1.0/conv1/Conv.
        kind: what the pattern is, for the error.

    Raises:
        UsageError: the pattern matches no node.
    """
    ops: dict[str, set[str]] = {}
    for name, op in (
        *((n.name, n.op) for n in program.graph.nodes),
        *((n.name, n.op_type) for n in program.source.graph.node),
    ):
        ops.setdefault(name, set()).add(op)
    hits = {name for name, found in ops.items() if pattern in found or _matches(name, pattern)}
    if hits:
        return hits
    near = nearest_node(pattern, set(ops).union(*ops.values()))
    raise UsageError(f"{kind} {pattern!r} matches no node name and no op type{near}")


def nearest_node(name: str, known: Collection[str]) -> str:
    """The end of an error about a node that is not known: what may have been meant, without the names of all others."""
    hint = str(unknown("node", name, known)).split("; ", 1)[1].split("? ", 1)[0]
    return f"; {hint}?" if hint.startswith("did you mean") else ""


def _matches(name: str, pattern: str) -> bool:
    parts = name.split("/")
    return any(fnmatchcase("/".join(parts[start:]), pattern) for start in range(len(parts)))


def inside_bodies(graph: gs.Graph, ops: Collection[str]) -> dict[str, str]:
    """Reason of each node of these ops inside a body of a control-flow node, where everything stays float."""
    inner = {
        node.name: owner
        for owner in graph.nodes
        for body in owner.subgraphs()
        for node in all_nodes(body)
        if node.op in ops
    }
    return {name: f"inside a body of {owner.op} node {owner.name!r}" for name, owner in inner.items()}


def kept_in_float(uses: Uses, weight: gs.Tensor) -> str | None:
    """Why weights must be there in float32 whatever becomes of layers that read them, None when they need not.

    Layers that read codes of them would only make the file larger.
    """
    others = [n.name for n in uses.readers(weight) if n.op not in WEIGHTED]
    if not others and not uses.escapes(weight):
        return None
    where = f"by node {others[0]!r}" if others else "outside the graph's own nodes"
    return f"its weights {weight.name!r} are needed in float32 {where}"


def writes_float32(node: gs.Node) -> bool:
    """Whether an output of the node is known to be float32."""
    return any(t.dtype == np.float32 for t in node.outputs)


def added_vector(node: gs.Node, data: gs.Tensor, size: int) -> gs.Tensor | None:
    """The other operand of an Add to `data` when it is a constant bias vector, float32 (size,)."""
    if node.op != "Add":
        return None
    other = node.inputs[1] if node.inputs[0] is data else node.inputs[0]
    values = float_values(other)
    return other if values is not None and values.shape == (size,) else None


def note_floats(program: Program, reason: Callable[[gs.Node], str]) -> None:
    """Give a reason to each node of the source model that writes float32 and has no other fate yet."""
    source = {n.name for n in program.source.graph.node}
    settled = {name for unit in program.units.values() for name in unit.nodes} | set(program.stored)
    for node in program.graph.nodes:
        if node.name in source and node.name not in settled and writes_float32(node):
            program.floats.setdefault(node.name, reason(node))
