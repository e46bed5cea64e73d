"""What a runtime can run in integers, as data: op -> rule, storage, hazards.

The rules of `ort-cpu` were measured on onnxruntime 1.32; tests hold them and fail when a newer runtime changes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.errors import UsageError, unknown
from onnxq.graph import float_values, is_constant, is_standard, present, rank
from onnxq.scheme import QuantScheme

Role = Literal["compute", "kernel", "curve", "layout", "table"]
Check = "Callable[[gs.Node], str | None]"


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
    """

    role: Role
    activations: tuple[int, ...] | None = (0,)
    float_output: bool = False
    absorbs: tuple[str, ...] = ()
    copies_equal: bool = False


RELU = ("Relu", "Clip")
LAYOUT = Rule("layout")


@dataclass(frozen=True)
class Target:
    """A runtime.

    Attributes:
        name: as given to `--target`.
        min_opset: opset that the emitted form needs.
        rules: op -> rule; an op without a rule stays float.
        packed: widths below 8 whose own integer types its initializers may have; others are stored as bit planes.
        signed: whether activations are int8 symmetric about 0, else uint8.
        pair_limit: largest magnitude that 255 times the sum of two neighbouring weights may reach in 16 bits on some
            machines; 0 when the kernels accumulate in 32 bits everywhere.
        narrow_depthwise: depthwise convolutions of at most so many channels are faster in float.
        pads_channels: whether convolutions over three channels are faster with a fourth one of zeros.
    """

    name: str
    min_opset: int
    rules: Mapping[str, Rule]
    packed: tuple[int, ...] = (2, 4)
    signed: bool = False
    pair_limit: int = 0
    narrow_depthwise: int = 0
    pads_channels: bool = False

    def rule(self, node: gs.Node) -> Rule | None:
        """The rule of a node, None when it must stay float."""
        if not is_standard(node):
            return None
        rule = self.rules.get(node.op)
        if rule is not None and rule.role == "table" and not is_constant(node.inputs[0]):
            return LAYOUT  # it picks from an activation
        return rule

    def check_weights(self, scheme: QuantScheme) -> None:
        """Refuse a scheme of weights that the integer kernels cannot run.

        Raises:
            UsageError: naming the scheme and the choices.
        """
        if not scheme.signed or not scheme.symmetric or scheme.granularity == "block":
            raise UsageError(
                f"target {self.name!r} takes weights intB:tensor or intB:channel, B from 2 to 8, not {scheme}"
            )

    def activation_scheme(self, scheme: QuantScheme) -> QuantScheme:
        """The grid on which the target holds activations of a scheme.

        A kernel that takes uint8 holds signed codes with the zero point in the middle: the same values, shifted.

        Raises:
            UsageError: the kernels cannot run the scheme.
        """
        if scheme.granularity != "tensor":
            raise UsageError(f"activations have one scale a tensor, which {scheme} has not")
        if self.signed and not (scheme.signed and scheme.symmetric):
            raise UsageError(f"target {self.name!r} takes activations intB, B from 2 to 8, not {scheme}")
        if self.signed or not scheme.signed:
            return scheme
        return replace(scheme, signed=False)


KERNEL = Rule("kernel", absorbs=RELU)

ORT_CPU = Target(
    name="ort-cpu",
    min_opset=13,
    rules={
        "Conv": Rule("compute", absorbs=RELU),
        "Gemm": Rule("compute", float_output=True, absorbs=RELU),
        "MatMul": Rule("compute", activations=(0, 1), float_output=True, absorbs=RELU),
        "Add": Rule("kernel", activations=None, absorbs=RELU),
        "Mul": Rule("kernel", activations=None, absorbs=RELU),
        "Concat": Rule("kernel", activations=None, copies_equal=True),
        "AveragePool": KERNEL,
        "GlobalAveragePool": KERNEL,
        "LeakyRelu": Rule("kernel"),
        "Sigmoid": Rule("curve"),
        "Softmax": Rule("curve"),
        "Gather": Rule("table"),
        **dict.fromkeys(
            (
                *(
                    "MaxPool",
                    "Resize",
                    "Transpose",
                    "Reshape",
                    "Flatten",
                    "Squeeze",
                    "Unsqueeze",
                    "Slice",
                    "Split",
                ),
                *("DepthToSpace", "SpaceToDepth", "Pad", "Expand", "Tile", "Identity"),
            ),
            LAYOUT,
        ),
    },
    pair_limit=32767,
    narrow_depthwise=64,
    pads_channels=True,
)

TARGETS = {t.name: t for t in (ORT_CPU,)}


def find_target(name: str) -> Target:
    """The target of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in TARGETS:
        raise unknown("target", name, TARGETS)
    return TARGETS[name]


def refusal(node: gs.Node) -> str | None:
    """Why this node cannot run on codes although its op can, None when it can."""
    check = CHECKS.get(node.op)
    return check(node) if check else None


def _refuse_conv(node: gs.Node) -> str | None:
    if float_values(node.inputs[1]) is None:
        return "its weights are no float32 initializer"
    bias = present(node, 2)
    if bias is not None and float_values(bias) is None:
        return "its bias is no float32 initializer"
    if rank(node.inputs[1]) not in (3, 4, 5):
        return f"its weights have rank {rank(node.inputs[1])}"
    return None


def _refuse_gemm(node: gs.Node) -> str | None:
    if float_values(node.inputs[1]) is None:
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
    if float_values(right) is None:
        return "its weights are not float32"
    return None if rank(right) == 2 else f"its weights have rank {rank(right)}; the kernel takes matrices"


def _refuse_table(node: gs.Node) -> str | None:
    if not is_constant(node.inputs[0]):
        return None
    if float_values(node.inputs[0]) is None:
        return "its table is not float32"
    if is_constant(node.inputs[1]) or rank(node.inputs[0]) != 2 or node.attrs.get("axis", 0) != 0:
        return "it is no embedding lookup (rows of a matrix)"
    return None


def _refuse_arithmetic(node: gs.Node) -> str | None:
    return "an operand is constant" if any(is_constant(t) for t in node.inputs) else None


def _refuse_resize(node: gs.Node) -> str | None:
    mode = node.attrs.get("mode", "nearest")
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return "it fills with a constant outside its input"
    return None if mode == "nearest" else f"mode {mode} changes codes"


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
    "Resize": _refuse_resize,
    "Pad": _refuse_pad,
    "MaxPool": _refuse_pool,
    "AveragePool": _refuse_pool,
}
