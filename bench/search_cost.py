"""What the joint search costs: against scipy's Powell on the same losses, and one evaluation against a float forward pass.

    python bench/search_cost.py [evaluation] [search]        writes bench/results/search_cost.json

CIFAR-10 ResNet-20, W4A4 with one scale a tensor, 512 calibration samples, one thread, weights rounded to nearest. Both searches
start at the best p-norm; scipy's does one iteration with its default line search and evaluates the whole graph each time. Times
are CPU seconds of the process.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
from int8 import quality
from tasks import TASKS, Task

from onnxq.data import input_specs, open_data
from onnxq.model.load import load_model
from onnxq.model.prepare import prepare
from onnxq.model.session import make_session
from onnxq.model.write import write_model
from onnxq.passes.search_norm import SearchNorm
from onnxq.passes.search_steps import _Chosen
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program
from onnxq.search import Rules, minimize
from onnxq.search.line import LineRules
from onnxq.search.reference import scipy_powell
from onnxq.simulate import Evaluator

RESULTS = Path(__file__).parent / "results" / "search_cost.json"
GRAPH = "fold-constants fold-batchnorm fold-pad flatten-matmul keep-stem equalize:weights={}"
SCHEME = "int4:tensor"
PLAN = "annotate:weights=int4:tensor,activations=uint4 calibrate:ranges=mse choose-ranges quantize-weights"
MODELS = {
    "cifar10_resnet20": 512,
    "cifar10_resnet56": 128,
    "imagenet_mobilenetv1_025": 256,
    "imagenet_squeezenet1_1": 96,
    "kws_dscnn": 512,
}
ROUNDS = 3
BASE = Rules(sweeps=2, hold="step")
TRICKS = {  # what is taken away, and what is added
    "as it is": (8, BASE),
    "no segments": (1, BASE),
    "backward order": (8, replace(BASE, order="backward")),
    "no held-back samples": (8, replace(BASE, hold="none")),
    "coarse brackets": (8, replace(BASE, coarse_sweeps=2)),
    "fixed widths": (8, replace(BASE, line=LineRules(narrowest=0.2, widest=0.2))),
    "one sweep": (8, replace(BASE, sweeps=1)),
}


def planned(task: Task, samples: int, plan: str = PLAN, scheme: str = SCHEME) -> tuple[Program, Context]:
    """A program with a complete plan."""
    model = prepare(load_model(task.path), 21)[0]
    program = Program.from_model(model)
    ctx = Context(data=open_data(task.calib, input_specs(model)), samples=samples, threads=1)
    Pipeline.parse(f"{GRAPH.format(scheme)} {plan}").run(program, ctx)
    return program, ctx


def timed(work: Callable[[], object]) -> float:
    """CPU seconds."""
    start = time.process_time()
    work()
    return time.process_time() - start


def evaluation(task: Task, samples: int) -> dict[str, float]:
    """One evaluation with all steps changed, and a coordinate sweep, against a float pass of the same samples."""
    program, ctx = planned(task, samples)
    evaluator = Evaluator(program, ctx, "kl", samples, rounding="nearest")
    float_model = make_session(program.to_model(), threads=1)
    feeds = [evaluator._samples[i].batch.feeds for i in evaluator._members("search")]
    zeros = np.zeros(len(evaluator.variables))
    evaluator.evaluate(zeros)
    passes, whole = [], []
    for i in range(ROUNDS):
        passes.append(timed(lambda: [float_model.run(None, f) for f in feeds]))
        whole.append(timed(lambda i=i: evaluator.evaluate(zeros + 1e-3 * (i + 1))))
    evaluator.evaluate(zeros)
    chosen = evaluator.coarse()
    sweep = timed(
        lambda: [evaluator.evaluate(zeros + 0.05 * (np.arange(len(zeros)) == i)) for i in chosen[::-1]]
    )
    base = float(np.median(passes))
    return {
        "samples": samples,
        "variables": len(chosen),
        "segments": evaluator._engine.segments,
        "float_ms": base * 1e3,
        "evaluation_over_float": float(np.median(whole)) / base,
        "sweep_evaluation_over_float": sweep / len(chosen) / base,
        "kept_mb": evaluator.kept_bytes / 1e6,
    }


def deployed(program: Program, ctx: Context, task: Task) -> dict[str, float | None]:
    """Quality of a program's plan."""
    Pipeline.parse("correct-bias:correction=output emit-qdq").run(program, ctx)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "model.onnx")
        write_model(program.to_model(), path)
        return quality(task, path)


def search(task: Task, samples: int) -> dict[str, dict[str, object]]:
    """Our search with and without its tricks, and scipy's."""
    rows: dict[str, dict[str, object]] = {}

    def started(segments: int) -> tuple[Program, Context, Evaluator, float]:
        program, ctx = planned(task, samples)
        seconds = timed(
            lambda: SearchNorm(loss="kl", samples=samples, rounding="nearest", correction="output").run(
                program, ctx
            )
        )
        begin = time.process_time()
        evaluator = Evaluator(program, ctx, "kl", samples, rounding="nearest", segments=segments)
        return program, ctx, evaluator, seconds + time.process_time() - begin

    for name, (segments, rules) in {**TRICKS, "scipy": (1, None)}.items():
        program, ctx, evaluator, before = started(segments)
        chosen = evaluator.coarse()
        objective = _Chosen(evaluator, len(evaluator.variables), chosen)
        begin = time.process_time()
        if rules is None:
            point, _, evaluations = scipy_powell(objective, len(chosen))
        else:
            result = minimize(objective, len(chosen), rules)
            point, evaluations = result.point, result.evaluations
        seconds = time.process_time() - begin
        full = np.zeros(len(evaluator.variables))
        start = evaluator.evaluate(full)
        full[chosen] = point
        row: dict[str, object] = {
            "variables": len(chosen),
            "evaluations": float(evaluations),
            "seconds": seconds,
            "seconds_with_norm": seconds + before,
            "ms_per_evaluation": 1e3 * seconds / float(evaluations),
            "loss_start": start,
            "loss_end": evaluator.evaluate(full),
            "held_end": evaluator.validate(full),
        }
        evaluator.apply(full)
        rows[name] = row | deployed(program, ctx, task)
        print(f"{name:24} {rows[name]}", flush=True)
    whole = float(rows["scipy"]["seconds"])  # type: ignore[arg-type]
    rows["scipy over ours"] = {
        "search": whole / float(rows["as it is"]["seconds"]),  # type: ignore[arg-type]
        "search and norm": whole / float(rows["as it is"]["seconds_with_norm"]),  # type: ignore[arg-type]
    }
    return rows


def main(parts: list[str]) -> None:
    """Measure the named parts, both without names."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["versions"] = {"onnxruntime": ort.__version__, "numpy": np.__version__}
    tasks = {task.model: task for task in TASKS}
    if not parts or "evaluation" in parts:
        results["evaluation"] = {m: evaluation(tasks[m], samples) for m, samples in MODELS.items()}
        print(json.dumps(results["evaluation"], indent=1), flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if not parts or "search" in parts:
        results["search"] = search(tasks["cifar10_resnet20"], 512)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
