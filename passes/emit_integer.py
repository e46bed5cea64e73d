"""Write the plan into the graph as operators on codes: QLinearConv, com.microsoft.QGemm and their like.

What a runtime makes of the QDQ form by matching patterns stands in the graph itself here, so nothing depends on a fusion. The
numbers are the same: both forms share codes, scales and biases. An activation that a unit absorbs vanishes where the grid of the
output ends at its bounds; elsewhere it becomes a Clip of codes. A unit for which there is no operator keeps the QDQ form, and so
does one whose operator is onnxruntime's own where the target is another runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.bias import bias_params
from onnxq.borders import FLOAT, Borders
from onnxq.emission import (
    activation,
    bounds_of,
    drop_unit_dilations,
    guard_floats,
    look_up_codes,
    move_codes,
    surround,
)
from onnxq.errors import UsageError
from onnxq.expansion import is_expanded
from onnxq.graph import CONTRIB, constant, rank, remove_node
from onnxq.hard_sigmoid import HARD_SIGMOID
from onnxq.lines import is_line, own_bounds, summands
from onnxq.measure.tensors import tensor_rows
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program, Unit


@dataclass(frozen=True)
class EmitInteger(Pass):
    """Write the plan as integer operators, those of onnxruntime's own domain included."""

    name: ClassVar[str] = "emit-integer"

    def run(self, program: Program, ctx: Context) -> PassResult:
        ctx.target.check_integer_form()
        if program.sides != "both":
            raise UsageError(f"only {program.sides} are quantized, which takes the format qdq")
        tensors = tensor_rows(program)
        borders, kept = Borders(program, ctx.target), {}
        nodes = {n.name: n for n in program.graph.nodes}
        for unit in list(program.units.values()):
            node = nodes[unit.name]
            if unit.is_layout:
                move_codes(borders, unit, node)
            elif ctx.target.rules[unit.kind].role == "table":
                look_up_codes(borders, unit, node)
            elif reason := _refusal(borders, unit):
                kept[unit.name] = reason
                surround(borders, unit, nodes)
            else:
                WRITERS[unit.kind](_Kernel(borders, unit, nodes))
        guard_floats(borders)
        borders.finish()
        return PassResult(len(program.units) - len(kept), kept, {"tensors": tensors})


def _refusal(borders: Borders, unit: Unit) -> str | None:
    """Why no operator on codes does the unit's work, None when one does."""
    program, contrib = borders.program, borders.target.contrib
    if unit.kind not in WRITERS or not (contrib or unit.kind in STANDARD):
        return f"there is no integer operator for {unit.kind}, so it is written in the QDQ form"
    if unit.output not in program.plan and not (contrib and unit.kind in FLOAT_RESULT):
        return "its output stays float, so it is written in the QDQ form"
    if is_expanded(borders.points(unit)):
        return "its points are added up in float, so it is written in the QDQ form"
    if unit.inputs != unit.multiplied:
        return "it adds another tensor before it rounds, so it is written in the QDQ form"
    if not contrib and unit.kind == "MatMul" and unit.bias is not None:
        return "the operator for its product has no bias, so it is written in the QDQ form"
    return None


@dataclass(frozen=True)
class _Kernel:
    """A unit whose main node is about to become an operator on codes."""

    borders: Borders
    unit: Unit
    nodes: Mapping[str, gs.Node]

    @property
    def node(self) -> gs.Node:
        return self.nodes[self.unit.name]

    @property
    def is_coded(self) -> bool:
        """Whether the output is held as codes."""
        return self.unit.output in self.borders.program.plan

    def operand(self, tensor: str) -> list[gs.Tensor]:
        """Codes, scale and zero point of an activation."""
        return [self.borders.codes(tensor), *self.borders.grid(tensor)]

    def factors(self) -> tuple[list[gs.Tensor], list[gs.Tensor]]:
        """Both operands of a product, the second of which may be a weight."""
        left, weight = self.unit.inputs[0], self.unit.weight
        right = self.operand(self.unit.inputs[1]) if weight is None else list(self.borders.weight(weight))
        return self.operand(left), right

    def output_grid(self) -> Sequence[gs.Tensor]:
        """Scale and zero point of the output, nothing when it is float."""
        return self.borders.grid(self.unit.output) if self.is_coded else ()

    def write(self, op: str, inputs: Sequence[gs.Tensor], domain: str | None = CONTRIB) -> None:
        """Make the node an operator that writes the unit's output."""
        self.node.op, self.node.domain = op, domain
        self.node.inputs, self.node.outputs = list(inputs), [self.result()]

    def result(self) -> gs.Variable:
        """What the operator is to write: the output, as codes when it is in the plan, or what the absorbed activation reads."""
        output, borders = self.unit.output, self.borders
        last = borders.hold(output) if self.is_coded else borders.tensors[output]
        last.inputs.clear()
        after = activation(self.unit, self.nodes)
        if not self.is_coded:
            return last if after is None else self._in_front_of(after, last)
        bounds = own_bounds(self.unit)
        if after is not None:
            bounds = bounds_of(after)
            remove_node(borders.graph, after)
        limits = borders.limits(output, bounds)
        if limits is None:
            return last
        inner = gs.Variable(borders.names.fresh(f"{output}_raw"), last.dtype, last.shape)
        borders.append("Clip", output, [inner, *limits], [last])
        return inner

    def _in_front_of(self, after: gs.Node, last: gs.Variable) -> gs.Variable:
        """What an activation that stays float reads."""
        inner = gs.Variable(self.borders.names.fresh(f"{last.name}_raw"), last.dtype, last.shape)
        after.outputs, after.inputs[0] = [last], inner
        return inner


def _conv(kernel: _Kernel) -> None:
    data, weight = kernel.factors()
    bias = kernel.borders.bias(kernel.unit)
    kernel.write(
        "QLinearConv", [*data, *weight, *kernel.output_grid(), *([] if bias is None else [bias])], domain=None
    )


def _gemm(kernel: _Kernel) -> None:
    data, weight = kernel.factors()
    bias = kernel.borders.bias(kernel.unit)
    kernel.node.attrs = {k: v for k, v in kernel.node.attrs.items() if k == "transB"}
    kernel.write(
        "QGemm", [*data, *weight, gs.Variable.empty() if bias is None else bias, *kernel.output_grid()]
    )


def _matmul(kernel: _Kernel) -> None:
    unit, node, borders = kernel.unit, kernel.node, kernel.borders
    if unit.bias is not None:
        remove_node(borders.graph, kernel.nodes[unit.nodes[1]])
        if rank(node.inputs[0]) == 2:
            _gemm(kernel)
            return
    left, right = kernel.factors()
    if kernel.is_coded and unit.bias is None:
        kernel.write("QLinearMatMul", [*left, *right, *kernel.output_grid()], domain=None)
        return
    (a, a_scale, a_zero), (b, b_scale, b_zero) = left, right
    kernel.write("MatMulIntegerToFloat", [a, b, a_scale, b_scale, a_zero, b_zero, *_float_bias(kernel)])
    if kernel.is_coded:
        codes = node.outputs[0]
        raw = gs.Variable(borders.names.fresh(f"{unit.output}_float"), FLOAT, codes.shape)
        node.outputs = [raw]
        borders.append("QuantizeLinear", unit.output, [raw, *kernel.output_grid()], [codes])


def _float_bias(kernel: _Kernel) -> list[gs.Tensor]:
    """The bias as the values of its codes, which is what the QDQ form adds."""
    codes = kernel.borders.bias(kernel.unit)
    if codes is None:
        return []
    values = codes.values * bias_params(kernel.unit, kernel.borders.program)
    return [constant(kernel.borders.names, f"{kernel.unit.bias}_dq", values.astype(np.float32))]


def _concat(kernel: _Kernel) -> None:
    unit, borders = kernel.unit, kernel.borders
    grids = {_grid_values(borders, tensor) for tensor in (*unit.inputs, unit.output)}
    if len(grids) > 1:
        operands = [t for tensor in unit.inputs for t in kernel.operand(tensor)]
        kernel.write("QLinearConcat", [*kernel.output_grid(), *operands])
        return
    kernel.write("Concat", [borders.codes(tensor) for tensor in unit.inputs], domain=None)
    borders.program.units[unit.name] = replace(unit, is_layout=True)


def _grid_values(borders: Borders, tensor: str) -> tuple[float, int]:
    params = borders.program.params(tensor)
    return float(params.scale), int(params.zero_point)


def _elementwise(kernel: _Kernel) -> None:
    if is_line(kernel.unit):
        _line(kernel)
        return
    operands = [t for tensor in kernel.unit.inputs for t in kernel.operand(tensor)]
    kernel.write(f"QLinear{kernel.unit.kind}", [*operands, *kernel.output_grid()])


def _line(kernel: _Kernel) -> None:
    operands = [t for operand in summands(kernel.borders, kernel.unit, kernel.nodes) for t in operand]
    kernel.node.attrs = {}
    kernel.write("QLinearAdd", [*operands, *kernel.output_grid()])


def _average_pool(kernel: _Kernel) -> None:
    drop_unit_dilations(kernel.node)
    _elementwise(kernel)


def _softmax(kernel: _Kernel) -> None:
    kernel.node.attrs["opset"] = kernel.borders.graph.opset
    _elementwise(kernel)


WRITERS: Mapping[str, Callable[[_Kernel], None]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Concat": _concat,
    "AveragePool": _average_pool,
    "Softmax": _softmax,
    **dict.fromkeys(("Add", "Mul", HARD_SIGMOID, "GlobalAveragePool", "LeakyRelu", "Sigmoid"), _elementwise),
}
FLOAT_RESULT = ("Gemm", "MatMul")
STANDARD = ("Conv", "MatMul")  # whose operators on codes are ONNX's own
