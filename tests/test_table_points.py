"""Rows of tables with further points: those that are looked up and lie off the grid come closer, all others keep their codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq.affine import dequantize
from onnxq.data import input_specs, open_data
from onnxq.model.session import make_session, optimized_model
from onnxq.pipeline import Context, PassResult, Pipeline
from onnxq.program import Program, QuantDecision
from onnxq.reference.run import Reference
from onnxq.simulate.variables import Steps
from onnxq.target import find_target

Array = NDArray[Any]
ParseProgram = Callable[..., Program]

ROWS, WIDTH = 400, 24
RNG = np.random.default_rng(0)
TABLE = (RNG.normal(size=(ROWS, WIDTH)) * np.geomspace(0.2, 1.0, ROWS)[:, None]).astype(np.float32)
WEIGHTS = RNG.normal(size=(WIDTH, 40)).astype(np.float32)
INDICES = RNG.integers(0, 100, size=256)  # of the smaller rows
TEXT = "g (int64[N] i) => (float[a,b] y) { h = Gather(t, i) y = MatMul(h, w) }"


def context(program: Program, indices: Array = INDICES) -> Context:
    return Context(open_data({"i": indices}, input_specs(program.source)), threads=1)


def prepared(parse: ParseProgram, scheme: str, opset: int = 21) -> Program:
    program = parse(TEXT, {"t": TABLE, "w": WEIGHTS}, opset)
    steps = f"annotate:small=0,first_last=same,weights={scheme} calibrate choose-ranges quantize-weights"
    Pipeline.parse(steps).run(program, context(program))
    return program


def pointed(program: Program, options: str, indices: Array = INDICES) -> PassResult:
    (step,) = Pipeline.parse(f"multipoint:{options}").run(program, context(program, indices))
    return step.result


def rows_of(decision: QuantDecision) -> Array:
    assert decision.codes is not None
    assert decision.params is not None
    return dequantize(decision.codes, decision.params)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_chosen_rows_come_closer_and_the_others_stay(parse_program: ParseProgram, bits: int) -> None:
    program = prepared(parse_program, f"int{bits}")
    before, grid = rows_of(program.plan["t"]), program.params("t")
    facts = pointed(program, "share=0.2").facts["multipoint"]
    after, decision = rows_of(program.plan["t"]), program.plan["t"]
    chosen = [c["channel"] for c in facts["channels"] if c["tensor"] == "t"]
    assert len(chosen) > 40
    left = np.setdiff1d(np.arange(ROWS), chosen)
    # a finer step is the old one times a power of two, so that the same codes stand for the same floats
    np.testing.assert_array_equal(after[left], before[left])
    step = float(grid.scale) / 2 ** min(bits, 8 - bits)
    inside = (TABLE[chosen] > grid.low) & (TABLE[chosen] < grid.high)
    assert np.abs(after - TABLE)[chosen][inside].max() <= step / 2 * (1 + 1e-4)
    points = decision.points
    assert points is not None
    assert decision.scheme.bits == bits
    assert 0 <= points.rows.min() <= points.rows.max() < 1 << bits
    assert points.extra == len(chosen)
    np.testing.assert_array_equal(points.codes(), decision.codes)


def test_more_points_than_two(parse_program: ParseProgram) -> None:
    noise = []
    for points in (2, 3, 4):
        program = prepared(parse_program, "int2")
        grid = program.params("t")
        pointed(program, f"share=9.0,points={points}")
        inside = (grid.low < TABLE) & (grid.high > TABLE)
        noise.append((rows_of(program.plan["t"]) - TABLE)[inside].std())
    assert noise[2] < noise[1] / 3 < noise[0] / 9  # each adds two bits


def test_rows_that_are_looked_up_come_first(parse_program: ParseProgram) -> None:
    seen = np.full(256, 7)
    program = prepared(parse_program, "int4")
    facts = pointed(program, "share=0.01", seen).facts["multipoint"]
    assert ("t", 7) in {(c["tensor"], c["channel"]) for c in facts["channels"]}
    other = prepared(parse_program, "int4")
    facts = pointed(other, "share=0.01", np.full(256, -1)).facts["multipoint"]  # the last row
    found = {(c["tensor"], c["channel"]) for c in facts["channels"]}
    assert ("t", ROWS - 1) in found
    assert ("t", 7) not in found


def test_the_budget_holds_over_tables_and_layers(parse_program: ParseProgram) -> None:
    program = prepared(parse_program, "int3:channel")
    facts = pointed(program, "share=0.1").facts["multipoint"]
    assert {c["tensor"] for c in facts["channels"]} == {"t", "w"}
    assert facts["extra_weights"] <= 0.1 * (TABLE.size + WEIGHTS.size)
    for c in (c for c in facts["channels"] if c["tensor"] == "t"):
        points = program.plan["t"].points
        assert points is not None
        codes = points.rows[points.places[c["channel"]]].astype(float)
        zero = float(program.params("t").zero_point * program.params("t").scale)
        near = np.array(c["factors"]) @ codes - zero
        np.testing.assert_allclose(near, rows_of(program.plan["t"])[c["channel"]], atol=1e-6)


@pytest.mark.parametrize("form", ["emit-qdq", "emit-integer"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_deployed(parse_program: ParseProgram, bits: int, form: str) -> None:
    """The table is one constant when it is loaded; outputs are those of its rows, and of the integer reference."""
    program = prepared(parse_program, f"int{bits}:channel", opset=25)  # has codes of 2 bits
    pointed(program, "share=0.3,points=4")
    rows, decision = rows_of(program.plan["t"]), program.plan["w"]
    Pipeline.parse(form).run(program, context(program))
    model = program.to_model()
    indices = np.arange(ROWS)
    (found,) = make_session(model, threads=1).run(None, {"i": indices})
    np.testing.assert_allclose(found, rows @ rows_of(decision), rtol=1e-4, atol=1e-4)  # float sums
    assert not {"ScatterND", "Mul"} & {n.op_type for n in optimized_model(model).graph.node}
    (reference,) = Reference(model).run({"i": indices}).values()
    np.testing.assert_allclose(reference, found, rtol=1e-5, atol=1e-5)


def test_steps_of_a_search_keep_the_points(parse_program: ParseProgram) -> None:
    program = prepared(parse_program, "int4")
    pointed(program, "share=0.3")
    steps = Steps(program, find_target("ort-cpu"))
    point = np.zeros(len(steps.variables))
    point[[v.name for v in steps.variables].index(program.plan["t"].group)] = np.log(0.8)
    old, new = program.plan["t"], steps.at(point)["t"]
    assert new.params is not None
    assert new.points is not None
    assert old.points is not None
    assert float(new.params.scale) == pytest.approx(0.8 * float(program.params("t").scale))
    np.testing.assert_array_equal(new.points.factors, old.points.factors)
    np.testing.assert_array_equal(new.points.codes(), new.codes)
    high = float(new.params.high)
    inside = np.abs(TABLE) < 0.9 * high
    far = np.abs(rows_of(new) - TABLE) / float(new.params.scale)
    single = np.count_nonzero(new.points.factors, axis=1) == 1
    assert far[single][inside[single]].max() <= 8.01  # half of 16 fine steps
    assert far[~single][inside[~single]].max() <= 0.51


@pytest.mark.parametrize(
    ("made", "options", "said"),
    [
        ({"scheme": "int8"}, "share=0.1", "its table has 8 bits"),
        ({"scheme": "int4", "opset": 15}, "share=0.1", "its rows need operator set 16, and the model has 15"),
        ({"scheme": "int4"}, "share=0.1,form=rows", "rows of a table are no rows of a product"),
    ],
)
def test_reasons(parse_program: ParseProgram, made: dict[str, Any], options: str, said: str) -> None:
    program = prepared(parse_program, **made)
    result = pointed(program, options)
    assert any(why.startswith(said) for why in result.skipped.values())
    assert program.plan["t"].points is None


def test_signed_codes_are_left(parse_program: ParseProgram) -> None:
    program = prepared(parse_program, "int4")
    for name in ("t", "h"):
        decision = program.plan[name]
        program.plan[name] = replace(decision, scheme=replace(decision.scheme, signed=True))
    assert "its table has signed codes" in pointed(program, "share=0.1").skipped.values()


def test_a_table_without_further_rows_is_as_it_was(parse_program: ParseProgram) -> None:
    program = prepared(parse_program, "int4")
    before = dict(program.plan)
    pointed(program, "share=0")
    assert all(program.plan[name] is decision for name, decision in before.items())


def test_biases_that_would_not_fit_keep_the_grid(parse_program: ParseProgram) -> None:
    """The scale of the weights is the least at which the bias fits; on a finer grid it would not."""
    text = "g (int64[N] i) => (float[a,b] y) { h = Gather(t, i) y = Gemm(h, w, b) }"
    program = parse_program(text, {"t": TABLE, "w": WEIGHTS, "b": np.full(40, 1e9, np.float32)}, 21)
    steps = "annotate:small=0,first_last=same,weights=int4:channel calibrate choose-ranges quantize-weights"
    Pipeline.parse(steps).run(program, context(program))
    result = pointed(program, "share=0.1")
    assert any("would not fit into int32 on a finer grid" in why for why in result.skipped.values())
    assert program.plan["t"].points is None


def test_kernels_that_would_saturate_keep_their_narrow_inputs(parse_program: ParseProgram) -> None:
    """Weights of 8 bits may be as large as they like where a table of 4 bits is looked up, but not where that has 8."""
    for saturation, wide in (("safe", False), ("ignore", True)):
        program = parse_program(TEXT, {"t": TABLE, "w": WEIGHTS}, 21)
        steps = "annotate:small=0,first_last=same,weights=int8,override=Gather=w4 calibrate choose-ranges"
        Pipeline.parse(f"{steps} quantize-weights").run(program, context(program))
        assert program.plan["t"].scheme.bits == 4
        result = pointed(program, f"share=0.1,saturation={saturation}")
        assert (program.plan["t"].points is not None) == wide
        assert any("would saturate on codes of 8 bits" in why for why in result.skipped.values()) != wide
