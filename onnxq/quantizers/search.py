"""Search for the grid (scale, zero point) of least error, for many rows at once.

With a fixed zero point the error is, up to ripples, a convex function of the scale: what saturates falls
convexly with the clip, what rounds grows with its square. So the scale goes down from min-max by octaves
until no row gains, then scale and zero point are refined around the best by shrinking patterns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxq.quantizers.base import Vector, grid
from onnxq.scheme import QuantScheme

# (scale (R, N), zero point (R, N)) -> error (R, N)
Error = Callable[[Vector, Vector], Vector]

OCTAVES = 16
SHIFTS = np.array([0.0, 1.0, -1.0, 4.0, -4.0])


@dataclass(frozen=True, eq=False)
class _Best:
    """The best grid of every row so far: scale, zero point and error, each (R,)."""

    scale: Vector
    zero: Vector
    error: Vector

    def better_of(self, error: Error, scale: Vector, zero: Vector) -> _Best:
        """This, or the best of the candidates (R, N) in the rows where that is strictly better."""
        errors = error(scale, zero)
        pick = np.argmin(errors, axis=1)[:, None]
        found, scales, zeros = (np.take_along_axis(a, pick, axis=1)[:, 0] for a in (errors, scale, zero))
        better = found < self.error
        return _Best(
            np.where(better, scales, self.scale),
            np.where(better, zeros, self.zero),
            np.where(better, found, self.error),
        )


def best_ranges(
    error: Error, low: Vector, high: Vector, scheme: QuantScheme, per_octave: int
) -> tuple[Vector, Vector]:
    """The ranges that the grids of least error represent.

    Args:
        error: the error of candidate grids; its unit does not matter.
        low, high: smallest and largest value of every row, (R,).
        scheme: the integer grid.
        per_octave: candidates in an octave of the first descent.

    Returns:
        Low and high, (R,); [0, 0] for rows of zeros.
    """
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    best = _descend(error, low, high, scheme, per_octave)
    if not scheme.symmetric and np.any((low < 0.0) & (high > 0.0)):
        best = _refine_both(error, best, low, high, scheme)
    best = _refine_scale(error, best, 1.0 / per_octave)
    if scheme.symmetric:
        limit = best.scale * ((1 << (scheme.bits - 1)) - 1)
        return -limit, limit
    return (scheme.qmin - best.zero) * best.scale, (scheme.qmax - best.zero) * best.scale


def _descend(error: Error, low: Vector, high: Vector, scheme: QuantScheme, per_octave: int) -> _Best:
    """The best clip of both ends to [-c, c], c from the largest magnitude down."""
    limit = np.maximum(-low, high)[:, None]
    best = _Best(np.zeros_like(low), np.zeros_like(low), np.full_like(low, np.inf))
    for octave in range(OCTAVES):
        clip = limit * 2.0 ** (-octave - np.arange(per_octave) / per_octave)
        candidates = grid(np.maximum(low[:, None], -clip), np.minimum(high[:, None], clip), scheme)
        before, best = best, best.better_of(error, *candidates)
        if np.array_equal(before.error, best.error):
            break
    return best


def _refine_both(error: Error, best: _Best, low: Vector, high: Vector, scheme: QuantScheme) -> _Best:
    """Zero points near and far, each with five scales; a row of one sign keeps its zero point.

    The scales are the best one and its neighbours, and those that leave the low or the high end where it is.
    """
    shifts = SHIFTS[np.abs(SHIFTS) < 1 << (scheme.bits - 1)]
    least = np.where(high <= 0.0, scheme.qmax, scheme.qmin)[:, None]
    most = np.where(low >= 0.0, scheme.qmin, scheme.qmax)[:, None]
    for round_ in range(4):
        scale, centre = best.scale[:, None], best.zero[:, None]
        zero = np.clip(centre + shifts, least, most)
        stretches = [np.broadcast_to(scale * 2.0 ** (k / (8 << round_)), zero.shape) for k in (-1, 0, 1)]
        anchored = [
            scale * np.divide(centre - end, zero - end, out=np.ones_like(zero), where=zero != end)
            for end in (scheme.qmin, scheme.qmax)
        ]
        scales = np.concatenate((*stretches, *(np.where(a > 0.0, a, scale) for a in anchored)), axis=1)
        best = best.better_of(error, scales, np.tile(zero, 5))
    return best


def _refine_scale(error: Error, best: _Best, step: float) -> _Best:
    """Scales between the neighbours of the best, `step` octaves away, in two rounds to 1/16 of a step."""
    offsets = np.array([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0]) / 4.0
    for span in (step, step / 4.0):
        scale = best.scale[:, None] * 2.0 ** (offsets * span)
        best = best.better_of(error, scale, np.repeat(best.zero[:, None], offsets.size, axis=1))
    return best
