"""Small helpers over graphsurgeon graphs that count graph outputs and sub-graph captures as users."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import DTypeLike, NDArray

from onnxq.model.surgeon import constant_values

CONTRIB = "com.microsoft"  # operators of onnxruntime's own
NOTHING = (None, math.nan)  # of `with_number`
NO_ATTRIBUTES: Mapping[str, Any] = MappingProxyType({})


def all_nodes(graph: gs.Graph) -> Iterator[gs.Node]:
    """Nodes of the graph and of every body of its If, Loop and Scan nodes."""
    yield from graph.nodes
    for body in bodies(graph):
        yield from body.nodes


def bodies(graph: gs.Graph) -> Iterator[gs.Graph]:
    """Every body of the graph's If, Loop and Scan nodes, at any depth."""
    for node in graph.nodes:
        for body in node.subgraphs():
            yield body
            yield from bodies(body)


def captured(graph: gs.Graph) -> set[str]:
    """Names of tensors that bodies of control-flow nodes read from outside themselves (or might)."""
    inner = list(bodies(graph))
    read = {t.name for body in inner for node in body.nodes for t in node.inputs}
    return read | {t.name for body in inner for t in body.outputs}


class Uses:
    """Who reads each tensor: nodes, the graph's outputs, and bodies of control-flow nodes.

    A snapshot: make a new one after a rewrite.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self._outputs = {t.name for t in graph.outputs}
        self._captured = captured(graph)
        self._readers: dict[str, list[gs.Node]] = {}
        for node in graph.nodes:
            for name in {t.name for t in node.inputs if not t.is_empty()}:
                self._readers.setdefault(name, []).append(node)

    def readers(self, tensor: gs.Tensor) -> list[gs.Node]:
        """Nodes of the top-level graph that read the tensor, each once, in graph order."""
        return self._readers.get(tensor.name, [])

    def escapes(self, tensor: gs.Tensor) -> bool:
        """Whether the tensor is a graph output or is read by a control-flow body."""
        return tensor.name in self._outputs or tensor.name in self._captured

    def only_reader(self, tensor: gs.Tensor) -> gs.Node | None:
        """The single user of the tensor, None when there are more, none, or it escapes."""
        readers = self.readers(tensor)
        if len(readers) != 1 or self.escapes(tensor):
            return None
        return readers[0] if sum(t is tensor for t in readers[0].inputs) == 1 else None


def is_standard(node: gs.Node) -> bool:
    """Whether the node's operator belongs to ONNX's own set."""
    return node.domain in (None, "", "ai.onnx")


def is_constant(tensor: gs.Tensor) -> bool:
    """Whether the tensor is an initializer."""
    return isinstance(tensor, gs.Constant)


def is_float_constant(tensor: gs.Tensor) -> bool:
    """Whether the tensor is a float32 initializer; its values are not read."""
    return isinstance(tensor, gs.Constant) and tensor.dtype == np.float32


def float_values(tensor: gs.Tensor) -> NDArray[np.float32] | None:
    """Values of a float32 initializer, None for anything else. Those on disk are mapped at each call; do not keep them."""
    return constant_values(tensor) if is_float_constant(tensor) else None


def number(tensor: gs.Tensor | None) -> float | None:
    """The value of a float32 initializer of one element, None for anything else: what is computed with it is float32 too."""
    values = None if tensor is None else float_values(tensor)
    return float(values.item()) if values is not None and values.size == 1 else None


def with_number(node: gs.Node | None, op: str) -> tuple[gs.Tensor | None, float]:
    """The activation and the constant number that an Add or Mul takes in any order; `NOTHING` of any other node."""
    if node is None or node.op != op or not is_standard(node):
        return NOTHING
    left, right = node.inputs
    x, other = (right, left) if is_constant(left) else (left, right)
    value = number(other)
    return NOTHING if value is None else (x, value)


def present(node: gs.Node, index: int) -> gs.Tensor | None:
    """The node's input at the index, None when it is left out."""
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return None
    return node.inputs[index]


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that writes the tensor, None for inputs and initializers."""
    return tensor.inputs[0] if tensor.inputs else None


class Names:
    """Fresh tensor and node names for one graph."""

    def __init__(self, graph: gs.Graph) -> None:
        self._taken = {t.name for g in (graph, *bodies(graph)) for t in (*g.inputs, *g.outputs)}
        for node in all_nodes(graph):
            self._taken |= {node.name, *(t.name for t in (*node.inputs, *node.outputs))}

    def fresh(self, wanted: str) -> str:
        """`wanted`, or `wanted_1`, `wanted_2`, … when it is taken; the answer is taken from then on."""
        name, count = wanted, 0
        while name in self._taken:
            count += 1
            name = f"{wanted}_{count}"
        self._taken.add(name)
        return name


def constant(names: Names, name: str, values: NDArray[np.generic]) -> gs.Constant:
    """A new initializer under a fresh name, of the same shape: a scalar stays one."""
    return gs.Constant(names.fresh(name), np.array(values, order="C"))


class NodeWriter:
    """Adds nodes and tensors under fresh names to one graph, behind its other nodes."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph, self.names = graph, Names(graph)

    def variable(self, name: str, dtype: DTypeLike, shape: Sequence[int | str] | None) -> gs.Variable:
        """A new tensor."""
        return gs.Variable(self.names.fresh(name), np.dtype(dtype), shape)

    def constant(self, name: str, values: NDArray[np.generic]) -> gs.Constant:
        """A new initializer."""
        return constant(self.names, name, values)

    def append(
        self,
        op: str,
        name: str,
        inputs: Sequence[gs.Tensor],
        output: gs.Tensor,
        attrs: Mapping[str, Any] = NO_ATTRIBUTES,
    ) -> None:
        """A new node of ONNX's own set, named after `name` and its operator."""
        fresh = self.names.fresh(f"{name}_{op}")
        self.graph.nodes.append(gs.Node(op, fresh, dict(attrs), inputs=list(inputs), outputs=[output]))


def rank(tensor: gs.Tensor) -> int | None:
    """Rank of the tensor, None when unknown."""
    return None if tensor.shape is None else len(tensor.shape)


def replace_reads(readers: Sequence[gs.Node], old: gs.Tensor, new: gs.Tensor) -> None:
    """Make the nodes read `new` where they read `old`."""
    for node in readers:
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new


def remove_node(graph: gs.Graph, node: gs.Node) -> None:
    """Take a node out; its tensors lose it as producer and reader."""
    node.inputs.clear()
    node.outputs.clear()
    graph.nodes.remove(node)


def set_input(node: gs.Node, index: int, tensor: gs.Tensor) -> None:
    """Make `tensor` the node's input at the index, which may be one past the last."""
    if index == len(node.inputs):
        node.inputs.append(tensor)
    else:
        node.inputs[index] = tensor
