"""Widths below 8 bits, deployed: accuracy, agreement with float, SQNR, size, and run time against W8A8 of the same model.

    python bench/low_bits.py [MODEL ...]        writes bench/results/low_bits.json

Speed is CPU time on one thread; the files of all widths take turns.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
from int8 import SAMPLES, quality, speeds
from tasks import TASKS, Task

import onnxq

RESULTS = Path(__file__).parent / "results" / "low_bits.json"
MODELS = (
    "cifar10_resnet20",
    "cifar10_resnet56",
    "imagenet_squeezenet1_1",
    "imagenet_mobilenetv1_025",
    "kws_dscnn",
    "minilm_l6_v2",
)
BITS = ("w8a8", "w6a8", "w5a8", "w4a8", "w3a8", "w2a8", "w8a4", "w8a3", "w8a2", "w4a4")
SCHEMES = ("tensor", "channel")


def measure(task: Task, directory: Path) -> dict[str, dict[str, float]]:
    """One row a width and granularity."""
    rows: dict[str, dict[str, float]] = {
        "float": {"bytes": task.path.stat().st_size, **quality(task, task.path)}
    }
    paths = {"float": task.path}
    for bits in BITS:
        for scheme in SCHEMES:
            name, out = f"{bits} {scheme}", directory / f"{task.model}.{bits}.{scheme}.onnx"
            weights = f"int{bits[1]}:{scheme}"
            onnxq.compile_model(
                task.path, task.calib, output=out, samples=SAMPLES, bits=bits, weights=weights, speed=False
            )
            rows[name] = {"bytes": out.stat().st_size, **quality(task, out)}
            paths[name] = out
    timed = {name: path for name, path in paths.items() if name == "float" or name.endswith("channel")}
    times = speeds(task, timed, 1)
    for name, ms in times.items():
        rows[name]["ms_batch1"] = ms
        rows[name]["time_over_w8a8"] = ms / times["w8a8 channel"]
    return rows


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
                shown = {k: round(v, 4) for k, v in figures.items() if v is not None}
                print(f"{model:28} {row:16} {shown}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
