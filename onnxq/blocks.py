"""Codes in blocks: one scale for each run of `block` values along an axis.

A symmetric grid has one code more below zero than above. The scale takes the sign that gives that code to the value of largest
magnitude, p, so that the whole grid is used:

    s = -p / 2^(b-1)        q = clip(round(x / s), -2^(b-1), 2^(b-1) - 1)        x_hat = s q

(as llama.cpp's Q4_0): at 4 bits 1 dB better than s = |p| / 7, at 2 bits 5 dB. An asymmetric grid reaches from the smallest value
to the largest one, and holds zero. Candidates c stretch the grid to c s; for the codes q that this gives, the scale of least
squared error is sum x q / sum q^2, and the best candidate is that of the largest (sum x q)^2 / sum q^2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.affine import SMALLEST_SCALE
from onnxq.errors import DataError
from onnxq.parallel import for_each

Floats = NDArray[np.float32]
Codes = NDArray[np.integer[Any]]

PLAIN = (1.0,)
NEAR = (1.0, 0.9, 0.8)  # of these, blocks up to LONG lose 0.2 dB to a fine search at 4 bits
FAR = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # the largest of many values lies far out
LONG = 128
CHUNK = 1 << 17  # values that are quantized at a time: they and their codes stay in a processor's cache


@dataclass(frozen=True, eq=False)
class BlockCodes:
    """An array as codes.

    Attributes:
        bits: 2 to 8.
        axis: along which the blocks lie.
        block: values in a block; the last one of the axis may have fewer.
        codes: int8 of zero point 0, or uint8, in the shape of the array.
        scale: float32, either sign, in the shape of the array with the number of blocks at the axis.
        zero_point: uint8 in the shape of the scale, None where the codes are int8.
    """

    bits: int
    axis: int
    block: int
    codes: Codes
    scale: Floats
    zero_point: NDArray[np.uint8] | None = None

    def values(self) -> Floats:
        """What the codes stand for, float32."""
        codes = self.codes.astype(np.float32)
        if self.zero_point is not None:
            codes -= self._spread(self.zero_point)
        codes *= self._spread(self.scale)
        return codes

    def _spread(self, of_blocks: NDArray[Any]) -> NDArray[Any]:
        """What belongs to blocks, for each value of theirs."""
        every = np.repeat(of_blocks, self.block, axis=self.axis)
        return every.take(range(self.codes.shape[self.axis]), axis=self.axis)


def quantize_blocks(
    values: Floats,
    axis: int,
    bits: int,
    block: int,
    *,
    symmetric: bool = True,
    search: bool = True,
    threads: int = 0,
) -> BlockCodes:
    """Codes of an array, in blocks along an axis, each on its own.

    Args:
        values: any shape, float32.
        axis: not negative.
        bits: 2 to 8.
        block: values in a block, at least 1; more than the axis has are as many as it has.
        symmetric: zero point 0 of int8 codes; else each block has a zero point of its own in uint8.
        search: try a few finer grids on each block; without, the largest values decide.
        threads: 0 for one per core; the codes do not depend on it.

    Raises:
        DataError: a value is NaN or infinite.
    """
    size = values.shape[axis]
    block = max(min(block, size), 1)
    shape = (*values.shape[:axis], -(-size // block), *values.shape[axis + 1 :])
    found = BlockCodes(
        bits,
        axis,
        block,
        np.empty(values.shape, np.int8 if symmetric else np.uint8),
        np.empty(shape, np.float32),
        None if symmetric else np.empty(shape, np.uint8),
    )
    outer, inner = int(np.prod(shape[:axis])), int(np.prod(shape[axis + 1 :]))
    codes, scale = found.codes.reshape(outer, size, inner), found.scale.reshape(outer, -1, inner)
    zero = None if found.zero_point is None else found.zero_point.reshape(scale.shape)
    quantize = _symmetric if symmetric else _asymmetric
    candidates = (NEAR if block <= LONG else FAR) if search else PLAIN
    pieces = _lying if inner == 1 else _standing

    def fill(piece: _Piece) -> None:
        x, where, place = piece
        columns, steps, zeros = quantize(np.ascontiguousarray(x), bits, candidates)
        target = codes[where]
        target[...] = (columns if inner > 1 else columns.T).reshape(target.shape)
        scale[place] = steps.reshape(scale[place].shape)
        if zero is not None and zeros is not None:
            zero[place] = zeros.reshape(scale[place].shape)

    for_each(fill, pieces(values.reshape(outer, size, inner), block), threads)
    return found


_Piece = tuple[Floats, tuple[slice | int, ...], tuple[slice | int, ...]]


def _standing(values: Floats, block: int) -> Iterator[_Piece]:
    """Blocks of (outer, size, inner) as columns (block, n), with the places of their values and of their scales."""
    outer, size, inner = values.shape
    width = max(CHUNK // block, 64)
    for o in range(outer):
        for index, start in enumerate(range(0, size, block)):
            for left in range(0, inner, width):
                columns = slice(left, left + width)
                where = (o, slice(start, start + block), columns)
                yield values[where], where, (o, index, columns)


def _lying(values: Floats, block: int) -> Iterator[_Piece]:
    """The same of (outer, size, 1), whose blocks lie in memory."""
    outer, size, _ = values.shape
    whole = size // block * block
    height = max(CHUNK // size, 1)
    for top in range(0, outer, height):
        rows = slice(top, top + height)
        if whole:
            x = values[rows, :whole].reshape(-1, block)
            yield x.T, (rows, slice(whole)), (rows, slice(whole // block))
        if whole < size:
            x = values[rows, whole:, 0]
            yield x.T, (rows, slice(whole, size)), (rows, slice(whole // block, None))


def _symmetric(x: Floats, bits: int, candidates: Sequence[float]) -> tuple[Codes, Floats, None]:
    """Codes of the columns (B, n), scale (n,), and no zero point."""
    half = 1 << (bits - 1)
    low, high = _extremes(x)
    first, last = np.float32(-half), np.float32(half - 1)
    scale = _usable(np.where(-low > high, low, high) / first)
    step, scale = _best(x, scale, None, first, last, candidates)
    return _rounded(x, step, None, first, last).astype(np.int8), scale, None


def _asymmetric(x: Floats, bits: int, candidates: Sequence[float]) -> tuple[Codes, Floats, NDArray[np.uint8]]:
    """Codes of the columns (B, n), scale and zero point (n,)."""
    steps = np.float32((1 << bits) - 1)
    low, high = _extremes(x)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = _usable((high - low) / steps)
    zero = np.rint(-low / scale)
    step, scale = _best(x, scale, zero, np.float32(0), steps, candidates)
    return _rounded(x, step, zero, np.float32(0), steps).astype(np.uint8), scale, zero.astype(np.uint8)


def _extremes(x: Floats) -> tuple[Floats, Floats]:
    low, high = x.min(axis=0), x.max(axis=0)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise DataError("weights hold NaN or infinite values")
    return low, high


def _usable(scale: NDArray[Any]) -> Floats:
    """The scale, 1 where a block holds nothing but zeros."""
    return np.where(np.abs(scale) < SMALLEST_SCALE, np.float32(1), scale).astype(np.float32, copy=False)


def _rounded(x: Floats, step: Floats, zero: Floats | None, first: np.float32, last: np.float32) -> Floats:
    """Codes as float32, (B, n)."""
    codes = x * (np.float32(1) / step)
    np.rint(codes, out=codes)
    if zero is not None:
        codes += zero
    clipped: Floats = np.clip(codes, first, last, out=codes)
    return clipped


def _best(
    x: Floats,
    scale: Floats,
    zero: Floats | None,
    first: np.float32,
    last: np.float32,
    candidates: Sequence[float],
) -> tuple[Floats, Floats]:
    """The step to round each column with and the scale of the codes that this gives, (n,) each."""
    if candidates is PLAIN:
        return scale, scale
    gain, step, fitted = np.full(scale.shape, -1, np.float32), scale, scale
    for factor in candidates:
        trial = scale * np.float32(factor)
        codes = _rounded(x, trial, zero, first, last)
        if zero is not None:
            codes -= zero
        # Sums over the first axis have one order on every machine; those of einsum would not.
        product, square = (x * codes).sum(axis=0), (codes * codes).sum(axis=0)
        fit = product / np.where(square > 0, square, np.float32(1))
        better = product * fit > gain
        gain = np.where(better, product * fit, gain)
        step, fitted = np.where(better, trial, step), np.where(better & (square > 0), fit, fitted)
    return step, _usable(fitted)
