"""HardSigmoid on codes against its definition, and ranges that end where it is constant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import onnxq
from onnxq.affine import affine_params, dequantize, sqnr_db
from onnxq.data import input_specs, open_data
from onnxq.graph import Uses
from onnxq.hard_sigmoid import useful_range
from onnxq.measure.coverage import read_coverage
from onnxq.model.session import make_session, session_and_optimized
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program

ParseProgram = Callable[..., Program]
Array = NDArray[Any]

RNG = np.random.default_rng(3)
X = (4.0 * RNG.normal(size=(32, 4, 16, 16))).astype(np.float32)
W, V = np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1), RNG.normal(size=(4, 4, 1, 1)).astype(np.float32)
TIE = 1e-3  # of a code; float32 sums of some hundred codes err by less


def planned(parse: ParseProgram, body: str, bits: str = "", shift: float = 0.0) -> tuple[Program, Context]:
    """Behind a convolution that writes its input plus `shift`, c."""
    text = f"g (float[N,4,16,16] x) => (float[a,b,c,d] y) {{ c = Conv(x, w, b) {body} }}"
    program = parse(text, {"w": W, "v": V, "b": np.full(4, shift, np.float32)})
    ctx = Context(open_data({"x": X}, input_specs(program.source)), threads=1)
    steps = (
        f"fold-activations annotate:small=0,first_last=same{bits} calibrate choose-ranges quantize-weights"
    )
    Pipeline.parse(steps).run(program, ctx)
    return program, ctx


def emitted(program: Program, ctx: Context, form: str, *tensors: str) -> list[Array]:
    """Codes of tensors in the emitted graph."""
    Pipeline.parse(f"emit-{form}").run(program, ctx)
    names = [program.codes[t] for t in tensors]
    model = program.to_model()
    coverage = read_coverage(session_and_optimized(model, threads=1)[1], {})
    assert "HardSigmoid" not in coverage.kernels
    assert coverage.kernels["QLinearAdd"] == 1
    found: list[Array] = make_session(model, threads=1, extra_outputs=names).run(names, {"x": X})
    return found


@pytest.mark.parametrize("form", ["qdq", "integer"])
@pytest.mark.parametrize("bits", ["", ",elementwise=same,activations=uint4"])
@pytest.mark.parametrize(("alpha", "beta"), [(1 / 6, 0.5), (0.2, 0.5), (1.0, 0.0), (0.5, -0.25), (0.1, 1.0)])
def test_codes_are_those_of_the_definition(
    alpha: float, beta: float, bits: str, form: str, parse_program: ParseProgram
) -> None:
    body = f"r = HardSigmoid<alpha={alpha}, beta={beta}>(c) m = Mul(c, r) y = Conv(m, v)"
    program, ctx = planned(parse_program, body, bits)
    source, target = program.params("c"), program.params("r")
    codes, found = emitted(program, ctx, form, "c", "r")
    x = float(source.scale) * (codes.astype(np.float64) - int(source.zero_point))
    exact = np.clip(alpha * x + beta, 0.0, 1.0) / float(target.scale) + int(target.zero_point)
    exact = np.clip(exact, target.scheme.qmin, target.scheme.qmax)
    assert len(np.unique(found)) > 1
    np.testing.assert_allclose(found, exact, rtol=0, atol=0.5 + TIE)


@pytest.mark.parametrize("form", ["qdq", "integer"])
def test_a_grid_beyond_its_bounds_is_cut_there(form: str, parse_program: ParseProgram) -> None:
    """As that of a tensor which shares its scale with others is."""
    program, ctx = planned(parse_program, "r = HardSigmoid(c) m = Mul(c, r) y = Conv(m, v)")
    program.plan["r"] = replace(program.plan["r"], params=affine_params(-1.0, 2.0, program.plan["r"].scheme))
    (found,) = emitted(program, ctx, form, "r")
    values = dequantize(found, program.params("r"))
    assert (values.min(), values.max()) == pytest.approx((0.0, 1.0), abs=float(program.params("r").scale) / 2)


def test_ranges_of_outputs_of_the_graph_stay(parse_program: ParseProgram) -> None:
    text = "g (float[N,4,16,16] x) => (float[a,b,c,d] y, float[e,f,g,h] c) { c = Conv(x, w) m = HardSwish(c) y = Conv(m, v) }"
    program = parse_program(text, {"w": W, "v": V})
    Pipeline.parse("fold-activations").run(program, Context())
    assert useful_range(Uses(program.graph), program.graph.tensors()["c"]) == (-np.inf, np.inf)


SWISH = "r = HardSigmoid<alpha=0.16666667, beta=0.5>(c) m = Mul(c, r)"


@pytest.mark.parametrize(
    ("body", "low", "high"),
    [
        (f"{SWISH} y = Conv(m, v)", -3.0, None),
        ("m = HardSwish(c) y = Conv(m, v)", -3.0, None),
        ("m = HardSigmoid<alpha=0.25, beta=0.25>(c) y = Conv(m, v)", -1.0, 3.0),
        (f"{SWISH} s = Add(m, c) y = Conv(s, v)", None, None),
        (f"{SWISH} s = Conv(c, v) t = Conv(m, v) y = Add(s, t)", None, None),
        ("r = HardSigmoid(c) d = Conv(x, v) m = Mul(d, r) y = Conv(m, v)", -2.5, 2.5),
        ("m = LeakyRelu(c) y = Conv(m, v)", None, None),
    ],
)
def test_ranges_end_where_readers_are_constant(
    body: str, low: float | None, high: float | None, parse_program: ParseProgram
) -> None:
    program, _ = planned(parse_program, body)
    params = program.params("c")
    least, most = float(X.min()), float(X.max())
    step = float(params.scale)
    # the codes of x, which c is, may lie half a step beyond; zero is a code
    assert float(params.low) == pytest.approx(least if low is None else low, abs=step)
    assert float(params.high) == pytest.approx(most if high is None else high, abs=step)


def test_a_narrower_range_has_less_noise(parse_program: ParseProgram) -> None:
    """Codes for what a hard swish makes nothing of are codes that the rest lacks."""
    noise = {}
    for is_narrow in (False, True):
        program, ctx = planned(parse_program, "m = HardSwish(c) y = Conv(m, v)", shift=-12.0)
        if not is_narrow:
            decision = program.plan["c"]
            whole = affine_params(X.min() - 12.0, X.max() - 12.0, decision.scheme)
            program.plan["c"] = replace(decision, params=whole)
        Pipeline.parse("emit-qdq").run(program, ctx)
        models = program.source, program.to_model()
        exact, found = (make_session(model, threads=1).run(None, {"x": X})[0] for model in models)
        noise[is_narrow] = sqnr_db(exact, found)
    assert noise[True] > noise[False] + 1.0


def test_noise_of_a_tensor_is_what_its_readers_see(parse_program: ParseProgram) -> None:
    """What lies below -3 is cut off, and a hard swish makes nothing of it: that is no noise."""
    program, _ = planned(parse_program, "m = HardSwish(c) y = Conv(m, v)", shift=-12.0)
    done = onnxq.compile_model(program.source, {"x": X}, ranges="mse", layers=True, speed=False, threads=1)
    assert done.report.layers is not None
    rows = next(step.result.facts["tensors"] for step in done.report.steps if step.name == "emit-qdq")
    own = next(row["sqnr_db"] for row in rows if row["tensor"] == "c")
    seen = np.maximum(X - 12.0, -3.0)  # c, and all of it that m tells
    assert float((seen**2).sum() / ((X - 12.0) ** 2).sum()) < 0.1  # most of its power lies below
    step = (float(seen.max()) + 3.0) / 255
    assert own > 10 * np.log10(12 * float((seen**2).mean()) / step**2)  # as if all were rounded; many are -3
    assert done.report.layers.deployed["c"] > 30.0  # the codes of x in front of it are coarser
