"""Run products with weights in integers, quantizing their input when the model runs.

    x_q, s_x, z_x = DynamicQuantizeLinear(x)        y = Cast(MatMulInteger(x_q, w_q, z_x, 0)) * (s_x s_w) + b

The range is that of the tensor at hand, so no calibration is needed. With the scales multiplied first,
onnxruntime runs the whole as one kernel, DynamicQuantizeMatMul; a tensor that several products read is
quantized once, and each of them runs as MatMulIntegerToFloat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.graph import Names, Uses, constant, float_values, is_constant, is_standard, present
from onnxq.packing import Packer
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program, Unit
from onnxq.quantizers import method_for
from onnxq.rules import refusal
from onnxq.saturation import pair_limit
from onnxq.scheme import QuantScheme
from onnxq.selection import added_vector, inside_bodies, kept_in_float, note_floats, skipped_nodes
from onnxq.target import Target
from onnxq.weights import quantized_weight

INT8 = QuantScheme.parse("int8:channel")
PRODUCTS = ("MatMul", "Gemm")


@dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Turn MatMul and Gemm by constant matrices into integer products of inputs quantized at run time.

    Attributes:
        weights: scheme of weights, e.g. int8:channel or int8:tensor.
        skip: node names or op types to leave in float; * and ? match as in file names.
        small: products of at most this many weights stay float.
    """

    name: ClassVar[str] = "quantize-dynamic"
    weights: QuantScheme = INT8
    skip: tuple[str, ...] = ()
    small: int = 2048

    def stored_bits(self) -> frozenset[int]:
        return frozenset({self.weights.bits})

    def run(self, program: Program, ctx: Context) -> PassResult:
        ctx.target.check_weights(self.weights)
        ctx.target.check_without_ranges()
        program.floats |= skipped_nodes(program, self.skip)
        rewriter = _Rewriter(program, self.weights, ctx.target)
        products = [n for n in program.graph.nodes if n.op in PRODUCTS and is_standard(n)]
        kept = {n.name: kept_in_float(rewriter.uses, n.inputs[1]) for n in products}  # as they all are still
        converted = 0
        for node in products:
            if node.name in program.floats:
                continue
            reason = _refusal(node) or self._too_small(node) or kept.get(node.name)
            if reason is not None:
                program.floats[node.name] = reason
                continue
            rewriter.convert(node)
            converted += 1
        program.graph.toposort()
        program.floats |= inside_bodies(program.graph, PRODUCTS)
        note_floats(program, lambda node: _why_float(node, ctx.target))
        return PassResult(converted, dict(program.floats), {"saturating_channels": rewriter.touched})

    def _too_small(self, node: gs.Node) -> str | None:
        size = int(np.prod(node.inputs[1].shape))
        if size > self.small:
            return None
        return f"its {size} weights are too few to repay the quantization of its input"


def _refusal(node: gs.Node) -> str | None:
    """Why the node cannot become an integer product, None when it can."""
    if node.op == "MatMul":
        return refusal(node) or (None if is_constant(node.inputs[1]) else "it multiplies two activations")
    if float_values(node.inputs[1]) is None:
        return "its weights are no float32 initializer"
    if is_constant(node.inputs[0]):
        return "its left operand is constant"
    if node.attrs.get("transA", 0):
        return "transA is set"
    bias, columns = present(node, 2), _columns(node)
    if bias is None:
        return None
    values = float_values(bias)
    if values is None:
        return "its C is no float32 initializer"
    is_vector = values.size == 1 or values.shape in ((columns,), (1, columns))
    return None if is_vector else "its C is no bias vector"


def _why_float(node: gs.Node, target: Target) -> str:
    known = is_standard(node) and node.op in target.rules
    return "there is no calibration data" if known else f"{target.name} has no integer kernel for {node.op}"


def _is_transposed(node: gs.Node) -> bool:
    return node.op == "Gemm" and bool(node.attrs.get("transB", 0))


def _columns(node: gs.Node) -> int:
    """Output features N."""
    return int(node.inputs[1].shape[0 if _is_transposed(node) else 1])


class _Rewriter:
    """Rewrites products one by one; tensors and weights that several of them read are quantized once."""

    def __init__(self, program: Program, scheme: QuantScheme, target: Target) -> None:
        self.program, self.graph = program, program.graph
        self.scheme, self.limit = scheme, pair_limit() if target.pair_limit else 0
        self.names, self.uses = Names(program.graph), Uses(program.graph)
        self.packer = Packer(program.graph, self.names, target.packed)
        self.touched: dict[str, int] = {}
        self._zeros: list[gs.Constant] = []
        self._inputs: dict[str, tuple[gs.Variable, gs.Variable, gs.Variable]] = {}
        self._weights: dict[tuple[str, bool, float], tuple[gs.Tensor, gs.Constant]] = {}

    def convert(self, node: gs.Node) -> None:
        """Rewrite a MatMul or Gemm; the integer product keeps its name, and so does the runtime's kernel."""
        name, result = node.name, node.outputs[0]
        unit, bias = self._unit(node), self._gemm_bias(node)
        codes, scale = self._weight(node)
        data, data_scale, data_zero = self._input(node.inputs[0])
        total = self._variable(f"{name}_sum", np.int32, result.shape)
        node.op = "MatMulInteger"
        node.attrs.clear()
        node.inputs = [data, codes, data_zero, self._zero()]
        node.outputs = [total]
        floats = self._variable(f"{name}_float", np.float32, result.shape)
        factor = self._variable(f"{name}_scale", np.float32, scale.shape)
        scaled = result if bias is None else self._variable(f"{name}_scaled", np.float32, result.shape)
        self._append("Cast", name, [total], [floats]).attrs["to"] = onnx.TensorProto.FLOAT
        self._append("Mul", name, [data_scale, scale], [factor])
        self._append("Mul", name, [floats, factor], [scaled])
        if bias is not None:
            self._append("Add", name, [scaled, bias], [result])
        self.program.units[name] = unit

    def _unit(self, node: gs.Node) -> Unit:
        """What the runtime's kernel will do: the product and the bias that is added to it."""
        data, weight, product = node.inputs[0], node.inputs[1], node.outputs[0]
        nodes, output, bias = [node.name], product, present(node, 2)
        if node.op == "MatMul":
            add = self.uses.only_reader(product)
            bias = None if add is None else added_vector(add, product, _columns(node))
            if add is not None and bias is not None and add.name not in self.program.floats:
                nodes.append(add.name)
                output = add.outputs[0]
        return Unit(
            kind=node.op,
            nodes=tuple(nodes),
            inputs=(data.name,),
            outputs=(output.name,),
            weight=weight.name,
            bias=None if bias is None else bias.name,
            channel_axis=0 if _is_transposed(node) else 1,
            float_output=True,
        )

    def _gemm_bias(self, node: gs.Node) -> gs.Tensor | None:
        """A Gemm's beta * C as a vector (N,), None without one; a MatMul's bias is an Add, which stays."""
        bias, beta = present(node, 2), node.attrs.get("beta", 1.0)
        if bias is None or beta == 0.0:
            return None
        values = float_values(bias)
        assert values is not None
        if beta == 1.0 and values.shape == (_columns(node),):
            return bias
        vector = np.broadcast_to(values.ravel() * np.float32(beta), (_columns(node),))
        return constant(self.names, f"{bias.name}_vector", vector)

    def _weight(self, node: gs.Node) -> tuple[gs.Tensor, gs.Constant]:
        """Codes (K, N) and scale, () or (N,), of alpha times the weight."""
        weight, alpha = node.inputs[1], node.attrs.get("alpha", 1.0)
        key = (weight.name, _is_transposed(node), alpha)
        if key not in self._weights:
            values = float_values(weight)
            assert values is not None
            matrix = (values.T if _is_transposed(node) else values) * np.float32(alpha)
            method = method_for("auto", self.scheme)
            params, codes, changed = quantized_weight(matrix, "MatMul", 1, self.scheme, self.limit, method)
            if changed:
                self.touched[weight.name] = changed
            self._weights[key] = (
                self.packer.tensor(f"{weight.name}_quantized", codes, self.scheme.bits),
                constant(self.names, f"{weight.name}_scale", params.scale),
            )
        return self._weights[key]

    def _zero(self) -> gs.Constant:
        """The zero point of all weights, given because the runtime's fusions look for one."""
        if not self._zeros:
            self._zeros.append(constant(self.names, "weight_zero_point", np.zeros((), np.int8)))
        return self._zeros[0]

    def _input(self, data: gs.Tensor) -> tuple[gs.Variable, gs.Variable, gs.Variable]:
        """Codes uint8, scale () float32 and zero point () uint8 of a product's input."""
        if data.name not in self._inputs:
            quantized = (
                self._variable(f"{data.name}_quantized", np.uint8, data.shape),
                self._variable(f"{data.name}_scale", np.float32, ()),
                self._variable(f"{data.name}_zero_point", np.uint8, ()),
            )
            self._append("DynamicQuantizeLinear", data.name, [data], list(quantized))
            self._inputs[data.name] = quantized
        return self._inputs[data.name]

    def _variable(self, name: str, dtype: type[np.generic], shape: Sequence[int | str] | None) -> gs.Variable:
        return gs.Variable(self.names.fresh(name), np.dtype(dtype), shape)

    def _append(self, op: str, name: str, inputs: list[gs.Tensor], outputs: list[gs.Tensor]) -> gs.Node:
        node = gs.Node(op, self.names.fresh(f"{name}_{op}"), inputs=inputs, outputs=outputs)
        self.graph.nodes.append(node)
        return node
