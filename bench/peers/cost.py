"""What a compile to 8 bits costs: onnxq and the quantizers that come closest, in turn, each in a process of its own.

CPU seconds and peak memory are of the whole process, its imports included, as in bench/peers/run.py: medians of the rounds.
Ratios are medians too, of the ratios within a round. Writes bench/results/compile_cost.json; what other tools take is in
bench/results/peers.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from peers.jobs import Outcome
from peers.run import MODELS, SECONDS, Row, calibration, compile_row, has_vnni, plan

RESULTS = Path(__file__).parents[1] / "results" / "compile_cost.json"
ROUNDS = 5
SETTING = "w8a8"
PEERS = {"onnxq": "default", "onnxruntime": "unsigned", "onnxsim": "default"}


def rows(model: str) -> list[Row]:
    """What is compared on a model."""
    return [row for peer, way in PEERS.items() for row in plan([model], [peer], [SETTING], [way])]


def cost(row: Row, calib: Path) -> Outcome:
    """Of one compile, whose output is not kept."""
    with tempfile.TemporaryDirectory() as folder:
        return compile_row(row, calib, Path(folder, "quantized.onnx"), SECONDS)


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


def main(arguments: list[str] | None = None) -> None:
    """Measure the named models, all without names; other models keep their rows."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = f"models to measure, all of them unless named: {', '.join(MODELS)}"
    made.add_argument("--model", nargs="+", choices=MODELS, default=MODELS, metavar="M", help=text)
    asked = made.parse_args(arguments)
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    results["versions"] = {"vnni": has_vnni(), "rounds": ROUNDS}
    with tempfile.TemporaryDirectory() as shared:
        for model in asked.model:
            results[model] = compare(model, Path(shared))
            print(model, results[model], flush=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
