"""Codes inside a model: which tensors are, how they are shown, and the parts between them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import ModelProto, checker

from onnxq.measure.codes import coded_tensors, on_grid, parts, up_to, with_outputs
from onnxq.model.session import make_session

TEXT = """g (float[n,3] x) => (float[n,2] y) {
    x_raw = QuantizeLinear(x, s, z) x_q = Clip(x_raw, low, high) x_dq = DequantizeLinear(x_q, s, z)
    w_q = Cast<to=3>(w_4) w_dq = DequantizeLinear(w_q, s, zero)
    m = MatMul(x_dq, w_dq) y_q = QuantizeLinear(m, t, z) y = DequantizeLinear(y_q, t, z)
}"""
WEIGHTS = {
    "s": np.float32(0.5),
    "t": np.float32(2.0),
    "z": np.uint8(3),
    "zero": np.int8(0),
    "low": np.uint8(0),
    "high": np.uint8(7),
    "w_4": np.array([[1, -2], [3, 4], [0, 5]], np.int16),
}
X = {"x": np.array([[0.26, -9.0, 1.0], [9.0, 0.0, 0.75]], np.float32)}


def test_codes_are_what_kernels_read(parse_model: Callable[..., ModelProto]) -> None:
    """Neither what a Clip still bounds nor the codes of weights."""
    assert list(coded_tensors(parse_model(TEXT, WEIGHTS))) == ["x_q", "y_q"]


def test_codes_can_be_shown(parse_model: Callable[..., ModelProto]) -> None:
    model = parse_model(TEXT, WEIGHTS)
    shown = with_outputs(model, coded_tensors(model))
    checker.check_model(shown, full_check=True)
    assert [o.name for o in shown.graph.output] == ["y", "x_q", "y_q"]
    assert len(model.graph.output) == 1
    found = make_session(shown).run(["x_q"], X)[0]
    np.testing.assert_array_equal(found, [[4, 0, 5], [7, 3, 5]])  # 0.75 / 0.5 is a tie, and rounds to even


def test_parts_compute_the_whole(parse_model: Callable[..., ModelProto]) -> None:
    model = parse_model(TEXT, WEIGHTS)
    whole = make_session(with_outputs(model, coded_tensors(model)), optimize=False).run(["x_q", "y_q"], X)
    first, second = parts(model)
    assert (first.inputs, first.output) == (("x",), "x_q")
    assert (second.inputs, second.output) == (("x_q",), "y_q")
    np.testing.assert_array_equal(make_session(first.model).run(None, X)[0], whole[0])
    np.testing.assert_array_equal(make_session(second.model).run(None, {"x_q": whole[0]})[0], whole[1])


def test_a_model_can_be_cut_off(parse_model: Callable[..., ModelProto]) -> None:
    model = parse_model(TEXT, WEIGHTS)
    whole = make_session(with_outputs(model, coded_tensors(model)), optimize=False)
    for name, cut in up_to(model, coded_tensors(model)):
        assert [o.name for o in cut.graph.output] == [name]
        np.testing.assert_array_equal(make_session(cut).run(None, X)[0], whole.run([name], X)[0])


def test_inputs_are_put_on_the_grid(parse_model: Callable[..., ModelProto]) -> None:
    text = """g (float[n,3] x, float[2] u) => (float[n,3] y, float[2] v) {
        q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) v = Neg(u)
    }"""
    model = parse_model(text, {"s": np.float32(0.5), "z": np.uint8(3)})
    feeds = {"x": X["x"], "u": np.ones(2, np.float32)}
    codes = {"q": make_session(with_outputs(model, coded_tensors(model))).run(["q"], feeds)[0]}
    moved = on_grid(model, feeds, codes)
    np.testing.assert_array_equal(moved["x"], [[0.5, -1.5, 1.0], [9.0, 0.0, 1.0]])
    np.testing.assert_array_equal(moved["u"], feeds["u"])
