"""The float32 arithmetic around integer kernels, in the runtime's own order of operations and rounding.

Rounding is half to even everywhere. What is float32 here is float32 in the kernels: one rounding more or less moves codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]
Floats = NDArray[np.float32]
Codes = NDArray[np.integer]
Sums = NDArray[np.int32]

BYTE = 256


def along(values: Array, ndim: int, axis: int) -> Array:
    """A vector (C,) shaped to broadcast along one axis of an array of rank `ndim`; one value alone becomes ()."""
    if values.size == 1:
        return values.reshape(())
    if values.ndim != 1:
        return values
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def quantize_linear(x: Floats, scale: Floats, zero: Codes, axis: int = 1) -> Codes:
    """Codes clip(round(x / scale), low - zero, high - zero) + zero, of the zero point's type.

    Args:
        x: float32 of any shape.
        scale, zero: () or (C,) along the axis.
    """
    zeros = along(zero, x.ndim, axis).astype(np.float32)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return saturate(np.divide(x, along(scale, x.ndim, axis), dtype=np.float32), zeros, zero.dtype)


def dequantize_linear(
    codes: Codes, scale: Floats, zero: Codes | None, axis: int = 1, block: int = 0
) -> Floats:
    """Values (codes - zero) * scale, float32, the same shape.

    Args:
        scale, zero: () or (C,) along the axis, or of the codes' rank with one entry for each block of the axis.
    """
    parts = [scale] if zero is None else [scale, zero]
    if block:
        parts = [np.repeat(p, block, axis).take(range(codes.shape[axis]), axis) for p in parts]
    scales, *zeros = (along(p, codes.ndim, axis) for p in parts)
    steps = codes.astype(np.int32)
    if zeros:
        steps = steps - zeros[0].astype(np.int32)
    values: Floats = (steps.astype(np.float32) * scales).astype(scales.dtype)
    return values


def dynamic_grid(x: Floats) -> tuple[Floats, NDArray[np.uint8]]:
    """Scale () and zero point () that DynamicQuantizeLinear chooses for a tensor of floats."""
    low = np.minimum(x.min(initial=np.float32(0)), np.float32(0))
    high = np.maximum(x.max(initial=np.float32(0)), np.float32(0))
    scale = np.float32(1) if high == low else (high - low) / np.float32(255)
    zero = np.rint(np.clip(np.float32(0) - low / scale, 0, 255)).astype(np.uint8)
    return np.asarray(scale, np.float32), np.asarray(zero)


def saturate(steps: Floats, zero: Array | np.float32, dtype: DTypeLike) -> Codes:
    """Real steps as codes: clipped so that the zero point fits, rounded, then moved by the zero point."""
    info = np.iinfo(np.dtype(dtype))
    inside = np.clip(steps, np.float32(info.min) - zero, np.float32(info.max) - zero)
    codes: Codes = (np.rint(inside) + zero).astype(dtype)
    return codes


def requantize(sums: Sums, factor: Floats, zero: Codes) -> Codes:
    """Codes of int32 sums: float32(sum) * factor, saturated.

    Args:
        sums: int32 of any shape.
        factor: float32 that broadcasts against the sums.
        zero: () zero point; its type is that of the codes.
    """
    return saturate(sums.astype(np.float32) * factor, zero.reshape(()).astype(np.float32), zero.dtype)


def fma(a: Array, b: Array, c: Array) -> Floats:
    """a * b + c in float32 with a single rounding.

    The product of two float32 is exact in float64. Their sum there is rounded to odd, after which rounding to float32
    equals rounding the exact sum (Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008).
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    is_even = (total.view(np.int64) & 1) == 0
    odd = np.where((error != 0) & is_even, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    result: Floats = odd.astype(np.float32)
    return result


def every_code(dtype: DTypeLike) -> Codes:
    """All codes of a byte, in the order of their bits, so that `codes.view(uint8)` indexes a table of them."""
    codes: Codes = np.arange(BYTE, dtype=np.uint8).view(np.dtype(dtype))
    return codes


def look_up(table: Array, codes: Codes) -> Array:
    """Entries of a table (256,) at the bits of each code."""
    found: Array = table[codes.view(np.uint8)]
    return found
