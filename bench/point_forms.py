"""The two forms of further points, folded at load and computed row by row, beside the plain width: quality, bytes, run time.

    python bench/point_forms.py [MODEL ...]        writes bench/results/point_forms.json

Weights of 4 bits with a scale for each channel, 10 % further ones, activations of 8 bits. Run time is CPU time on one thread
over that of the plain width, the three files in turn.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import onnxruntime as ort
from int8 import speeds
from multipoint import MODELS, TABLES, Start
from tasks import TASKS

RESULTS = Path(__file__).parent / "results" / "point_forms.json"
SCHEME, BUDGET = "int4:channel", 10
BATCHES = (1, 32)
FORMS = {"plain": (0, None), "fold": (BUDGET, "fold"), "rows": (BUDGET, "rows")}


def main(names: list[str]) -> None:
    """Measure the named models, all without names; other models keep their rows."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["versions"] = {"onnxruntime": ort.__version__}
    tasks = {task.model: task for task in TASKS}
    for model in names or (m for m in MODELS if m not in TABLES):
        start, rows = Start.of(tasks[model], SCHEME, rounding=True), {}
        with tempfile.TemporaryDirectory() as directory:
            paths = {name: Path(directory, f"{name}.onnx") for name in FORMS}
            for name, (budget, form) in FORMS.items():
                rows[name], _ = start.figures(budget, "chosen", paths[name], form=form)
            for batch in BATCHES:
                for name, ms in (times := speeds(tasks[model], paths, batch)).items():
                    rows[name] |= {f"time_over_plain_batch{batch}": ms / times["plain"]}
        results[model] = rows
        print(model, rows, flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
