"""Integer sums of products, exact or as x86 machines without VNNI make them.

The AVX2 kernels for uint8 by int8 multiply bytes with `vpmaddubsw`, which adds the products of places 2i and 2i + 1 of
the reduction and saturates them at 16 bits; these pairs are then added in 32 bits. The kernels for uint8 by uint8 and for
int8 by int8 widen first and are exact, and so are those that accumulate in 32 bits (VNNI, ARM).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Codes = NDArray[np.integer]
Sums = NDArray[np.int32]
Arithmetic = Literal["exact", "avx2"]

INT16 = np.iinfo(np.int16)
FLOAT32_EXACT, FLOAT64_EXACT = 2**24, 2**53


def product(a: Codes, a_zero: Codes, b: Codes, b_zero: Codes, arithmetic: Arithmetic) -> Sums:
    """Sums over k of (a[m, k] - a_zero) (b[k, n] - b_zero), int32 that wraps, shape (..., M, N).

    Args:
        a: (..., M, K) uint8 or int8.
        b: (..., K, N) uint8 or int8.
        a_zero: ().
        b_zero: () or (N,).
        arithmetic: `avx2` saturates pairs where a is uint8 and b is int8.
    """
    sums = _exact(a.astype(np.int16) - a_zero.astype(np.int16), b.astype(np.int16) - b_zero.astype(np.int16))
    if arithmetic == "exact" or a.dtype != np.uint8 or b.dtype != np.int8:
        return sums
    return np.subtract(sums, lost(a, b))


def _exact(a: Codes, b: Codes) -> Sums:
    """The product through floats, in which all partial sums are integers that they hold exactly."""
    largest = int(np.abs(a).max(initial=0)) * int(np.abs(b).sum(axis=-2, dtype=np.int64).max(initial=0))
    assert largest < FLOAT64_EXACT
    kind = np.float32 if largest < FLOAT32_EXACT else np.float64
    return wrapped(np.matmul(a.astype(kind), b.astype(kind)))


def wrapped(sums: Array) -> Sums:
    """Integers as int32 that wraps around, as the kernels' registers do."""
    return sums.astype(np.int64).astype(np.int32)


def lost(a: Codes, b: Codes) -> Sums:
    """What saturation takes from each sum, int32 (..., M, N), which is negative where sums come out too large.

    Only pairs that can overflow with the largest codes found in their columns of a are looked at.

    Args:
        a: (..., M, K) uint8 as the kernel reads it, zero points included.
        b: (..., K, N) int8.
    """
    if b.ndim > 2:
        lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        left, right = (np.broadcast_to(x, (*lead, *x.shape[-2:])) for x in (a, b))
        parts = [lost(left[i], right[i]) for i in np.ndindex(*lead)]
        return np.array(parts, np.int32).reshape(*lead, a.shape[-2], b.shape[-1])
    rows = a.reshape(-1, a.shape[-1])
    beyond = np.zeros((len(rows), b.shape[1]), np.int32)
    first, second = _pairs(rows.T), _pairs_of_weights(b)
    peaks = first.max(axis=2, initial=0).astype(np.int32)[..., None]  # (pairs, 2, 1)
    up, down = ((peaks * np.maximum(sign * second, 0)).sum(axis=1) for sign in (1, -1))
    risky = (up > INT16.max) | (down > -int(INT16.min))  # (pairs, N)
    for pair in np.flatnonzero(risky.any(axis=1)):
        columns = np.flatnonzero(risky[pair])
        _add_excess(beyond, first[pair], second[pair][:, columns], columns)
    return beyond.reshape(*a.shape[:-1], b.shape[1])


def _pairs(columns: Codes) -> Codes:
    """(K, M) as (pairs, 2, M); an odd last one is paired with zeros."""
    padded = np.pad(columns, ((0, len(columns) % 2), (0, 0)))
    return padded.reshape(-1, 2, columns.shape[1])


def _pairs_of_weights(b: Codes) -> Sums:
    return _pairs(b).astype(np.int32)


def _add_excess(beyond: Sums, codes: Codes, weights: Sums, columns: NDArray[np.intp]) -> None:
    """Add to some columns of (M, N) by how much the products of one pair pass 16 bits.

    Args:
        codes: (2, M).
        weights: (2, columns).
    """
    wide = codes.astype(np.int32)
    up, down = (np.maximum(sign * weights, 0).max(axis=1) for sign in (1, -1))
    reached = (wide[0] * up[0] + wide[1] * up[1] > INT16.max) | (
        wide[0] * down[0] + wide[1] * down[1] > -int(INT16.min)
    )
    rows = np.flatnonzero(reached)
    if not rows.size:
        return
    sums = wide[:, rows].T @ weights
    beyond[np.ix_(rows, columns)] += sums - np.clip(sums, INT16.min, INT16.max)
