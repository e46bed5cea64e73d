"""What the runtime made of a model: its optimized graph read back, matched with the units that were emitted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx

INTEGER_KERNELS = {
    "QLinearConv",
    "QLinearMatMul",
    "QGemm",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "ConvInteger",
    "DynamicQuantizeMatMul",
    "DynamicQuantizeLSTM",
    "QLinearAdd",
    "QLinearMul",
    "QLinearConcat",
    "QLinearAveragePool",
    "QLinearGlobalAveragePool",
    "QLinearLeakyRelu",
    "QLinearSigmoid",
    "QLinearSoftmax",
    "QLinearWhere",
    "QLinearReduceMean",
}
CONVERSIONS = {"QuantizeLinear", "DequantizeLinear"}
SUFFIX = re.compile(r"(_token_\d+|_nhwc|/duplicated|/MatMulAddFusion|_quant|_Q?Gemm|_gemm|_MatMul\w*)$")


@dataclass(frozen=True)
class Coverage:
    """How much of a model runs in integer kernels.

    Attributes:
        integer_macs: multiply-adds of one sample in integer kernels.
        total_macs: all multiply-adds of convolutions, matrix products and recurrent layers; 0 when sizes are unknown.
        kernels: count of each op of the optimized graph.
        integer: names of nodes that run in an integer kernel.
    """

    integer_macs: int
    total_macs: int
    kernels: Mapping[str, int]
    integer: frozenset[str]

    @property
    def share(self) -> float | None:
        """Share of multiply-adds in integer kernels; None when the model has none."""
        return self.integer_macs / self.total_macs if self.total_macs else None


def base_names(name: str) -> Iterator[str]:
    """A node's name, then what is left of it when endings that onnxruntime appends to moved and fused nodes are cut, one by one.

    Which of them the node had in the model only the model can tell: a user's own name may end like that.

    >>> list(base_names("head_gemm_token_12"))
    ['head_gemm_token_12', 'head_gemm', 'head']
    """
    yield name
    shorter = SUFFIX.sub("", name)
    if shorter != name:
        yield from base_names(shorter)


def read_coverage(optimized: onnx.ModelProto, macs: Mapping[str, int]) -> Coverage:
    """Match the optimized graph with multiply-adds per node name of the float model.

    Args:
        optimized: the graph as onnxruntime runs it.
        macs: multiply-adds of one sample, by node name, as `count_macs` gives them.
    """
    kernels = Counter(node.op_type for node in optimized.graph.node)
    integer = set()
    for node in optimized.graph.node:
        if node.op_type in INTEGER_KERNELS:
            integer |= set(base_names(node.name))
    return Coverage(
        integer_macs=sum(count for name, count in macs.items() if name in integer),
        total_macs=sum(macs.values()),
        kernels=dict(sorted(kernels.items())),
        integer=frozenset(integer),
    )
