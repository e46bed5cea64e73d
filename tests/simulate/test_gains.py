"""Gains of the loss: those of the plan that a change makes, and the plan is as before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from onnxq.affine import quantize
from onnxq.graph import float_values
from onnxq.pipeline import Context
from onnxq.program import Program
from onnxq.quantizers import weight_params
from onnxq.scheme import QuantScheme
from onnxq.simulate import Evaluator, loss_gains


def test_gains(planned: Callable[..., tuple[Program, Context]]) -> None:
    program, ctx = planned("digits_cnn", "weights=int2:channel")
    tensors, changes = program.graph.tensors(), []
    weights = [u.weight for u in program.units.values() if u.weight is not None and not u.is_table][1:4]
    for weight in weights:
        old, values = program.plan[weight], float_values(tensors[weight])
        assert values is not None
        params = weight_params("minmax", values, old.axis, QuantScheme.parse("int8:channel"))
        changes.append({weight: replace(old, params=params, codes=quantize(values, params))})
    plan = dict(program.plan)
    found = loss_gains(program, ctx, [*changes, {}], "mse", 64)
    assert program.plan == plan
    assert found[-1] == 0.0
    assert found[:3].max() > 0.0  # weights of 8 instead of 2 bits help somewhere

    def loss() -> float:
        evaluator = Evaluator(program, ctx, "mse", 64)
        return evaluator.evaluate(np.zeros(len(evaluator.variables)))

    before = loss()
    program.plan.update(changes[1])
    assert before - loss() == pytest.approx(found[1], rel=1e-9)  # the same sums in another order
    assert loss_gains(program, ctx, []).shape == (0,)
