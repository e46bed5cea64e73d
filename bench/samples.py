"""How many calibration samples ranges need: quality of plain 8 bits, and CPU time of the compile, by their number.

    python bench/samples.py [MODEL ...]        writes bench/results/samples.json

Samples are evenly spaced over the calibration data; a number beyond what there is takes all. Seconds are CPU time of the compile,
verification included, on one thread. The first compile of a model, which does not count, loads what Python loads once.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import onnxruntime as ort
from int8 import quality
from tasks import TASKS, Task

import onnxq

RESULTS = Path(__file__).parent / "results" / "samples.json"
COUNTS = (16, 32, 64, 128, 256, 512)


def measure(task: Task, out: Path) -> dict[str, dict[str, float | None]]:
    """A row for each number of samples."""
    compiled(task, out, COUNTS[0])
    return {str(count): {"cpu_seconds": compiled(task, out, count), **quality(task, out)} for count in COUNTS}


def compiled(task: Task, out: Path, count: int) -> float:
    """CPU seconds of a compile."""
    start = time.process_time()
    onnxq.compile_model(task.path, task.calib, output=out, samples=count, threads=1, speed=False)
    return time.process_time() - start


def main(names: list[str]) -> None:
    """Measure the named models, all without names; other models keep their rows."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["versions"] = {"onnxruntime": ort.__version__}
    with tempfile.TemporaryDirectory() as directory:
        for task in TASKS:
            if names and task.model not in names:
                continue
            results[task.model] = measure(task, Path(directory, "model.onnx"))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            for count, row in results[task.model].items():
                print(f"{task.model:28} {count:>4} {row}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
