"""onnxq itself, in a process of its own as the others."""

from __future__ import annotations

from job import Job, UnableError, perform

import onnxq
from onnxq.errors import OnnxqError


def quantize(job: Job) -> None:
    """Options are those of `onnxq.compile_model`, which are the long ones of `onnxq compile`; `blind` leaves the samples out."""
    bits = job.setting.partition("-")[0]
    scheme = {} if job.per_channel or job.activations is None else {"weights": f"int{job.weights}:tensor"}
    options = {"bits": bits, **scheme, **job.options}
    data = None if options.pop("blind", False) else job.calib
    try:
        onnxq.compile_model(job.model, data, output=job.output, threads=1, speed=False, **options)
    except OnnxqError as error:
        raise UnableError(str(error)) from error


perform(quantize, "onnxq", "onnxruntime")
