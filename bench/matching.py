"""What matching outputs in the deployed network brings: figures of the deployed model by what corrects its biases and scales.

    python bench/matching.py [MODEL ...]        writes bench/results/matching.json

The preset with its defaults, weights with a scale for each channel. `output` corrects means for what weights do to them, `means`
matches means alone and `deployed` means and spreads. Seconds are CPU time of the compile, verification included.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from unittest.mock import patch

import onnxruntime as ort
from int8 import SAMPLES, quality
from tasks import TASKS, Task

import onnxq
from onnxq.simulate import outputs

RESULTS = Path(__file__).parent / "results" / "matching.json"
MODELS = ("kws_dscnn", "cifar10_resnet20", "imagenet_mobilenetv1_025", "imagenet_squeezenet1_1")
WIDTHS = ("w4a4", "w4a8", "w8a8")
CORRECTIONS = {"output": "output", "means": "deployed", "deployed": "deployed"}
NEVER = 1 << 62  # places that would tell a spread


def row(task: Task, bits: str, name: str, out: Path) -> dict[str, float | None]:
    """One compile."""
    start = time.process_time()
    with patch.object(outputs, "ENOUGH", NEVER if name == "means" else outputs.ENOUGH):
        onnxq.compile_model(
            task.path,
            task.calib,
            output=out,
            bits=bits,
            bias_correction=CORRECTIONS[name],
            samples=SAMPLES,
            threads=1,
            speed=False,
        )
    return {"cpu_seconds": time.process_time() - start, **quality(task, out)}


def main(names: list[str]) -> None:
    """Measure the named models, all without names; other models keep their rows."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["versions"] = {"onnxruntime": ort.__version__}
    tasks = {task.model: task for task in TASKS}
    for model in names or MODELS:
        rows = results[model] = {}
        with tempfile.TemporaryDirectory() as directory:
            for bits, name in product(WIDTHS, CORRECTIONS):
                rows[f"{bits} {name}"] = row(tasks[model], bits, name, Path(directory, "model.onnx"))
                print(model, bits, name, rows[f"{bits} {name}"], flush=True)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
