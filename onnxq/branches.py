"""Residual branches: where two of them meet in an Add, and which convolution the Add belongs to.

A runtime that fuses the Add into a convolution adds before it rounds. So that convolution's own output is not quantized, while
the other branch is. Of two convolutions that meet, the one with more nodes in front of it has the Add: the other is the shortcut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxq.graph import Uses, is_constant, producer
from onnxq.rules import RELU


@dataclass(frozen=True, eq=False)
class Branch:
    """The way from a node to the Add that reads it.

    Attributes:
        nodes: an activation or none, then the Add.
        other: what is added to it.
    """

    nodes: tuple[gs.Node, ...]
    other: gs.Tensor

    @property
    def add(self) -> gs.Node:
        """Where the branches meet."""
        return self.nodes[-1]

    @property
    def rival(self) -> gs.Node | None:
        """The node that writes the other operand, in front of its activation."""
        node = producer(self.other)
        return producer(node.inputs[0]) if node is not None and node.op in RELU else node


def branch(uses: Uses, node: gs.Node) -> Branch | None:
    """The way from a node to an Add of another activation of the same shape; None where anything else reads what it makes."""
    result, inner = node.outputs[0], []
    after = uses.only_reader(result)
    if after is not None and after.op in RELU:
        result, inner = after.outputs[0], [after]
        after = uses.only_reader(result)
    if after is None or after.op != "Add":
        return None
    other = after.inputs[1] if after.inputs[0] is result else after.inputs[0]
    return (
        None if is_constant(other) or _differ(other.shape, result.shape) else Branch((*inner, after), other)
    )


def depths(graph: gs.Graph) -> dict[str, int]:
    """The largest number of nodes on a way from an input through each node, by name; the graph is in order."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        before = (producer(t) for t in node.inputs)
        found[node.name] = 1 + max((found.get(n.name, 0) for n in before if n is not None), default=0)
    return found


def _differ(one: Sequence[int | str] | None, other: Sequence[int | str] | None) -> bool:
    """Whether two shapes are known to differ; open dimensions have many names."""
    if one is None or other is None:
        return False
    known = ((a, b) for a, b in zip(one, other, strict=False) if isinstance(a, int) and isinstance(b, int))
    return len(one) != len(other) or any(a != b for a, b in known)
