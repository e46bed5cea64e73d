"""Rounding and saturation against fractions, onnx's evaluator and onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, helper
from onnx.reference import ReferenceEvaluator

from onnxq.reference.arithmetic import (
    dequantize_linear,
    dynamic_grid,
    every_code,
    fma,
    look_up,
    quantize_linear,
    requantize,
)

FLOATS = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)


def nearest(value: Fraction) -> np.float32:
    """The float32 nearest to a fraction, ties to the even one."""
    guess = np.float32(float(value))
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(near, key=lambda x: (abs(Fraction(float(x)) - value), int(x.view(np.int32)) & 1))


@given(FLOATS, FLOATS, FLOATS)
def test_a_fused_addition_rounds_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if not 2.0**-100 < abs(exact) < 2.0**120:
        return
    found = fma(*(np.array([x], np.float32) for x in (a, b, c)))[0]
    assert found == nearest(exact)


def test_a_fused_addition_where_float64_would_round_twice() -> None:
    """(1 + 2^-23)(1 - 2^-23) 2^-24 lies 2^-70 below the middle between two float32 above 1, which float64 cannot tell."""
    odd = 1 + 2.0**-23  # a tie goes to the even neighbour above it
    for sign in (1, -1):
        a, b = np.float32(2.0**-24 * (1 + 2.0**-23)), np.float32(sign * (1 - 2.0**-23))
        addend = np.float32(sign * odd)
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(addend))
        assert np.float32(np.float64(a) * np.float64(b) + np.float64(addend)) != nearest(exact)
        assert fma(np.array([a]), np.array([b]), np.array([addend]))[0] == nearest(exact) == addend


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_quantizing_ties_and_extremes(
    dtype: type[np.integer[Any]], assert_exact: Callable[..., Any], build_model: Callable[..., ModelProto]
) -> None:
    scale, zero = np.float32(0.37), np.array(dtype(3))
    steps = np.concatenate([np.arange(-600, 600) / 2, [np.inf, -np.inf, 1e30, -1e30, 1e-30]])
    feeds = {"x": (steps.astype(np.float32) * scale).astype(np.float32)}
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
    found = assert_exact(build_model([node], feeds, {"s": scale, "z": zero}), feeds)["y"]
    assert (found.min(), found.max()) == (np.iinfo(dtype).min, np.iinfo(dtype).max)


def test_quantizing_per_channel_and_by_block() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 8, 5)).astype(np.float32)
    scale, zero = rng.uniform(0.01, 0.1, 8).astype(np.float32), rng.integers(0, 255, 8).astype(np.uint8)
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], axis=1)
    (expected,) = ReferenceEvaluator(node).run(None, {"x": x, "s": scale, "z": zero})
    codes = quantize_linear(x, scale, zero, 1)
    np.testing.assert_array_equal(codes, expected)
    blocks = rng.uniform(0.01, 0.1, (3, 3, 5)).astype(np.float32)
    node = helper.make_node("DequantizeLinear", ["x", "s"], ["y"], axis=1, block_size=3)
    (values,) = ReferenceEvaluator(node).run(None, {"x": codes, "s": blocks})
    np.testing.assert_array_equal(dequantize_linear(codes, blocks, None, 1, 3), values)


@given(st.lists(FLOATS, min_size=1, max_size=20))
def test_the_grid_of_a_dynamic_quantization(values: list[float]) -> None:
    x = np.array(values, np.float32)
    if not 0.0 <= float(np.ptp(np.append(x, 0))) < 1e30:
        return
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])
    codes, scale, zero = ReferenceEvaluator(node).run(None, {"x": x})
    found_scale, found_zero = dynamic_grid(x)
    if x.any():  # onnx's evaluator gives scale 0 for zeros, onnxruntime 1
        assert (found_scale, found_zero) == (scale, zero)
        np.testing.assert_array_equal(quantize_linear(x, found_scale, found_zero), codes)
    else:
        assert (found_scale.item(), found_zero.item()) == (1.0, 0)


def test_sums_are_rounded_to_float32_before_they_are_scaled() -> None:
    sums = np.array([2**24 + 1, 2**24 + 3, -5, 5, 3], np.int32)
    found = requantize(sums, np.asarray(np.float32(0.5)), np.array(10, np.uint8))
    np.testing.assert_array_equal(found, [255, 255, 8, 12, 12])  # -2.5 and 2.5 go to even, 1.5 to 2
    tiny = np.asarray(np.float32(2.0**-20))
    assert requantize(sums[:2], tiny, np.array(0, np.uint8)).tolist() == [16, 16]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_tables_have_an_entry_for_each_code(dtype: type[np.integer[Any]]) -> None:
    codes: NDArray[Any] = every_code(dtype)
    assert sorted(codes) == list(range(np.iinfo(dtype).min, np.iinfo(dtype).max + 1))
    some = np.array([[0, 5], [np.iinfo(dtype).max, np.iinfo(dtype).min]], dtype)
    np.testing.assert_array_equal(look_up(codes, some), some)
