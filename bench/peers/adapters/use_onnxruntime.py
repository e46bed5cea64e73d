"""onnxruntime.quantization: static QDQ models, or 4-bit weights of products."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from job import Job, UnableError, perform
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

LAYERS = ("Conv", "Gemm", "MatMul")


class Reader(CalibrationDataReader):
    """The samples as the calibrators ask for them."""

    def __init__(self, job: Job) -> None:
        self.batches: Iterator = job.feeds()

    def get_next(self) -> dict | None:
        return next(self.batches, None)


def quantize(job: Job) -> None:
    """Options: `method`, `reduce_range`, `signed` activations, `edges` for 8 bits in the first and last layers, `tables`."""
    if job.activations is None:
        quantize_weights(job)
        return
    prepared = str(Path(job.output).with_suffix(".prepared.onnx"))
    quant_pre_process(job.model, prepared, skip_symbolic_shape=True)
    width = "Int" if job.options.get("signed") else "UInt"
    activations = getattr(QuantType, f"Q{width}{job.activations}")
    extra = {"TensorQuantOverrides": edge_overrides(prepared, job)} if job.options.get("edges") else {}
    quantize_static(
        prepared,
        job.output,
        Reader(job),
        quant_format=QuantFormat.QDQ,
        per_channel=job.per_channel,
        reduce_range=bool(job.options.get("reduce_range")),
        activation_type=activations,
        weight_type=getattr(QuantType, f"QInt{job.weights}"),
        calibrate_method=getattr(CalibrationMethod, job.options.get("method", "MinMax")),
        extra_options=extra,
    )


def edge_overrides(path: str, job: Job) -> dict[str, list[dict]]:
    """8 bits for the weights of the first and last layer and, in narrow activations, for what those read and the model's ends."""
    graph = onnx.load(path).graph
    held = {t.name: t for t in graph.initializer}
    layers = [n for n in graph.node if n.op_type in LAYERS and n.input[1] in held]
    found: dict[str, list[dict]] = {}
    for node in (layers[0], layers[-1]):
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        axis = 0 if node.op_type == "Conv" or transposed else len(held[node.input[1]].dims) - 1
        found[node.input[1]] = [{"quant_type": QuantType.QInt8} | ({"axis": axis} if job.per_channel else {})]
        if job.activations is not None and job.activations < 8:
            found[node.input[0]] = [{"quant_type": QuantType.QUInt8}]
    if job.activations is not None and job.activations < 8:
        found |= {v.name: [{"quant_type": QuantType.QUInt8}] for v in (*graph.input, *graph.output)}
    return found


def quantize_weights(job: Job) -> None:
    """4-bit blocks of 32 for MatMulNBits, with `tables` for GatherBlockQuantized too."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    ops = ("MatMul", "Gather") if job.options.get("tables") else ("MatMul",)
    axes = (("MatMul", 0), ("Gather", 1))
    quantizer = MatMulNBitsQuantizer(
        onnx.load(job.model),
        block_size=32,
        is_symmetric=True,
        accuracy_level=4,
        op_types_to_quantize=ops,
        quant_axes=axes,
    )
    quantizer.process()
    model = quantizer.model.model
    if not any(n.op_type in ("MatMulNBits", "GatherBlockQuantized") for n in model.graph.node):
        raise UnableError(
            f"it stores the weights of {' and '.join(ops)} alone, and this model has none that it takes"
        )
    onnx.save(model, job.output)


perform(quantize, "onnxruntime")
