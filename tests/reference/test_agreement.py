"""What differs between 32-bit sums, 16-bit pairs and onnxruntime: counts against those of whole arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper

from onnxq.data import input_specs, open_data
from onnxq.reference.agreement import CodeDifference, Side, agreement, unreadable
from onnxq.reference.run import Reference
from onnxq.reference.sums import Arithmetic

Array = NDArray[Any]
Build = Callable[..., ModelProto]


def chain(build: Build, largest: int) -> tuple[ModelProto, dict[str, Array]]:
    """Two products of codes by weights up to a magnitude."""
    rng = np.random.default_rng(1)
    constants = {
        "s": np.float32(0.02),
        "z": np.array(0, np.uint8),
        "y_s": np.float32(0.6),
        "o": np.zeros((), np.int8),
        "w": rng.integers(-largest, largest + 1, (32, 16)).astype(np.int8),
        "v": rng.integers(-largest, largest + 1, (16, 8)).astype(np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("QLinearMatMul", ["q", "s", "z", "w", "s", "o", "y_s", "z"], ["h"]),
        helper.make_node("QLinearMatMul", ["h", "y_s", "z", "v", "s", "o", "y_s", "z"], ["k"]),
        helper.make_node("DequantizeLinear", ["k", "y_s", "z"], ["y"]),
    ]
    feeds = {"x": rng.uniform(0, 5.1, (50, 32)).astype(np.float32)}
    return build(nodes, feeds, constants), feeds


def test_a_file_that_saturates(build_model: Build, arithmetic: Arithmetic) -> None:
    model, feeds = chain(build_model, 127)
    found = agreement(model, open_data(feeds, input_specs(model)), batch=7, threads=1)
    assert found.saturating == ["h", "k"]
    exact, pairs = (Reference(model, kind).codes(feeds) for kind in ("exact", "avx2"))
    assert list(found.avx2.codes) == ["q", "h", "k"]
    for name, counted in found.avx2.codes.items():
        steps = np.abs(exact[name].astype(int) - pairs[name])
        assert counted == CodeDifference(steps.size, int((steps > 0).sum()), int(steps.max()))
    assert list(found.avx2.differing) == ["h", "k"]
    assert not found.avx2.is_same
    assert found.avx2.outputs.samples == 50
    assert found.avx2.outputs.main is not None
    assert found.avx2.outputs.main.max_abs > 0
    here, there = found.runtime, found.runtime_avx2
    assert (here.is_same, there.is_same) == ((True, False) if arithmetic == "exact" else (False, True))
    assert found.is_undisturbed


def test_a_file_that_cannot_saturate(build_model: Build) -> None:
    model, feeds = chain(build_model, 64)
    found = agreement(Reference(model, threads=1), open_data(feeds, input_specs(model)), threads=1)
    assert not found.saturating
    assert found.avx2.is_same
    assert found.runtime.is_same
    assert found.runtime_avx2.is_same


def test_a_limit_and_progress(build_model: Build) -> None:
    model, feeds = chain(build_model, 64)
    seen: list[int] = []
    data = open_data(feeds, input_specs(model))
    found = agreement(model, data, limit=10, batch=4, threads=1, progress=seen.append)
    assert seen == [4, 8, 10]
    assert found.runtime.codes["q"].values == 10 * 32


def test_other_outputs_alone_are_a_difference() -> None:
    side = Side()
    codes, values = np.zeros((2, 3), np.uint8), np.ones((2, 3), np.float32)
    side.update({"q": codes, "y": values}, {"q": codes, "y": values}, ["y"], 2)
    assert side.is_same
    side.update({"q": codes, "y": values}, {"q": codes, "y": values + 1}, ["y"], 2)
    assert not side.is_same
    assert not side.differing


def test_int8_codes_of_the_qdq_form_are_left_unread(build_model: Build) -> None:
    """As outputs they would keep the runtime from moving them to uint8, and so from its kernels."""
    rng = np.random.default_rng(1)
    constants = {"s": np.float32(0.02), "z": np.array(3, np.int8), "y_s": np.float32(0.9)}
    constants |= {"w": rng.integers(-99, 99, (16, 8)).astype(np.int8), "o": np.zeros((), np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "s", "o"], ["v"]),
        helper.make_node("MatMul", ["d", "v"], ["m"]),
        helper.make_node("QuantizeLinear", ["m", "y_s", "z"], ["k"]),
        helper.make_node("DequantizeLinear", ["k", "y_s", "z"], ["y"]),
    ]
    feeds = {"x": rng.normal(size=(9, 16)).astype(np.float32)}
    model = build_model(nodes, feeds, constants)
    assert unreadable(model) == {"q", "k"}
    found = agreement(model, open_data(feeds, input_specs(model)), threads=1)
    assert (found.unseen, list(found.runtime.codes), list(found.avx2.codes)) == (["q", "k"], [], ["q", "k"])
    assert found.runtime.outputs.outputs["y"].noise == 0.0
