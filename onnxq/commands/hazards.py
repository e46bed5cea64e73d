"""What may go wrong with a model, a sentence each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from onnxq.model.opset import DEFAULT
from onnxq.model.quantized import ALREADY, is_quantized
from onnxq.model.skeleton import PROTOBUF_LIMIT
from onnxq.model.tensors import ELEMENTS, storage_bytes, subgraphs, tensor_array
from onnxq.saturation import excess, pair_limit

# Index of the weights, and the kind whose reduction order they have.
INTEGER_WEIGHTS = {
    "QLinearConv": (3, "Conv"),
    "ConvInteger": (1, "Conv"),
    "QLinearMatMul": (3, "MatMul"),
    "MatMulInteger": (1, "MatMul"),
    "MatMulIntegerToFloat": (1, "MatMul"),
    "DynamicQuantizeMatMul": (1, "MatMul"),
    "QGemm": (3, "Gemm"),
}
FLOAT_WEIGHTS = {"Conv": (1, "Conv"), "MatMul": (1, "MatMul"), "Gemm": (1, "Gemm")}


def model_hazards(model: ModelProto) -> list[str]:
    """Hazards of its types, its size, its control flow, and of quantization that it already has."""
    return [
        *_interface(model),
        *_size(model),
        *_bodies(model.graph),
        *_quantized(model),
        *_saturation(model.graph),
    ]


def _interface(model: ModelProto) -> Iterator[str]:
    constants = {t.name for t in model.graph.initializer}
    for info in model.graph.input:
        if info.name in constants:
            continue
        if not info.type.HasField("tensor_type"):
            yield f"input {info.name!r} is no tensor, so samples cannot be fed to it"
            continue
        dtype = ELEMENTS.get(info.type.tensor_type.elem_type, ("unknown", 0))[0]
        if dtype not in ("float32", "float16", "bfloat16"):
            yield f"input {info.name!r} is {dtype}: it stays as it is"


def _size(model: ModelProto) -> Iterator[str]:
    stored = sum(storage_bytes(model).values())
    if stored > PROTOBUF_LIMIT:
        yield f"its tensors take {stored / 1e9:.1f} GB: some go to a second file"


def _bodies(graph: GraphProto) -> Iterator[str]:
    for node in graph.node:
        if any(True for _ in subgraphs(node)):
            yield f"nodes in the bodies of {node.op_type} node {_name(node)!r} stay as they are"


def _quantized(model: ModelProto) -> Iterator[str]:
    if is_quantized(model):
        yield f"it is {ALREADY}"


def _saturation(graph: GraphProto) -> Iterator[str]:
    """8-bit weights whose neighbouring products can overflow 16 bits on x86 machines without VNNI."""
    limit, nodes, channels = pair_limit(), [], 0
    for name, codes, kind, axis in integer_weights(graph):
        over = int((excess(codes, kind, axis, limit) > 0).sum())
        channels += over
        if over:
            nodes.append(name)
    if nodes:
        more = f" and {len(nodes) - 1} more nodes" if len(nodes) > 1 else ""
        yield (
            f"8-bit weights of {nodes[0]!r}{more} ({channels} channels) can saturate: neighbouring products "
            "overflow 16 bits on x86 machines without VNNI, so that results differ between machines"
        )


def integer_weights(graph: GraphProto) -> Iterator[tuple[str, NDArray[np.integer], str, int]]:
    """Constant int8 weights of the top-level graph that meet 8-bit activations in a kernel.

    Yields:
        Node name, codes, kind for `onnxq.saturation`, output-channel axis. Matrices of MatMul come with a
        row for each output channel, stacked ones below each other.
    """
    stored = {t.name: t for t in graph.initializer if t.data_type == TensorProto.INT8}
    decoded = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    for node in graph.node:
        index, kind, source = _place(node)
        if index >= len(node.input):
            continue
        name = node.input[index]
        tensor = stored.get(decoded.get(name, "") if source == "decoded" else name)
        if tensor is None or (source == "decoded" and node.input[0] not in decoded):
            continue
        codes, axis = tensor_array(tensor), 0
        if codes.ndim < 2 or not codes.size:
            continue
        if kind == "Conv" and codes.shape[:2] == (_attribute(node, "group", 1), 1):
            kind = "Depthwise"
        if kind == "Gemm" and not _attribute(node, "transB", 0):
            axis = 1
        if kind == "MatMul":
            codes = np.swapaxes(codes, -1, -2).reshape(-1, codes.shape[-2])
        yield _name(node), codes, kind, axis


def _place(node: NodeProto) -> tuple[int, str, str]:
    """Index and kind of the weights, and whether they are codes or decoded; an index too large for none."""
    if node.op_type in INTEGER_WEIGHTS:
        return *INTEGER_WEIGHTS[node.op_type], "codes"
    if node.op_type in FLOAT_WEIGHTS and node.domain in DEFAULT:
        return *FLOAT_WEIGHTS[node.op_type], "decoded"
    return len(node.input), "", ""


def _name(node: NodeProto) -> str:
    return str(node.name or node.output[0])


def _attribute(node: NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)
