"""Groups of operators that stay float: what is run together, and fusions inside as in the whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper

from onnxq.model.session import optimized_model
from onnxq.reference.kernels import Step
from onnxq.reference.lowering import lower
from onnxq.reference.regions import Region, schedule, typed

Array = NDArray[Any]
Build = Callable[..., ModelProto]
GRID = {"s": np.float32(0.05), "z": np.array(100, np.uint8)}


def quantized(name: str) -> list[Any]:
    return [
        helper.make_node("QuantizeLinear", [name, "s", "z"], [f"{name}_q"]),
        helper.make_node("DequantizeLinear", [f"{name}_q", "s", "z"], [f"{name}_d"]),
    ]


def test_operators_run_in_as_few_groups_as_the_kernels_between_them_allow(build_model: Build) -> None:
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),
        *quantized("a"),
        helper.make_node("Abs", ["x"], ["b"]),  # needs no kernel, so it is in the first group
        helper.make_node("Exp", ["a_d"], ["c"]),
        helper.make_node("Add", ["b", "c"], ["y"]),
    ]
    feeds = {"x": np.ones((2, 2), np.float32)}
    model = build_model(nodes, feeds, GRID)
    plan = schedule(lower(model), ["y"], model, 1)
    kinds = [item.op if isinstance(item, Step) else [n.op_type for n in item.nodes] for item in plan]
    assert kinds == [["Neg", "Abs"], "QuantizeLinear", "DequantizeLinear", ["Exp", "Add"]]
    first, last = (item for item in plan if isinstance(item, Region))
    assert (first.inputs, first.outputs) == (["x"], ["a", "b"])
    assert (sorted(last.inputs), last.outputs) == (["a_d", "b"], ["y"])
    alone = next(i for i in schedule(lower(model), ["a_q"], model, 1) if isinstance(i, Region))
    assert alone.outputs == ["a"]


def test_a_sum_that_others_read_is_not_fused_away(
    build_model: Build, assert_exact: Callable[..., dict[str, Array]]
) -> None:
    """onnxruntime fuses Add and LayerNormalization where nobody else reads the sum; here a later group does."""
    rng = np.random.default_rng(1)
    nodes = [
        helper.make_node("Add", ["x", "w"], ["a"]),
        helper.make_node("LayerNormalization", ["a", "g", "b"], ["n"]),
        *quantized("n"),
        helper.make_node("Add", ["n_d", "a"], ["y"]),
    ]
    constants = GRID | {n: rng.normal(size=64).astype(np.float32) for n in "gb"}
    feeds = {n: rng.normal(size=(2, 7, 64)).astype(np.float32) for n in "xw"}
    model = build_model(nodes, feeds, constants)
    for info in model.graph.input:
        for dim, size in zip(info.type.tensor_type.shape.dim, feeds["x"].shape, strict=True):
            dim.dim_value = size
    kernels = {n.op_type for n in optimized_model(model, threads=1).graph.node}
    assert "LayerNormalization" in kernels
    assert_exact(model, feeds)
    # asking for codes alone leaves the reader out of the plan, and still the sum is kept apart
    lowered = lower(model)
    for reads, fused in ((lowered.reads, False), ({}, True)):
        plan = schedule(replace(lowered, reads=reads), ["n_q"], model, 1)
        region = next(item for item in plan if isinstance(item, Region))
        alone = optimized_model(region.model_for(typed(feeds, lowered.infos)), threads=1)
        assert ("SkipLayerNormalization" in {n.op_type for n in alone.graph.node}) == fused
