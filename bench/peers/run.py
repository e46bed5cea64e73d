"""Quantize models with onnxq and with other quantizers, and measure every output alike in plain onnxruntime.

Writes bench/results/peers.json, a row at a time. A row that stands is left as it is, so a run that was broken off goes on where
it stopped, and a new peer or model adds its rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnxruntime as ort
from peers.adapters.job import Job
from peers.catalog import PEERS, SETTINGS, Peer
from peers.environments import NotInstalledError, interpreter
from peers.jobs import Outcome, run_job
from peers.measure import judge, judge_float
from tasks import TASKS, Task

from onnxq.data import input_specs, open_data
from onnxq.model.load import load_model

RESULTS = Path(__file__).parents[1] / "results" / "peers.json"
SAMPLES = 512
SECONDS = 1800
QUALITY = ("metric", "sqnr_db", "agreement", "bytes")
KERNELS = ("loads", "integer_kernels", "float_kernels")
MODELS = (
    "cifar10_resnet20",
    "kws_dscnn",
    "imagenet_mobilenetv1_025",
    "imagenet_squeezenet1_1",
    "cifar10_resnet56",
    "ncf_ml1m_mlp",
    "ncf_ml1m_gmf",
    "minilm_l6_v2",
    "cifar10_resnet8_mlperftiny",
    "mnist_cntk",
)
TEACH = """examples:
  python bench/peers/run.py
      everything that is missing from bench/results/peers.json; the first time this makes an environment for each peer
  python bench/peers/run.py --model kws_dscnn --setting w4a8
      one model at one setting, by onnxq and all peers
  python bench/peers/run.py --peer nncf --again
      all rows of one peer anew
  python bench/peers/run.py --peer onnxq --again quality
      on another machine: the rows keep the times that were measured beside those of other peers

environment:
  ONNXQ_DATA    directory with the models and data
  ONNXQ_PEERS   where the peers' virtual environments are kept, a temporary folder unless set
"""


@dataclass(frozen=True)
class Row:
    """One compile to do: a peer goes a way at a setting on a model."""

    task: Task
    setting: str
    peer: Peer
    way: str
    options: dict[str, Any]

    @property
    def key(self) -> tuple[str, str, str]:
        """Place in the results."""
        return self.task.model, self.setting, f"{self.peer.name}: {self.way}"


def plan(
    models: list[str], peers: list[str], settings: list[str], ways: list[str] | None = None
) -> Iterator[Row]:
    """All rows of the named models, peers, settings and ways (all of them when None), peer by peer."""
    tasks = {task.model: task for task in TASKS}
    for model in models:
        for peer in (PEERS[name] for name in peers):
            for setting in settings:
                for way, options in peer.at(setting, model).items():
                    if ways is not None and way not in ways:
                        continue
                    yield Row(tasks[model], setting, peer, way, options)


def measure(row: Row, calib: Path, folder: Path, seconds: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The figures of a row, or why there are none, and the versions of the packages behind it."""
    output = folder / "quantized.onnx"
    try:
        outcome = compile_row(row, calib, output, seconds)
    except NotInstalledError as error:
        return {"failed": str(error)}, {}
    return figures(outcome, row.task, output), outcome.versions


def compile_row(row: Row, calib: Path, output: Path, seconds: int) -> Outcome:
    """What the compile of a row came to.

    Raises:
        NotInstalledError: the peer's environment cannot be made.
    """
    batch = 1 if row.task.batch == 1 else row.peer.batch
    job = Job(str(row.task.path), str(calib), str(output), row.setting, batch, row.options)
    return run_job(interpreter(row.peer.name), row.peer.script, job, seconds)


def figures(outcome: Outcome, task: Task, output: Path) -> dict[str, Any]:
    """What the compile took, and what its model is worth."""
    took = {"cpu_seconds": outcome.cpu_seconds, "peak_mb": outcome.peak_mb, "note": outcome.note}
    found = {name: value for name, value in took.items() if value is not None}
    return found | ({"failed": outcome.failed} if outcome.failed else judge(task, output))


def calibration(task: Task, folder: Path) -> Path:
    """The samples that every peer sees: an .npz of the inputs alone, evenly spaced over the calibration data."""
    path = folder / f"{task.feeds}.npz"
    if not path.exists():
        data = open_data(task.calib, input_specs(load_model(task.path)))
        batches = [batch.feeds for batch in data.batches(SAMPLES, SAMPLES)]
        np.savez(path, **{name: np.concatenate([feeds[name] for feeds in batches]) for name in batches[0]})
    return path


def main(arguments: list[str] | None = None) -> None:
    """Measure what is asked for and does not stand yet."""
    asked = parser().parse_args(arguments)
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    versions = results.setdefault("versions", {})
    versions.setdefault("measured in", {"onnxruntime": ort.__version__, "vnni": has_vnni()})
    models, peers = asked.model or list(MODELS), asked.peer or list(PEERS)
    rows = plan(models, peers, asked.setting or list(SETTINGS), asked.way)
    with tempfile.TemporaryDirectory() as shared:
        for row in rows:
            _add(results, row, Path(shared), asked)


def _add(results: dict[str, Any], row: Row, shared: Path, asked: argparse.Namespace) -> None:
    """Measure a row that is missing and write all results."""
    model, setting, name = row.key
    rows = results.setdefault(model, {}).setdefault(setting, {})
    if name in rows and asked.again is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        measured, found = measure(row, calibration(row.task, shared), Path(folder), asked.seconds)
    measured = remarked(measured, results["versions"]["measured in"]["vnni"], has_vnni())
    rows[name] = renewed(rows.get(name, {}), measured) if asked.again == "quality" else measured
    if found:
        results["versions"][row.peer.name] = found
    results[model].setdefault("float", judge_float(row.task))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in rows[name].items()}
    print(f"{model:26} {setting:12} {name:48} {shown}", flush=True)


def remarked(row: dict[str, Any], others: bool | None, here: bool | None) -> dict[str, Any]:
    """A row with a note where it ran on a CPU with, or without, VNNI and the others did not."""
    if others == here or not row.get("loads"):
        return row
    note = f"on a CPU {'with' if here else 'without'} VNNI"
    return row | {"note": f"{row['note']}; {note}" if "note" in row else note}


def renewed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A row with new quality and size; its times stay where the file runs in the same kernels as before."""
    if all(key in new and old.get(key) == new[key] for key in KERNELS):
        return old | {key: new[key] for key in QUALITY}
    return new  # a row that failed has no kernels


def has_vnni() -> bool | None:
    """Whether 8-bit kernels sum without saturation on this machine; None where that cannot be told."""
    described = Path("/proc/cpuinfo")
    return "_vnni" in described.read_text() if described.exists() else None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=__doc__, epilog=TEACH + _listing(), formatter_class=form)
    for name, choices in (("model", MODELS), ("peer", tuple(PEERS)), ("setting", tuple(SETTINGS))):
        text = f"{name}s to measure, all of them unless named"
        made.add_argument(f"--{name}", nargs="+", choices=choices, metavar=name[0].upper(), help=text)
    ways = sorted({way for peer in PEERS.values() for found in peer.ways.values() for way in found})
    text = "ways to go, as they are named in the tables, all of them unless named"
    made.add_argument("--way", nargs="+", choices=ways, metavar="W", help=text)
    made.add_argument(
        "--again",
        nargs="?",
        const="all",
        choices=("all", "quality"),
        help="measure rows anew that stand already; with quality, leave their times where the kernels are the same",
    )
    made.add_argument(
        "--seconds",
        type=int,
        default=SECONDS,
        metavar="N",
        help=f"end a compile after N CPU seconds ({SECONDS})",
    )
    return made


def _listing() -> str:
    width = max(map(len, SETTINGS))
    settings = "\n".join(f"  {name:{width}}  {text}" for name, text in SETTINGS.items())
    return f"\nmodels:\n  {', '.join(MODELS)}\n\npeers:\n  {', '.join(PEERS)}\n\nsettings:\n{settings}\n"


if __name__ == "__main__":
    main()
