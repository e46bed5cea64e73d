"""The evaluator: what it keeps changes nothing, a point becomes the plan, and its losses are near those of what is deployed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq.errors import DataError
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program
from onnxq.simulate import Evaluator

Planned = Callable[..., tuple[Program, Context]]
MODELS = ("digits_cnn", "digits_transformer")
LOW = "weights=int4:channel,activations=uint4"


def points(count: int, variables: int) -> list[NDArray[Any]]:
    """The start, steps of single variables, and of all."""
    rng = np.random.default_rng(2)
    found = [np.zeros(variables)]
    for _ in range(count):
        point = found[-1].copy()
        point[rng.integers(variables)] += rng.normal() * 0.2
        found.append(point)
    return [*found, rng.normal(size=variables) * 0.1, np.zeros(variables)]


@pytest.mark.parametrize("model", MODELS)
def test_keeping_what_did_not_change_changes_nothing(model: str, planned: Planned) -> None:
    program, ctx = planned(model)
    kept = Evaluator(program, ctx, "kl", 64)
    bare = Evaluator(program, ctx, "kl", 64, memory=0)
    for point in points(6, len(kept.variables)):
        for part in ("search", "held", "coarse"):
            assert kept.evaluate(point, part) == bare.evaluate(point, part)
    assert bare.kept_bytes == 0
    assert kept.kept_bytes > 0
    assert kept.runs < 0.8 * bare.runs


def test_memory_is_bounded(planned: Planned) -> None:
    program, ctx = planned("digits_cnn")
    full = Evaluator(program, ctx, "kl", 64, segments=99)
    start = np.zeros(len(full.variables))
    full.evaluate(start)
    full.validate(start)
    limit = full.kept_bytes // 2
    small = Evaluator(program, ctx, "kl", 64, segments=99, memory=limit)
    assert small.evaluate(start) == full.evaluate(start)
    small.validate(start)
    assert 0 < small.kept_bytes <= limit


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("widths", [LOW, "weights=int8:tensor", "weights=int3:channel,activations=uint2"])
def test_the_loss_is_that_of_the_emitted_model(model: str, widths: str, planned: Planned) -> None:
    """The same kernels run on the same codes, whatever else is cut: equal up to the order in which float layers add."""
    program, ctx = planned(model, widths)
    evaluator = Evaluator(program, ctx, "mse", 64)
    point = np.random.default_rng(5).normal(size=len(evaluator.variables)) * 0.2
    losses = [evaluator.evaluate(np.zeros_like(point)), evaluator.evaluate(point)]
    found = []
    for at in (np.zeros_like(point), point):
        again, ctx = planned(model, widths)
        Evaluator(again, ctx, "mse", 64).apply(at)
        Pipeline.parse("correct-bias:correction=output emit-qdq").run(again, ctx)
        found.append(evaluator.deployed_loss(again.to_model()))
    assert losses == pytest.approx(found, rel=1e-5)


def test_segments_change_nothing(planned: Planned) -> None:
    program, ctx = planned("digits_cnn")
    whole, cut = (Evaluator(program, ctx, "kl", 64, segments=n) for n in (1, 99))
    point = np.random.default_rng(6).normal(size=len(whole.variables)) * 0.1
    assert whole.evaluate(point) == cut.evaluate(point)
    assert cut.runs > whole.runs


def test_a_point_becomes_the_plan(planned: Planned) -> None:
    program, ctx = planned("digits_cnn")
    evaluator = Evaluator(program, ctx, "kl", 64)
    point = np.random.default_rng(3).normal(size=len(evaluator.variables)) * 0.2
    there = evaluator.evaluate(point)
    before = {tensor: d.params for tensor, d in program.plan.items()}
    evaluator.apply(point)
    assert Evaluator(program, ctx, "kl", 64).evaluate(np.zeros(len(point))) == there
    factors = dict(zip([v.name for v in evaluator.variables], np.exp(point), strict=True))
    for tensor, decision in program.plan.items():
        old, new = before[tensor], decision.params
        assert old is not None
        assert new is not None
        if not decision.is_weight:
            assert float(new.scale) == pytest.approx(float(old.scale) * factors[decision.group], rel=1e-6)
            assert int(new.zero_point) == int(old.zero_point)


def test_steps_that_are_far_off_lose(planned: Planned) -> None:
    """Twenty times the step is 400 times the noise of one tensor among some forty; much of it saturates away."""
    program, ctx = planned("digits_cnn", "weights=int8:channel")
    evaluator = Evaluator(program, ctx, "kl", 64)
    start = np.zeros(len(evaluator.variables))
    losses = [evaluator.evaluate(start + 3.0 * row) for row in np.eye(len(start))]
    assert np.median(losses) > 3 * evaluator.evaluate(start)


def test_parts_share_no_samples_and_cover_all(planned: Planned) -> None:
    program, ctx = planned("digits_cnn")
    evaluator = Evaluator(program, ctx, "kl", 64)
    start = np.zeros(len(evaluator.variables))
    sums = {part: evaluator.partial(start, part) for part in ("search", "held", "coarse")}
    assert sums["search"][1] + sums["held"][1] == 64
    assert 0 < sums["coarse"][1] < sums["search"][1]
    assert evaluator.costs == {part: count / sums["search"][1] for part, (_, count) in sums.items()}


def test_the_float_model_loses_nothing_against_itself(planned: Planned) -> None:
    program, ctx = planned("digits_cnn")
    evaluator = Evaluator(program, ctx, "kl", 64)
    assert evaluator.float_loss() == 0.0
    assert evaluator.deployed_loss(program.to_model()) == 0.0  # not emitted yet


def test_without_data_there_is_no_loss(planned: Planned) -> None:
    program, ctx = planned("digits_cnn")
    with pytest.raises(DataError, match="no calibration data to evaluate a loss on"):
        Evaluator(program, replace(ctx, data=None))
