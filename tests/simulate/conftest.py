"""Programs whose plans are complete and whose graphs are still float."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from onnxq.data import input_specs, open_data
from onnxq.model.load import load_model
from onnxq.model.prepare import prepare
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program

Planned = Callable[..., tuple[Program, Context]]
GRAPH = "fold-constants fold-batchnorm fold-pad flatten-matmul"
RANGES = "calibrate:ranges=mse choose-ranges quantize-weights"


@pytest.fixture(scope="session")
def planned(models_dir: Path) -> Planned:
    """A model that ships, as the passes before emission leave it."""

    def plan(name: str, options: str = "weights=int4:channel,activations=uint4") -> tuple[Program, Context]:
        model = prepare(load_model(models_dir / f"{name}.onnx"), 21)[0]
        program = Program.from_model(model)
        data = open_data(models_dir / "digits_calib.npz", input_specs(model))
        ctx = Context(data=data, samples=64, threads=1)
        Pipeline.parse(f"{GRAPH} annotate:{options} {RANGES}").run(program, ctx)
        return program, ctx

    return plan
