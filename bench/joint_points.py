"""LAPQ and further points together: which comes first, and what they gain at W4A4, deployed.

    python bench/joint_points.py [MODEL ...]        writes bench/results/joint_points.json

Weights have a scale for each channel and 10 % further weights; losses are those of the search, on the emitted graph. ResNet-20
has every order, the other models those that matter. `ranges` is the first half of LAPQ, `steps` the second.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
from lapq import GRAPH, row
from lapq import MODELS as EFFORTS
from tasks import TASKS

RESULTS = Path(__file__).parent / "results" / "joint_points.json"
PLAN = "annotate:weights=int4:channel,activations=uint4 calibrate:ranges=mse choose-ranges quantize-weights round-weights"
MODELS = ("cifar10_resnet20", "cifar10_resnet56", "imagenet_squeezenet1_1", "imagenet_mobilenetv1_025")
SEARCH, POINTS, END = "search-norm search-steps", "multipoint:share=0.1", "correct-bias emit-qdq"
ORDERS = {
    "neither": "",
    "points": POINTS,
    "lapq": SEARCH,
    "lapq, points": f"{SEARCH} {POINTS}",
    "points, lapq": f"{POINTS} {SEARCH}",
    "ranges, points, steps": f"search-norm {POINTS} search-steps",
    "lapq, points, lapq": f"{SEARCH} {POINTS} search-steps",
}
EVERY = "cifar10_resnet20"
COMPARED = ("neither", "lapq", "lapq, points", "points, lapq", "ranges, points, steps", "lapq, points, lapq")


def main(names: list[str]) -> None:
    """Measure the named models, all without names; other models keep their rows."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["versions"] = {"onnxruntime": ort.__version__, "numpy": np.__version__}
    tasks = {task.model: task for task in TASKS}
    with tempfile.TemporaryDirectory() as directory:
        for model in names or MODELS:
            rows = results.setdefault(model, {})
            for name in ORDERS if model == EVERY else COMPARED:
                text = " ".join((GRAPH.format("int4:channel"), PLAN, ORDERS[name], END))
                found = row(tasks[model], text, EFFORTS[model].samples, Path(directory, "model.onnx"))
                rows[f"channel {name}"] = found
                shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}
                print(f"{model:26} {name:20} {shown}", flush=True)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
