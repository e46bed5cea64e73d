"""Kernels by the name of their operator: integer arithmetic, which no runtime is asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
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


# Second factor of the operators that multiply: indices of its codes and of its zero point.
FACTORS = {
    "QLinearConv": (3, 5),
    "ConvInteger": (1, 3),
    "QLinearMatMul": (3, 5),
    "MatMulInteger": (1, 3),
    "MatMulIntegerToFloat": (1, 5),
    "DynamicQuantizeMatMul": (1, 3),
    "QGemm": (3, 5),
}

TOP_BIT = np.uint8(128)


def on_uint8(kernel: Kernel, kept: Collection[int]) -> Kernel:
    """The kernel with int8 activations moved to uint8, codes and zero points by 128, as the runtime does in the QDQ form.

    Args:
        kept: indices of inputs that stay int8.
    """

    def moved(
        attributes: Mapping[str, Any], inputs: Sequence[Any], arithmetic: Arithmetic
    ) -> tuple[Array, ...]:
        given = [
            x if x is None or x.dtype != np.int8 or at in kept else x.view(np.uint8) ^ TOP_BIT
            for at, x in enumerate(inputs)
        ]
        found = kernel(attributes, given, arithmetic)
        return tuple((y ^ TOP_BIT).view(np.int8) if y.dtype == np.uint8 else y for y in found)

    return moved


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
