"""Affine quantization against ONNX's own QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator

from onnxq.affine import (
    SMALLEST_SCALE,
    QuantParams,
    affine_params,
    dequantize,
    quantize,
    sqnr_db,
    symmetric_params,
)
from onnxq.model.session import make_session
from onnxq.scheme import QuantScheme

INT8, UINT8 = QuantScheme.parse("int8"), QuantScheme.parse("uint8")
Arrays = dict[str, NDArray[Any]]


def grid(scheme: QuantScheme, shape: tuple[int, ...], axis: int | None, seed: int) -> QuantParams:
    """Random scales and zero points, per tensor or along an axis; some scales are powers of two."""
    rng = np.random.default_rng(seed)
    size = () if axis is None else (shape[axis],)
    scale = np.exp2(rng.integers(-5, 3, size)) * np.where(
        rng.random(size) < 0.5, 1.0, rng.uniform(1, 2, size)
    )
    zero = rng.integers(scheme.qmin, scheme.qmax, size, endpoint=True)
    return QuantParams(scheme, np.asarray(scale, np.float32), np.asarray(zero, np.int32), axis)


def linear(parse_model: Callable[..., ModelProto], params: QuantParams, x: NDArray[np.float32]) -> ModelProto:
    """A model that quantizes and dequantizes its input."""
    kind = "int8" if params.scheme.signed else "uint8"
    axis = "" if params.axis is None else f"<axis={params.axis}>"
    shape = ",".join(map(str, x.shape))
    return parse_model(
        f"g (float[{shape}] x) => ({kind}[{shape}] q, float[{shape}] y)"
        f" {{ q = QuantizeLinear{axis}(x, s, z) y = DequantizeLinear{axis}(q, s, z) }}",
        {"s": params.scale, "z": params.zero_point.astype(kind)},
    )


@pytest.mark.parametrize("scheme", [INT8, UINT8], ids=str)
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_codes_and_values_are_those_of_onnx(
    parse_model: Callable[..., ModelProto], scheme: QuantScheme, axis: int | None, seed: int
) -> None:
    shape = (4, 5, 600)
    params = grid(scheme, shape, axis, seed)
    rng = np.random.default_rng(seed)
    steps = rng.integers(-800, 800, shape) / 2  # halves lie between two codes, and a third saturates
    x = (steps * params.broadcast(params.scale, 3)).astype(np.float32)
    x[..., ::3] += rng.normal(size=x[..., ::3].shape).astype(np.float32)
    codes = quantize(x, params)
    model = linear(parse_model, params, x)
    runs: list[Any] = [ReferenceEvaluator(model), make_session(model, threads=1, optimize=False)]
    for expected, values in (run.run(None, {"x": x}) for run in runs):
        assert codes.dtype == expected.dtype
        np.testing.assert_array_equal(codes, expected)
        np.testing.assert_array_equal(dequantize(codes, params), values)
    assert {int(codes.min()), int(codes.max())} == {scheme.qmin, scheme.qmax}


def test_infinities_and_what_overflows_float32_saturate(parse_model: Callable[..., ModelProto]) -> None:
    x = np.array([np.inf, -np.inf, 3e38, -3e38], np.float32)
    params = affine_params(-0.5, 0.5, UINT8)
    codes, _ = make_session(linear(parse_model, params, x), threads=1).run(None, {"x": x})
    assert quantize(x, params).tolist() == codes.tolist() == [255, 0, 255, 0]


def test_halves_round_to_even_and_zero_points_come_after() -> None:
    params = QuantParams(UINT8, np.asarray(2.0, np.float32), np.asarray(3, np.int32))
    x = np.array([-3, -1, 1, 3, 5, 7, 600, -600], np.float32)
    assert quantize(x, params).tolist() == [1, 3, 3, 5, 5, 7, 255, 0]


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_of_fewer_bits_saturate(bits: int) -> None:
    for signed in (True, False):
        params = symmetric_params(1.0, QuantScheme(bits, signed, True))
        codes = quantize(np.linspace(-9, 9, 99, dtype=np.float32), params)
        assert (codes.min(), codes.max()) == (params.scheme.qmin, params.scheme.qmax)
        assert quantize(np.array([-1.0, 0.0, 1.0]), params).tolist() == [
            params.scheme.midpoint + k * (2 ** (bits - 1) - 1) for k in (-1, 0, 1)
        ]


finite = st.floats(-(2.0**100), 2.0**100, width=32)


@given(finite, finite, st.integers(2, 8), st.booleans(), st.booleans())
def test_a_range_holds_zero_and_its_ends(
    a: float, b: float, bits: int, signed: bool, symmetric: bool
) -> None:
    low, high = min(a, b), max(a, b)
    params = affine_params(low, high, QuantScheme(bits, signed, symmetric))
    step = float(params.scale)
    assert step > 0
    assert params.scheme.qmin <= int(params.zero_point) <= params.scheme.qmax
    assert dequantize(np.asarray(params.zero_point), params) == 0.0
    ends = np.array([low, high], np.float32)
    error = np.abs(dequantize(quantize(ends, params), params) - ends)
    # The zero point moves the grid by up to half a step; one more half is rounding. Scales keep 24 bits.
    assert (error <= step * 1.001 + 1e-30).all()


@given(finite, finite, st.integers(2, 8), st.booleans(), st.integers(0, 99))
def test_quantizing_again_changes_nothing(a: float, b: float, bits: int, signed: bool, seed: int) -> None:
    params = affine_params(min(a, b), max(a, b), QuantScheme(bits, signed, False))
    x = np.random.default_rng(seed).uniform(min(a, b), max(a, b), 64).astype(np.float32)
    values = dequantize(quantize(x, params), params)
    np.testing.assert_array_equal(dequantize(quantize(values, params), params), values)
    inside = (x >= params.low) & (x <= params.high)
    assert (np.abs(values - x)[inside] <= float(params.scale) * 0.5001).all()


def test_low_and_high_are_the_values_of_the_outer_codes() -> None:
    params = grid(INT8, (3, 2), 0, seed=1)
    for code, value in ((-128, params.low), (127, params.high)):
        codes = np.full((3, 2), code, np.int8)
        np.testing.assert_array_equal(dequantize(codes, params), np.stack([value] * 2, axis=1))


def test_empty_and_tiny_ranges() -> None:
    for scheme in (INT8, UINT8):
        assert float(affine_params(0.0, 0.0, scheme).scale) == 1.0
        assert float(affine_params(-1e-45, 1e-45, scheme).scale) == np.float32(SMALLEST_SCALE)
    assert symmetric_params(np.array([0.0, 127.0, 1e-44]), INT8, axis=0).scale.tolist() == [
        1.0,
        1.0,
        np.float32(SMALLEST_SCALE),
    ]


def test_types_and_shapes() -> None:
    tensor, channel = affine_params(-1, 2, UINT8), symmetric_params(np.ones(3), INT8, axis=1)
    for params, shape, codes in ((tensor, (), "uint8"), (channel, (3,), "int8")):
        assert (params.scale.dtype.name, params.zero_point.dtype.name) == ("float32", "int32")
        assert params.scale.shape == params.zero_point.shape == shape
        quantized = quantize(np.zeros((2, 3, 4)), params)
        assert (quantized.dtype.name, dequantize(quantized, params).dtype.name) == (codes, "float32")
    assert quantize(np.zeros(()), tensor).shape == ()


def test_sqnr() -> None:
    rng = np.random.default_rng(0)
    signal = rng.normal(size=1000)
    assert sqnr_db(signal, signal) == np.inf
    assert sqnr_db(signal, signal * 0.99) == pytest.approx(40.0)  # the noise is a hundredth of the signal
    assert sqnr_db(np.zeros(3), np.ones(3)) == -np.inf
    assert sqnr_db(signal, signal / 2) < 7  # a scale that is off by 2 does not pass
    long = np.zeros((3, 100_000), np.float32)
    long[2, -1] = 1.0  # more values than are looked at at once, and all that counts is the last
    assert sqnr_db(long, 0.9 * long) == pytest.approx(20.0, abs=1e-5)  # of 0.9 in float32
    step = 2 / 255
    # Noise of rounding is uniform over a step: variance step^2 / 12, for a signal of variance 1/3.
    x = rng.uniform(-1, 1, 100_000).astype(np.float32)
    params = affine_params(-1, 1, UINT8)
    assert sqnr_db(x, dequantize(quantize(x, params), params)) == pytest.approx(
        10 * np.log10(4 / step**2), abs=0.05
    )
