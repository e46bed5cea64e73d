"""What a compile to 8 bits costs: onnxq and the quantizers that come closest, in turn, each in a process of its own.

    python bench/peers/cost.py [MODEL ...]        writes bench/results/compile_cost.json

CPU seconds and peak memory are of the whole process, its imports included, as in bench/peers/run.py: medians of the rounds.
Ratios are medians too, of the ratios within a round. Other tools take several times as much: bench/results/peers.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from peers.adapters.job import Job
from peers.environments import interpreter
from peers.jobs import Outcome, run_job
from peers.run import MODELS, SECONDS, Row, calibration, has_vnni, plan

RESULTS = Path(__file__).parents[1] / "results" / "compile_cost.json"
ROUNDS = 7
SETTING = "w8a8"
PEERS = {"onnxq": "default", "onnxruntime": "unsigned", "onnxsim": "default"}


def rows(model: str) -> list[Row]:
    """What is compared on a model."""
    return [row for peer, way in PEERS.items() for row in plan([model], [peer], [SETTING], [way])]


def cost(row: Row, calib: Path) -> Outcome:
    """Of one compile, whose output is not kept."""
    with tempfile.TemporaryDirectory() as folder:
        output, batch = Path(folder, "quantized.onnx"), 1 if row.task.batch == 1 else row.peer.batch
        job = Job(str(row.task.path), str(calib), str(output), row.setting, batch, row.options)
        return run_job(interpreter(row.peer.name), row.peer.script, job, SECONDS)


def compare(model: str, shared: Path) -> dict[str, dict[str, Any]]:
    """Medians by peer, or why it has none; the first round, in which modules are compiled, does not count."""
    asked = rows(model)
    calib = calibration(asked[0].task, shared)
    rounds = [{row.peer.name: cost(row, calib) for row in asked} for _ in range(ROUNDS + 1)][1:]
    return {row.peer.name: figures(row.peer.name, rounds) for row in asked}


def figures(peer: str, rounds: Sequence[Mapping[str, Outcome]]) -> dict[str, Any]:
    """Medians of a peer, and of its multiples of what onnxq takes in the same round."""
    failed = next((r[peer].failed for r in rounds if r[peer].failed), None)
    if failed is not None:
        return {"failed": failed}
    found = {}
    for key in ("cpu_seconds", "peak_mb"):
        theirs, ours = ([getattr(r[name], key) for r in rounds] for name in (peer, "onnxq"))
        found[key] = median(theirs)
        found[f"{key}_over_onnxq"] = median(a / b for a, b in zip(theirs, ours, strict=True))
    return found


def main(models: list[str]) -> None:
    """Measure the named models, all without names; other models keep their rows."""
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    results["versions"] = {"vnni": has_vnni(), "rounds": ROUNDS}
    with tempfile.TemporaryDirectory() as shared:
        for model in models or MODELS:
            results[model] = compare(model, Path(shared))
            print(model, results[model], flush=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
