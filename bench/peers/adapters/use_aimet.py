"""AIMET-ONNX, exported as QDQ."""

from __future__ import annotations

from pathlib import Path

import aimet_onnx
import numpy as np
import onnx
from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight
from aimet_onnx.cross_layer_equalization import equalize_model
from aimet_onnx.quantsim import set_param_type
from job import Job, perform

LAYERS = ("Conv", "Gemm", "MatMul")
CONFIGS = Path(aimet_onnx.__file__).parent / "common" / "quantsim_config"


def quantize(job: Job) -> str | None:
    """Options: `scheme` of ranges, `equalize`, `seq_mse`, `adaround` iterations, `edges` for 8 bits in first and last layers."""
    options, feeds = job.options, list(job.feeds())
    model = as_it_reads(onnx.load(job.model))
    if options.get("seq_mse") or options.get("adaround"):
        fix_sizes(model, feeds[0])
    if options.get("equalize"):
        equalize_model(model)  # folds normalizations as well
    else:
        fold_all_batch_norms_to_weight(model)
    config = CONFIGS / ("default_config_per_channel.json" if job.per_channel else "default_config.json")
    sim = aimet_onnx.QuantizationSimModel(
        model,
        param_type=f"int{job.weights}",
        activation_type=f"int{job.activations or 8}",
        quant_scheme=options.get("scheme", "min_max"),
        config_file=str(config),
        dummy_input=feeds[0],
        providers=["CPUExecutionProvider"],
    )
    if options.get("edges"):
        widen_edges(sim, model)
    if job.activations is None:
        for name in sim.activation_names:
            sim.qc_quantize_op_dict[name].enabled = False
    if options.get("seq_mse"):
        aimet_onnx.apply_seq_mse(sim, feeds)
    if options.get("adaround"):
        aimet_onnx.apply_adaround(sim, feeds, num_iterations=options["adaround"])
    sim.compute_encodings(feeds)
    made = sim.to_onnx_qdq(export_int32_bias=job.activations is not None, prequantize_constants=True)
    onnx.save(made, job.output)
    return None


def as_it_reads(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without two things that are valid and that AIMET fails on.

    Empty names of optional inputs at the end (KeyError: ''), and weights that are listed as inputs too, as files of IR version 3
    do (it asks the samples for them, and its output has no weights).
    """
    for node in model.graph.node:
        while node.input and not node.input[-1]:
            del node.input[-1]
    held = {t.name for t in model.graph.initializer}
    asked = [value for value in model.graph.input if value.name not in held]
    del model.graph.input[:]
    model.graph.input.extend(asked)
    model.ir_version = max(model.ir_version, 4)  # the first in which weights are no inputs
    return model


def fix_sizes(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> None:
    """Give inputs the sizes of the samples but for the batch; the ways that learn make up samples, of size 1 where it is free."""
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        for dim, size in list(zip(dims, feeds[value.name].shape, strict=True))[1:]:
            dim.dim_value = size


def widen_edges(sim: aimet_onnx.QuantizationSimModel, model: onnx.ModelProto) -> None:
    """8 bits for the weights of the first and the last layer and for what they read and the model returns."""
    held = {t.name for t in model.graph.initializer}
    layers = [n for n in model.graph.node if n.op_type in LAYERS and n.input[1] in held]
    ends = (layers[0], layers[-1])
    set_param_type(sim, "int8", nodes_to_include={n.name for n in ends})
    for name in {*(n.input[0] for n in ends), *(o.name for o in model.graph.output)}:
        if name in sim.qc_quantize_op_dict:
            sim.qc_quantize_op_dict[name].set_bitwidth(8)


perform(quantize, "aimet-onnx", "onnxruntime", "torch")
