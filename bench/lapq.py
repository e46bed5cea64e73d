"""LAPQ against the range methods that look at one tensor at a time: the table of the LAPQ paper on our models, deployed.

    python bench/lapq.py [--missing] [MODEL ...]        writes bench/results/lapq.json

W/A are the widths of weights and activations; 32 is float. Weights have one scale a tensor, the first and last layers 8 bits.
The methods choose the ranges of weights and activations alike. `lapq nearest` is the paper's method; `lapq` also rounds weights
with error feedback wherever the search evaluates them, and `mmse rounded` does that without a search; `shaped` scales follow the
normalizations that were folded, where a model has some that one scale a tensor ruins. Each method runs with and
without bias correction on ResNet-20, with it elsewhere, and the searches always with it. Metrics are of the test set; `jpeg` is
the top-1 agreement with the float model on images that nobody searched on, of which there are 10,000 for CIFAR-10.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort
from int8 import quality
from tasks import TASKS, Task, feeds

import onnxq

RESULTS = Path(__file__).parent / "results" / "lapq.json"
CORRECTION = "correction=output"  # alike for all methods, as in the paper
NCF_WIDTHS = ("32/8", "8/32", "8/8", "4/8")
WIDTHS = ("8/4", "8/3", "8/2", "4/4", "4/32", "32/4")
GRAPH = "fold-constants fold-batchnorm fold-pad flatten-matmul keep-stem equalize:weights={}"


@dataclass(frozen=True)
class Method:
    """Range method of weights and activations, and what runs behind it."""

    ranges: str
    behind: str = ""
    weights: str = ""


METHODS = {
    "minmax": Method("minmax"),
    "aciq": Method("aciq"),
    "kld": Method("entropy"),
    "mmse": Method("mse"),
    "mmse rounded": Method("mse", "round-weights"),
    "lapq nearest": Method("mse", "search-norm:{0},rounding=nearest search-steps:{0},rounding=nearest"),
    "lapq": Method("mse", "round-weights search-norm:{0} search-steps:{0}"),
    "mmse shaped": Method("mse", "", ",pattern=batchnorm"),
    "lapq shaped": Method("mse", "round-weights search-norm:{0} search-steps:{0}", ",pattern=batchnorm"),
}
SHAPED = ("imagenet_mobilenetv1_025", ("8/4", "4/4", "4/32"))
SEARCHES = ("lapq nearest", "lapq")


@dataclass(frozen=True)
class Effort:
    """Samples to search on, as many as take a minute or two; whether every method runs in every way, and `small` layers too."""

    samples: int
    everything: bool = False
    widths: tuple[str, ...] = WIDTHS
    small: bool = False


MODELS = {
    "cifar10_resnet20": Effort(512, everything=True),
    "cifar10_resnet56": Effort(256),
    "imagenet_mobilenetv1_025": Effort(256),
    "imagenet_squeezenet1_1": Effort(96),
    "ncf_ml1m_mlp": Effort(2000, widths=NCF_WIDTHS, small=True),
    "ncf_ml1m_gmf": Effort(2000, widths=NCF_WIDTHS, small=True),
}


def pipeline(widths: str, method: Method, correct: bool, small: bool = False) -> str:
    """Pipeline text."""
    weights, activations = widths.split("/")
    sides = "activations" if weights == "32" else "weights" if activations == "32" else "both"
    extra = ",small=0,first_last=same" if small else ""
    scheme = f"int{min(int(weights), 8)}:tensor"
    schemes = f"weights={scheme},activations=uint{min(int(activations), 8)},sides={sides}{extra}"
    ranges = f"ranges={method.ranges}"
    codes = f"quantize-weights:method={method.ranges}{method.weights}"
    steps = f"{GRAPH.format(scheme)} annotate:{schemes} calibrate:{ranges} choose-ranges:{ranges} {codes}"
    behind = method.behind.format(CORRECTION)
    return " ".join((steps, behind, f"correct-bias:{CORRECTION}" if correct else "", "emit-qdq"))


@cache
def classes(path: Path, images: Path) -> np.ndarray:
    """Top-1 classes of the images, (N,)."""
    with np.load(images) as arrays:
        name = next(n for n in arrays.files if n != "label")
        x = arrays[name]
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    parts = [session.run(None, {name: x[i : i + 250]})[0].argmax(axis=1) for i in range(0, len(x), 250)]
    return np.concatenate(parts)


def agreement(task: Task, path: Path) -> float | None:
    """Top-1 agreement with the float model on other images, None where there are none."""
    images = feeds() / f"{task.feeds}_jpg.test.npz"
    if not images.exists():
        return None
    return float((classes(task.path, images) == classes.__wrapped__(path, images)).mean())


def row(task: Task, text: str, samples: int, out: Path) -> dict[str, object]:
    """Figures of one pipeline."""
    start = time.perf_counter()
    done = onnxq.compile_model(task.path, task.calib, output=out, pipeline=text, samples=samples, speed=False)
    seconds = time.perf_counter() - start
    found = {**quality(task, out), "jpeg": agreement(task, out), "seconds": seconds}
    lapq = done.report.lapq or {}
    names = ("loss", "p_star", "variables", "evaluations", "loss_start", "loss_end", "loss_deployed")
    return found | {name: lapq[name] for name in (*names, "held_start", "held_end") if name in lapq}


def settings(model: str, effort: Effort) -> Iterator[tuple[str, str, bool]]:
    """Widths, method, and whether biases are corrected."""
    for widths in effort.widths:
        for name, method in METHODS.items():
            if method.weights and (model != SHAPED[0] or widths not in SHAPED[1]):
                continue
            if not effort.everything and name == "lapq nearest" and widths != "4/4":
                continue
            yield widths, name, True
            if effort.everything and name not in SEARCHES:
                yield widths, name, False


def main(names: list[str]) -> None:
    """Measure the named models, all without names; other models keep their rows, and with --missing all rows that stand."""
    is_kept, names = "--missing" in names, [name for name in names if name != "--missing"]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["versions"] = {"onnxruntime": ort.__version__, "numpy": np.__version__}
    tasks = {task.model: task for task in TASKS}
    with tempfile.TemporaryDirectory() as directory:
        for model in names or MODELS:
            task, out = tasks[model], Path(directory, "model.onnx")
            rows = results.setdefault(model, {})
            rows["float"] = quality(task, task.path)
            for widths, name, correct in settings(model, MODELS[model]):
                key = f"{widths} {name}" + ("" if correct else ", biases as they are")
                if is_kept and key in rows:
                    continue
                text = pipeline(widths, METHODS[name], correct, MODELS[model].small)
                rows[key] = row(task, text, MODELS[model].samples, out)
                shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in rows[key].items()}
                print(f"{model:26} {key:40} {shown}", flush=True)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
