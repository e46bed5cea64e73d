"""Write a MatMul by constant weights with a bias as a two-dimensional Gemm, which onnxruntime fuses with its int32 bias.

    x (…, K) @ w (K, N) + b (N)  =  reshape(gemm(reshape(x, (-1, K)), w, b), (…, N))

A reshape next to another one is dropped: the second alone says the shape. A Relu or Clip behind the bias stays next to the
product, in front of the reshape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.graph import (
    Names,
    Uses,
    constant,
    float_values,
    is_float_constant,
    is_standard,
    producer,
    rank,
    remove_node,
)
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program
from onnxq.rules import RELU

FLOAT, INT64 = np.dtype(np.float32), np.dtype(np.int64)


@dataclass(frozen=True)
class FlattenMatMul(Pass):
    """Turn MatMul with constant weights and a bias into Gemm on two-dimensional tensors."""

    name: ClassVar[str] = "flatten-matmul"

    def run(self, program: Program, ctx: Context) -> PassResult:
        if not ctx.target.contrib:  # QGemm is onnxruntime's own
            return PassResult()
        graph, names, skipped = program.graph, Names(program.graph), {}
        changed = 0
        for node in [n for n in graph.nodes if n.op == "MatMul" and is_standard(n)]:
            add = Uses(graph).only_reader(node.outputs[0])
            reason = _obstacle(node, add)
            if reason is not None:
                skipped[node.name] = reason
                continue
            assert add is not None
            _rewrite(graph, names, node, add)
            changed += 1
        graph.cleanup(remove_unused_graph_inputs=False).toposort()
        return PassResult(changed, skipped)


def _obstacle(node: gs.Node, add: gs.Node | None) -> str | None:
    weight = node.inputs[1]
    if not is_float_constant(weight) or rank(weight) != 2:
        return "its right operand is no constant matrix"
    ranks = rank(node.inputs[0])
    if ranks is None or ranks < 2:
        return "the rank of its input is unknown or below 2"
    if add is None or add.op != "Add":
        return "no bias is added to it"
    bias = float_values(_other(add, node.outputs[0]))
    columns = weight.shape[1]
    vector = bias is not None and bias.size == columns and bias.shape[-1:] in ((columns,), ())
    if bias is not None and bias.ndim > ranks:
        return "what is added to it adds dimensions"
    return None if vector else "what is added to it is no bias vector"


def _other(add: gs.Node, tensor: gs.Tensor) -> gs.Tensor:
    return add.inputs[1] if add.inputs[0] is tensor else add.inputs[0]


def _rewrite(graph: gs.Graph, names: Names, node: gs.Node, add: gs.Node) -> None:
    data, weight, result, uses = node.inputs[0], node.inputs[1], add.outputs[0], Uses(graph)
    bias = _other(add, node.outputs[0])
    if len(bias.shape) != 1:
        bias = constant(names, f"{bias.name}_vector", np.ravel(bias.values))
    inner, columns = (int(d) for d in weight.shape)
    ranks = len(data.shape)
    remove_node(graph, add)
    name = node.name
    remove_node(graph, node)
    if ranks == 2:
        graph.nodes.append(gs.Node("Gemm", name, inputs=[data, weight, bias], outputs=[result]))
        return
    flat = _two_dimensional(graph, names, uses, data, inner)
    product = gs.Variable(names.fresh(f"{name}_flat"), FLOAT, [None, columns])
    graph.nodes.append(gs.Node("Gemm", name, inputs=[flat, weight, bias], outputs=[product]))
    after = uses.only_reader(result)
    if after is not None and after.op in RELU:
        after.inputs[0], result = product, after.outputs[0]
        product = gs.Variable(names.fresh(f"{after.name}_flat"), FLOAT, [None, columns])
        after.outputs = [product]
        after = uses.only_reader(result)
    if after is not None and after.op == "Reshape" and _ignores_input(after):
        after.inputs[0] = product
        return
    shape = _output_shape(graph, names, data, name, columns)
    graph.nodes.append(
        gs.Node("Reshape", names.fresh(f"{name}_unflatten"), inputs=[product, shape], outputs=[result])
    )


def _two_dimensional(graph: gs.Graph, names: Names, uses: Uses, data: gs.Tensor, inner: int) -> gs.Tensor:
    """The data as (rows, inner); a reshape that made it is skipped over, and readers of one tensor share one reshape."""
    made = producer(data)
    source = made.inputs[0] if made is not None and made.op == "Reshape" else data
    if rank(source) == 2 and source.shape[1] == inner:
        return source
    for reader in uses.readers(source):
        target = reader.inputs[1] if reader.op == "Reshape" and reader.inputs[0] is source else None
        if isinstance(target, gs.Constant) and list(target.values) == [-1, inner]:
            return reader.outputs[0]
    flat = gs.Variable(names.fresh(f"{source.name}_flat"), FLOAT, [None, inner])
    shape = constant(names, f"{source.name}_flat_shape", np.array([-1, inner], np.int64))
    graph.nodes.append(
        gs.Node("Reshape", names.fresh(f"{source.name}_flatten"), inputs=[source, shape], outputs=[flat])
    )
    return flat


def _ignores_input(reshape: gs.Node) -> bool:
    """Whether the result depends on the data's count of elements only: the target shape copies no dimension."""
    target = reshape.inputs[1]
    if isinstance(target, gs.Constant):
        return bool(np.all(np.asarray(target.values) != 0)) or bool(reshape.attrs.get("allowzero", 0))
    made = producer(target)
    if made is None or made.op != "Concat":
        return False
    constants = [t for t in made.inputs if isinstance(t, gs.Constant)]
    sizes = [t for t in made.inputs if not isinstance(t, gs.Constant)]
    return all(np.all(np.asarray(t.values) != 0) for t in constants) and all(_is_size(t) for t in sizes)


def _is_size(tensor: gs.Tensor) -> bool:
    """Whether the tensor holds dimensions of another one, which are 0 only where there is no data."""
    made = producer(tensor)
    if made is None:
        return False
    return made.op == "Shape" or (
        made.op in ("Gather", "Unsqueeze", "Squeeze", "Slice") and _is_size(made.inputs[0])
    )


def _output_shape(graph: gs.Graph, names: Names, data: gs.Tensor, name: str, columns: int) -> gs.Tensor:
    """Shape of the product: the data's with the last dimension replaced; a constant when at most one is unknown."""
    leading = list(data.shape[:-1])
    known = [isinstance(d, int) and d > 0 for d in leading]
    if sum(known) >= len(known) - 1:
        dims = [d if k else -1 for d, k in zip(leading, known, strict=True)]
        return constant(names, f"{name}_shape", np.array([*dims, columns], np.int64))
    dims = gs.Variable(names.fresh(f"{name}_dims"), INT64, [len(data.shape)])
    rows = gs.Variable(names.fresh(f"{name}_rows"), INT64, [len(leading)])
    shape = gs.Variable(names.fresh(f"{name}_shape"), INT64, [len(data.shape)])
    begin, end = (
        constant(names, f"{name}_{k}", np.array([v], np.int64)) for k, v in (("begin", 0), ("end", -1))
    )
    last = constant(names, f"{name}_columns", np.array([columns], np.int64))
    graph.nodes += [
        gs.Node("Shape", names.fresh(f"{name}_shape_of"), inputs=[data], outputs=[dims]),
        gs.Node("Slice", names.fresh(f"{name}_leading"), inputs=[dims, begin, end], outputs=[rows]),
        gs.Node("Concat", names.fresh(f"{name}_target"), {"axis": 0}, inputs=[rows, last], outputs=[shape]),
    ]
    return shape
