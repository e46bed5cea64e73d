"""Peak memory of calibration against the number of samples, for every range method.

    python bench/memory.py        writes bench/results/memory.json

Each compile runs in a process of its own. What is compared is the peak of the whole process, imports and model included.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tasks import TASKS

RESULTS = Path(__file__).parent / "results" / "memory.json"
METHODS = ("minmax", "percentile", "mse", "entropy", "aciq")
MODEL = "cifar10_resnet20"
SAMPLES = (64, 512, 2000)

CHILD = """
import resource, sys
import onnxq
onnxq.compile_model(sys.argv[1], sys.argv[2], samples=int(sys.argv[3]), ranges=sys.argv[4], threads=1, speed=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak_mb(samples: int, method: str) -> float:
    """Peak resident memory of one compile, in MB."""
    task = next(t for t in TASKS if t.model == MODEL)
    words = [sys.executable, "-c", CHILD, task.path, task.calib, str(samples), method]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure and write."""
    results = {m: {str(n): round(peak_mb(n, m), 1) for n in SAMPLES} for m in METHODS}
    for method, row in results.items():
        row["growth_64_to_2000"] = round(row["2000"] / row["64"] - 1, 4)
        print(method, row, flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"model": MODEL, "unit": "MB peak RSS", **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
