"""Channels of several points: accuracy, agreement with float, SQNR, file size and run time by width, budget and choice.

    python bench/multipoint.py [MODEL ...]        writes bench/results/multipoint.json

A row is named after its width, granularity, budget in percent and choice; budget 0 is the plain width. Rows with `a8` are
deployed in onnxruntime; those without have activations in float and the same weights. Biases make up for what weights do to
means; outputs are not matched further, which would hide what points do. `nearest` rows leave out the error-feedback rounding that
the preset has; ResNet-20 has them, and every choice of channels at more budgets. Run time is CPU time on one thread over that of
the plain width, all files in turn.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import onnxruntime as ort
from int8 import SAMPLES, quality, speeds
from tasks import TASKS, Task

from onnxq.affine import dequantize
from onnxq.choices import Choices
from onnxq.compiler import slim
from onnxq.data import input_specs, open_data
from onnxq.model.load import load_model
from onnxq.model.prepare import prepare
from onnxq.model.surgeon import to_graph
from onnxq.passes.multipoint import Multipoint
from onnxq.pipeline import Context, Pass, Pipeline
from onnxq.point_rows import Form
from onnxq.program import Program
from onnxq.target import ORT_CPU

RESULTS = Path(__file__).parent / "results" / "multipoint.json"
MODELS = (
    "cifar10_resnet20",
    "cifar10_resnet56",
    "imagenet_squeezenet1_1",
    "imagenet_mobilenetv1_025",
    "ncf_ml1m_mlp",
)
TABLES = ("ncf_ml1m_mlp",)  # are its first layers, which get points too
WIDTHS = (3, 4, 2)
SCHEMES = ("tensor", "channel")
BUDGETS = (0, 2, 5, 10, 20, 40)
COMPARED = ("threshold", "random")
EVERY = "cifar10_resnet20"


def variants(model: str) -> list[tuple[int, str]]:
    """Budgets in percent with the choice of channels."""
    chosen = [(budget, "chosen") for budget in BUDGETS]
    compared = (5, 10, 20) if model == EVERY else (10,)
    return [*chosen, *((budget, choose) for choose in COMPARED for budget in compared)]


@dataclass(frozen=True, eq=False)
class Start:
    """A model as the preset leaves it in front of the choice of channels."""

    task: Task
    program: Program
    ctx: Context
    behind: tuple[Pass, ...]

    @classmethod
    def of(cls, task: Task, scheme: str, rounding: bool) -> Start:
        """Calibrated and quantized, with error-feedback rounding or without."""
        ends = "same" if task.model in TABLES else "8"
        steps = (
            Choices(bits="w4a8", multipoint=0.1, first_last=ends)
            .resolve(True)
            .with_option("weights", scheme)
            .with_option("correction", "output")
            .passes
        )
        place = [p.name for p in steps].index("multipoint")
        source = prepare(load_model(task.path), Pipeline(steps).opset(ORT_CPU))[0]
        data = open_data(task.calib, input_specs(source))
        program, ctx = Program.from_model(source), Context(data, SAMPLES, threads=1)
        Pipeline(tuple(p for p in steps[:place] if rounding or p.name != "round-weights")).run(program, ctx)
        return cls(task, program, ctx, steps[place + 1 :])

    def chosen(self, budget: int, choose: str, form: Form | None = None) -> tuple[Program, dict]:
        """A copy with further points and corrected biases, and the figures of the pass."""
        old = self.program
        graph = to_graph(old.to_model())
        program = Program(graph, old.source, dict(old.plan), dict(old.units), dict(old.floats))
        program.statistics.update(old.statistics)
        choice = "error" if choose == "chosen" else choose
        points = Multipoint(share=budget / 100, choose=choice, form=form or "auto")
        first, *_ = Pipeline((points, *self.behind[:1])).run(program, self.ctx)
        return program, dict(first.result.facts["multipoint"])

    def figures(
        self, budget: int, choose: str, out: Path, alone: bool = False, form: Form | None = None
    ) -> tuple[dict, dict | None]:
        """Figures of the emitted model, and of the float model with the same weights and biases if asked for."""
        program, found = self.chosen(budget, choose, form)
        floats = self._weights_alone(program, out) if alone else None
        Pipeline(self.behind[1:]).run(program, self.ctx)
        model = program.to_model()
        slim(model, {i.name for i in program.source.graph.value_info}, program.source)
        out.write_bytes(model.SerializeToString())
        facts = {key: found[key] for key in ("extra_weights", "bits_mean")}
        return {"bytes": out.stat().st_size, **quality(self.task, out), **facts}, floats

    def _weights_alone(self, program: Program, out: Path) -> dict[str, float]:
        kept = {}
        for name, tensor in program.graph.tensors().items():
            decision = program.plan.get(name)
            if decision is not None and decision.codes is not None and decision.params is not None:
                kept[name], tensor.values = tensor.values, dequantize(decision.codes, decision.params)
        out.write_bytes(program.to_model().SerializeToString())
        for name, values in kept.items():
            program.graph.tensors()[name].values = values
        return quality(self.task, out)


def measure(task: Task, directory: Path, results: dict) -> None:
    """All rows of one model, written as they come."""
    rows = results.setdefault(task.model, {})
    rows["float"] = {"bytes": task.path.stat().st_size, **quality(task, task.path)}
    paths: dict[str, Path] = {}
    roundings = (True, False) if task.model == EVERY else (True,)
    for rounding, scheme, bits in product(roundings, SCHEMES, WIDTHS):
        if not rounding and scheme == "channel":
            continue
        start = Start.of(task, f"int{bits}:{scheme}", rounding)
        for budget, choose in variants(task.model):
            row = f"w{bits}a8{'' if rounding else ' nearest'} {scheme} {budget}% {choose}"
            out = directory / f"{task.model}.{row}.onnx"
            rows[row], floats = start.figures(budget, choose, out, rounding and choose == "chosen")
            show(task, row, rows[row])
            if rounding and scheme == "channel" and choose == "chosen":
                paths[row] = out
            if floats is not None:
                rows[row.replace("a8", "")] = floats
            save(results)
    for bits in (5, 6, 7, 8):
        start, row = Start.of(task, f"int{bits}:channel", True), f"w{bits}a8 channel 0% chosen"
        rows[row], _ = start.figures(0, "chosen", directory / f"{task.model}.{row}.onnx", False)
        show(task, row, rows[row])
    save(results)
    for bits in WIDTHS:
        plain = f"w{bits}a8 channel 0% chosen"
        times = speeds(task, {row: path for row, path in paths.items() if row.startswith(f"w{bits}a8")}, 1)
        for row, ms in times.items():
            rows[row] |= {"ms_batch1": ms, "time_over_plain": ms / times[plain]}
    save(results)


def show(task: Task, row: str, figures: dict[str, float]) -> None:
    """One line."""
    shown = {k: round(v, 4) for k, v in figures.items() if v is not None}
    print(f"{task.model:26} {row:36} {shown}", flush=True)


def save(results: dict) -> None:
    """Write the file anew."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def main(names: list[str]) -> None:
    """Measure the named models, all without names; other models keep their rows."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["versions"] = {"onnxruntime": ort.__version__, "numpy": np.__version__}
    tasks = {task.model: task for task in TASKS}
    for model in names or MODELS:
        with tempfile.TemporaryDirectory() as directory:
            measure(tasks[model], Path(directory), results)


if __name__ == "__main__":
    main(sys.argv[1:])
