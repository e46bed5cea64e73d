"""The error that counts: what a difference of weights makes of a layer's inputs.

For a row d of differences and inputs x the mean squared error of the output is E[(d x)^2] = d^T C d with C = E[x x^T]. C may be
known whole, by its diagonal (inputs that do not correlate), or not at all (inputs of power 1).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Vector = NDArray[np.float64]

CHUNK = 1 << 16  # weights at once: some work arrays stay in the cache


def apply_moment(rows: Floats, moment: Floats | None = None) -> Floats:
    """C d of each row d.

    Args:
        rows: (R, K).
        moment: C as None (identity), its diagonal (K,), (K, K), or (groups, K, K) where groups divides R.

    Raises:
        ValueError: the moment does not fit the rows.
    """
    if moment is None:
        return rows
    groups = len(moment) if moment.ndim == 3 else 1
    if moment.ndim > 3 or moment.shape[-1] != rows.shape[1] or len(rows) % groups:
        raise ValueError(f"a moment of shape {moment.shape} does not fit rows of shape {rows.shape}")
    if moment.ndim == 1:
        product: Floats = rows * moment
        return product
    grouped = rows.reshape(groups, -1, rows.shape[1]) @ moment
    return grouped.reshape(rows.shape)


def output_errors(difference: Floats, moment: Floats | None = None) -> Vector:
    """d^T C d of each row of differences (R, K), (R,); see `apply_moment` for the moment."""
    error: Vector = np.vecdot(difference, apply_moment(difference, moment)).astype(np.float64)
    return np.maximum(error, 0.0)  # rounding leaves tiny negative numbers where inputs repeat each other


def parts(shape: tuple[int, ...], moment: Floats | None) -> Iterator[tuple[slice, Floats | None]]:
    """Rows (R, K) in parts of about CHUNK weights, whole groups or parts of one, each with its moment."""
    count, most = shape[0], max(CHUNK // max(shape[1], 1), 1)
    groups = len(moment) if moment is not None and moment.ndim == 3 else 1
    each = count // max(groups, 1)
    if groups > 1 and each <= most:
        together = max(most // max(each, 1), 1)
        for group in range(0, groups, together):
            stop = min(group + together, groups)
            yield slice(group * each, stop * each), moment[group:stop]  # type: ignore[index]
        return
    for group in range(groups):
        own = moment[group] if moment is not None and moment.ndim == 3 else moment
        for start in range(group * each, (group + 1) * each, most):
            yield slice(start, min(start + most, (group + 1) * each)), own
