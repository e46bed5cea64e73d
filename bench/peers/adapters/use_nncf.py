"""NNCF on its ONNX backend."""

from __future__ import annotations

from pathlib import Path

import nncf
import onnx
from job import Job, perform
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters


def quantize(job: Job) -> str | None:
    """Options: `fold` normalizations first, `accurate` bias correction, `mixed` preset, `transformer`.

    Of 4-bit weights: `group` size.
    """
    model = onnx.load(folded(job) if job.options.get("fold") else job.model)
    if job.activations is None:
        return compress(model, job)
    options = job.options
    advanced = AdvancedQuantizationParameters(
        weights_quantization_params=_parameters(job.weights, None if job.per_channel else False),
        activations_quantization_params=_parameters(job.activations, None),
    )
    quantized = nncf.quantize(
        model,
        nncf.Dataset(list(job.feeds())),
        subset_size=-(-job.samples // job.batch),
        preset=nncf.QuantizationPreset.MIXED if options.get("mixed") else None,
        fast_bias_correction=not options.get("accurate"),
        model_type=nncf.ModelType.TRANSFORMER if options.get("transformer") else None,
        advanced_parameters=advanced,
    )
    onnx.save(quantized, job.output)
    return None


def folded(job: Job) -> str:
    """The model as onnxruntime's pre-processing leaves it, with normalizations in the convolutions; NNCF folds none itself."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = str(Path(job.output).with_suffix(".prepared.onnx"))
    quant_pre_process(job.model, prepared, skip_symbolic_shape=True)
    return prepared


def compress(model: onnx.ModelProto, job: Job) -> str | None:
    """4-bit weights of products, whole rows or groups of them."""
    mode, group = nncf.CompressWeightsMode.INT4_SYM, job.options.get("group", -1)
    onnx.save(nncf.compress_weights(model, mode=mode, group_size=group, all_layers=True), job.output)
    has_convolutions = any(node.op_type == "Conv" for node in model.graph.node)
    return "convolutions keep 8 bits" if has_convolutions else None


def _parameters(bits: int, per_channel: bool | None) -> QuantizationParameters:
    """Only what differs from NNCF's defaults is set: it takes the number 8 for a constraint of its own."""
    return QuantizationParameters(num_bits=None if bits == 8 else bits, per_channel=per_channel)


perform(quantize, "nncf", "onnxruntime")
