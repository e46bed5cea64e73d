"""The norm of least loss: never worse than before, and the figures of the report are those of the plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxq.bias import BiasCorrection
from onnxq.data import input_specs, open_data
from onnxq.errors import OnnxqError
from onnxq.model.load import load_model
from onnxq.model.prepare import prepare
from onnxq.passes.search_norm import SearchNorm
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program
from onnxq.simulate import Evaluator, Matched, match_outputs, matched_model, outputs
from onnxq.simulate.norms import choose_layerwise

PLAN = (
    "fold-constants flatten-matmul annotate:{} calibrate:ranges={} choose-ranges:ranges={} quantize-weights"
)


def planned(models_dir: Path, options: str, ranges: str = "mse") -> tuple[Program, Context]:
    model = prepare(load_model(models_dir / "digits_cnn.onnx"), 21)[0]
    program = Program.from_model(model)
    data = open_data(models_dir / "digits_calib.npz", input_specs(model))
    ctx = Context(data=data, samples=64, threads=1)
    Pipeline.parse(PLAN.format(options, ranges, ranges)).run(program, ctx)
    return program, ctx


def loss(program: Program, ctx: Context) -> float:
    evaluator = Evaluator(program, ctx, "kl", 64)
    return evaluator.evaluate(np.zeros(len(evaluator.variables)))


@pytest.mark.parametrize(
    "options", ["weights=int3:tensor,activations=uint3", "weights=int4:channel,activations=uint2"]
)
def test_the_loss_falls_to_what_the_report_says(models_dir: Path, options: str) -> None:
    program, ctx = planned(models_dir, options)
    before = loss(program, ctx)
    facts = SearchNorm(loss="kl", samples=64, points=5, correction="output").run(program, ctx).facts["lapq"]
    assert facts["loss_before"] == before
    assert loss(program, ctx) == facts["loss_after"] <= before
    assert facts["loss_after"] == min(before, *facts["p_losses"], *facts["range_losses"].values())
    assert len(facts["p_values"]) >= 5
    norms = {f"lp={p:.6g}": loss for p, loss in zip(facts["p_values"], facts["p_losses"], strict=True)}
    assert (norms | facts["range_losses"])[facts["ranges"]] == facts["loss_after"]


@pytest.mark.parametrize("correction", ["auto", "deployed"])
def test_outputs_are_matched_where_correct_bias_will(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch, correction: BiasCorrection
) -> None:
    """Biases that spoil the output count with `deployed`; `auto` does not take them, so that they cost no method its place."""
    program, ctx = planned(models_dir, "weights=int4:channel,activations=uint4")
    spoiled = Matched({}, {name: bias + 100.0 for name, bias in match_outputs(program, ctx).biases.items()})
    monkeypatch.setattr(outputs, "match_outputs", lambda *_: spoiled)
    taken = {"auto": Matched({}, {}), "deployed": spoiled}[correction]
    wanted = Evaluator(program, ctx, "kl", 64).deployed_loss(matched_model(program, ctx, taken))
    search = SearchNorm(loss="kl", samples=64, points=3, correction=correction)
    assert search.run(program, ctx).facts["lapq"]["loss_before"] == pytest.approx(wanted, rel=1e-6)


def test_activations_may_take_a_method_alone(models_dir: Path) -> None:
    program, ctx = planned(models_dir, "weights=int4:channel,activations=uint4")
    start, weights = dict(program.plan), Evaluator(program, ctx, "kl", 64).weights
    choose_layerwise(program, weights, "lp=1.5", weights=False)
    changed = {t for t, d in program.plan.items() if d is not start[t]}
    assert changed
    assert not any(start[t].is_weight for t in changed)
    choose_layerwise(program, weights, "lp=1.5")
    assert any(d is not start[t] for t, d in program.plan.items() if d.is_weight)


def test_eight_bits_are_left(models_dir: Path) -> None:
    program, ctx = planned(models_dir, "weights=int8:channel")
    plan = dict(program.plan)
    result = SearchNorm(samples=64).run(program, ctx)
    assert result.changed == 0
    assert result.skipped == {"all tensors": "8 bits leave the norm little to choose"}
    assert all(program.plan[t] is d for t, d in plan.items())


def test_it_needs_histograms(models_dir: Path) -> None:
    program, ctx = planned(models_dir, "weights=int4:channel,activations=uint4", "minmax")
    with pytest.raises(OnnxqError, match="has no histogram; write calibrate:ranges=mse"):
        SearchNorm(samples=64).run(program, ctx)
