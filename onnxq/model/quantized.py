"""Whether a model is quantized already."""

from __future__ import annotations

from onnx import ModelProto

from onnxq.model.tensors import all_graphs

QUANTIZED = frozenset(
    {
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeLSTM"),
        *("QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger"),
        *("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits"),
    }
)
ALREADY = "quantized already: compile the float model it was made from"


def is_quantized(model: ModelProto) -> bool:
    """Whether nodes of the model compute or store codes."""
    return any(node.op_type in QUANTIZED for graph in all_graphs(model.graph) for node in graph.node)
