"""Store weights as 8-bit codes and compute in float: a quarter of the size at the speed of float.

Weights become `Cast(int8 -> float32) * scale`, which onnxruntime folds into a float initializer when the
model is loaded (it does not fold DequantizeLinear, which would run with every inference). Embedding tables
are looked up as codes, and only the rows found become float.

Rounding errors of weights are made to cancel within each kernel: without data there is no bias correction to undo the shift of
the mean that they cause.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import DTypeLike

from onnxq.affine import dequantize, quantize, sqnr_db
from onnxq.graph import Names, Uses, constant, float_values, is_standard, replace_reads
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program
from onnxq.quantizers import weight_params
from onnxq.rules import refusal
from onnxq.scheme import QuantScheme
from onnxq.selection import note_floats, skipped_nodes, writes_float32
from onnxq.weights import balanced_codes

INT8 = QuantScheme.parse("int8:channel")
UINT8 = QuantScheme.parse("uint8")
NO_DATA = "there is no calibration data"
OPS = ("Conv", "ConvTranspose", "MatMul", "Gemm", "Gather")
GOOD_DB = 40.0  # about what a scale per channel gives convolutions at 8 bits


@dataclass(frozen=True)
class StoreWeights(Pass):
    """Store weights of layers that stay float as int8, and embedding tables in 8 bits.

    Attributes:
        weights: scheme of weights, e.g. int8:channel or int8:tensor; the channels of a table are its rows.
        skip: node names or op types to leave in float; * and ? match as in file names.
        small: weights of fewer elements than this stay float32.
        small_table: the same for tables.
    """

    name: ClassVar[str] = "store-weights"
    weights: QuantScheme = INT8
    skip: tuple[str, ...] = ()
    small: int = 256
    small_table: int = 4096

    def run(self, program: Program, ctx: Context) -> PassResult:
        ctx.target.check_weights(self.weights)
        ctx.target.refuse_integers("weights that are stored as codes and computed in float")
        uses, writer = Uses(program.graph), _Writer(program.graph, self.weights)
        for nodes in self._sites(program).values():
            reason = _conflict(uses, nodes)
            if reason is not None:
                program.floats |= {n.name: reason for n in nodes}
                continue
            writer.store_table(nodes) if nodes[0].op == "Gather" else writer.store(nodes)
            program.stored |= {n.name: _stored(n, program.floats.pop(n.name, NO_DATA)) for n in nodes}
        program.graph.toposort()
        note_floats(program, lambda node: NO_DATA)
        return PassResult(len(program.stored), dict(program.floats))

    def _sites(self, program: Program) -> dict[str, list[gs.Node]]:
        """Nodes whose weights can be stored, by name of the weight; the reasons of the others are noted."""
        skipped = skipped_nodes(program, self.skip)
        sites: dict[str, list[gs.Node]] = {}
        for node in program.graph.nodes:
            if node.op not in OPS or not is_standard(node):
                continue
            reason = skipped.get(node.name) or self._refusal(node)
            if reason is None:
                sites.setdefault(_weight(node).name, []).append(node)
            elif program.floats.get(node.name, NO_DATA) == NO_DATA and writes_float32(node):
                program.floats[node.name] = reason
        return sites

    def _refusal(self, node: gs.Node) -> str | None:
        """Why the node's weights stay float32, None when they need not."""
        values = float_values(_weight(node))
        if values is None:
            return "its weights are no float32 initializer"
        if values.ndim < 2:
            return "its weights are a vector"
        if node.op != "Gather":
            few = values.size < self.small
            return f"its {values.size} weights are too few to repay the extra nodes" if few else None
        if values.size < self.small_table:
            return f"its table of {values.size} values is too small to repay the conversion of its rows"
        return refusal(node)


def _weight(node: gs.Node) -> gs.Tensor:
    return node.inputs[0 if node.op == "Gather" else 1]


def _axis(node: gs.Node) -> int | None:
    """Output-channel axis of the weight; None where it has no axis of its own."""
    if node.op == "ConvTranspose":
        return 1 if node.attrs.get("group", 1) == 1 else None
    if node.op == "MatMul":
        return len(node.inputs[1].shape) - 1
    if node.op == "Gemm":
        return 0 if node.attrs.get("transB", 0) else 1
    return 0


def _summed(node: gs.Node) -> tuple[int, ...]:
    """Axes of the weight over which rounding errors should cancel: a convolution's kernel, else the inputs."""
    dims = len(node.inputs[1].shape)
    if node.op == "MatMul":
        return (dims - 2,)
    if node.op == "Gemm":
        return (1 if node.attrs.get("transB", 0) else 0,)
    is_pointwise = node.op == "Conv" and all(size == 1 for size in node.inputs[1].shape[2:])
    return (1,) if is_pointwise else tuple(range(2, dims))


def _conflict(uses: Uses, nodes: list[gs.Node]) -> str | None:
    """Why weights that all these nodes read must stay float32, None when they need not."""
    weight = _weight(nodes[0])
    others = [n.name for n in uses.readers(weight) if not any(n is known for known in nodes)]
    if others or uses.escapes(weight):
        where = f"by node {others[0]!r}" if others else "outside the graph's own nodes"
        return f"its weights {weight.name!r} are needed in float32 {where}"
    if len({(n.op == "Gather", _axis(n)) for n in nodes}) > 1:
        return f"its weights {weight.name!r} are shared with a node of another kind"
    return None


def _stored(node: gs.Node, reason: str) -> str:
    if node.op == "Gather":
        return "its table is stored in 8 bits and the rows that are looked up become float"
    return f"weights are stored as int8 and computed in float: {reason}"


class _Writer:
    """Writes weights as codes into a graph."""

    def __init__(self, graph: gs.Graph, scheme: QuantScheme) -> None:
        self.graph, self.scheme = graph, scheme
        self.names = Names(graph)

    def store(self, nodes: list[gs.Node]) -> None:
        """Let the nodes read int8 weights that are turned into float32 when the model is loaded."""
        weight = _weight(nodes[0])
        values = float_values(weight)
        assert values is not None
        params = weight_params("minmax", values, self._channels(_axis(nodes[0])), self.scheme)
        scale = params.broadcast(params.scale, values.ndim)
        codes = constant(
            self.names, f"{weight.name}_quantized", balanced_codes(values, params, _summed(nodes[0]))
        )
        floats = self._variable(f"{weight.name}_dequantized", np.float32, weight.shape)
        self._scaled(weight.name, codes, constant(self.names, f"{weight.name}_scale", scale), floats)
        replace_reads(nodes, weight, floats)

    def store_table(self, nodes: list[gs.Node]) -> None:
        """Let the nodes look up codes: uint8 of one scale where that is good enough, else int8.

        The scale of each int8 row is found by its extremes: least squares gain 0.2 dB and search row by row.
        """
        table = _weight(nodes[0])
        values = float_values(table)
        assert values is not None
        params = weight_params("mse", values, None, UINT8)
        codes = quantize(values, params)
        by_row = self.scheme.granularity == "channel" and sqnr_db(values, dequantize(codes, params)) < GOOD_DB
        if by_row:
            params = weight_params("minmax", values, 0, self.scheme)
            codes = quantize(values, params)
        stored = constant(self.names, f"{table.name}_quantized", codes)
        scale = constant(self.names, f"{table.name}_scale", params.broadcast(params.scale, 2))
        zero = constant(self.names, f"{table.name}_zero_point", params.zero_point.astype(codes.dtype))
        for node in nodes:
            rows = node.outputs[0]
            found = self._variable(f"{rows.name}_quantized", codes.dtype, rows.shape)
            node.inputs[0] = stored
            node.outputs = [found]
            if by_row:
                self._scale_rows(node, found, scale, rows)
            else:
                self._append("DequantizeLinear", node.name, [found, scale, zero], rows)

    def _scale_rows(self, node: gs.Node, found: gs.Variable, scale: gs.Constant, rows: gs.Tensor) -> None:
        """Look up the scales (V, 1) of the rows that were found, and multiply."""
        name, indices = node.name, node.inputs[1]
        shape = None if rows.shape is None else [*rows.shape[:-1], 1]
        scales = self._variable(f"{rows.name}_scale", np.float32, shape)
        self._append("Gather", f"{name}_scale", [scale, indices], scales)
        self._scaled(name, found, scales, rows)

    def _channels(self, axis: int | None) -> int | None:
        return axis if self.scheme.granularity == "channel" else None

    def _scaled(self, name: str, codes: gs.Tensor, scale: gs.Tensor, result: gs.Tensor) -> None:
        floats = self._variable(f"{result.name}_codes", np.float32, codes.shape)
        self._append("Cast", name, [codes], floats).attrs["to"] = onnx.TensorProto.FLOAT
        self._append("Mul", name, [floats, scale], result)

    def _variable(self, name: str, dtype: DTypeLike, shape: Sequence[int | str] | None) -> gs.Variable:
        return gs.Variable(self.names.fresh(name), np.dtype(dtype), shape)

    def _append(self, op: str, name: str, inputs: list[gs.Tensor], output: gs.Tensor) -> gs.Node:
        node = gs.Node(op, self.names.fresh(f"{name}_{op}"), inputs=inputs, outputs=[output])
        self.graph.nodes.append(node)
        return node
