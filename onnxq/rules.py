"""How an op runs on codes, as data, and which nodes of it cannot."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.graph import NOTHING, float_values, is_constant, is_float_constant, present, rank, with_number

RECURRENT = {"LSTM": 1, "GRU": 1, "RNN": 1}  # op -> index of the weights
MATRICES = (1, 2)  # inputs of a recurrent layer that hold the weights of its data and of its state
WEIGHTED = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "Gather": 0, **RECURRENT}

Role = Literal["compute", "kernel", "curve", "layout", "table"]


@dataclass(frozen=True)
class Rule:
    """How one op runs on codes.

    Attributes:
        role: `compute` multiplies by weights and is worth quantizing for itself; `kernel` has an integer kernel that pays
            only between coded tensors; `curve` is a kernel whose 8-bit output pays only when codes are read next;
            `layout` moves codes without changing them; `table` looks codes up.
        activations: indices of the inputs that are activations; None for all.
        float_output: the integer kernel may write float32 directly.
        absorbs: activations that vanish into the kernel when the output's zero point is its smallest code.
        copies_equal: the kernel only copies when inputs and output share one grid.
        numbers: a number may be an operand: codes read at another scale, and an addition.
        sums: an Add of another activation behind the kernel belongs to it; what the kernel adds to is not quantized by itself.
    """

    role: Role
    activations: tuple[int, ...] | None = (0,)
    float_output: bool = False
    absorbs: tuple[str, ...] = ()
    copies_equal: bool = False
    numbers: bool = False
    sums: bool = False


RELU = ("Relu", "Clip")
LAYOUT = Rule("layout")
KERNEL = Rule("kernel", absorbs=RELU)
FLATTEST = 1e-6  # factor that leaves scales normal numbers
SLOPE_AND_SHIFT = {"alpha": 0.2, "beta": 0.5}  # of a HardSigmoid that does not say


def refusal(node: gs.Node) -> str | None:
    """Why this node cannot run on codes although its op can, None when it can."""
    check = CHECKS.get(node.op)
    return check(node) if check else None


def _refuse_conv(node: gs.Node) -> str | None:
    if not is_float_constant(node.inputs[1]):
        return "its weights are no float32 initializer"
    bias = present(node, 2)
    if bias is not None and not is_float_constant(bias):
        return "its bias is no float32 initializer"
    if rank(node.inputs[1]) not in (3, 4, 5):
        return f"its weights have rank {rank(node.inputs[1])}"
    return None


def _refuse_gemm(node: gs.Node) -> str | None:
    if not is_float_constant(node.inputs[1]):
        return "its weights are no float32 initializer"
    if node.attrs.get("transA", 0):
        return "transA is set"
    if node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("beta", 1.0) != 1.0:
        return "alpha or beta is not 1"
    bias = present(node, 2)
    if bias is None:
        return None
    columns = node.inputs[1].shape[0 if node.attrs.get("transB", 0) else 1]
    values = float_values(bias)
    vector = values is not None and values.size == columns and values.shape[-1:] in ((columns,), ())
    return None if vector else "its C is no bias vector"


def _refuse_matmul(node: gs.Node) -> str | None:
    left, right = node.inputs
    if is_constant(left):
        return "its left operand is constant"
    if not is_constant(right):
        return None if right.dtype == np.float32 else "its operands are not float32"
    if not is_float_constant(right):
        return "its weights are not float32"
    return None if rank(right) == 2 else f"its weights have rank {rank(right)}; the kernel takes matrices"


def _refuse_table(node: gs.Node) -> str | None:
    if not is_constant(node.inputs[0]):
        return None
    if not is_float_constant(node.inputs[0]):
        return "its table is not float32"
    if is_constant(node.inputs[1]) or rank(node.inputs[0]) != 2 or node.attrs.get("axis", 0) != 0:
        return "it is no embedding lookup (rows of a matrix)"
    return None


def _refuse_arithmetic(node: gs.Node) -> str | None:
    return "an operand is constant" if any(is_constant(t) for t in node.inputs) else None


def takes_number(node: gs.Node) -> bool:
    """Whether an Add or Mul takes an activation and a number, positive if it multiplies, and leaves the activation's shape."""
    x, value = with_number(node, node.op) if node.op in ("Add", "Mul") else NOTHING
    if (
        x is None
        or not math.isfinite(value)
        or (node.op == "Mul" and not FLATTEST <= value <= 1.0 / FLATTEST)
    ):
        return False
    dims = rank(x)
    return dims is not None and all(len(t.shape) <= dims for t in node.inputs if is_constant(t))


def _refuse_resize(node: gs.Node) -> str | None:
    mode = node.attrs.get("mode", "nearest")
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return "it fills with a constant outside its input"
    return None if mode == "nearest" else f"mode {mode} changes codes"


def _refuse_hard_sigmoid(node: gs.Node) -> str | None:
    return None if node.attrs.get("alpha", SLOPE_AND_SHIFT["alpha"]) > 0.0 else "its slope is not positive"


def _refuse_pad(node: gs.Node) -> str | None:
    mode = node.attrs.get("mode", "constant")
    if mode in ("reflect", "edge", "wrap"):
        return None
    fill = present(node, 2)
    if fill is None:
        return None
    values = float_values(fill)
    return None if values is not None and not values.any() else "it pads with something other than zero"


def _refuse_pool(node: gs.Node) -> str | None:
    if rank(node.inputs[0]) not in (3, 4, 5):
        return "the rank of its input is unknown"
    if len(node.outputs) > 1:
        return "it also writes indices"
    if node.op != "AveragePool":
        return None
    if any(d != 1 for d in node.attrs.get("dilations", [])):
        return "the integer kernel has no dilations"
    if node.attrs.get("ceil_mode", 0) and node.attrs.get("count_include_pad", 0):
        return "the integer kernel counts padding wrongly where sizes round up"
    return None


CHECKS = {
    "Conv": _refuse_conv,
    "Gemm": _refuse_gemm,
    "MatMul": _refuse_matmul,
    "Gather": _refuse_table,
    "Add": _refuse_arithmetic,
    "Mul": _refuse_arithmetic,
    "HardSigmoid": _refuse_hard_sigmoid,
    "Resize": _refuse_resize,
    "Pad": _refuse_pad,
    "MaxPool": _refuse_pool,
    "AveragePool": _refuse_pool,
}
