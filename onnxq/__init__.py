"""onnxq: an ONNX to ONNX post-training quantization compiler.

    import onnxq

    done = onnxq.compile_model("model.onnx", "samples.npz", output="model_int8.onnx")
    print(done.report.as_json()["quality"])

Names are loaded when they are first used, so that importing onnxq is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxq.affine import QuantParams as QuantParams
    from onnxq.analysis import Analysis as Analysis
    from onnxq.analysis import analyze as analyze
    from onnxq.compiler import CompiledModel as CompiledModel
    from onnxq.compiler import compile_model as compile_model
    from onnxq.data import Dataset as Dataset
    from onnxq.data import ImageOptions as ImageOptions
    from onnxq.errors import DataError as DataError
    from onnxq.errors import ModelError as ModelError
    from onnxq.errors import OnnxqError as OnnxqError
    from onnxq.errors import UsageError as UsageError
    from onnxq.pipeline import Context as Context
    from onnxq.pipeline import Pass as Pass
    from onnxq.pipeline import PassResult as PassResult
    from onnxq.pipeline import Pipeline as Pipeline
    from onnxq.presets import preset_pipeline as preset_pipeline
    from onnxq.program import Program as Program
    from onnxq.program import QuantDecision as QuantDecision
    from onnxq.program import Unit as Unit
    from onnxq.report.model import Report as Report
    from onnxq.scheme import QuantScheme as QuantScheme
    from onnxq.target import Target as Target

    __version__: str

_HOMES = {
    "Analysis": "analysis",
    "CompiledModel": "compiler",
    "Context": "pipeline",
    "DataError": "errors",
    "Dataset": "data",
    "ImageOptions": "data",
    "ModelError": "errors",
    "OnnxqError": "errors",
    "Pass": "pipeline",
    "PassResult": "pipeline",
    "Pipeline": "pipeline",
    "Program": "program",
    "QuantDecision": "program",
    "QuantParams": "affine",
    "QuantScheme": "scheme",
    "Report": "report.model",
    "Target": "target",
    "Unit": "program",
    "UsageError": "errors",
    "analyze": "analysis",
    "compile_model": "compiler",
    "preset_pipeline": "presets",
}

__all__ = [
    "Analysis",
    "CompiledModel",
    "Context",
    "DataError",
    "Dataset",
    "ImageOptions",
    "ModelError",
    "OnnxqError",
    "Pass",
    "PassResult",
    "Pipeline",
    "Program",
    "QuantDecision",
    "QuantParams",
    "QuantScheme",
    "Report",
    "Target",
    "Unit",
    "UsageError",
    "__version__",
    "analyze",
    "compile_model",
    "preset_pipeline",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"onnxq.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'onnxq' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """The installed version; a checkout that is not installed has none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("onnxq")
    except PackageNotFoundError:
        return "0+unknown"
