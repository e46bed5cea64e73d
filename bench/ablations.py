"""What each part of LAPQ contributes, on CIFAR-10 ResNet-20, deployed: the ablations of the paper.

    python bench/ablations.py [start] [samples] [bias]        writes bench/results/ablations.json

Weights have one scale a tensor, the first and last layers 8 bits. `start`: steps as the joint search finds them and leaves them,
by where it starts: steps times random factors between 1/2 and 2 (three seeds), least squared error layer by layer, or the p-norm
of least loss. `samples`: how many it searches on. `bias`: what correcting biases brings without a search and with it. The paper's
searches round weights to nearest; rows with `feedback` round them as the preset does.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
from int8 import quality
from lapq import GRAPH, agreement, row
from search_cost import planned
from tasks import TASKS, Task

from onnxq.model.write import write_model
from onnxq.passes.search_norm import SearchNorm
from onnxq.passes.search_steps import SearchSteps
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program
from onnxq.simulate import Evaluator

RESULTS = Path(__file__).parent / "results" / "ablations.json"
MODEL, SAMPLES = "cifar10_resnet20", 512
SEEDS = (0, 1, 2)
WIDTHS = ("4/4", "8/3")
SIZES = (32, 64, 128, 256, 512, 1024)
PLAN = "annotate:weights=int{}:tensor,activations=uint{} calibrate:ranges=mse choose-ranges quantize-weights"
SEARCH = "search-norm:{0} search-steps:{0}"
BIASES = {
    "none": "",
    "output": "correct-bias:correction=output",
    "exact": "correct-bias:correction=exact",
    "spread": "correct-bias:correction=output,spread=true",
}


def starts() -> Iterator[tuple[str, int]]:
    """Names of starts, with a seed."""
    yield from (("random", seed) for seed in SEEDS)
    yield from (("layer-wise", 0), ("layer-wise, quadratic", 0))


def begin(program: Program, ctx: Context, start: str, seed: int) -> None:
    """Put the steps where a search is to start."""
    if start == "layer-wise, quadratic":
        SearchNorm(loss="kl", samples=SAMPLES, rounding="nearest", correction="output").run(program, ctx)
    if start == "random":
        evaluator = Evaluator(program, ctx, "kl", SAMPLES, rounding="nearest")
        point, chosen = np.zeros(len(evaluator.variables)), evaluator.coarse()
        point[chosen] = np.random.default_rng(seed).uniform(-np.log(2), np.log(2), len(chosen))
        evaluator.apply(point)


def deployed(program: Program, ctx: Context, task: Task, out: Path) -> dict[str, float | None]:
    """Figures of a program's plan."""
    Pipeline.parse("correct-bias:correction=output emit-qdq").run(program, ctx)
    write_model(program.to_model(), out)
    return {**quality(task, out), "jpeg": agreement(task, out)}


def by_start(task: Task, out: Path) -> Iterator[tuple[str, dict]]:
    """Rows before and after the joint search."""
    for widths in WIDTHS:
        plan, scheme = PLAN.format(*widths.split("/")), f"int{widths[0]}:tensor"
        for start, seed in starts():
            name = f"{widths} {start}" + (f" {seed}" if start == "random" else "")
            program, ctx = planned(task, SAMPLES, plan, scheme)
            begin(program, ctx, start, seed)
            yield f"{name}, before", deployed(program, ctx, task, out)
            program, ctx = planned(task, SAMPLES, plan, scheme)
            begin(program, ctx, start, seed)
            found = (
                SearchSteps(loss="kl", samples=SAMPLES, rounding="nearest", correction="output")
                .run(program, ctx)
                .facts["lapq"]
            )
            losses = {k: found[k] for k in ("loss_start", "loss_end", "held_end", "evaluations")}
            yield f"{name}, after", losses | deployed(program, ctx, task, out)


def by_samples(task: Task, out: Path) -> Iterator[tuple[str, dict]]:
    """Rows by the number of samples searched on, those held back included."""
    plan, graph = PLAN.format(4, 4), GRAPH.format("int4:tensor")
    for size in SIZES:
        for rounding, behind in (("nearest", ""), ("feedback", "round-weights ")):
            search = behind + SEARCH.format(f"samples={size},rounding={rounding},correction=output")
            yield (
                f"4/4 {size} {rounding}",
                row(task, f"{graph} {plan} {search} correct-bias:correction=output emit-qdq", size, out),
            )


def by_bias(task: Task, out: Path) -> Iterator[tuple[str, dict]]:
    """Rows by correction of biases."""
    plan, graph = PLAN.format(4, 4), GRAPH.format("int4:tensor")
    for name, words in BIASES.items():
        option = "rounding=nearest,correction=" + ("output" if name == "spread" else name)
        for method, search in (("mmse", ""), ("lapq", SEARCH.format(option))):
            yield (
                f"4/4 {method} {name}",
                row(task, " ".join((graph, plan, search, words, "emit-qdq")), SAMPLES, out),
            )


PARTS = {"start": by_start, "samples": by_samples, "bias": by_bias}


def main(names: list[str]) -> None:
    """Measure the named parts, all without names; other parts keep their rows."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["versions"] = {"onnxruntime": ort.__version__, "numpy": np.__version__}
    task = next(task for task in TASKS if task.model == MODEL)
    with tempfile.TemporaryDirectory() as directory:
        for part in names or PARTS:
            rows = results.setdefault(part, {})
            for name, figures in PARTS[part](task, Path(directory, "model.onnx")):
                rows[name] = figures
                shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
                print(f"{name:40} {shown}", flush=True)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
