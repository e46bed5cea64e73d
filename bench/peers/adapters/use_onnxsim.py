"""onnxsim's quantizers."""

from __future__ import annotations

import onnx
import onnxsim
from job import Job, UnableError, perform
from onnxsim.full_qdq import quantize_full_qdq
from onnxsim.quark_weight_rounding import gptq_int8


def quantize(job: Job) -> str | None:
    """Options: `kind` is static, full, int4 or nbits; `method` of ranges, `equalize`, `correct` biases, `gptq`."""
    options = job.options
    source = onnx.load(job.model)
    if job.activations is None:
        return store(source, job)
    if job.activations != 8:
        raise UnableError(f"it has activations of 8 and 16 bits, not {job.activations}")
    if job.weights != 8 and not options.get("gptq"):
        raise UnableError(
            "its static quantizers have weights of 8 and 16 bits; GPTQ alone puts fewer into them"
        )
    if options["kind"] == "static" and not job.per_channel:
        raise UnableError("its default scheme has a scale for each output channel, not one a tensor")
    source, _ = onnxsim.simplify(source)
    if options.get("equalize"):
        source = onnxsim.cross_layer_equalize(source)
    feeds = list(job.feeds())
    common = {
        "calibration_data": feeds,
        "method": options.get("method", "minmax"),
        "per_channel": job.per_channel,
    }
    made = (
        onnxsim.quantize_static(source, **common)
        if options["kind"] == "static"
        else quantize_full_qdq(source, **common)
    )
    if options.get("gptq"):
        regrid = {"bits": job.weights, "per_channel": job.per_channel, "mse": True} if job.weights < 8 else {}
        made, _ = gptq_int8(source, made, feeds, **regrid)
    if options.get("correct"):
        made = onnxsim.correct_bias(source, made, calibration_data=feeds)
    onnx.save(made, job.output)
    return "all layers of 4 bits, in bytes" if options.get("gptq") and job.weights < 8 else None


def store(source: onnx.ModelProto, job: Job) -> str | None:
    """4-bit weights in blocks of 32, dequantized by the runtime or for MatMulNBits."""
    if job.options["kind"] == "int4":
        onnx.save(onnxsim.quantize_weight_only_int4(source), job.output)
        return "all layers of 4 bits"
    made = onnxsim.quantize_weight_only_matmul_nbits(source)
    if not any(node.op_type == "MatMulNBits" for node in made.graph.node):
        raise UnableError("it stores the weights of MatMul and of plain Gemm alone, and this model has none")
    onnx.save(made, job.output)
    return None


perform(quantize, "onnxsim", "onnxruntime")
