"""Affine quantization of arrays.

Rounding is stated here once: half to even, then saturation, as ONNX's QuantizeLinear:

    q = clip(round(x / scale) + zero_point, qmin, qmax)        x_hat = (q - zero_point) * scale
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxq.scheme import QuantScheme

Floats = NDArray[np.floating]
Codes = NDArray[np.integer]
Number = TypeVar("Number", bound=np.generic)

CHUNK = 1 << 18  # values in float64 at once
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, eq=False)
class QuantParams:
    """A grid with its scale and zero point.

    Attributes:
        scheme: the integer grid.
        scale: float32, shape () per tensor, (C,) per channel, (C, blocks) per block; positive.
        zero_point: int32, the same shape.
        axis: channel axis of the quantized array; None per tensor.
    """

    scheme: QuantScheme
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32] = field(default_factory=lambda: np.zeros((), np.int32))
    axis: int | None = None

    @property
    def low(self) -> NDArray[np.float32]:
        """Smallest representable value, the shape of scale."""
        return ((self.scheme.qmin - self.zero_point) * self.scale).astype(np.float32)

    @property
    def high(self) -> NDArray[np.float32]:
        """Largest representable value, the shape of scale."""
        return ((self.scheme.qmax - self.zero_point) * self.scale).astype(np.float32)

    def broadcast(self, values: NDArray[Number], ndim: int) -> NDArray[Number]:
        """Reshape a vector (C,) so that it broadcasts over an array of rank `ndim`; () passes through."""
        if self.axis is None or values.ndim == 0:
            return values
        shape = [1] * ndim
        shape[self.axis] = -1
        return values.reshape(shape)


def symmetric_params(limit: Floats | float, scheme: QuantScheme, axis: int | None = None) -> QuantParams:
    """The symmetric grid that represents [-limit, limit], codes ±(2^(bits-1)-1).

    Args:
        limit: largest magnitude, shape () or (C,), non-negative; 0 gives scale 1.
    """
    limits = np.asarray(limit, np.float64)
    steps = (1 << (scheme.bits - 1)) - 1
    scale = np.where(limits > 0, np.maximum(limits / steps, SMALLEST_SCALE), 1.0).astype(np.float32)
    return QuantParams(scheme, scale, np.full(scale.shape, scheme.midpoint, np.int32), axis)


def affine_params(low: float, high: float, scheme: QuantScheme) -> QuantParams:
    """The per-tensor grid for values in [low, high], widened to hold zero, which is represented exactly.

    A symmetric scheme takes the larger magnitude; an empty range gives scale 1.
    """
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if scheme.symmetric:
        return symmetric_params(max(-low, high), scheme)
    span = high - low
    if span == 0.0:
        return QuantParams(scheme, np.ones((), np.float32), np.full((), scheme.qmin, np.int32))
    scale = np.float32(max(span / (scheme.qmax - scheme.qmin), SMALLEST_SCALE))
    zero = int(np.clip(round(scheme.qmin - low / float(scale)), scheme.qmin, scheme.qmax))
    return QuantParams(scheme, np.asarray(scale), np.full((), zero, np.int32))


def quantize(x: Floats, params: QuantParams) -> Codes:
    """Codes of `x` (any shape, no NaN), int8 or uint8 by the scheme's sign."""
    scheme = params.scheme
    scale = params.broadcast(params.scale, x.ndim)
    zero = params.broadcast(params.zero_point, x.ndim).astype(np.float32)
    with np.errstate(over="ignore"):  # what overflows float32, or has no exact integer in it, saturates
        q = np.asarray(np.divide(x, scale, dtype=np.float32))
    np.rint(q, out=q)
    q += zero
    np.clip(q, scheme.qmin, scheme.qmax, out=q)
    codes: Codes = q.astype(np.int8 if scheme.signed else np.uint8)
    return codes


def dequantize(codes: Codes, params: QuantParams) -> NDArray[np.float32]:
    """Values of the codes, float32, the same shape."""
    zero = params.broadcast(params.zero_point, codes.ndim)
    scale = params.broadcast(params.scale, codes.ndim)
    values: NDArray[np.float32] = np.asarray(np.subtract(codes, zero, dtype=np.float32))  # exact below 2^24
    values *= scale
    return values


def sqnr_db(reference: Floats, approximation: Floats) -> float:
    """Signal to quantization noise ratio in dB, 10 log10(sum r^2 / sum (r - a)^2), of arrays of one shape; inf when equal.

    >>> round(sqnr_db(np.array([1.0, -1.0]), np.array([0.9, -0.9])), 6)
    20.0
    """
    r, a = (np.ravel(values) for values in (reference, approximation))
    signal, noise = 0.0, 0.0
    for start in range(0, r.size, CHUNK):
        part = r[start : start + CHUNK].astype(np.float64)
        signal += float(np.sum(part**2))
        noise += float(np.sum((part - a[start : start + CHUNK]) ** 2))
    if noise == 0.0:
        return float("inf")
    return 10.0 * float(np.log10(signal / noise)) if signal > 0.0 else float("-inf")
