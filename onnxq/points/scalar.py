"""The one point that is closest to a row of weights: argmin over a factor a and codes q of |w - a q|^2, solved exactly.

For a given factor the codes are w / a rounded, so as a falls, a code of magnitude k - 1 becomes k at the breakpoint |w_j| /
(k - 1/2). For given codes the factor is S / N with S = <w, q> and N = <q, q>, and the error |w|^2 - S^2 / N. One sweep over
the sorted breakpoints, each of which adds |w_j| to S and 2 k - 1 to N, therefore meets the optimum, which is where S^2 / N is
largest.

Breakpoints at which saturation alone errs by more than a known solution need no visit: the optimal factor is larger.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnxq.parallel import for_each
from onnxq.points.errors import Floats, Vector, parts

GUESSES = 2.0 ** (-np.arange(16) / 4.0)  # factors, as parts of the one that saturates nothing
CODE_BITS, VALUE_BITS = 8, 32  # of a sort key, below its row
LOWER = 1.0 - 1e-6  # brings a breakpoint, rounded to float32, below all that it stands for

Codes = NDArray[np.int8]


def best_point(rows: Floats, ends: tuple[int, int]) -> tuple[Vector, Codes]:
    """Factor and codes of least squared error for each row.

    Args:
        rows: (R, K), finite.
        ends: smallest and largest code, the former negative.

    Returns:
        Factors, float64, (R,), negative where the ends differ and the other way round is better, 0 for rows of zeros; codes,
        int8, (R, K).
    """
    factor, codes = np.zeros(len(rows)), np.zeros(rows.shape, np.int8)

    def solve(place: tuple[slice, Floats | None]) -> None:
        part, _ = place
        factor[part], codes[part] = _best_of_signs(rows[part], ends)

    for_each(solve, parts(rows.shape, None))
    return factor, codes


def _best_of_signs(rows: Floats, ends: tuple[int, int]) -> tuple[Vector, Codes]:
    factor, codes, gain = _sweep(rows, ends)
    if ends[0] == -ends[1]:
        return factor, codes
    turned = _sweep(-rows, ends)
    better = turned[2] > gain
    return np.where(better, -turned[0], factor), np.where(better[:, None], turned[1], codes)


def _sweep(rows: Floats, ends: tuple[int, int]) -> tuple[Vector, Codes, Vector]:
    """The best point of positive factor, and S^2 / N, by which it lowers the squared error."""
    size = np.abs(rows).astype(np.float32)
    most = np.where(rows < 0, -ends[0], ends[1]).astype(np.float32)
    value, code, start = _breakpoints(size, most)
    if not len(value):
        return np.zeros(len(rows)), np.zeros(rows.shape, np.int8), np.zeros(len(rows))
    sums = np.cumsum(value * (code - 0.5))
    norms = np.cumsum(2.0 * code - 1.0)
    steps = np.diff(start)
    alive = steps > 0
    before = np.maximum(start[:-1] - 1, 0)
    base = np.where(start[:-1] > 0, [sums[before], norms[before]], 0.0)
    s, n = (total - np.repeat(b, steps) for total, b in zip((sums, norms), base, strict=True))
    quality = s * s / n
    best = np.maximum.reduceat(quality, start[:-1][alive])
    is_best = quality == np.repeat(best, steps[alive])
    row = np.repeat(np.arange(len(rows)), steps)[is_best]
    threshold = np.ones(len(rows))
    threshold[row[::-1]] = value[is_best][::-1]  # the first of equals
    codes = np.minimum(np.floor(size / (threshold * LOWER)[:, None] + 0.5), most)
    codes = np.where(alive[:, None], np.copysign(codes, rows), 0.0)
    dot, norm = np.vecdot(rows.astype(np.float64), codes), np.vecdot(codes, codes)
    factor = dot / np.where(norm > 0.0, norm, 1.0)
    return factor, codes.astype(np.int8), factor * dot


def _breakpoints(size: Floats, most: Floats) -> tuple[Vector, Vector, NDArray[np.int64]]:
    """Breakpoints of all rows, each row's falling: their values and codes (B,), and where each row starts, (R + 1,)."""
    least = _least_factor(size, most)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):  # a least factor of 0 leaves none out
        reach = np.where(size > 0, np.minimum(np.floor(size / least + 0.5), most), 0.0)
    number = reach.astype(np.int64).ravel()
    magnitude = np.repeat(size.ravel(), number)
    code = np.arange(len(magnitude)) - np.repeat(np.cumsum(number) - number, number) + 1
    start = np.concatenate([[0], np.cumsum(number.reshape(size.shape).sum(axis=1))])
    value = (magnitude / (code - 0.5)).astype(np.float32)
    row = np.repeat(np.arange(len(size)), np.diff(start)).astype(np.uint64)
    # One key sorts by row, then by falling value (the bits of positive floats sort as they do), and carries the code.
    falling = (~value.view(np.uint32)).astype(np.uint64)
    key = (
        (row << np.uint64(CODE_BITS + VALUE_BITS))
        | (falling << np.uint64(CODE_BITS))
        | code.astype(np.uint64)
    )
    key.sort()
    value = (~(key >> np.uint64(CODE_BITS)).astype(np.uint32)).view(np.float32)
    return value.astype(np.float64), (key & np.uint64((1 << CODE_BITS) - 1)).astype(np.float64), start


def _least_factor(size: Floats, most: Floats) -> NDArray[np.float32]:
    """A factor for each row that the optimum is not below, (R,); 0 where none is known."""
    whole: NDArray[np.float32] = (size / most).max(axis=1, initial=0.0)
    known = np.full(len(size), np.inf, np.float32)
    clipped = []
    for guess in GUESSES:
        factor = np.where(whole > 0, whole * np.float32(guess), 1.0).astype(np.float32)[:, None]
        codes = np.minimum(np.rint(size / factor), most)
        known = np.minimum(known, ((size - codes * factor) ** 2).sum(axis=1))
        clipped.append((factor[:, 0], (np.maximum(size - most * factor, 0.0) ** 2).sum(axis=1)))
    least = np.zeros_like(whole)
    for factors, error in clipped:
        least = np.maximum(least, np.where(error > known * 1.001, factors, 0.0))  # sums in float32
    return least
