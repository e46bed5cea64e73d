"""Mul and Add by numbers run on codes, as one addition that rounds once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import onnxq
from onnxq.affine import affine_params, dequantize
from onnxq.data import input_specs, open_data
from onnxq.measure.coverage import read_coverage
from onnxq.model.session import make_session, session_and_optimized
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program
from onnxq.target import find_target

ParseProgram = Callable[..., Program]
Array = NDArray[Any]

RNG = np.random.default_rng(5)
X = (4.0 * RNG.normal(size=(32, 4, 16, 16))).astype(np.float32)
NUMBERS = {
    "half": 0.5,
    "third": 1 / 3,
    "two": [2.0],
    "minus": [[[-1.5]]],
    "zero": 0.0,
    "huge": 1e9,
    "deep": [[[[[2.0]]]]],
}
VALUES = {
    "w": np.eye(4).reshape(4, 4, 1, 1),
    "v": RNG.normal(size=(4, 4, 1, 1)),
    "channels": RNG.normal(size=(4, 1, 1)),
    **NUMBERS,
}
TIE = 1e-3  # of a code; float32 sums of some hundred codes err by less


def planned(parse: ParseProgram, body: str, target: str = "ort-cpu") -> tuple[Program, Context]:
    """Behind a convolution that writes its input, c."""
    text = f"g (float[N,4,16,16] x) => (float[a,b,c,d] y) {{ c = Conv(x, w) {body} }}"
    values = {name: np.array(value, np.float32) for name, value in VALUES.items() if name in f"w {body}"}
    program = parse(text, values)
    goal = find_target(target)
    ctx = Context(open_data({"x": X}, input_specs(program.source)), target=goal, threads=1)
    scheme = "int8" if goal.signed else "uint8"
    steps = f"annotate:small=0,activations={scheme} calibrate choose-ranges quantize-weights"
    Pipeline.parse(steps).run(program, ctx)
    return program, ctx


@pytest.mark.parametrize("form", ["qdq", "integer"])
@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("r = Mul(c, half) y = Conv(r, v)", lambda x: x / 2),
        ("r = Mul(two, c) y = Conv(r, v)", lambda x: 2 * x),
        ("r = Add(c, two) y = Conv(r, v)", lambda x: x + 2),
        ("r = Add(minus, c) y = Conv(r, v)", lambda x: x - 1.5),
        ("r = Add(c, zero) y = Conv(r, v)", lambda x: x),
        ("m = Mul(c, third) r = Add(m, minus) y = Conv(r, v)", lambda x: x / 3 - 1.5),
        ("m = Mul(c, half) s = Add(m, two) r = Relu(s) y = Conv(r, v)", lambda x: np.maximum(x / 2 + 2, 0)),
        ("m = Mul(c, half) r = Relu(m) y = Conv(r, v)", lambda x: np.maximum(x / 2, 0)),
        ("s = Add(c, two) r = Clip(s, zero, half) y = Conv(r, v)", lambda x: np.clip(x + 2, 0, 0.5)),
    ],
)
def test_codes_are_those_of_the_line(
    body: str, line: Callable[[Array], Array], form: str, parse_program: ParseProgram
) -> None:
    program, ctx = planned(parse_program, body)
    source, target = program.params("c"), program.params("r")
    Pipeline.parse(f"emit-{form}").run(program, ctx)
    model, names = program.to_model(), [program.codes[t] for t in ("c", "r")]
    onnx.checker.check_model(model)
    coverage = read_coverage(session_and_optimized(model, threads=1)[1], {})
    assert coverage.kernels["QLinearAdd"] == 1
    assert not coverage.kernels.keys() & {"Mul", "Add", "QLinearMul", "Relu"}
    codes, found = make_session(model, threads=1, extra_outputs=names).run(names, {"x": X})
    x = float(source.scale) * (codes.astype(np.float64) - int(source.zero_point))
    exact = line(x) / float(target.scale) + int(target.zero_point)
    exact = np.clip(exact, target.scheme.qmin, target.scheme.qmax)
    assert len(np.unique(found)) > 1
    np.testing.assert_allclose(found, exact, rtol=0, atol=0.5 + TIE)


@pytest.mark.parametrize(
    "body",
    [
        "m = Mul(c, minus) y = Conv(m, v)",
        "m = Mul(c, zero) y = Conv(m, v)",
        "m = Mul(c, huge) y = Conv(m, v)",
        "m = Mul(c, channels) y = Conv(m, v)",
        "m = Mul(c, deep) y = Squeeze(m)",
    ],
)
def test_what_is_no_line_stays_float(body: str, parse_program: ParseProgram) -> None:
    program, _ = planned(parse_program, body)
    (name,) = [node.name for node in program.graph.nodes if node.op == "Mul"]
    assert program.floats[name] == "an operand is constant"


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_targets_whose_additions_take_no_numbers_keep_them_float(
    target: str, parse_program: ParseProgram
) -> None:
    program, _ = planned(parse_program, "r = Add(c, two) y = Conv(r, v)", target)
    assert "Add" not in {unit.kind for unit in program.units.values()}


def test_a_product_that_others_read_is_a_line_of_its_own(parse_program: ParseProgram) -> None:
    program, _ = planned(
        parse_program, "m = Mul(c, half) r = Add(m, two) s = Conv(m, v) t = Conv(r, v) y = Add(s, t)"
    )
    lines = [unit for unit in program.units.values() if unit.kind in ("Mul", "Add") and len(unit.inputs) == 1]
    assert [(unit.inputs, unit.outputs) for unit in lines] == [(("c",), ("m",)), (("m",), ("r",))]


@pytest.mark.parametrize("form", ["qdq", "integer"])
def test_a_grid_beyond_the_activation_is_cut_there(form: str, parse_program: ParseProgram) -> None:
    """As that of a tensor which shares its scale with others is."""
    program, ctx = planned(parse_program, "s = Add(c, two) r = Clip(s, zero, half) y = Conv(r, v)")
    program.plan["r"] = replace(program.plan["r"], params=affine_params(-1.0, 2.0, program.plan["r"].scheme))
    Pipeline.parse(f"emit-{form}").run(program, ctx)
    names = [program.codes["r"]]
    (codes,) = make_session(program.to_model(), threads=1, extra_outputs=names).run(names, {"x": X})
    values = dequantize(codes, program.params("r"))
    assert (values.min(), values.max()) == pytest.approx((0.0, 0.5), abs=float(program.params("r").scale) / 2)


def test_two_products_are_two_lines(parse_program: ParseProgram) -> None:
    program, _ = planned(parse_program, "m = Mul(c, half) r = Mul(m, third) y = Conv(r, v)")
    assert [unit.outputs for unit in program.units.values() if unit.kind == "Mul"] == [("m",), ("r",)]


def test_an_addition_that_is_skipped_stays_float(parse_program: ParseProgram) -> None:
    text = "g (float[N,4,16,16] x) => (float[a,b,e,d] y) {c = Conv(x, w) m = Mul(c, half) [left] r = Add(m, two) y = Conv(r, v)}"
    values = {name: np.array(VALUES[name], np.float32) for name in ("w", "v", "half", "two")}
    program = parse_program(text, values)
    Pipeline.parse("annotate:small=0,skip=left").run(program, Context())
    assert "left" in program.floats
    assert [unit.outputs for unit in program.units.values() if unit.kind == "Mul"] == [("m",)]


def test_a_network_of_lines_and_hard_swishes_runs_in_integers(
    parse_model: Callable[..., onnx.ModelProto],
) -> None:
    """As a block of PP-LCNetV3 is written."""
    text = """g (float[N,4,16,16] x) => (float[a,b,c,d] y) {
        c = Conv(x, w) h = HardSwish(c) m = Mul(h, third) r = Add(m, two) y = Conv(r, v)
    }"""
    values = {name: np.array(VALUES[name], np.float32) for name in ("w", "v", "third", "two")}
    model = parse_model(text, values)
    done = onnxq.compile_model(model, {"x": X}, speed=False, threads=1)
    assert {row.status for row in done.report.nodes} == {"integer"}
    want, got = (make_session(m, threads=1).run(None, {"x": X})[0] for m in (model, done.model))
    assert (
        10 * np.log10(np.square(want).sum() / np.square(want - got).sum()) > 35.0
    )  # four roundings to 8 bits
