"""AMD Quark for ONNX."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from job import Job, UnableError, perform
from onnxruntime.quantization import CalibrationDataReader
from quark.onnx import ModelQuantizer
from quark.onnx.quantization.config import algorithm, spec
from quark.onnx.quantization.config.config import Config, QConfig
from quark.onnx.quantization.config.custom_config import get_default_config


class Reader(CalibrationDataReader):
    """The samples, as often as they are asked for."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.rewind()

    def get_next(self) -> dict | None:
        return next(self.batches, None)

    def rewind(self) -> None:
        self.batches: Iterator = self.job.feeds()


def quantize(job: Job) -> str | None:
    """Options: a `preset`, or `method` of ranges with `algorithms` and their arguments."""
    if job.activations is None:
        return store(job)
    if (job.weights, job.activations) != (8, 8):
        raise UnableError("its integers have 8, 16 or 32 bits, and 4 only as the weights of MatMulNBits")
    preset = job.options.get("preset")
    config = Config(global_quant_config=get_default_config(preset)) if preset else composed(job)
    ModelQuantizer(config).quantize_model(job.model, job.output, Reader(job))
    return None


def composed(job: Job) -> QConfig:
    """Unsigned activations, signed weights, and the algorithms asked for."""
    method = spec.CalibMethod[job.options["method"]]
    grain = spec.QuantGranularity.Channel if job.per_channel else spec.QuantGranularity.Tensor
    layers = spec.QLayerConfig(
        activation=spec.UInt8Spec(calibration_method=method),
        weight=spec.Int8Spec(calibration_method=spec.CalibMethod.MinMax, quant_granularity=grain),
    )
    asked = job.options.get("algorithms", {})
    steps = [getattr(algorithm, f"{name}Config")(**arguments) for name, arguments in asked.items()]
    return QConfig(global_config=layers, algo_config=steps, ForceQuantizeNoInputCheck=True)


def store(job: Job) -> str | None:
    """4-bit weights of products in groups of 32."""
    config = get_default_config("MATMUL_NBITS")
    config.extra_options["MatMulNBitsParams"] |= {"GroupSize": 32, "AccuracyLevel": 4}
    ModelQuantizer(Config(global_quant_config=config)).quantize_model(job.model, job.output, Reader(job))
    if not any(node.op_type == "MatMulNBits" for node in onnx.load(job.output).graph.node):
        raise UnableError("it stores the weights of MatMul alone at 4 bits, and this model has none")
    return None


perform(quantize, "amd-quark", "onnxruntime", "torch")
