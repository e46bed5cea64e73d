"""The QDQ form: a float operator between DequantizeLinear and QuantizeLinear is one kernel on codes.

The conditions are those under which onnxruntime fuses, read from its source, measured, and stated here again independently of it,
so that a difference shows:

- all operands are dequantized: activations per tensor, weights per tensor or channel, a bias from int32;
- the result is read by one QuantizeLinear alone, of the type of the input, perhaps through a Relu or Clip that its grid implies;
- a Gemm and a MatMul may also write float32, and the Add of an int32 bias after a MatMul of matrices joins it.

A MatMulInteger whose sums are cast and scaled, perhaps with a bias added, is one kernel as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxq.reference.arithmetic import quantize_linear
from onnxq.reference.facts import BYTES, INT8, UINT8, Facts, Grid, attributes
from onnxq.reference.kernels import FACTORS, KERNELS, Kernel, on_uint8

Array = NDArray[Any]
KERNEL_OPS = (
    *("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Softmax"),
)

BIAS_SHARE, BIAS_STEP = 0.01, 1e-6  # by how much a bias' scale may be off, measured


@dataclass(frozen=True)
class Match:
    """A kernel that stands for some nodes.

    Attributes:
        op: operator on codes.
        inputs, output: its tensors.
        data: grid of the first operand, None where it is chosen as the model runs.
        absorbed: nodes that it stands for besides the main one.
    """

    op: str
    inputs: Sequence[str]
    output: str
    data: Grid | None
    absorbed: tuple[NodeProto, ...] = ()

    def kernel(self, facts: Facts) -> Kernel:
        """What computes it."""
        kernel = KERNELS[self.op]
        if self.data is None:
            return kernel
        kind = facts.kind(self.data.codes)
        if facts.seen(self.data.codes, kind) == kind:
            return kernel
        is_weighted = self.op in FACTORS and self.inputs[FACTORS[self.op][0]] in facts.constants
        return on_uint8(kernel, FACTORS[self.op] if is_weighted else ())


@dataclass(frozen=True)
class _End:
    """The QuantizeLinear behind an operator and the activation on the way there."""

    nodes: tuple[NodeProto, ...]

    @property
    def grid(self) -> list[str]:
        return list(self.nodes[-1].input[1:3])

    @property
    def codes(self) -> str:
        return str(self.nodes[-1].output[0])


def match(node: NodeProto, facts: Facts) -> Match | None:
    """The kernel that the runtime makes of a standard operator, None when it stays float."""
    if node.op_type == "MatMulInteger":
        return _scaled(node, facts)
    names = [name for name in node.input if name]
    grids = [facts.grids[name] for name in names if name in facts.grids]
    if not grids or len(grids) < len(names) or not facts.takes(grids[0]):
        return None
    if node.op_type in ("Conv", "Gemm"):
        return _weighted(node, facts, grids)
    if node.op_type == "MatMul":
        return _product(node, facts, grids)
    return _kernel(node, facts, grids) if node.op_type in KERNEL_OPS else None


def _weighted(node: NodeProto, facts: Facts, grids: list[Grid]) -> Match | None:
    data, weight, *bias = grids
    if facts.kind(weight.codes) not in BYTES or (bias and facts.kind(bias[0].codes) != np.int32):
        return None
    if node.op_type == "Conv" and (_seen(facts, data) == INT8 or not _fits(facts, grids)):
        return None
    if _seen(facts, data) == INT8 and facts.kind(weight.codes) != INT8:
        return None
    if bias and attributes(node).get("beta", 1.0) != 1.0:
        return None
    end = _end(node.output[0], facts, data)
    if end is None and (node.op_type == "Conv" or facts.is_quantized(node.output[0])):
        return None
    grid, output, absorbed = _tail(end, node.output[0])
    operands, codes = [*data.operand, *weight.operand], bias[0].codes if bias else ""
    if node.op_type == "Conv":
        return Match("QLinearConv", [*operands, *grid, codes], output, data, absorbed)
    return Match("QGemm", [*operands, codes, *grid], output, data, absorbed)


def _fits(facts: Facts, grids: list[Grid]) -> bool:
    """Whether a convolution's bias has about input scale times weight scale, which the kernel takes for granted."""
    scales = [facts.constants.get(grid.scale) for grid in grids]
    if len(scales) < 3:
        return True
    data, weight, bias = scales
    if data is None or weight is None or bias is None:
        return False
    return bool(np.isclose(bias, data * weight, rtol=BIAS_SHARE, atol=BIAS_STEP).all())


def _product(node: NodeProto, facts: Facts, grids: list[Grid]) -> Match | None:
    data, other = grids
    if facts.kind(other.codes) not in BYTES or _seen(facts, data) != UINT8:
        return None
    operands = [*data.operand, *other.operand]
    end = _end(node.output[0], facts, data)
    if end is not None:
        return Match("QLinearMatMul", [*operands, *end.grid], end.codes, data, end.nodes)
    if facts.is_quantized(node.output[0]):
        return None
    a, a_scale, a_zero, b, b_scale, b_zero = operands
    alone = Match("MatMulIntegerToFloat", [a, b, a_scale, b_scale, a_zero, b_zero], node.output[0], data)
    return _biased(node, facts, data, operands) or alone


def _biased(node: NodeProto, facts: Facts, data: Grid, operands: list[str]) -> Match | None:
    """A MatMul and the Add of its bias, where the runtime makes a Gemm of them."""
    add = facts.only_reader(node.output[0])
    if add is None or add.op_type != "Add" or not facts.is_matrix(node.input[0]):
        return None
    bias = facts.grids.get(_other(add, node.output[0]))
    if bias is None or facts.kind(bias.codes) != np.int32:
        return None
    end = _end(add.output[0], facts, data)
    if end is None and facts.is_quantized(add.output[0]):
        return None
    grid, output, absorbed = _tail(end, add.output[0])
    return Match("QGemm", [*operands, bias.codes, *grid], output, data, (add, *absorbed))


def _scaled(node: NodeProto, facts: Facts) -> Match | None:
    """Sums of codes that are quantized as the model runs, times input scale and weight scale, plus a bias."""
    cast = facts.only_reader(node.output[0])
    scaled = None if cast is None or cast.op_type != "Cast" else facts.only_reader(cast.output[0])
    if cast is None or scaled is None or scaled.op_type != "Mul":
        return None
    factor = facts.writers.get(_other(scaled, cast.output[0]))
    if factor is None or factor.op_type != "Mul" or len(node.input) < 4:
        return None
    scales = sorted(factor.input, key=lambda name: name in facts.constants)  # that of the weights is constant
    a, b, a_zero, b_zero = node.input
    inputs, output, absorbed = [a, b, *scales, a_zero, b_zero], scaled.output[0], (cast, scaled)
    add = facts.only_reader(output)
    if add is not None and add.op_type == "Add":
        bias = facts.constants.get(_other(add, output))
        if bias is not None and bias.ndim == 1:
            name = _other(add, output)
            return Match("MatMulIntegerToFloat", [*inputs, name], add.output[0], None, (*absorbed, add))
    return Match("MatMulIntegerToFloat", inputs, output, None, absorbed)


def _other(node: NodeProto, name: str) -> str:
    """The input of an operator of two that is not the one of this name."""
    return next((n for n in node.input if n != name), "")


def _kernel(node: NodeProto, facts: Facts, grids: list[Grid]) -> Match | None:
    """Kernels whose operands are all activations."""
    data = grids[0]
    if any(not facts.takes(g) or _seen(facts, g) != _seen(facts, data) for g in grids):
        return None
    end = _end(node.output[0], facts, data)
    if end is None:
        return None
    operands = [name for grid in grids for name in grid.operand]
    inputs = [*end.grid, *operands] if node.op_type == "Concat" else [*operands, *end.grid]
    return Match(f"QLinear{node.op_type}", inputs, end.codes, data, end.nodes)


def _seen(facts: Facts, grid: Grid) -> np.dtype[Any] | None:
    return facts.seen(grid.codes, facts.kind(grid.codes))


def _tail(end: _End | None, output: str) -> tuple[list[str], str, tuple[NodeProto, ...]]:
    """Output grid, output and absorbed nodes; no grid and the float output without an end."""
    return ([], output, ()) if end is None else (end.grid, end.codes, end.nodes)


def _end(output: str, facts: Facts, data: Grid) -> _End | None:
    """The QuantizeLinear that alone reads a result, perhaps through an activation that its grid implies."""
    nodes = []
    reader = facts.only_reader(output)
    if reader is not None and reader.op_type in ("Relu", "Clip"):
        nodes, reader = [reader], facts.only_reader(reader.output[0])
    if reader is None or reader.op_type != "QuantizeLinear" or len(reader.input) < 3:
        return None
    scale, zero = (facts.constants.get(name) for name in reader.input[1:3])
    if scale is None or zero is None or scale.size != 1:
        return None
    if facts.seen(reader.output[0], zero.dtype) != _seen(facts, data):
        return None
    if any(not _is_implied(n, facts, scale, zero) for n in nodes):
        return None
    return _End((*nodes, reader))


def _is_implied(node: NodeProto, facts: Facts, scale: Array, zero: Array) -> bool:
    """Whether a Relu or Clip lets every code of the grid through."""
    info = np.iinfo(zero.dtype)
    if node.op_type == "Relu":
        return int(zero.item()) == info.min
    for end, name in zip((info.min, info.max), node.input[1:], strict=False):
        bound = facts.constants.get(name)
        if name and (bound is None or quantize_linear(bound, scale, zero).item() != end):
            return False
    return True
