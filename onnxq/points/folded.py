"""Points at integer ratios, which fold into the codes of one 8-bit kernel.

Multipoint quantization (Liu et al., "Post-training Quantization with Multiple Points", arXiv 2002.09049) writes a row of weights
as w = sum_i a_i q_i with few-bit codes q_i. Here the factors stand in whole ratios, a_i = r^(n-i) s:

    w = s (r^(n-1) q_1 + ... + r q_(n-1) + q_n) = s c

The bracket is one whole number per weight, so an 8-bit kernel multiplies by c as by any other code. While r is no larger than the
number of codes of a point, every whole number from f qmin to f qmax, f = 1 + r + ... + r^(n-1), is such a bracket: as in a
positional number system with digits qmin..qmax, no number is left out. The best decomposition is therefore the best rounding of
w / s to whole numbers of that range, split into digits afterwards, which loses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from onnxq.affine import SMALLEST_SCALE
from onnxq.digits import reach, split
from onnxq.parallel import for_each
from onnxq.points.errors import Floats, Vector, apply_moment, output_errors, parts
from onnxq.points.scalar import best_point
from onnxq.rounding import Feedback, cut_pairs

LARGEST_CODE = 127  # of the kernel; -128 is left out, as everywhere where it gains nothing
RATIOS = 16  # candidates at most
DEEP = 1.5  # octaves of steps below the one that saturates nothing
WIDE = 1.0  # and above it, where pairs are limited
PER_OCTAVE = 8, 64  # steps, least and most: the error of a short row has many dips
SHORT = 64  # weights of rows that also try the step which is the best without a moment
EVALUATIONS = 2048  # an octave, in the rows where that lies between the two

Trial = tuple[Vector, int]  # step of each row (R,), ratio


def _none() -> NDArray[np.intp]:
    return np.zeros((0, 1), np.intp)


@dataclass(frozen=True, eq=False)
class Grid:
    """What the codes have to keep.

    Attributes:
        ends: smallest and largest code of one point.
        partners: neighbours in the kernel's reduction, (orders, K); see `onnxq.saturation.partners`.
        limit: largest sum of two neighbouring codes of one sign; 0 for none.
        turned: whether a row may have a negative ratio, which turns what its codes reach to either side and evens it out: two
            points of 2 bits reach from -10 to 5 at a ratio of 4, from -6 to 9 at -4.
    """

    ends: tuple[int, int]
    partners: NDArray[np.intp] = field(default_factory=_none)
    limit: int = 0
    turned: bool = False

    @property
    def levels(self) -> int:
        """Number of codes of one point, the largest ratio."""
        return self.ends[1] - self.ends[0] + 1

    def folded_ends(self, ratio: int, count: int) -> tuple[int, int]:
        """Smallest and largest folded code of `count` points.

        >>> Grid((-8, 7)).folded_ends(ratio=4, count=2), Grid((-2, 1)).folded_ends(ratio=-4, count=2)
        ((-40, 35), (-6, 9))
        """
        low, high = reach(np.array(ratio), count, self.ends)
        return max(int(low), -LARGEST_CODE), min(int(high), LARGEST_CODE)


@dataclass(frozen=True, eq=False)
class Folded:
    """Rows of weights as points that fold, w = step * codes.

    Attributes:
        codes: what the kernel multiplies by, int8, (R, K); uint8 where they are looked up.
        step: float32, (R,).
        ratio: of neighbouring points of each row, int64, (R,); negative only where the grid is turned.
        points: the codes that are stored, coarsest first, of the same type, (n, R, K).
        error: at the output, float64, (R,).
    """

    codes: NDArray[np.int8 | np.uint8]
    step: NDArray[np.float32]
    ratio: NDArray[np.int64]
    points: NDArray[np.int8 | np.uint8]
    error: Vector


def fold_fixed(
    rows: Floats,
    step: Floats | float,
    grid: Grid,
    count: int = 2,
    moment: Floats | None = None,
    least: Floats | float = 0.0,
    feed: bool = True,
) -> Folded:
    """Points whose coarsest has the step that the whole layer has; a row chooses its ratio r alone, w = step / r^(n-1) codes.

    A large ratio makes the steps fine, a small one lets the finer points reach further beyond the coarsest, which clips. None is
    negative.

    Args:
        rows: weights, (R, K), in the kernel's order.
        step: of the coarsest point, () or (R,).
        grid: what the codes have to keep.
        count: points, at least 2; beyond two of 4 bits each, the reach of 8 bits ends before theirs.
        moment: of the inputs; see `onnxq.points.errors.apply_moment`.
        least: smallest step of the folded codes, () or (R,), as a bias in int32 may ask for; it goes before `step`.
        feed: whether, where the moment is whole, roundings make up for each other in the rows that gain (`onnxq.rounding`).
    """
    coarse = np.broadcast_to(np.asarray(step, np.float64), len(rows))
    ratios = np.unique(np.rint(np.geomspace(2, max(grid.levels, 2), RATIOS)).astype(int)).tolist()
    trials = ((coarse / ratio ** (count - 1), ratio) for ratio in ratios)
    search = _Search(grid, count, moment, refit=False)
    return search.folded(rows, search.best(rows, list(trials), least), feed)


def fold_free(
    rows: Floats,
    grid: Grid,
    count: int = 2,
    moment: Floats | None = None,
    least: Floats | float = 0.0,
    feed: bool = True,
) -> Folded:
    """Points whose step each row chooses for itself; see `fold_fixed` for the arguments.

    The ratio only decides how far the folded codes reach, so it is the least with which they reach furthest to both sides. Of
    some steps each row takes the best, then once the step of least squares of the codes found. Short rows, whose error has many
    dips, also try the step of the closest point.
    """
    search = _Search(grid, count, moment, refit=True)
    best = search.best(rows, _trials(rows, grid, count, 1), least)
    if grid.turned:
        best = best.better_of(search.best(rows, _trials(rows, grid, count, -1), least))
    return search.folded(rows, best, feed)


def _trials(rows: Floats, grid: Grid, count: int, sign: int) -> list[Trial]:
    """Steps that rows may choose from, at the ratio of this sign that reaches furthest."""
    ratios = [sign * ratio for ratio in range(2, max(grid.levels, 2) + 1)]
    reaches = [min(-low, high) for low, high in (grid.folded_ends(ratio, count) for ratio in ratios)]
    ratio = ratios[int(np.argmax(reaches))]
    low, high = grid.folded_ends(ratio, count)
    peak = np.maximum(rows.max(axis=1, initial=0.0) / high, rows.min(axis=1, initial=0.0) / low)
    peak = np.where(peak > 0.0, peak.astype(np.float64), 1.0)
    per_octave = int(np.clip(EVALUATIONS // max(rows.shape[1], 1), *PER_OCTAVE))
    wide = WIDE if grid.limit else 0.0
    octaves = np.arange(-int(DEEP * per_octave), wide * per_octave + 1) / per_octave
    trials = [(peak * 2.0**octave, ratio) for octave in octaves]
    if rows.shape[1] <= SHORT:
        closest, _ = best_point(rows, (low, high))
        even = min(-low, high)  # with equal ends no factor is negative
        trials += [
            (np.where(closest > 0.0, closest, peak), ratio),
            (best_point(rows, (-even, even))[0], ratio),
        ]
    return trials


@dataclass(frozen=True, eq=False)
class _Best:
    """The best grids so far: codes (R, K) as floats, step and error (R,), ratio (R,)."""

    codes: Floats
    step: NDArray[np.float32]
    ratio: NDArray[np.int64]
    error: Vector

    def better_of(self, other: _Best) -> _Best:
        """The rows of the other where its error is strictly less."""
        better = other.error < self.error
        return _Best(
            np.where(better[:, None], other.codes, self.codes),
            np.where(better, other.step, self.step),
            np.where(better, other.ratio, self.ratio),
            np.where(better, other.error, self.error),
        )


@dataclass(frozen=True, eq=False)
class _Search:
    """The search for the grids of rows; `refit`: whether the steps are free."""

    grid: Grid
    count: int
    moment: Floats | None
    refit: bool

    def best(self, rows: Floats, trials: list[Trial], least: Floats | float) -> _Best:
        """The best grids of the trials."""
        lowest = np.maximum(np.broadcast_to(np.asarray(least, np.float64), len(rows)), SMALLEST_SCALE)
        codes, ratio = np.zeros(rows.shape, np.float32), np.zeros(len(rows), np.int64)
        step, error = np.zeros(len(rows), np.float32), np.zeros(len(rows))

        def search(place: tuple[slice, Floats | None]) -> None:
            part, moment = place
            own = [(np.maximum(s[part], lowest[part]), r) for s, r in trials]
            best = self._best(rows[part], own, moment, lowest[part])
            codes[part], step[part], ratio[part], error[part] = best.codes, best.step, best.ratio, best.error

        for_each(search, parts(rows.shape, self.moment))
        return _Best(codes, step, ratio, error)

    def folded(self, rows: Floats, best: _Best, feed: bool) -> Folded:
        """The points on these grids, with error feedback where it lowers the error."""
        if feed and self.moment is not None and self.moment.ndim > 1 and rows.size:
            best = best.better_of(self._fed(rows, best, self.moment))
        points = split(best.codes.astype(np.int8), best.ratio, self.count, self.grid.ends)
        return Folded(best.codes.astype(np.int8), best.step, best.ratio, points, best.error)

    def _best(self, rows: Floats, trials: list[Trial], moment: Floats | None, lowest: Vector) -> _Best:
        found = (self._nearest(rows, step, ratio, moment) for step, ratio in trials)
        best = next(found)
        for other in found:
            best = best.better_of(other)
        if not self.refit:
            return best
        weighed = apply_moment(best.codes, moment)
        power = np.vecdot(best.codes, weighed).astype(np.float64)
        fit = np.vecdot(rows, weighed) / np.where(power > 0.0, power, 1.0)
        return best.better_of(self._nearest(rows, np.maximum(fit, lowest), int(best.ratio[0]), moment))

    def _nearest(self, rows: Floats, step: Vector, ratio: int, moment: Floats | None) -> _Best:
        """Codes nearest to the rows on one grid each."""
        scale = step.astype(np.float32)
        ends = self.grid.folded_ends(ratio, self.count)
        nearest = np.clip(np.rint(rows / scale[:, None]), *ends)
        codes = cut_pairs(nearest, self.grid.partners, self.grid.limit)
        error = output_errors(rows - codes * scale[:, None], moment)
        return _Best(codes, scale, np.full(len(rows), ratio), error)

    def _fed(self, rows: Floats, best: _Best, moment: Floats) -> _Best:
        """The same grids with error feedback."""
        inputs = moment if moment.ndim == 3 else moment[None]
        shape = (len(inputs), len(rows) // len(inputs))
        ends = np.clip(reach(best.ratio, self.count, self.grid.ends), -LARGEST_CODE, LARGEST_CODE)
        low, high = ends.astype(np.float64).reshape(2, *shape)
        grouped = rows.astype(np.float64).reshape(*shape, -1)
        step = best.step.astype(np.float64).reshape(shape)
        feedback, kept = Feedback(inputs), (self.grid.partners, self.grid.limit, (low, high))
        fed = feedback.round(grouped, step, *kept)
        codes = feedback.settle(grouped, fed, step, *kept).reshape(rows.shape)
        error = output_errors(rows - codes * best.step[:, None], moment)
        return replace(best, codes=codes.astype(np.float32), error=error)
