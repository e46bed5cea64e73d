"""Kernels by the name of their operator: integer arithmetic, which no runtime is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from onnxq.reference import elementwise, pools, products
from onnxq.reference.sums import Arithmetic

Array = NDArray[Any]
Kernel = Callable[[Mapping[str, Any], Sequence[Any], Arithmetic], tuple[Array, ...]]


@dataclass(frozen=True)
class Step:
    """One kernel to run.

    Attributes:
        kernel: what it computes.
        op: its operator.
        inputs: names of tensors; empty where one is left out.
        outputs: names of the tensors it writes.
        attributes: of the operator.
    """

    kernel: Kernel
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


# Weights of the operators that multiply, by the index of that input.
WEIGHTS = {
    "QLinearConv": 3,
    "ConvInteger": 1,
    "QLinearMatMul": 3,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
    "QGemm": 3,
}

KERNELS: dict[str, Kernel] = {
    "QLinearConv": products.qlinear_conv,
    "ConvInteger": products.conv_integer,
    "QLinearMatMul": products.qlinear_matmul,
    "MatMulInteger": products.matmul_integer,
    "MatMulIntegerToFloat": products.matmul_to_float,
    "DynamicQuantizeMatMul": products.dynamic_matmul,
    "DynamicQuantizeLinear": products.dynamic_quantize,
    "QGemm": products.qgemm,
    "QuantizeLinear": elementwise.quantize,
    "DequantizeLinear": elementwise.dequantize,
    "QLinearAdd": elementwise.qlinear_add,
    "QLinearMul": elementwise.qlinear_mul,
    "QLinearConcat": elementwise.qlinear_concat,
    "QLinearLeakyRelu": elementwise.qlinear_leaky_relu,
    "QLinearSigmoid": elementwise.qlinear_sigmoid,
    "QLinearSoftmax": elementwise.qlinear_softmax,
    "QLinearAveragePool": pools.average,
    "QLinearGlobalAveragePool": pools.global_average,
}

# Standard operators that have a kernel of their own where their data are codes.
ON_CODES: dict[str, Kernel] = {
    "Clip": elementwise.clip,
    "Min": elementwise.smallest,
    "Max": elementwise.largest,
    "MaxPool": pools.max_pool,
}

# Standard operators that move codes; onnx's evaluator does it.
MOVES = (
    *("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Pad", "Expand", "Tile"),
    *("Identity", "Gather", "Concat", "DepthToSpace", "SpaceToDepth"),
)
