"""Points with free factors: w = sum_i a_i q_i, each q_i of few bits, the factors any numbers.

Liu et al., "Post-training Quantization with Multiple Points", arXiv 2002.09049, take greedily the closest point to what the
earlier points leave. At 3 bits and more that first point clips, which leaves the next one few but huge residuals. Two other
constructions therefore stand beside it: a first point that clips nothing, and one chosen by what the next point would leave.
After each, all factors of a row are fitted together by least squares. A row keeps what has the least error at the output, and
its codes are rounded anew to the nearest sums of points, and fitted again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import unknown
from onnxq.parallel import for_each
from onnxq.points.errors import Floats, Vector, apply_moment, output_errors, parts
from onnxq.points.scalar import best_point

Construction = Literal["absmax", "greedy", "lookahead"]
Choice = Construction | Literal["best"]
CONSTRUCTIONS: tuple[Construction, ...] = get_args(Construction)
Ends = tuple[int, int]

LOOKS = 2.0 ** (
    np.arange(2, -13, -1) / 8.0
)  # first factors of a look ahead, as parts of the one that clips nothing
NEXT = 2.0 ** (-np.arange(4) / 4.0)  # the same of the point after it
ROUNDS = 2  # of rounding and fitting, each kept where it gains


@dataclass(frozen=True, eq=False)
class Points:
    """Rows of weights as sums of points.

    Attributes:
        codes: int8, (n, R, K).
        factors: float64, (n, R); 0 where a row has fewer points.
    """

    codes: NDArray[np.int8]
    factors: Vector

    def values(self) -> Vector:
        """The sums, float64, (R, K)."""
        values: Vector = np.einsum("nr,nrk->rk", self.factors, self.codes)
        return values


Scored = tuple[Points, Vector]  # with the error of each row at the output, (R,)


def decompose(
    rows: Floats,
    ends: Ends,
    count: int,
    construction: Choice = "best",
    moment: Floats | None = None,
) -> Points:
    """Rows as sums of `count` points.

    Args:
        rows: weights, (R, K), finite.
        ends: smallest and largest code of a point.
        count: points of each row, at least 1.
        construction: `greedy` as in the paper, `absmax` whose points but the last clip nothing, `lookahead`, or for each row the
            `best` of the three.
        moment: of the inputs; see `onnxq.points.errors.apply_moment`.

    Raises:
        UsageError: the construction is unknown.
    """
    if construction not in (*CONSTRUCTIONS, "best"):
        raise unknown("construction", construction, (*CONSTRUCTIONS, "best"))
    found = Points(np.zeros((count, *rows.shape), np.int8), np.zeros((count, len(rows))))
    tried = [c for c in CONSTRUCTIONS if construction in (c, "best")]

    def solve(place: tuple[slice, Floats | None]) -> None:
        part, inputs = place
        own = rows[part].astype(np.float64)
        fitted = (_fit(own, _constructed(own, ends, count, each), inputs) for each in tried)
        best = _refined(
            own, ends, reduce(_better, (_score(own, points, inputs) for points in fitted)), inputs
        )
        found.codes[:, part], found.factors[:, part] = best.codes, best.factors

    for_each(solve, parts(rows.shape, moment))
    return found


def decompose_until(
    rows: Floats, ends: Ends, limit: Floats | float, most: int, moment: Floats | None = None
) -> tuple[Points, NDArray[np.int64]]:
    """Points of each row until its error at the output is at most `limit`, () or (R,), or there are `most`.

    Returns:
        Points, most of any row, factors and codes 0 beyond a row's own; and the number of each row, (R,).
    """
    chosen = Points(np.zeros((most, *rows.shape), np.int8), np.zeros((most, len(rows))))
    number = np.zeros(len(rows), np.int64)
    for count in range(1, most + 1):
        found = decompose(rows, ends, count, moment=moment)
        meets = (output_errors(rows - found.values(), moment) <= limit) | (count == most)
        here = meets & (number == 0)
        chosen.codes[:count, here], chosen.factors[:count, here] = (
            found.codes[:, here],
            found.factors[:, here],
        )
        number[here] = count
        if number.all():
            break
    used = int(number.max(initial=1))
    return Points(chosen.codes[:used], chosen.factors[:used]), number


def _better(one: Scored, other: Scored) -> Scored:
    """The rows of the other where its error is less, and the rest of the one."""
    (points, error), (others, other_error) = one, other
    better = other_error < error
    codes = np.where(better[:, None], others.codes, points.codes)
    factors = np.where(better, others.factors, points.factors)
    return Points(codes, factors), np.where(better, other_error, error)


def _score(rows: Vector, points: Points, moment: Floats | None) -> Scored:
    return points, output_errors(rows - points.values(), moment)


def _refined(rows: Vector, ends: Ends, best: Scored, moment: Floats | None) -> Points:
    """The points after some rounds of rounding and fitting, in the rows that gain."""
    for _ in range(ROUNDS):
        factors = best[0].factors
        new = _fit(rows, Points(nearest_codes(rows, factors, ends), factors), moment)
        best = _better(best, _score(rows, new, moment))
    return best[0]


def _constructed(rows: Vector, ends: Ends, count: int, construction: Construction) -> Points:
    left, factors, codes = rows, [], []
    for place in range(count):
        if construction == "greedy" or place == count - 1:
            factor, point = best_point(left, ends)
        elif construction == "absmax":
            factor = _whole(left, ends)
            point = _round(left, factor, ends)
        else:
            factor, point = _look_ahead(left, ends)
        left = left - factor[:, None] * point
        factors.append(factor)
        codes.append(point)
    return Points(np.stack(codes), np.stack(factors))


def _look_ahead(rows: Vector, ends: Ends) -> tuple[Vector, NDArray[np.int8]]:
    """The point of which the next one leaves the least."""
    whole = _whole(rows, ends)
    best_factor, best_left = whole, np.full(len(rows), np.inf)
    for look in LOOKS:
        factor = whole * look
        rest = rows - factor[:, None] * _round(rows, factor, ends)
        after = _whole(rest, ends)
        for part in NEXT:
            second = after * part
            left = output_errors(rest - second[:, None] * _round(rest, second, ends))
            better = left < best_left
            best_factor, best_left = np.where(better, factor, best_factor), np.where(better, left, best_left)
    return best_factor, _round(rows, best_factor, ends)


def _whole(rows: Vector, ends: Ends) -> Vector:
    """The least factor that clips nothing, (R,); 1 for rows of zeros."""
    peak = np.maximum(rows.max(axis=1, initial=0.0) / ends[1], rows.min(axis=1, initial=0.0) / ends[0])
    return np.where(peak > 0.0, peak, 1.0)


def _round(rows: Vector, factor: Vector, ends: Ends) -> NDArray[np.int8]:
    return np.clip(np.rint(rows / factor[:, None]), *ends).astype(np.int8)


def _fit(rows: Vector, points: Points, moment: Floats | None) -> Points:
    """The same codes with the factors of least squares at the output."""
    codes = points.codes.astype(np.float64)
    weighed = np.stack([apply_moment(code, moment) for code in codes])
    gram = np.einsum("nrk,mrk->rnm", codes, weighed)
    right = np.einsum("rk,nrk->rn", rows, weighed)
    factors = np.linalg.pinv(gram, hermitian=True) @ right[..., None]
    return Points(points.codes, factors[..., 0].T)


def nearest_codes(rows: Vector, factors: Vector, ends: Ends) -> NDArray[np.int8]:
    """Codes, int8, (n, R, K), whose sums are closest to the rows (R, K).

    All points but the last try both neighbours of their quotient. No other code can be in the closest sum where the later points
    reach less far than a step; where they reach further it rarely is.

    Args:
        factors: (n, R), coarsest first.
    """
    factor = np.where(factors[0] == 0.0, np.inf, factors[0])[:, None]
    quotient = rows / factor
    if len(factors) == 1:
        return np.clip(np.rint(quotient), *ends).astype(np.int8)[None]
    best, least = np.zeros((len(factors), *rows.shape), np.int8), np.full(rows.shape, np.inf)
    for code in (np.floor(quotient), np.ceil(quotient)):
        point = np.clip(code, *ends).astype(np.int8)
        left = rows - factors[0][:, None] * point
        rest = nearest_codes(left, factors[1:], ends)
        distance = np.abs(left - np.einsum("nr,nrk->rk", factors[1:], rest))
        better = distance < least
        best, least = (
            np.where(better, np.concatenate([point[None], rest]), best),
            np.where(better, distance, least),
        )
    return best
