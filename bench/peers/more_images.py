"""The CIFAR-10 networks again on 10,000 images, ten times those that bench/results/peers.json judges by, to tell luck from merit.

A tool's way at a setting is the one that is best in peers.json, beside its default: chosen by other images than it is judged by,
but for the tenth that both sets share. Writes bench/results/more_images.json, a setting of a model at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from peers.catalog import SETTINGS
from peers.environments import NotInstalledError
from peers.measure import outputs, worth
from peers.run import RESULTS as PEERS_RESULTS
from peers.run import Row, calibration, compile_row, plan
from peers.tables import OURS, TOOLS, best
from scipy.stats import binomtest
from tasks import Task

from onnxq.errors import ModelError

RESULTS = Path(__file__).parents[1] / "results" / "more_images.json"
MODELS = ("cifar10_resnet20", "cifar10_resnet56")
IMAGES = "cifar10_jpg"
SECONDS = 600


def rows(model: str, setting: str, known: dict[str, Any], seconds: int) -> Iterator[Row]:
    """The default and the best way of each tool, of those that took at most so many CPU seconds; that of onnxq first."""
    quick = {name: row for name, row in known.items() if row.get("cpu_seconds", 0) <= seconds}
    for tool in TOOLS:
        found = best(quick, tool)
        if found is not None:
            yield from plan([model], [tool], [setting], list(dict.fromkeys((found[0], "default"))))


def cell(rows: list[Row], shared: Path, seconds: int) -> dict[str, Any]:
    """Figures of all ways at a setting of a model by `tool: way`, with what each has right that the best of onnxq has not."""
    task = replace(rows[0].task, feeds=IMAGES)
    found, right = {}, {}
    for row in rows:
        name = row.key[2]
        found[name], images = judged(row, task, shared, seconds)
        if images is not None:
            right[name] = images
        print(*row.key[:2], name, found[name], flush=True)
    leader = best(found, OURS)
    if leader is None:
        return found
    ours = f"{OURS}: {leader[0]}"
    for name in right.keys() - {ours}:
        found[name] |= against(right[name], right[ours])
    return found


def judged(row: Row, task: Task, shared: Path, seconds: int) -> tuple[dict[str, Any], np.ndarray | None]:
    """Figures of a way, and which images it has right; or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "quantized.onnx")
        try:
            outcome = compile_row(row, calibration(row.task, shared), path, seconds)
            if outcome.failed:
                return {"failed": outcome.failed}, None
            values, labels = outputs(task, path)
        except (NotInstalledError, ModelError) as error:
            return {"failed": str(error)}, None
    return worth(task, values, labels), correct(values, labels)


def correct(values: dict[str, np.ndarray], labels: np.ndarray | None) -> np.ndarray:
    """Which samples have the highest logit at their label."""
    assert labels is not None
    return np.asarray(next(iter(values.values())).argmax(1) == labels)


def against(theirs: np.ndarray, ours: np.ndarray) -> dict[str, Any]:
    """Images that only one of two networks has right, and McNemar's exact two-sided p that they are as good."""
    only, lost = int((theirs & ~ours).sum()), int((ours & ~theirs).sum())
    p = float(binomtest(only, only + lost).pvalue) if only + lost else 1.0
    return {"right_alone": only, "wrong_alone": lost, "p": p}


def main(arguments: list[str] | None = None) -> None:
    """Measure the settings that are missing."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--model",
        nargs="+",
        choices=MODELS,
        default=MODELS,
        metavar="M",
        help="models, all of them unless named",
    )
    made.add_argument(
        "--setting",
        nargs="+",
        choices=tuple(SETTINGS),
        default=tuple(SETTINGS),
        metavar="S",
        help="settings, all unless named",
    )
    made.add_argument("--again", action="store_true", help="measure settings anew that stand already")
    made.add_argument(
        "--seconds",
        type=int,
        default=SECONDS,
        metavar="N",
        help=f"leave out ways that took more CPU seconds ({SECONDS})",
    )
    asked = made.parse_args(arguments)
    known = json.loads(PEERS_RESULTS.read_text("utf-8"))
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    results["seconds"] = asked.seconds
    with tempfile.TemporaryDirectory() as shared:
        for model in asked.model:
            found = results.setdefault(model, {})
            for setting in asked.setting:
                if setting in found and not asked.again:
                    continue
                ways = list(rows(model, setting, known[model][setting], asked.seconds))
                found[setting] = cell(ways, Path(shared), 2 * asked.seconds)
                task = replace(ways[0].task, feeds=IMAGES)
                right = correct(*outputs(task, task.path))
                found["float"] = {"metric": float(right.mean()), "images": len(right)}
                RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
