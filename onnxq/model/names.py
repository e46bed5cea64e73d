"""Names of nodes and tensors: making fresh ones, making all node names unique, and renaming reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from onnx import GraphProto, ModelProto, NodeProto

from onnxq.model.tensors import all_graphs, subgraphs


def tensor_names(graph: GraphProto) -> Iterator[str]:
    """Every name of a tensor in the graph and its bodies, with repetitions."""
    for part in all_graphs(graph):
        yield from (i.name for i in (*part.input, *part.output, *part.value_info, *part.initializer))
        yield from (s.values.name for s in part.sparse_initializer)
        for node in part.node:
            yield from node.input
            yield from node.output


def read_names(node: NodeProto) -> list[str]:
    """Tensors that a node reads, those that its bodies take from outside included, once for each reading."""
    return [name for name in node.input if name] + [n for body in subgraphs(node) for n in _captured(body)]


def _captured(body: GraphProto) -> list[str]:
    own = _own_names(body)
    read = [name for node in body.node for name in read_names(node)] + [o.name for o in body.output]
    return [name for name in read if name not in own]


def _own_names(body: GraphProto) -> set[str]:
    stored = (*body.initializer, *(s.values for s in body.sparse_initializer))
    return {t.name for t in (*body.input, *stored)} | {name for node in body.node for name in node.output}


class FreshNames:
    """Names that are not taken yet."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)

    def __call__(self, wanted: str) -> str:
        """`wanted`, or `wanted_1`, `wanted_2`, … when it is taken; the answer is taken from then on."""
        name, count = wanted, 0
        while name in self._taken:
            count += 1
            name = f"{wanted}_{count}"
        self._taken.add(name)
        return name


def name_nodes(model: ModelProto) -> int:
    """Name each node that has no name, or that of an earlier node, by its operator and position: `Conv_12`.

    Positions count the nodes of the main graph first, so the names are the same on every run.

    Returns:
        How many names changed.
    """
    nodes = [node for graph in all_graphs(model.graph) for node in graph.node]
    fresh = FreshNames(node.name for node in nodes)
    seen: set[str] = set()
    changed = 0
    for position, node in enumerate(nodes):
        if not node.name or node.name in seen:
            node.name = fresh(f"{node.op_type}_{position}")
            changed += 1
        seen.add(node.name)
    return changed


def rename_reads(graph: GraphProto, renamed: Mapping[str, str]) -> None:
    """Make nodes of the graph, and of bodies that capture the tensors, read the new names."""
    for node in graph.node:
        _rename_inputs(node, renamed)


def _rename_inputs(node: NodeProto, renamed: Mapping[str, str]) -> None:
    for index, name in enumerate(node.input):
        if name in renamed:
            node.input[index] = renamed[name]
    for body in subgraphs(node):
        own = _own_names(body)
        outer = {old: new for old, new in renamed.items() if old not in own}
        if outer:
            rename_reads(body, outer)
            for output in body.output:
                output.name = outer.get(output.name, output.name)
