"""How an output was made: versions, and what is written into a model's metadata."""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import onnx

from onnxq.calibration.table import CalibrationTable

PACKAGES = ("onnxq", "onnx", "onnxruntime", "onnx-graphsurgeon", "numpy", "scipy")
PREFIX = "onnxq."


def versions() -> dict[str, str]:
    """Versions of onnxq and the packages that it stands on; loaded ones tell their own, which is quicker than their metadata."""
    return {package: _version(package) for package in PACKAGES}


@cache
def _version(package: str) -> str:
    loaded = sys.modules.get(package.replace("-", "_"))
    if loaded is not None and hasattr(loaded, "__version__"):
        return str(loaded.__version__)
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def stamp(model: onnx.ModelProto, pipeline: str, seed: int, table: CalibrationTable | None) -> None:
    """Write pipeline, seed, versions and the digest of the calibration data into the model's metadata; the rest of it stays."""
    made = {"pipeline": pipeline, "seed": str(seed), **{f"version.{k}": v for k, v in versions().items()}}
    if table is not None:
        made |= {"calibration.digest": table.data_digest, "calibration.samples": str(table.samples)}
    kept = [(p.key, p.value) for p in model.metadata_props if not p.key.startswith(PREFIX)]
    del model.metadata_props[:]
    for key, value in (*kept, *((PREFIX + k, v) for k, v in made.items())):
        model.metadata_props.add(key=key, value=value)
