"""Weights that 16-bit pair sums hold, judged by an emulation of the AVX2 instruction."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxq.passes.quantize_weights import QuantizeWeights
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program
from onnxq.saturation import as_rows, excess, from_rows, kernel_kind, pair_limit, partners, peaks

Codes = NDArray[np.integer[Any]]
Rows = NDArray[np.int64]


def avx2_sums(weights: Rows, activations: Rows) -> Rows:
    """What vpmaddubsw and the additions after it make of int8 and uint8 codes, (channels, K) each: (channels,).

    Products of neighbours are added with saturation to 16 bits, all else in 32 bits.
    """
    products = np.pad(weights * activations, ((0, 0), (0, weights.shape[1] % 2)))
    sums: Rows = np.clip(products[:, ::2] + products[:, 1::2], -32768, 32767).sum(axis=1)
    return sums


def kernel_rows(codes: Codes, kind: str, axis: int) -> Rows:
    """Codes in the order in which the kernels add them, (channels, K), written out element by element."""
    if kind in ("Gemm", "MatMul"):
        return np.array([np.take(codes, c, axis) for c in range(codes.shape[axis])], np.int64)
    taps = list(itertools.product(*map(range, codes.shape[2:])))
    channels = range(codes.shape[1])
    return np.array(
        [[codes[(o, i, *tap)] for tap in taps for i in channels] for o in range(len(codes))], np.int64
    )


def is_exact(rows: Rows) -> bool:
    """Whether no activation codes saturate: all are 255, or only those of weights of one sign."""
    return all(
        np.array_equal(avx2_sums(rows, active * 255), (rows * active * 255).sum(axis=1))
        for active in (np.ones_like(rows), (rows > 0).astype(np.int64), (rows < 0).astype(np.int64))
    )


def test_the_limit_is_where_sixteen_bits_end() -> None:
    limit = pair_limit()
    assert limit == 128
    for a, b in ((limit - 1, 1), (limit // 2, limit // 2), (-limit, 0), (-limit + 1, -1), (127, -127)):
        assert is_exact(np.array([[a, b]]))
    for a, b in ((limit - 1, 2), (limit // 2 + 1, limit // 2), (-limit, -1), (-64, -65)):
        assert not is_exact(np.array([[a, b]]))
    assert pair_limit(127) >= 2 * 127  # with 7-bit activations every weight is safe


LAYOUTS = [
    ((5, 3, 3, 3), "Conv", 0),
    ((4, 1, 3, 3), "Conv", 0),
    ((4, 6, 5), "Conv", 0),
    ((2, 3, 2, 3, 1), "Conv", 0),
    ((6, 1, 3, 3), "Depthwise", 0),
    ((6, 7), "Gemm", 0),
    ((7, 6), "Gemm", 1),
    ((8, 3), "MatMul", 1),
    ((1, 3), "MatMul", 1),
]


@pytest.mark.parametrize(("shape", "kind", "axis"), LAYOUTS)
def test_rows_are_in_the_order_of_the_kernel_and_go_back(
    shape: tuple[int, ...], kind: str, axis: int
) -> None:
    weights = np.arange(1, np.prod(shape) + 1).reshape(shape)
    rows = as_rows(weights, kind, axis)
    np.testing.assert_array_equal(rows, kernel_rows(weights, kind, axis))
    np.testing.assert_array_equal(from_rows(rows, shape, kind, axis), weights)


@pytest.mark.parametrize(
    ("shape", "kind", "axis", "expected"),
    [
        ((2, 2, 2), "Conv", 0, [[1, 0, 3, 2]]),
        ((2, 5), "Gemm", 0, [[1, 0, 3, 2, 5]]),
        ((3, 2), "MatMul", 1, [[1, 0, 3]]),
        ((2, 1, 3), "Conv", 0, [[1, 0, 3]]),
        ((3, 1, 3), "Depthwise", 0, []),
        # Three channels: as they are, and with a fourth one of zeros behind each tap.
        ((2, 3, 3), "Conv", 0, [[1, 0, 3, 2, 5, 4, 7, 6, 9], [1, 0, 9, 4, 3, 9, 7, 6, 9]]),
    ],
)
def test_who_is_next_to_whom(shape: tuple[int, ...], kind: str, axis: int, expected: list[list[int]]) -> None:
    assert partners(shape, kind, axis).tolist() == expected


@pytest.mark.parametrize(("shape", "kind", "axis"), LAYOUTS)
def test_peaks_are_the_largest_sums_of_partners_of_one_sign(
    shape: tuple[int, ...], kind: str, axis: int
) -> None:
    weights = np.random.default_rng(2).integers(-128, 128, shape)
    rows = kernel_rows(weights, kind, axis)
    ends = np.pad(rows, ((0, 0), (0, 1)))  # place K holds 0
    expected = np.zeros(len(rows), np.int64)
    for order in partners(shape, kind, axis):
        for place, partner in enumerate(order):
            a, b = ends[:, place], ends[:, partner]
            joined = np.where(a * b > 0, np.abs(a + b), np.maximum(np.abs(a), np.abs(b)))
            expected = np.maximum(expected, joined)
    np.testing.assert_array_equal(peaks(weights, kind, axis), expected)
    np.testing.assert_array_equal(excess(weights, kind, axis, 128), np.maximum(expected - 128, 0))


@given(st.lists(st.integers(-128, 127), min_size=2, max_size=9))
def test_excess_is_zero_just_when_the_sums_are_exact(row: list[int]) -> None:
    codes = np.array([row, [0] * len(row)], np.int8)
    beyond = excess(codes, "Gemm", 0, pair_limit())
    assert beyond[1] == 0
    assert (beyond[0] == 0) == is_exact(codes.astype(np.int64))


@given(st.floats(0, 200), st.floats(0, 200))
def test_rounding_keeps_the_limit_at_the_scale_of_the_peak(a: float, b: float) -> None:
    weights = np.array([[a, b]], np.float32)
    scale = max(float(peaks(weights, "Gemm", 0)[0]) / (pair_limit() - 1), 1e-6)
    assert np.rint(weights / np.float32(scale)).sum() <= pair_limit()


@pytest.mark.parametrize(
    ("channels", "inputs", "group", "kind"),
    [(4, 4, 4, "Depthwise"), (1, 1, 1, "Depthwise"), (8, 4, 4, "Conv"), (8, 1, 1, "Conv"), (4, 4, 2, "Conv")],
)
def test_only_groups_of_one_input_and_one_output_are_depthwise(
    parse_program: Callable[..., Program], channels: int, inputs: int, group: int, kind: str
) -> None:
    program = parse_program(
        f"g (float[1,{inputs},5,5] x) => (float[a,b,c,d] y) {{ y = Conv<group={group}>(x, w) }}",
        {"w": np.ones((channels, inputs // group, 3, 3), np.float32)},
    )
    assert kernel_kind(program.graph.nodes[0]) == kind


def test_other_kernels_keep_their_name(parse_program: Callable[..., Program]) -> None:
    text = "g (float[1,4] x) => (float[a,b] y) { y = MatMul(x, w) }"
    program = parse_program(text, {"w": np.ones((4, 1), np.float32)})
    assert kernel_kind(program.graph.nodes[0]) == "MatMul"


IMAGE = "float[1,{},6,6] x) => (float[a,b,c,d] y)"
LAYERS = {
    "conv": (f"g ({IMAGE.format(5)} {{ y = Conv(x, w) }}", (8, 5, 3, 3), 0),
    "three channels": (f"g ({IMAGE.format(3)} {{ y = Conv(x, w) }}", (8, 3, 3, 3), 0),
    "one channel": (f"g ({IMAGE.format(1)} {{ y = Conv(x, w) }}", (8, 1, 3, 3), 0),
    "multiplier": (f"g ({IMAGE.format(4)} {{ y = Conv<group=4>(x, w) }}", (8, 1, 3, 3), 0),
    "gemm": ("g (float[2,33] x) => (float[a,b] y) { y = Gemm<transB=1>(x, w) }", (8, 33), 0),
    "matmul": ("g (float[2,33] x) => (float[a,b] y) { y = MatMul(x, w) }", (33, 8), 1),
}


def quantized(program: Program, weights: str, saturation: str) -> tuple[Codes, NDArray[np.float32]]:
    """Codes of the weight w and the values that they stand for."""
    Pipeline.parse(f"annotate:small=0,weights={weights}").run(program, Context())
    QuantizeWeights(saturation=saturation).run(program, Context())
    codes, params = program.plan["w"].codes, program.params("w")
    assert codes is not None
    return codes, (codes * params.broadcast(params.scale, codes.ndim)).astype(np.float32)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("weights", ["int8:tensor", "int8:channel"])
@pytest.mark.parametrize("sign", [1, -1, 0])
def test_codes_of_the_pass_are_exact_and_plain_ones_are_not(
    parse_program: Callable[..., Program], layer: str, weights: str, sign: int
) -> None:
    text, shape, axis = LAYERS[layer]
    rng = np.random.default_rng(1)
    values = (rng.uniform(0.5, 1.0, shape) * (sign or rng.choice([-1, 1], shape))).astype(np.float32)
    kind = "Gemm" if len(shape) == 2 else "Conv"
    plain, _ = quantized(parse_program(text, {"w": values}), weights, "ignore")
    codes, found = quantized(parse_program(text, {"w": values}), weights, "safe")
    assert not is_exact(kernel_rows(plain, kind, axis))
    assert is_exact(kernel_rows(codes, kind, axis))
    if layer == "three channels":  # the kernel may also get a fourth channel of zeros
        assert is_exact(kernel_rows(np.pad(codes, ((0, 0), (0, 1), (0, 0), (0, 0))), kind, axis))
    # Neighbours up to 1 sum to at most 2, so a step is at most 2/127 and the error half of it.
    assert np.abs(found - values).max() <= 1 / 127 + 1e-6


def test_depthwise_weights_use_all_codes(parse_program: Callable[..., Program]) -> None:
    text = f"g ({IMAGE.format(8)} {{ y = Conv<group=8>(x, w) }}"
    codes, _ = quantized(
        parse_program(text, {"w": np.ones((8, 1, 3, 3), np.float32)}), "int8:channel", "safe"
    )
    assert (codes == 127).all()


def test_channels_that_are_safe_keep_their_scale(parse_program: Callable[..., Program]) -> None:
    values = np.zeros((2, 32), np.float32)
    values[0], values[1, ::2] = (
        1.0,
        1.0,
    )  # all pairs of the first channel pass the limit, none of the second can
    text = "g (float[2,32] x) => (float[a,b] y) { y = Gemm<transB=1>(x, w) }"
    codes, found = quantized(parse_program(text, {"w": values}), "int8:channel", "safe")
    assert (codes[1, ::2] == 127).all()
    assert (codes[0] == 64).all()  # 2 / 127 apart: 63.5, rounded to even
    np.testing.assert_allclose(found[1], values[1], atol=1e-6)
