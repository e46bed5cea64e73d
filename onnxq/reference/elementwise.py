"""Additions, multiplications and curves on codes, one place at a time.

Inputs of each kernel are those of the operator of the same name in onnxruntime's own domain, in its order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.reference.arithmetic import (
    Codes,
    Floats,
    dequantize_linear,
    every_code,
    fma,
    look_up,
    quantize_linear,
    saturate,
)
from onnxq.reference.sums import Arithmetic

Array = NDArray[Any]
Attributes = Mapping[str, Any]
Inputs = Sequence[Any]
Outputs = tuple[Array, ...]

RESERVED = (
    5.0  # of the exponent, kept free by the runtime's Softmax so that a sum of exponentials stays finite
)
PER_ROW = 13  # opset from which Softmax normalizes along one axis


def quantize(attributes: Attributes, inputs: Inputs, arithmetic: Arithmetic) -> Outputs:
    """Codes of a float tensor."""
    x, scale, *zero = inputs
    point = zero[0] if zero and zero[0] is not None else np.zeros(scale.shape, np.uint8)
    return (quantize_linear(x, scale, point, attributes.get("axis", 1)),)


def dequantize(attributes: Attributes, inputs: Inputs, arithmetic: Arithmetic) -> Outputs:
    """Values of codes."""
    codes, scale, *zero = inputs
    axis, block = attributes.get("axis", 1), attributes.get("block_size", 0)
    return (dequantize_linear(codes, scale, zero[0] if zero else None, axis, block),)


def qlinear_add(attributes: Attributes, inputs: Inputs, arithmetic: Arithmetic) -> Outputs:
    """a * (a_scale / y_scale) + b * (b_scale / y_scale) + the part that is the same everywhere, with fused additions.

    The operand that is constant along the innermost axis is added first.
    """
    a, b = (inputs[0], inputs[1], inputs[2]), (inputs[3], inputs[4], inputs[5])
    y_scale, y_zero = inputs[6], inputs[7]
    if _is_repeated(inputs[0], inputs[3]):
        a, b = b, a
    ratios = [(scale / y_scale).reshape(()) for _, scale, _ in (a, b)]
    zeros = [zero.reshape(()).astype(np.float32) for _, _, zero in (a, b)]
    moved = fma(ratios[0], zeros[0], ratios[1] * zeros[1])
    fixed = y_zero.reshape(()).astype(np.float32) - moved
    partial = fma(b[0].astype(np.float32), ratios[1], fixed)
    total = fma(a[0].astype(np.float32), ratios[0], partial)
    return (saturate(total, np.float32(0), y_zero.dtype),)


def _is_repeated(a: Codes, b: Codes) -> bool:
    """Whether a alone is broadcast along the innermost axis on which the two differ in nothing else."""
    rank = max(a.ndim, b.ndim)
    left, right = ((1,) * (rank - x.ndim) + x.shape for x in (a, b))
    for size, other in zip(reversed(left), reversed(right), strict=True):
        if size != other:
            return size == 1
        if size != 1:
            return False
    return False


def qlinear_mul(attributes: Attributes, inputs: Inputs, arithmetic: Arithmetic) -> Outputs:
    """(a - a_zero) (b - b_zero) * ((a_scale * b_scale) / y_scale) + y_zero, then rounded."""
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = inputs
    steps = [x.astype(np.int32) - zero.reshape(()).astype(np.int32) for x, zero in ((a, a_zero), (b, b_zero))]
    ratio = ((a_scale * b_scale) / y_scale).reshape(())
    moved = (steps[0] * steps[1]).astype(np.float32) * ratio + y_zero.reshape(()).astype(np.float32)
    return (saturate(moved, np.float32(0), y_zero.dtype),)


def qlinear_concat(attributes: Attributes, inputs: Inputs, arithmetic: Arithmetic) -> Outputs:
    """Codes of all inputs on the output's grid, side by side; those of an equal grid are copied."""
    (y_scale, y_zero), rest = inputs[:2], inputs[2:]
    parts = []
    for x, scale, zero in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        is_same = scale.item() == y_scale.item() and zero.item() == y_zero.item()
        parts.append(x if is_same else _mapped(x, (scale, zero), (y_scale, y_zero), lambda values: values))
    return (np.concatenate(parts, attributes["axis"]),)


def qlinear_leaky_relu(attributes: Attributes, inputs: Inputs, arithmetic: Arithmetic) -> Outputs:
    """v where v >= 0, alpha v elsewhere, through a table of all codes."""
    x, x_scale, x_zero, y_scale, y_zero = inputs
    slope = np.float32(attributes.get("alpha", 0.01))
    leaky = lambda v: np.where(v >= 0, v, slope * v)  # noqa: E731
    return (_mapped(x, (x_scale, x_zero), (y_scale, y_zero), leaky),)


def qlinear_sigmoid(attributes: Attributes, inputs: Inputs, arithmetic: Arithmetic) -> Outputs:
    """1 / (1 + exp(-v)), rounded once to float32, through a table of all codes.

    The runtime evaluates a rational approximation; where the value lies within some 1e-7 of the middle between two
    codes, its table may differ by one.
    """
    x, x_scale, x_zero, y_scale, y_zero = inputs
    return (_mapped(x, (x_scale, x_zero), (y_scale, y_zero), sigmoid),)


def sigmoid(values: Floats) -> Floats:
    """The logistic function, correctly rounded up to the last place."""
    with np.errstate(over="ignore"):
        return (1.0 / (1.0 + np.exp(-values.astype(np.float64)))).astype(np.float32)


def _mapped(x: Codes, source: tuple[Array, Array], target: tuple[Array, Array], curve: Any) -> Codes:
    """Codes of a function of each value."""
    values = dequantize_linear(every_code(x.dtype), source[0].reshape(()), source[1].reshape(()))
    table = quantize_linear(curve(values), target[0].reshape(()), target[1].reshape(()))
    return look_up(table, x)


def qlinear_softmax(attributes: Attributes, inputs: Inputs, arithmetic: Arithmetic) -> Outputs:
    """Shares of exponentials along an axis, through a table of exponentials below the largest code of a row.

    The output's grid enters as the whole number floor(1 / y_scale), as in the runtime; the exponentials are added one after the
    other in float32, and divided in float64.
    """
    x, x_scale, _, y_scale, y_zero = inputs
    is_flat = attributes["opset"] < PER_ROW
    axis = attributes.get("axis", 1 if is_flat else -1)
    rows = x.reshape(*x.shape[: axis % x.ndim], -1) if is_flat else np.moveaxis(x, axis, -1)
    below = rows.max(axis=-1, keepdims=True).astype(np.int32) - rows.astype(np.int32)
    exponentials = _exponentials(x_scale.reshape(()), rows.shape[-1])[255 - below]
    sums = np.add.accumulate(exponentials, axis=-1, dtype=np.float32)[..., -1:]
    steps = np.floor(np.float32(1) / y_scale.reshape(())).astype(np.float64)
    shares = np.rint((exponentials * steps) / sums).astype(np.int32) + y_zero.reshape(()).astype(np.int32)
    codes = np.minimum(shares, np.iinfo(y_zero.dtype).max).astype(y_zero.dtype)
    return (codes.reshape(x.shape) if is_flat else np.moveaxis(codes, -1, axis),)


def _exponentials(scale: Floats, length: int) -> Floats:
    """exp((i - 255) scale + headroom) for i from 0 to 255, float32; the headroom keeps a sum of `length` finite."""
    largest = np.log(np.finfo(np.float32).max / np.float32(length))  # a float32 logarithm
    headroom = max(0.0, float(largest) - RESERVED) / float(scale)
    powers: Floats = np.exp((np.arange(256.0) - 255 + headroom) * float(scale)).astype(np.float32)
    return powers


def clip(attributes: Attributes, inputs: Inputs, arithmetic: Arithmetic) -> Outputs:
    """Codes no smaller and no larger than two codes, either of which may be missing."""
    x, low, high = ([*inputs, None, None])[:3]
    bounded = x if low is None else np.maximum(x, low)
    return (bounded if high is None else np.minimum(bounded, high),)


def smallest(attributes: Attributes, inputs: Inputs, arithmetic: Arithmetic) -> Outputs:
    """Min."""
    return (np.asarray(np.minimum.reduce(np.broadcast_arrays(*inputs))),)


def largest(attributes: Attributes, inputs: Inputs, arithmetic: Arithmetic) -> Outputs:
    """Max."""
    return (np.asarray(np.maximum.reduce(np.broadcast_arrays(*inputs))),)
