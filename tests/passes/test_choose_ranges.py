"""Scales of activations: each group by its statistics, tables by their values, Concats by all of their parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq.affine import QuantParams, dequantize, quantize
from onnxq.data import input_specs, open_data
from onnxq.errors import DataError
from onnxq.model.session import make_session
from onnxq.passes.choose_ranges import ChooseRanges
from onnxq.pipeline import Context, PassResult, Pipeline
from onnxq.program import Program
from onnxq.quantizers import METHODS

Array = NDArray[Any]
ParseProgram = Callable[..., Program]

IMAGE, MAP = "float[N,3,9,8] x", "float[N,6,7,6]"


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


W, V, U = normal(1, 6, 3, 3, 3), normal(2, 6, 3, 3, 3), normal(3, 6, 6, 1, 1)
X = {"x": normal(0, 20, 3, 9, 8)}


def chosen(
    program: Program,
    feeds: Mapping[str, Array] = X,
    ranges: str = "minmax",
    annotate: str = "annotate:small=0",
) -> PassResult:
    """The result of choose-ranges after the passes before it."""
    data = open_data(feeds, input_specs(program.source))
    context = Context(data=data, threads=1)
    Pipeline.parse(f"{annotate} calibrate:ranges={ranges}").run(program, context)
    return ChooseRanges(ranges).run(program, context)


def values_of(program: Program, *names: str) -> dict[str, Array]:
    session = make_session(program.source, threads=1, extra_outputs=names)
    return dict(zip(names, session.run(list(names), X), strict=True))


def assert_is_minmax(params: QuantParams, *values: Array) -> None:
    """The uint8 grid from the least to the largest value and 0, of ONNX's DynamicQuantizeLinear."""
    low, high = (float(f([f(v) for v in values] + [0.0])) for f in (np.min, np.max))
    # float32 sums of the two sessions differ in the last bits
    np.testing.assert_allclose(params.scale, (high - low) / 255, rtol=1e-5)
    assert int(params.zero_point) == round(-low / ((high - low) / 255))


def test_every_group_gets_the_range_of_its_own_values(parse_program: ParseProgram) -> None:
    text = f"""g ({IMAGE}) => (float[N,6,3,3] y) {{
        c = Conv(x, w) d = Conv(c, u) p = MaxPool<kernel_shape=[2,2],strides=[2,2]>(d) y = Conv(p, u) }}"""
    program = parse_program(text, {"w": W, "u": U}, 17)
    result = chosen(program)
    values = values_of(program, "c", "d", "y")
    for name in ("c", "d", "y"):
        assert_is_minmax(program.params(name), values[name])
    assert_is_minmax(program.params("x"), X["x"])
    assert program.params("p") is program.params("d")
    assert result.changed == len(result.facts["ranges"]) == 4
    assert result.facts["tied"] == 0
    assert program.plan["w"].params is None  # another pass's work
    low, high = result.facts["ranges"]["c"]
    assert low <= values["c"].min() + 0.51 * program.params("c").scale
    assert high >= values["c"].max() - 0.51 * program.params("c").scale


@pytest.mark.parametrize("method", [m.name for m in METHODS])
def test_all_methods_choose_grids_that_serve_the_values(method: str, parse_program: ParseProgram) -> None:
    program = parse_program(
        f"g ({IMAGE}) => ({MAP} y) {{ c = Conv(x, w) r = Relu(c) y = Conv(r, u) }}", {"w": W, "u": U}, 17
    )
    chosen(program, ranges=method)
    values = values_of(program, "r")["r"]
    params = program.params("r")
    assert params.scale.shape == ()
    assert int(params.zero_point) == 0  # the Relu vanishes
    noise = np.mean((dequantize(quantize(values, params), params) - values) ** 2) / np.mean(values**2)
    assert noise < 0.01  # 20 dB: whatever is cut off, most values are kept


def test_statistics_must_be_there(parse_program: ParseProgram) -> None:
    program = parse_program(f"g ({IMAGE}) => ({MAP} y) {{ y = Conv(x, w) }}", {"w": W}, 17)
    Pipeline.parse("annotate").run(program, Context())
    with pytest.raises(DataError, match="tensor 'x' has no statistics; the pass calibrate must run before"):
        ChooseRanges().run(program, Context())
    assert chosen(program).changed == 2
    with pytest.raises(DataError, match="ranges 'mse' need histograms; write calibrate:ranges=mse"):
        ChooseRanges("mse").run(program, Context())


def test_a_table_has_the_grid_of_least_error_of_its_values(parse_program: ParseProgram) -> None:
    table = normal(1, 3000, 64)
    table[3, 5], table[9, 2] = 7, -7  # beyond all others; the samples below never look them up
    text = "g (int64[N,5] i) => (float[N,5,64] y) { e = Gather(table, i) y = Relu(e) }"
    program = parse_program(text, {"table": table}, 17)
    chosen(program, {"i": np.full((4, 5), 50)})
    params = program.params("table")
    assert program.params("e") is params
    assert str(params.scheme) == "uint8"

    def error(scale: float, zero: int) -> float:
        grid = QuantParams(params.scheme, np.array(scale, np.float32), np.array(zero, np.int32))
        return float(np.mean((dequantize(quantize(table, grid), grid) - table) ** 2))

    own = error(float(params.scale), int(params.zero_point))
    step = (table.max() - table.min()) / 255
    least = min(error(step * f, z) for f in np.linspace(0.5, 1, 26) for z in (127, 128))
    assert own <= least * 1.05  # the search is on a grid of its own
    assert own < error(step, round(-table.min() / step)) / 1.3  # min-max


def test_rows_of_a_table_that_samples_look_up_are_not_cut_off(parse_program: ParseProgram) -> None:
    """As the rows of special tokens, which are in every sentence: a few among thousands, and larger."""
    table = normal(1, 3000, 64)
    table[:2] *= 4
    text = "g (int64[N,5] i) => (float[N,5,8] y) { e = Gather(table, i) t = Tanh(e) y = MatMul(t, v) }"
    errors = []
    for rows in ([5, 6, 7, 8, 9], [0, 1, 7, 8, 9]):
        program = parse_program(text, {"table": table, "v": normal(2, 64, 8)}, 17)
        chosen(program, {"i": np.tile(np.array(rows), (400, 1))})
        params = program.params("table")
        assert program.params("e") is params
        errors.append(np.mean((dequantize(quantize(table[:2], params), params) - table[:2]) ** 2))
    assert errors[1] < errors[0] / 4  # saturation, not rounding, is what there was before


CONCAT = "s = Concat<axis=1>(p, q) y = Conv(s, u)"


def concat(
    parse_program: ParseProgram, body: str, factor: float = 1.0, shift: float = 0.0
) -> tuple[Program, PassResult]:
    """A Concat of two convolutions, the second one's weights and bias scaled."""
    weights = {
        "w": W,
        "v": V * np.float32(factor),
        "b": np.full(6, shift, np.float32),
        "u": normal(4, 6, 12, 1, 1),
    }
    program = parse_program(f"g ({IMAGE}) => ({MAP} y) {{ {body} {CONCAT} }}", weights, 17)
    return program, chosen(program)


def test_parts_of_like_range_take_one_grid(parse_program: ParseProgram) -> None:
    program, result = concat(parse_program, "p = Conv(x, w) q = Conv(x, v, b)")
    params = [program.params(t) for t in "pqs"]
    assert len({(float(p.scale), int(p.zero_point)) for p in params}) == 1
    values = values_of(program, "p", "q")
    low, high = (f([f(v) for v in values.values()]) for f in (np.min, np.max))
    slack = 0.51 * float(params[0].scale)  # the zero point is rounded
    assert params[0].low <= low + slack
    assert params[0].high >= high - slack
    assert result.facts["tied"] >= 1
    assert result.changed == 5


@pytest.mark.parametrize(("factor", "tied"), [(0.6, True), (0.3, False), (4.0, False)])
def test_no_part_gets_a_step_more_than_twice_coarser(
    factor: float, tied: bool, parse_program: ParseProgram
) -> None:
    program, result = concat(parse_program, "p = Conv(x, w) q = Conv(x, v, b)", factor)
    values = values_of(program, "p", "q")
    assert (float(program.params("p").scale) == float(program.params("q").scale)) == tied
    assert bool(result.facts["tied"]) == tied
    for name in ("p", "q"):
        own = float(np.ptp(np.append(values[name], 0))) / 255
        assert float(program.params(name).scale) <= 2.001 * own  # float32
        if not tied:
            assert_is_minmax(program.params(name), values[name])


def test_a_chain_of_concats_loses_no_more(parse_program: ParseProgram) -> None:
    """Each step of the chain is less than twice as coarse as the one before, the last four times the first."""
    text = f"""g ({IMAGE}) => (float[N,24,7,6] y) {{ p = Conv(x, w) q = Conv(x, v) r = Conv(x, u)
        s = Concat<axis=1>(p, q) y = Concat<axis=1>(s, r, p) }}"""
    weights = {"w": W, "v": W * np.float32(1.8), "u": W * np.float32(3.2)}
    program = parse_program(text, weights, 17)
    chosen(program)
    own = float(np.ptp(values_of(program, "p")["p"])) / 255
    assert own * 1.7 < float(program.params("p").scale) < own * 2.001
    assert float(program.params("p").scale) == float(program.params("s").scale)


def test_the_zero_point_of_a_relu_stays_at_the_smallest_code(parse_program: ParseProgram) -> None:
    program, result = concat(parse_program, "p = Conv(x, w) t = Conv(x, v, b) q = Relu(t)")
    assert int(program.params("q").zero_point) == 0
    assert int(program.params("p").zero_point) > 0
    assert result.facts["tied"] == 0
    program, result = concat(parse_program, "m = Conv(x, w) p = Relu(m) t = Conv(x, v, b) q = Relu(t)")
    assert {int(program.params(t).zero_point) for t in "pqs"} == {0}
    assert len({float(program.params(t).scale) for t in "pqs"}) == 1


def test_all_of_a_group_takes_the_grid_of_a_concat(parse_program: ParseProgram) -> None:
    body = "p = Conv(x, w) m = Conv(x, v, b) q = Transpose<perm=[0,1,2,3]>(m)"
    program, _ = concat(parse_program, body, 0.7)
    assert program.plan["q"].group == "m"
    assert {float(program.params(t).scale) for t in "pmqs"} == {float(program.params("p").scale)}


def test_lookups_side_by_side_share_their_tables_grid(parse_program: ParseProgram) -> None:
    text = "g (int64[N] i, int64[N] j) => (float[N,128] y) { p = Gather(t, i) q = Gather(u, j) y = Concat<axis=1>(p, q) }"
    program = parse_program(text, {"t": normal(1, 100, 64), "u": normal(2, 100, 64) * np.float32(0.8)}, 17)
    chosen(program, {"i": np.arange(100), "j": np.arange(100)})
    assert len({float(program.params(name).scale) for name in "tupqy"}) == 1
