"""Codes of weights: near the values, safe on every kernel, and with biases that int32 holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq.affine import QuantParams, quantize
from onnxq.data import input_specs, open_data
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program

Array = NDArray[Any]
ParseProgram = Callable[..., Program]

IMAGE, MAP = "float[N,3,9,8] x", "float[N,6,7,6]"
PAIR_LIMIT = 32767 // 255  # two products of 255 and a code, added in int16


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X = {"x": normal(0, 20, 3, 9, 8)}


def quantized(
    program: Program, options: str = "", weights: str = "int8:channel", feeds: Mapping[str, Array] = X
) -> Mapping[str, Any]:
    """Facts of quantize-weights, after the passes before it."""
    context = Context(data=open_data(feeds, input_specs(program.source)), threads=1)
    steps = f"annotate:small=0,weights={weights} calibrate choose-ranges quantize-weights{options and ':'}{options}"
    return Pipeline.parse(steps).run(program, context)[-1].result.facts


def codes(program: Program, weight: str) -> NDArray[np.int64]:
    found = program.plan[weight].codes
    assert found is not None
    assert found.dtype == np.int8
    return found.astype(np.int64)


def errors(program: Program, weight: str, values: Array, axis: int = 0) -> Array:
    """Differences of codes and values, in steps."""
    scale = program.params(weight).scale.astype(np.float64)
    shape = [-1 if i == axis else 1 for i in range(values.ndim)]
    return codes(program, weight) - values / (scale.reshape(shape) if scale.ndim else scale)


def pair_sums(weight: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums of neighbours of one sign, in the order (kh, kw, cin) that convolutions reduce in."""
    rows = np.moveaxis(weight, 1, -1).reshape(len(weight), -1)
    pairs = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2))).reshape(len(rows), -1, 2)
    return np.stack([np.maximum(pairs, 0).sum(2), -np.minimum(pairs, 0).sum(2)])


CONV = f"g ({IMAGE}) => ({MAP} y) {{ y = Conv(x, w) }}"


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("weights", ["int8:channel", "int8:tensor"])
def test_codes_are_the_nearest_of_a_fair_grid(weights: str, method: str, parse_program: ParseProgram) -> None:
    w = normal(1, 6, 3, 3, 3) * np.geomspace(0.1, 10, 6).astype(np.float32)[:, None, None, None]
    program = parse_program(CONV, {"w": w}, 17)
    facts = quantized(program, f"saturation=ignore,method={method}", weights)
    params, off = program.params("w"), np.abs(errors(program, "w", w))
    largest = np.abs(w).max((1, 2, 3)) if weights == "int8:channel" else np.abs(w).max()
    assert params.scale.shape == np.shape(largest)
    assert not params.zero_point.any()
    assert not facts["saturating_channels"]
    if method == "minmax":
        np.testing.assert_allclose(params.scale, largest / 127, rtol=1e-6)  # float32
        assert off.max() <= 0.5 + 1e-4  # the quotient is float32
        assert np.abs(codes(program, "w")).max() == 127
    else:
        inside = np.abs(codes(program, "w")) < 127
        assert off[inside].max() <= 0.5 + 1e-4
        widest = (largest / 127).reshape(-1, 1, 1, 1) if weights == "int8:channel" else largest / 127
        noise = np.sum((np.rint(w / widest) * widest - w) ** 2, dtype=np.float64)
        steps = params.scale.reshape(-1, 1, 1, 1) if weights == "int8:channel" else params.scale
        assert np.sum((off * steps) ** 2) < noise


@pytest.mark.parametrize("weights", ["int8:channel", "int8:tensor"])
def test_neighbours_stay_within_sixteen_bits(weights: str, parse_program: ParseProgram) -> None:
    w = normal(1, 6, 5, 3, 3)
    w[:4] = np.abs(w[:4])
    w[5, 1:] *= 0.4  # one large tap each: no two neighbours add up to much
    text = f"g (float[N,5,9,8] x) => ({MAP} y) {{ y = Conv(x, w) }}"
    feeds = {"x": normal(0, 20, 5, 9, 8)}
    free, safe = (parse_program(text, {"w": w}, 17) for _ in range(2))
    assert not quantized(free, "saturation=ignore", weights, feeds)["saturating_channels"]
    worst = pair_sums(codes(free, "w")).max((0, 2))
    assert (worst > PAIR_LIMIT).sum() >= 3
    facts = quantized(safe, "", weights, feeds)
    assert pair_sums(codes(safe, "w")).max() <= PAIR_LIMIT
    assert facts["saturating_channels"]["w"] == (worst > PAIR_LIMIT).sum()
    calm = worst <= PAIR_LIMIT
    if weights == "int8:channel":
        np.testing.assert_array_equal(codes(safe, "w")[calm], codes(free, "w")[calm])
    # less than two steps of the free grid: 64 of 127 codes are left at worst
    ratio = safe.params("w").scale / free.params("w").scale
    assert ratio.min() >= 1
    assert ratio.max() <= 2.001
    assert np.abs(errors(safe, "w", w)).max() <= 1.0


def test_depthwise_convolutions_have_no_neighbours(parse_program: ParseProgram) -> None:
    text = "g (float[N,6,9,8] x) => (float[N,6,7,6] y) { y = Conv<group=6>(x, w) }"
    w = np.abs(normal(1, 6, 1, 3, 3))
    program = parse_program(text, {"w": w}, 17)
    assert not quantized(program, feeds={"x": normal(0, 20, 6, 9, 8)})["saturating_channels"]
    assert np.abs(errors(program, "w", w)).max() <= 0.5 + 1e-4


def test_a_weight_of_two_convolutions_is_safe_for_the_stricter(parse_program: ParseProgram) -> None:
    text = """g (float[N,4,9,8] x, float[N,1,9,8] z) => (float[N,4,7,6] y, float[N,4,7,6] q) {
        y = Conv<group=4>(x, w) q = Conv(z, w) }"""
    w = np.abs(normal(1, 4, 1, 3, 3))
    program = parse_program(text, {"w": w}, 17)
    assert quantized(program, feeds={"x": normal(0, 9, 4, 9, 8), "z": normal(0, 9, 1, 9, 8)})[
        "saturating_channels"
    ]
    assert pair_sums(codes(program, "w")).max() <= PAIR_LIMIT


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [("Gemm(f, w)", (216, 6), 1), ("Gemm<transB=1>(f, w)", (6, 216), 0), ("MatMul(f, w)", (216, 6), 1)],
)
def test_products_have_their_channels_where_the_operator_has_them(
    layer: str, shape: tuple[int, int], axis: int, parse_program: ParseProgram
) -> None:
    w = normal(1, *shape)
    program = parse_program(f"g ({IMAGE}) => (float[N,6] y) {{ f = Flatten(x) y = {layer} }}", {"w": w}, 17)
    quantized(program, "saturation=ignore")
    assert program.params("w").axis == axis
    np.testing.assert_allclose(program.params("w").scale, np.abs(w).max(1 - axis) / 127, rtol=1e-6)
    assert np.abs(errors(program, "w", w, axis)).max() <= 0.5 + 1e-4


def biased(parse_program: ParseProgram, w: Array, b: Array) -> Program:
    return parse_program(f"g ({IMAGE}) => ({MAP} y) {{ y = Conv(x, w, b) }}", {"w": w, "b": b}, 17)


def bias_steps(program: Program) -> NDArray[np.float64]:
    """Resolution of the int32 bias: input scale times weight scale."""
    return np.asarray(program.params("x").scale * program.params("w").scale.astype(np.float64))


@pytest.mark.parametrize("weights", ["int8:channel", "int8:tensor"])
def test_a_huge_bias_fits_into_int32(weights: str, parse_program: ParseProgram) -> None:
    w, b = normal(1, 6, 3, 3, 3), normal(2, 6)
    w[2] *= 1e-9
    b[2] = 50.0
    if weights == "int8:tensor":
        w *= np.float32(1e-9)
    program = biased(parse_program, w, b)
    quantized(program, "saturation=ignore", weights)
    stored = b / bias_steps(program)
    assert np.abs(stored).max() < 2**31 - 255 * 128 * 27  # room for all products
    assert np.abs(b / bias_steps(program)).max() > 2**20  # and no more coarse than needed
    assert np.abs(errors(program, "w", w)).max() <= 0.5 + 1e-4
    if weights == "int8:channel":
        others = np.arange(6) != 2
        expected = np.abs(w[others]).max((1, 2, 3)) / 127
        np.testing.assert_allclose(program.params("w").scale[others], expected, rtol=1e-6)


@pytest.mark.parametrize("dead", [[4], [0, 1, 5]])
def test_the_bias_of_a_dead_channel_keeps_its_resolution(
    dead: list[int], parse_program: ParseProgram
) -> None:
    w, b = normal(1, 6, 3, 3, 3) * np.float32(0.01), normal(2, 6) * np.float32(0.1)
    w[dead] = 0
    program = biased(parse_program, w, b)
    quantized(program)
    assert not codes(program, "w")[dead].any()
    assert np.abs(codes(program, "w")).max((1, 2, 3)).astype(bool).sum() == 6 - len(dead)
    # rounding the bias must be nothing next to rounding the output
    assert bias_steps(program).max() < 0.01 * program.params("y").scale


def test_a_table_takes_the_codes_of_the_grid_that_was_chosen(parse_program: ParseProgram) -> None:
    table = normal(1, 100, 64)
    program = parse_program("g (int64[N] i) => (float[N,64] y) { y = Gather(t, i) }", {"t": table}, 17)
    facts = quantized(program, feeds={"i": np.arange(9)})
    params: QuantParams = program.params("t")
    found = program.plan["t"].codes
    assert found is not None
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, quantize(table, params))
    steps = np.clip(
        table / params.scale.astype(np.float64), -int(params.zero_point), 255 - int(params.zero_point)
    )
    assert np.abs(found.astype(int) - int(params.zero_point) - steps).max() <= 0.5 + 1e-4  # float32 quotient
    assert facts == {"saturating_channels": {}}


def test_scales_in_the_pattern_of_a_folded_normalization(parse_program: ParseProgram) -> None:
    """Equalization moves factors into the weights; the step in front of them stays one for all channels."""
    norm = "h = Conv(x, w) b = BatchNormalization(h, g, s, m, v) r = Relu(b)"
    text = f"g ({IMAGE}) => (float[N,5,7,6] y) {{ {norm} y = Conv(r, u) }}"
    ones, variance = np.ones(6, np.float32), np.geomspace(0.01, 4.0, 6).astype(np.float32)
    weights = {"w": normal(2, 6, 3, 3, 3), "u": normal(3, 5, 6, 1, 1)}
    weights |= {"g": -ones, "s": ones, "m": ones, "v": variance}
    found = {}
    for pattern in ("batchnorm", "range"):
        program = parse_program(text, weights)
        annotate = "annotate:small=0,first_last=same,weights=int4:tensor calibrate choose-ranges"
        steps = f"fold-batchnorm equalize:when=always {annotate} quantize-weights:pattern={pattern}"
        context = Context(data=open_data(X, input_specs(program.source)), threads=1)
        Pipeline.parse(steps).run(program, context)
        weight = program.graph.nodes[0].inputs[1]
        found[pattern] = program.params(weight.name).scale
    size = np.abs(weight.values / weights["w"])[:, 0, 0, 0]  # what both passes multiplied by
    assert np.ptp(size) > 1.0
    np.testing.assert_allclose(
        found["batchnorm"] / size, found["batchnorm"][0] / size[0], rtol=1e-5
    )  # of float32
    assert found["range"].ndim == 0
