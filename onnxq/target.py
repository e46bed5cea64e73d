"""What a runtime can run in integers, as data: op -> rule, storage, form, hazards.

The rules of `ort-cpu` were measured on onnxruntime 1.32 and those of `openvino` on OpenVINO 2026.4; tests hold them and fail when
a newer runtime changes one. Those of `tensorrt` are NVIDIA's; `docs/adr/0006-targets.md` names all sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import onnx_graphsurgeon as gs

from onnxq.errors import UsageError, unknown
from onnxq.graph import is_constant, is_standard
from onnxq.rules import KERNEL, LAYOUT, RELU, Rule
from onnxq.scheme import QuantScheme


@dataclass(frozen=True)
class Target:
    """A runtime.

    Attributes:
        name: as given to `--target`.
        min_opset: opset that the emitted form needs.
        rules: op -> rule; an op without a rule stays float.
        local: whether it is the runtime that checks what is compiled here, so that coverage and speed are its own.
        contrib: whether operators of com.microsoft may be written.
        qdq_only: whether it reads nothing but QuantizeLinear and DequantizeLinear around float operators: no casts of codes, no
            ranges found at run time.
        bits: widths of codes that it takes.
        packed: widths below 8 whose own integer types its initializers may have; others are stored as bit planes.
        signed: whether activations are int8 symmetric about 0, else uint8.
        bias: type in which the bias of a unit is stored; operators on codes take int32 alone.
        guard: how layers that stay float are kept from being quantized by the runtime itself where they read codes: behind a
            DequantizeLinear with equal scales per `channel`, or behind a LeakyRelu of `slope` 1.
        pair_limit: largest magnitude that 255 times the sum of two neighbouring weights may reach in 16 bits on some
            machines; 0 when the kernels accumulate in 32 bits everywhere.
        narrow_depthwise: depthwise convolutions of at most so many channels are faster in float.
        narrow_inputs: convolutions over at most so many channels are faster in float, unless rows of their windows are long.
        pads_channels: whether convolutions over three channels are faster with a fourth one of zeros.
    """

    name: str
    min_opset: int
    rules: Mapping[str, Rule]
    local: bool = False
    contrib: bool = False
    qdq_only: bool = False
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    packed: tuple[int, ...] = (4,)
    signed: bool = False
    bias: Literal["int32", "float32"] = "int32"
    guard: Literal["none", "channel", "slope"] = "none"
    pair_limit: int = 0
    narrow_depthwise: int = 0
    narrow_inputs: int = 0
    pads_channels: bool = False

    def rule(self, node: gs.Node) -> Rule | None:
        """The rule of a node, None when it must stay float."""
        if not is_standard(node):
            return None
        rule = self.rules.get(node.op)
        if rule is not None and rule.role == "table" and not is_constant(node.inputs[0]):
            return LAYOUT  # it picks from an activation
        return rule

    def check_bits(self, widths: Iterable[int | None]) -> None:
        """Refuse widths of codes that the runtime does not take; None, for float, it does.

        Raises:
            UsageError: naming the width and the choices.
        """
        for width in widths:
            if width is not None and width not in self.bits:
                choices = ", ".join(map(str, self.bits))
                raise UsageError(f"target {self.name!r} takes codes of {choices} bits, not {width}")

    def check_weights(self, scheme: QuantScheme) -> None:
        """Refuse a scheme of weights that the integer kernels cannot run.

        Raises:
            UsageError: naming the scheme and the choices.
        """
        self.check_bits([scheme.bits])
        if not scheme.signed or not scheme.symmetric or scheme.granularity == "block":
            raise UsageError(
                f"target {self.name!r} takes weights intB:tensor or intB:channel, {self._widths()}, not {scheme}"
            )

    def check_integer_form(self) -> None:
        """Refuse operators on codes.

        Raises:
            UsageError: the runtime does not read them.
        """
        if self.bias != "int32":
            raise UsageError(f"target {self.name!r} takes the format qdq alone")

    def check_without_ranges(self) -> None:
        """Refuse weights that are computed with in float, and products that quantize their inputs when they run.

        Raises:
            UsageError: the runtime reads neither.
        """
        if self.qdq_only:
            raise UsageError(
                f"target {self.name!r} takes weights and activations in integers together; give calibration data"
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
            raise UsageError(f"target {self.name!r} takes activations intB, {self._widths()}, not {scheme}")
        self.check_bits([scheme.bits])
        if self.signed or not scheme.signed:
            return scheme
        return replace(scheme, signed=False)

    def _widths(self) -> str:
        return f"B from {self.bits[0]} to {self.bits[-1]}" if len(self.bits) > 1 else f"B = {self.bits[0]}"


ORT_CPU = Target(
    name="ort-cpu",
    min_opset=13,
    rules={
        "Conv": Rule("compute", absorbs=RELU),
        "Gemm": Rule("compute", float_output=True, absorbs=RELU),
        "MatMul": Rule("compute", activations=(0, 1), float_output=True, absorbs=RELU),
        "Add": Rule("kernel", activations=None, absorbs=RELU, numbers=True),
        "Mul": Rule("kernel", activations=None, absorbs=RELU, numbers=True),
        "Concat": Rule("kernel", activations=None, copies_equal=True),
        "AveragePool": KERNEL,
        "GlobalAveragePool": KERNEL,
        "LeakyRelu": Rule("kernel"),
        "Sigmoid": Rule("curve"),
        "HardSigmoid": Rule("curve"),
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
    local=True,
    contrib=True,
    packed=(2, 4),
    guard="channel",
    pair_limit=32767,
    narrow_depthwise=64,
    narrow_inputs=2,
    pads_channels=True,
)

# Runtimes that fuse an Add into the convolution in front of it round the convolution's output or do not, as they like.
SUMMING = {**ORT_CPU.rules, "Conv": Rule("compute", absorbs=RELU, sums=True)}

ONNX = Target(
    name="onnx",
    min_opset=19,  # the oldest QuantizeLinear that onnx's own evaluator has
    rules=SUMMING,
    guard="slope",
    pair_limit=32767,
)

OPENVINO = Target(
    name="openvino",
    min_opset=13,
    rules={op: replace(rule, numbers=False) for op, rule in SUMMING.items() if rule.role != "curve"},
    bias="float32",
    pair_limit=32767,
)

TENSORRT = Target(
    name="tensorrt",
    min_opset=13,
    rules={
        "Conv": Rule("compute", float_output=True, absorbs=RELU, sums=True),
        "Gemm": Rule("compute", float_output=True, absorbs=RELU),
        "MatMul": Rule("compute", activations=(0, 1), float_output=True, absorbs=RELU),
        "Add": Rule("kernel", activations=None, absorbs=RELU),
        "AveragePool": KERNEL,
        "GlobalAveragePool": KERNEL,
    },
    qdq_only=True,
    bits=(8,),
    packed=(),
    signed=True,
    bias="float32",
)

TARGETS = {t.name: t for t in (ORT_CPU, ONNX, OPENVINO, TENSORRT)}


def find_target(name: str) -> Target:
    """The target of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in TARGETS:
        raise unknown("target", name, TARGETS)
    return TARGETS[name]
