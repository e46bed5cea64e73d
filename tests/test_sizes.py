"""Sizes of files to come are close to what is written and never less."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxq.compiler import compile_model
from onnxq.data import input_specs, open_data
from onnxq.errors import UsageError
from onnxq.model.load import load_model
from onnxq.model.prepare import prepare
from onnxq.pipeline import Context, Pipeline
from onnxq.presets import preset_pipeline
from onnxq.program import Program
from onnxq.sizes import emitted_bytes, parse_bytes
from onnxq.target import find_target


@pytest.mark.parametrize(
    ("text", "size"),
    [("400KB", 400_000), ("1.5 MB", 1_500_000), ("7", 7), ("2g", 2_000_000_000), ("3 kb", 3_000)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "kB", "4xB", "-3", "1e3", "4 TB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="cannot read the size"):
        parse_bytes(text)


def test_an_estimate_before_emission(models_dir: Path) -> None:
    path, calib = models_dir / "digits_cnn.onnx", models_dir / "digits_calib.npz"
    model = prepare(load_model(path), 21)[0]
    program = Program.from_model(model)
    steps = Pipeline.parse(preset_pipeline("int8")).passes
    ctx = Context(open_data(calib, input_specs(model)), samples=32, threads=1)
    Pipeline(steps[: [p.name for p in steps].index("correct-bias")]).run(program, ctx)
    nodes = len(program.graph.nodes)
    estimate = emitted_bytes(program, find_target("ort-cpu"))
    assert len(program.graph.nodes) == nodes
    done = compile_model(path, calib, samples=32, threads=1, speed=False)
    assert done.report.quantized_bytes <= estimate <= done.report.quantized_bytes + 5000
