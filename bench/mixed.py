"""Layers of different widths against one width for all: bytes of the file at the same SQNR.

    python bench/mixed.py [MODEL ...]        writes bench/results/mixed.json

Each model is compiled at widths from 4 to 6, then from 3 bits with the SQNR of each of those as `min_sqnr`. What steers is
`calib_sqnr_db`, of calibration samples; metric, agreement and `sqnr_db` are of the test set.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from int8 import SAMPLES, quality
from tasks import TASKS, Task

import onnxq

RESULTS = Path(__file__).parent / "results" / "mixed.json"
MODELS = (
    "imagenet_mobilenetv1_025",
    "cifar10_resnet20",
    "cifar10_resnet56",
    "imagenet_squeezenet1_1",
    "kws_dscnn",
    "minilm_l6_v2",
)
START, UNIFORM = "w3a8", ("w4a8", "w5a8", "w6a8")


def measure(task: Task, directory: Path) -> dict[str, dict[str, Any]]:
    """One row a width, and one that keeps its SQNR."""
    rows = {}
    for bits in UNIFORM:
        rows[bits] = uniform = compiled(task, directory, bits=bits)
        rows[f"as {bits}"] = compiled(task, directory, bits=START, min_sqnr=uniform["calib_sqnr_db"])
    return rows


def compiled(task: Task, directory: Path, **options: Any) -> dict[str, Any]:
    """One compile: size, quality, what it took."""
    out = directory / "mixed.onnx"
    done = onnxq.compile_model(task.path, task.calib, output=out, samples=SAMPLES, speed=False, **options)
    report = done.report
    assert report.difference is not None
    assert report.difference.main is not None
    attempts = 1 if report.floor is None else len(report.floor.tries)
    sqnr = report.difference.main.sqnr_db
    return {"bytes": out.stat().st_size, "calib_sqnr_db": sqnr, **quality(task, out), "attempts": attempts}


def main(names: list[str]) -> None:
    """Measure the named models, all without names; other models keep their rows."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["versions"] = {"onnxruntime": ort.__version__, "numpy": np.__version__}
    tasks = {task.model: task for task in TASKS}
    with tempfile.TemporaryDirectory() as directory:
        for model in names or MODELS:
            results[model] = measure(tasks[model], Path(directory))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            for row, figures in results[model].items():
                print(f"{model:28} {row:8} {figures}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
