"""Another plan in an emitted graph gives the graph that would be emitted for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper, parser

from onnxq.data import input_specs, open_data
from onnxq.model.prepare import prepare
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program
from onnxq.simulate import Evaluator
from onnxq.simulate.emitted import emit
from onnxq.simulate.segments import cut_into_segments, typed
from onnxq.simulate.variables import Steps
from onnxq.target import find_target

Planned = Callable[..., tuple[Program, Context]]


@pytest.mark.parametrize("model", ["digits_cnn", "digits_transformer"])
@pytest.mark.parametrize("correct", [False, True])
def test_each_initializer_follows(model: str, correct: bool, planned: Planned) -> None:
    program, ctx = planned(model)
    emitted, steps = emit(program, ctx.target, correct=correct), Steps(program, ctx.target)
    plan = steps.at(np.random.default_rng(1).normal(size=len(steps.variables)) * 0.3)
    program.plan.update(plan)
    fresh = {
        t.name: numpy_helper.to_array(t)
        for t in emit(program, ctx.target, correct=correct).model.graph.initializer
    }
    old = {t.name: numpy_helper.to_array(t) for t in emitted.model.graph.initializer}
    changed = {name for name, values in fresh.items() if not np.array_equal(values, old[name])}
    assert old.keys() == fresh.keys()
    assert changed <= emitted.recipes.keys()
    assert len(changed) > len(steps.variables)  # codes and biases too
    for name in emitted.recipes:
        np.testing.assert_array_equal(emitted.array(name, plan), fresh[name], err_msg=name)


def test_the_plan_of_the_program_is_left_alone(planned: Planned) -> None:
    program, ctx = planned("digits_cnn")
    plan, nodes = dict(program.plan), [n.name for n in program.graph.nodes]
    emit(program, ctx.target, correct=True)
    assert program.plan == plan
    assert [n.name for n in program.graph.nodes] == nodes


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("target", ["ort-cpu", "onnx"])
def test_where_an_activation_saturates_moves_with_the_step(factor: float, target: str) -> None:
    """The grid starts where Clip ends, so that nothing is written for it; a larger step needs a limit below 255."""
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]> g (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y)
        <float[4, 4, 1, 1] w = {3, 1, 0, 2, -1, 2, 1, 0, 1, 1, 1, 1, 2, -2, 1, 3}, float low = {0}, float high = {6}>
        { c = Conv (x, w)  r = Clip (c, low, high)  y = Conv (r, w) }"""
    )
    rng = np.random.default_rng(2)
    feeds = {"x": rng.normal(size=(64, 4, 6, 6)).astype(np.float32) * 3}
    model = prepare(model, 21)[0]
    data = open_data(feeds, input_specs(model))
    ctx = Context(data=data, samples=64, threads=1, target=find_target(target))
    program = Program.from_model(model)
    Pipeline.parse("annotate calibrate choose-ranges quantize-weights").run(program, ctx)
    group = program.plan["r"].group
    emitted, steps = emit(program, ctx.target, correct=False), Steps(program, ctx.target)
    place = next(i for i, v in enumerate(steps.variables) if v.name == group)
    point = np.zeros(len(steps.variables))
    point[place] = np.log(factor)
    plan = steps.at(point)
    limits = [
        emitted.array(n, plan)
        for n, r in emitted.recipes.items()
        if r.reads == ("r",) and n.endswith("_high")
    ]
    assert [int(v) for v in limits] == [min(255, round(255 / factor))]
    assert replace(program.plan["r"]) is not plan["r"]


def test_an_output_that_is_dequantized_is_written() -> None:
    """Pooling writes codes, and the output of the network is their values: it belongs to the last segment."""
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]> g (float[N, 8, 6, 6] x) => (float[N, 8, 1, 1] y)
        { c = Conv (x, w)  r = Relu (c)  d = Conv (r, w)  e = Relu (d)  y = GlobalAveragePool (e) }"""
    )
    rng = np.random.default_rng(3)
    weights = rng.normal(size=(8, 8, 3, 3)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    model = prepare(model, 21)[0]
    data = open_data({"x": rng.normal(size=(64, 8, 6, 6)).astype(np.float32)}, input_specs(model))
    ctx = Context(data=data, samples=64, threads=1)
    program = Program.from_model(model)
    Pipeline.parse("annotate calibrate choose-ranges quantize-weights").run(program, ctx)
    assert "y" in program.plan
    evaluator = Evaluator(program, ctx, "mse", 64)
    found = evaluator.evaluate_plan(program.plan)
    Pipeline.parse("correct-bias emit-qdq").run(program, ctx)
    assert found == pytest.approx(
        evaluator.deployed_loss(program.to_model()), rel=1e-6
    )  # order of float sums


def test_a_network_without_layers_is_one_segment() -> None:
    """Embeddings alone, or layers that stay float, leave nothing in front of which to cut."""
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    )
    (segment,) = cut_into_segments(typed(model), [], 8)
    assert (segment.inputs, segment.live, segment.outputs) == (("x",), (), ("y",))
