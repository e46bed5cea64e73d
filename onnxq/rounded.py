"""Codes of weights at any scale, each so that it makes up for the rounding of the others on the calibration samples.

See `onnxq.rounding` for the method. A channel keeps the codes of least expected error at its output, E[((w - s q) x)^2], so none
gets worse than rounded to nearest. Channels that have a step of their own may take a better one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.graph import float_values
from onnxq.moments import Moment, Site, moment_parts, second_moments, weight_sites
from onnxq.pipeline import Context
from onnxq.program import Program, QuantDecision
from onnxq.rounding import Feedback, output_error
from onnxq.saturation import as_rows, from_rows, partners
from onnxq.scheme import BYTE
from onnxq.weights import code_limit, is_coarse

LARGEST = 1152
# Of steps to try: the best one lies below that of the weights alone.
FACTORS = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1)
REFITS = 2

Codes = NDArray[np.integer[Any]]
Rows = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Trial:
    """Codes of rows, (groups, rows, K), with their steps and expected errors, (groups, rows)."""

    codes: Rows
    step: Rows
    error: Rows

    def better_of(self, other: _Trial) -> _Trial:
        """Each row of the one whose error is smaller, of this one where they are equal."""
        taken = other.error < self.error
        return _Trial(
            np.where(taken[:, :, None], other.codes, self.codes),
            np.where(taken, other.step, self.step),
            np.minimum(other.error, self.error),
        )


class WeightRounder:
    """Makes codes of one weight."""

    def __init__(self, site: Site, moment: Moment, limit: int) -> None:
        """Of a weight that layers read.

        Args:
            site: the weight and its layers.
            moment: E[x x^T] of their inputs, (groups, K, K).
            limit: largest sum of two neighbouring codes of one sign; 0 for none.
        """
        values = float_values(site.nodes[0].inputs[1])
        assert values is not None
        self._site, self._moment, self._limit = replace(site, nodes=()), moment, limit  # no graph: it pickles
        self._rows = self._as_rows(values)
        self._partners = partners(values.shape, site.kind, site.axis)

    def round(self, decision: QuantDecision) -> tuple[QuantDecision, float]:
        """The decision with the better codes of each channel at its step, and what part of the expected error is left."""
        start = self._trial(self._as_rows(_codes(decision)), self._steps(decision))
        fed = self._fed(start.step, decision)
        if decision.scheme.bits < BYTE:  # of finer codes none is far from its best
            fed = self._settled(fed.codes, fed.step, decision)
        return self._taken(decision, start, start.better_of(fed))

    def refit(self, decision: QuantDecision, least: Rows | float = 0.0) -> tuple[QuantDecision, float]:
        """As `round`, and each channel takes the step of least expected error too: the best of some, then that of least squares.

        Args:
            decision: with a step for each channel and one point.
            least: smallest steps, () or (C,).
        """
        start = self._trial(self._as_rows(_codes(decision)), self._steps(decision))
        floor = np.broadcast_to(np.asarray(least, np.float64), start.step.size).reshape(start.step.shape)
        best = start
        for factor in FACTORS:
            best = best.better_of(self._fed(np.maximum(start.step * factor, floor), decision))
        for _ in range(REFITS):
            step = np.maximum(self._least_squares(best), floor)
            best = best.better_of(self._settled(best.codes, step, decision))
        assert decision.params is not None
        steps = best.step.reshape(decision.params.scale.shape).astype(np.float32)
        decision = replace(decision, params=replace(decision.params, scale=steps))
        return self._taken(decision, start, best)

    def _taken(self, decision: QuantDecision, start: _Trial, best: _Trial) -> tuple[QuantDecision, float]:
        site, codes = self._site, _codes(decision)
        left = float(best.error.sum() / max(start.error.sum(), np.finfo(np.float64).tiny))
        flat = best.codes.reshape(-1, site.shape[2]).astype(codes.dtype)
        return with_codes(decision, from_rows(flat, codes.shape, site.kind, site.axis)), left

    def _fed(self, step: Rows, decision: QuantDecision) -> _Trial:
        ends = self._ends(decision)
        return self._trial(self._feedback.round(self._rows, step, self._partners, self._limit, ends), step)

    def _settled(self, codes: Rows, step: Rows, decision: QuantDecision) -> _Trial:
        ends = self._ends(decision)
        return self._trial(
            self._feedback.settle(self._rows, codes, step, self._partners, self._limit, ends), step
        )

    def _trial(self, codes: Rows, step: Rows) -> _Trial:
        return _Trial(codes, step, output_error(self._rows - codes * step[:, :, None], self._moment))

    def _least_squares(self, trial: _Trial) -> Rows:
        """The steps of least expected error of these codes; that of a row of zeros stays."""
        weighed = trial.codes @ self._moment.astype(np.float64)
        power = np.einsum("gok,gok->go", weighed, trial.codes)
        found: Rows = np.einsum("gok,gok->go", weighed, self._rows) / np.where(power > 0.0, power, 1.0)
        return np.where((power > 0.0) & (found > 0.0), found, trial.step)

    def _steps(self, decision: QuantDecision) -> Rows:
        """Step of each row, (groups, rows)."""
        assert decision.params is not None
        scale = decision.params.scale.astype(np.float64)
        rows = _codes(decision).shape[self._site.axis]
        return np.broadcast_to(scale, rows).reshape(self._site.shape[:2])

    def _ends(self, decision: QuantDecision) -> tuple[int | Rows, int | Rows]:
        """Smallest and largest code, () or (groups, rows)."""
        scheme = decision.scheme
        if decision.points is not None:
            low, high = (end.astype(float) for end in decision.points.reach((scheme.qmin, scheme.qmax)))
            return low.reshape(self._site.shape[:2]), high.reshape(self._site.shape[:2])
        least = -scheme.qmax if scheme.bits == BYTE else scheme.qmin  # with few codes, each counts
        return least, scheme.qmax

    @cached_property
    def _feedback(self) -> Feedback:
        return Feedback(self._moment)

    def _as_rows(self, weight: NDArray[Any]) -> Rows:
        return as_rows(weight.astype(np.float64), self._site.kind, self._site.axis).reshape(self._site.shape)


def _codes(decision: QuantDecision) -> Codes:
    assert decision.codes is not None
    return decision.codes


def with_codes(decision: QuantDecision, codes: Codes) -> QuantDecision:
    """The decision with other codes on the same grids, and the rows that they are sums of where it has several points."""
    scheme, points = decision.scheme, decision.points
    if points is None:
        return replace(decision, codes=codes)
    sums = codes.astype(np.int8)
    return replace(decision, codes=sums, points=points.with_codes(sums, (scheme.qmin, scheme.qmax)))


def weight_rounders(program: Program, ctx: Context, most: int = LARGEST) -> dict[str, WeightRounder]:
    """What makes the codes of each weight below 8 bits, and of each coarse one; those that reduce over too many values have none.

    Args:
        program: its weights have codes.
        ctx: without calibration data there are none.
        most: values that a layer may reduce over; the work grows with the cube.
    """
    if ctx.data is None:
        return {}
    sites = [site for site in weight_sites(program)[0] if site.shape[2] <= most and gains(program, site)]
    found = {}
    for part in moment_parts(sites):
        moments = second_moments(program, ctx, part)
        for site in part:
            limit = code_limit(program, site.units, ctx.target)
            found[site.weight] = WeightRounder(site, moments[site.weight], limit)
    return found


def gains(program: Program, site: Site) -> bool:
    """Whether it matters how a weight is rounded: it has less than 8 bits, or half of its channels drown on their grid."""
    decision, values = program.plan[site.weight], float_values(site.nodes[0].inputs[1])
    assert values is not None
    return decision.scheme.bits < BYTE or is_coarse(values, decision, site.axis)
