"""Deployed codes against the integer reference, at every width: codes that differ, per tensor and per channel weights.

    python bench/exactness.py [MODEL ...]        writes bench/results/exactness.json

Each file is run in onnxruntime and in `onnxq.reference`, with 32-bit sums and with the 16-bit pairs of AVX2 without VNNI,
and all quantized tensors are compared code by code.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from tasks import TASKS

import onnxq
from onnxq.data import input_specs, open_data
from onnxq.model.load import load_model
from onnxq.reference.agreement import Side, agreement

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "exactness.json"
SAMPLES = 64
WEIGHTS, ACTIVATIONS, SCHEMES = range(2, 9), (2, 3, 4, 8), ("tensor", "channel")
MODELS = ("digits_cnn", "digits_transformer", "cifar10_resnet20")


def files(model: str) -> tuple[Path, Path, Path]:
    """The float model, its calibration and its test feeds."""
    if model.startswith("digits"):
        folder = ROOT / "models"
        return folder / f"{model}.onnx", folder / "digits_calib.npz", folder / "digits_test.npz"
    task = next(t for t in TASKS if t.model == model)
    return task.path, task.calib, task.test


def settings() -> Iterator[tuple[str, dict[str, str]]]:
    """Names and options of all widths."""
    for scheme in SCHEMES:
        for w in WEIGHTS:
            for a in ACTIVATIONS:
                yield f"w{w}a{a} {scheme}", {"bits": f"w{w}a{a}", "weights": f"int{w}:{scheme}"}


def measure(model: str, directory: Path) -> dict[str, dict[str, int]]:
    """A row a setting."""
    path, calib, test = files(model)
    data = open_data(test, input_specs(load_model(path)))
    rows = {}
    for name, options in settings():
        done = onnxq.compile_model(path, calib, samples=128, speed=False, **options)
        out = directory / "q.onnx"
        done.save(out)
        found = agreement(onnx.load(out), data, limit=SAMPLES)
        rows[name] = {
            "tensors": len(found.runtime.codes),
            "codes": sum(c.values for c in found.runtime.codes.values()),
            "differing_in_onnxruntime": differing(found.runtime),
            "differing_on_avx2": differing(found.avx2),
        }
        print(f"{model:20} {name:14} {rows[name]}", flush=True)
    return rows


def differing(side: Side) -> int:
    """Codes that differ."""
    return sum(c.differing for c in side.codes.values())


def main(names: list[str]) -> None:
    """Measure the named models, all without names; other models keep their rows."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["versions"] = {"onnxruntime": ort.__version__, "numpy": np.__version__}
    with tempfile.TemporaryDirectory() as directory:
        for model in names or MODELS:
            results[model] = measure(model, Path(directory))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
