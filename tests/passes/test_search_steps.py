"""The joint search: never worse than its start, deterministic, within its budget, resumable, and right about what is deployed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import onnxq
from onnxq.data import input_specs, open_data
from onnxq.errors import DataError, UsageError
from onnxq.model.load import load_model
from onnxq.model.prepare import prepare
from onnxq.passes.search_steps import SearchSteps
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program
from onnxq.saturation import excess
from onnxq.simulate import Evaluator, Matched, match_outputs, matched_model
from onnxq.simulate.variables import Weights

PLAN = "fold-constants flatten-matmul annotate:{} calibrate:ranges=mse choose-ranges quantize-weights"
LOW = "weights=int3:channel,activations=uint3"


@pytest.fixture
def planned(models_dir: Path) -> Callable[..., tuple[Program, Context]]:
    def plan(options: str = LOW) -> tuple[Program, Context]:
        model = prepare(load_model(models_dir / "digits_cnn.onnx"), 21)[0]
        program = Program.from_model(model)
        data = open_data(models_dir / "digits_calib.npz", input_specs(model))
        ctx = Context(data=data, samples=64, threads=1)
        Pipeline.parse(PLAN.format(options)).run(program, ctx)
        return program, ctx

    return plan


def scales(program: Program) -> dict[str, list[float]]:
    return {t: np.ravel(d.params.scale).tolist() for t, d in program.plan.items() if d.params is not None}


def test_the_loss_falls_and_the_plan_has_it(planned: Callable[..., tuple[Program, Context]]) -> None:
    program, ctx = planned()
    facts = (
        SearchSteps(correction="output", loss="kl", samples=64, budget="40").run(program, ctx).facts["lapq"]
    )
    evaluator = Evaluator(program, ctx, "kl", 64)
    start = np.zeros(len(evaluator.variables))
    assert facts["loss_end"] < facts["loss_start"]
    assert facts["held_end"] <= facts["held_start"]
    assert evaluator.evaluate(start) == pytest.approx(facts["loss_end"], rel=1e-9)
    assert evaluator.validate(start) == pytest.approx(facts["held_end"], rel=1e-9)
    again, other = planned()
    SearchSteps(correction="output", loss="kl", samples=64, budget="40").run(again, other)
    assert scales(again) == scales(program)


def test_only_narrow_tensors_are_searched(planned: Callable[..., tuple[Program, Context]]) -> None:
    program, ctx = planned()
    low = {d.group if not d.is_weight else t for t, d in program.plan.items() if d.scheme.bits < 8}
    facts = (
        SearchSteps(correction="output", loss="kl", samples=64, budget="3").run(program, ctx).facts["lapq"]
    )
    assert set(facts["factors"]) == low
    every = (
        SearchSteps(correction="output", loss="kl", samples=64, budget="3", variables="all")
        .run(program, ctx)
        .facts["lapq"]
    )
    assert set(every["factors"]) > low
    wide, ctx = planned("weights=int8:channel")
    facts = SearchSteps(correction="output", loss="kl", samples=64, budget="3").run(wide, ctx).facts["lapq"]
    assert facts["variables"] == len({d.group if not d.is_weight else t for t, d in wide.plan.items()})


def test_the_budget_is_kept(planned: Callable[..., tuple[Program, Context]]) -> None:
    program, ctx = planned()
    facts = (
        SearchSteps(correction="output", loss="kl", samples=64, budget="12").run(program, ctx).facts["lapq"]
    )
    assert facts["evaluations"] <= 12
    assert facts["stopped"] == "evaluations"
    with pytest.raises(UsageError, match="search budget 'soon' is not understood"):
        SearchSteps(correction="output", budget="soon").run(program, ctx)


def test_a_checkpoint_goes_on(planned: Callable[..., tuple[Program, Context]], tmp_path: Path) -> None:
    file = str(tmp_path / "search.json")
    whole, ctx = planned()
    SearchSteps(correction="output", loss="kl", samples=64, budget="40").run(whole, ctx)
    first, ctx = planned()
    SearchSteps(correction="output", loss="kl", samples=64, budget="15", checkpoint=file).run(first, ctx)
    second, ctx = planned()
    SearchSteps(correction="output", loss="kl", samples=64, budget="40", checkpoint=file).run(second, ctx)
    assert scales(second) == scales(whole)
    other, ctx = planned("weights=int4:channel,activations=uint4")
    with pytest.raises(DataError, match="checkpoint"):
        SearchSteps(correction="output", loss="kl", samples=64, checkpoint=file).run(other, ctx)


def test_the_search_starts_where_outputs_are_matched(planned: Callable[..., tuple[Program, Context]]) -> None:
    """Its first loss is that of the graph whose outputs are matched, and its plan has those scales where no step moved."""
    program, ctx = planned()
    evaluator, matched = Evaluator(program, ctx, "kl", 64), match_outputs(program, ctx)
    assert matched.plan
    wanted = evaluator.deployed_loss(matched_model(program, ctx, matched))
    facts = SearchSteps(loss="kl", samples=64, budget="3", variables="all").run(program, ctx).facts["lapq"]
    assert facts["loss_start"] == pytest.approx(wanted, rel=1e-6)  # float32 sums in the float tail
    assert facts["loss_start"] < 0.8 * evaluator.evaluate(np.zeros(len(evaluator.variables)))
    for name, decision in matched.plan.items():
        if facts["factors"].get(name, 1.0) == 1.0:
            found = program.params(name).scale
            np.testing.assert_array_equal(found, decision.params.scale if decision.params else None)


def test_biases_that_the_search_ended_with_are_kept(planned: Callable[..., tuple[Program, Context]]) -> None:
    """They have the loss that the search found, wherever its steps went."""
    program, ctx = planned()
    evaluator = Evaluator(program, ctx, "kl", 64)
    facts = SearchSteps(loss="kl", samples=64, budget="30", variables="all").run(program, ctx).facts["lapq"]
    assert any(facts["factors"].get(unit.weight, 1.0) != 1.0 for unit in program.units.values())
    assert facts["loss_end"] < 0.99 * facts["loss_start"]
    kept = matched_model(program, ctx, Matched({}, program.searched))
    assert evaluator.deployed_loss(kept) == pytest.approx(facts["loss_end"], rel=1e-6)
    program, ctx = planned()
    SearchSteps(loss="kl", samples=64, budget="3", correction="output").run(program, ctx)
    assert program.searched == {}


def test_the_deployed_loss_is_in_the_report(models_dir: Path) -> None:
    done = onnxq.compile_model(
        models_dir / "digits_cnn.onnx",
        models_dir / "digits_calib.npz",
        bits="w3a3",
        ranges="lapq",
        search_budget="30",
        bias_correction="output",  # as the search does it; matching outputs lowers the loss further
        samples=64,
        threads=1,
        speed=False,
    )
    found = done.report.as_json()["lapq"]
    assert found["loss_end"] <= found["loss_start"]
    assert found["loss_deployed"] == pytest.approx(
        found["loss_end"], rel=1e-6
    )  # the same kernels on the same codes
    assert found["p_values"]


def test_weights_of_several_points_are_searched_too(planned: Callable[..., tuple[Program, Context]]) -> None:
    """Their channels keep their points, whose sums are the codes, and the loss is that of what is emitted."""
    program, ctx = planned()
    Pipeline.parse("multipoint:share=0.3").run(program, ctx)
    before = {t: d for t, d in program.plan.items() if d.points is not None}
    facts = SearchSteps(correction="output", loss="kl", samples=64).run(program, ctx).facts["lapq"]
    assert set(before) <= set(facts["factors"])
    moved = [t for t in before if program.params(t).scale.max() != before[t].params.scale.max()]  # type: ignore[union-attr]
    assert moved
    for tensor, old in before.items():
        new = program.plan[tensor]
        assert new.points is not None
        assert old.points is not None
        assert new.codes is not None
        np.testing.assert_array_equal(new.points.codes(), new.codes)
        np.testing.assert_array_equal(new.points.factors, old.points.factors)
    deployed = program.deployed["search-steps"]
    Pipeline.parse("correct-bias:correction=output emit-qdq").run(program, ctx)
    assert deployed(program.to_model()) == pytest.approx(
        facts["loss_end"], rel=1e-6
    )  # float32 sums in the float tail


@pytest.mark.parametrize("factor", [0.7, 1.4])
def test_no_kernel_saturates_at_other_steps(
    planned: Callable[..., tuple[Program, Context]], factor: float
) -> None:
    """Sums of 4-bit points reach as far as 8 bits do, so their neighbours are kept within the pair limit anew."""
    program, ctx = planned("weights=int4:channel")
    Pipeline.parse("multipoint:share=1.0").run(program, ctx)
    weights = Weights.of(program, ctx.target)
    pointed = [t for t, d in program.plan.items() if d.points is not None]
    assert pointed
    for tensor in pointed:
        kind, axis, limit = weights.sites[tensor]
        made = weights.at(tensor, factor)
        assert made.codes is not None
        assert np.abs(made.codes).max() > 60
        assert not excess(made.codes, kind, axis, limit).any()
