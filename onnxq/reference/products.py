"""Convolutions and matrix products on codes.

Inputs of each kernel are those of the operator of the same name, in its order; an absent one is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.reference.arithmetic import Codes, Floats, Sums, along, dynamic_grid, quantize_linear, requantize
from onnxq.reference.sums import Arithmetic, product, wrapped
from onnxq.reference.windows import Windows

Array = NDArray[Any]
Attributes = Mapping[str, Any]
Inputs = Sequence[Any]
Outputs = tuple[Array, ...]

NO_ZERO = np.zeros((), np.int8)


def qlinear_conv(attributes: Attributes, inputs: Inputs, arithmetic: Arithmetic) -> Outputs:
    """x (N, C, *spatial), w (O, C / group, *kernel) -> (N, O, *counts)."""
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, *bias = inputs
    sums = conv_sums(attributes, (x, x_zero), (w, w_zero), arithmetic)
    if bias and bias[0] is not None:
        sums = wrapped(sums.astype(np.int64) + along(bias[0], sums.ndim, 1))
    factor = (_one(x_scale) * w_scale) / _one(y_scale)
    return (requantize(sums, along(factor, sums.ndim, 1), y_zero),)


def conv_integer(attributes: Attributes, inputs: Inputs, arithmetic: Arithmetic) -> Outputs:
    """int32 sums (N, O, *counts)."""
    x, w, *zeros = inputs
    x_zero, w_zero = _zeros(zeros)
    return (conv_sums(attributes, (x, x_zero), (w, w_zero), arithmetic),)


def conv_sums(
    attributes: Attributes, data: tuple[Codes, Codes], weights: tuple[Codes, Codes], arithmetic: Arithmetic
) -> Sums:
    """Sums (N, O, *counts) of a convolution; data and weights come with their zero points, () or (O,).

    The reduction runs over the window first, the channels of the group within, as the kernels' packed weights do.
    Kernels with one input and one output channel per group add in 32 bits everywhere.
    """
    (x, x_zero), (w, w_zero) = data, weights
    group, channels = attributes.get("group", 1), w.shape[1]
    windows = Windows.read(attributes, x.shape[2:], w.shape[2:])
    view = windows.over(x, x_zero.reshape(()))
    if channels == 1 and len(w) == group:
        return _depthwise(view, x_zero, w, along(w_zero, w.ndim, 0))
    dims, outputs = w.ndim - 2, len(w) // group
    axes = (0, *range(2, 2 + 2 * dims), 1)
    parts = []
    for index in range(group):
        ours = slice(index * outputs, (index + 1) * outputs)
        rows = view[:, index * channels : (index + 1) * channels].transpose(axes)
        matrix = np.moveaxis(w[ours], 1, -1).reshape(outputs, -1).T
        zero = w_zero[ours] if w_zero.size > 1 else w_zero.reshape(())
        flat = rows.reshape(-1, matrix.shape[0])
        parts.append(product(flat, x_zero.reshape(()), matrix, zero, arithmetic))
    sums = np.concatenate(parts, axis=1).reshape(len(x), *windows.counts, len(w))
    return np.moveaxis(sums, -1, 1)


def _depthwise(view: Codes, x_zero: Codes, w: Codes, w_zero: Codes) -> Sums:
    """Tap by tap; view (N, C, *counts, *kernel), w (C, 1, *kernel)."""
    steps = w[:, 0].astype(np.int32) - (w_zero[:, 0] if w_zero.ndim else w_zero).astype(np.int32)
    sums: Sums = np.zeros(view.shape[: 2 + steps.ndim - 1], np.int32)
    for tap in np.ndindex(*steps.shape[1:]):
        factors = along(steps[(slice(None), *tap)], sums.ndim, 1)
        sums += (view[(..., *tap)].astype(np.int32) - x_zero.astype(np.int32)) * factors
    return sums


def qlinear_matmul(attributes: Attributes, inputs: Inputs, arithmetic: Arithmetic) -> Outputs:
    """a (..., M, K), b (..., K, N) -> (..., M, N)."""
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = inputs
    sums = product(a, a_zero.reshape(()), b, _vector(b_zero), arithmetic)
    return (requantize(sums, (_one(a_scale) * _vector(b_scale)) / _one(y_scale), y_zero),)


def matmul_integer(attributes: Attributes, inputs: Inputs, arithmetic: Arithmetic) -> Outputs:
    """int32 sums (..., M, N)."""
    a, b, *zeros = inputs
    a_zero, b_zero = _zeros(zeros)
    return (product(a, a_zero.reshape(()), b, _vector(b_zero), arithmetic),)


def matmul_to_float(attributes: Attributes, inputs: Inputs, arithmetic: Arithmetic) -> Outputs:
    """float32(sum) * (a_scale * b_scale) + bias."""
    a, b, a_scale, b_scale, *rest = inputs
    a_zero, b_zero = _zeros(rest[:2])
    sums = product(a, a_zero.reshape(()), b, _vector(b_zero), arithmetic)
    values = sums.astype(np.float32) * (_one(a_scale) * _vector(b_scale))
    bias = rest[2] if len(rest) > 2 else None
    return (values if bias is None else values + bias,)


def dynamic_matmul(attributes: Attributes, inputs: Inputs, arithmetic: Arithmetic) -> Outputs:
    """The same for a float a, quantized by its own range."""
    a, b, b_scale, *rest = inputs
    b_zero, bias = ([*rest, None, None])[:2]
    scale, zero = dynamic_grid(a)
    codes = quantize_linear(a, scale, zero)
    return matmul_to_float(attributes, [codes, b, scale, b_scale, zero, b_zero, bias], arithmetic)


def qgemm(attributes: Attributes, inputs: Inputs, arithmetic: Arithmetic) -> Outputs:
    """a (..., M, K), b (K, N) or transposed, c int32 -> codes, or float32 without an output grid."""
    a, a_scale, a_zero, b, b_scale, b_zero, *rest = inputs
    c, y_scale, y_zero = ([*rest, None, None, None])[:3]
    left = np.swapaxes(a, -1, -2) if attributes.get("transA", 0) else a
    right = b.T if attributes.get("transB", 0) else b
    sums = product(left, a_zero.reshape(()), right, _vector(b_zero), arithmetic)
    if c is not None:
        sums = wrapped(sums.astype(np.int64) + c)
    factor = (np.float32(attributes.get("alpha", 1.0)) * _one(a_scale)) * _vector(b_scale)
    if y_scale is None:
        return (sums.astype(np.float32) * factor,)
    return (requantize(sums, factor / _one(y_scale), y_zero),)


def dynamic_quantize(attributes: Attributes, inputs: Inputs, arithmetic: Arithmetic) -> Outputs:
    """Codes uint8, scale () and zero point () of a float tensor."""
    scale, zero = dynamic_grid(inputs[0])
    return quantize_linear(inputs[0], scale, zero), scale, zero


def reduction(op: str, attributes: Attributes, weights: Array) -> tuple[str, int]:
    """Kind and output-channel axis of weights, as `onnxq.saturation` takes them."""
    if "Conv" in op:
        is_depthwise = weights.shape[:2] == (attributes.get("group", 1), 1)
        return ("Depthwise" if is_depthwise else "Conv"), 0
    return "Gemm", 0 if attributes.get("transB", 0) else 1


def _zeros(given: Inputs) -> tuple[Codes, Codes]:
    """Two optional zero points."""
    first, second = ([*given, None, None])[:2]
    return (NO_ZERO if first is None else first, NO_ZERO if second is None else second)


def _one(value: Array) -> Floats:
    """A scalar that may come as a vector of one."""
    return value.reshape(())


def _vector(values: Array) -> Array:
    """() or (N,), whatever rank one value or a row of them comes in."""
    return values.reshape(()) if values.size == 1 else values
