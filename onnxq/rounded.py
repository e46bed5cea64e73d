"""Codes of weights at any scale, each so that it makes up for the rounding of the others on the calibration samples.

See `onnxq.rounding` for the method. A channel keeps the codes of least expected error at its output, E[((w - s q) x)^2], so none
gets worse than rounded to nearest.
"""

from __future__ import annotations

from dataclasses import replace
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
from onnxq.weights import code_limit, is_coarse

LARGEST = 1152
BYTE = 8

Codes = NDArray[np.integer[Any]]
Rows = NDArray[np.float64]


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
        """The decision with the better codes of each channel, and what part of the expected error is left."""
        params, codes, site = decision.params, decision.codes, self._site
        assert params is not None
        assert codes is not None
        nearest = self._as_rows(codes)
        scale = np.broadcast_to(params.scale.astype(np.float64), codes.shape[site.axis]).reshape(
            site.shape[:2]
        )
        fed = self._feedback.round(self._rows, scale, self._partners, self._limit, self._ends(decision))
        before, after = (
            output_error(self._rows - trial * scale[:, :, None], self._moment) for trial in (nearest, fed)
        )
        best = np.where((after < before)[:, :, None], fed, nearest)
        flat = best.reshape(-1, site.shape[2]).astype(codes.dtype)
        left = float(np.minimum(after, before).sum() / max(before.sum(), np.finfo(np.float64).tiny))
        return with_codes(decision, from_rows(flat, codes.shape, site.kind, site.axis)), left

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
    sites = [site for site in weight_sites(program)[0] if site.shape[2] <= most and _gains(program, site)]
    found = {}
    for part in moment_parts(sites):
        moments = second_moments(program, ctx, part)
        for site in part:
            limit = code_limit(program, site.units, ctx.target)
            found[site.weight] = WeightRounder(site, moments[site.weight], limit)
    return found


def _gains(program: Program, site: Site) -> bool:
    """Whether rounding matters to a weight."""
    decision, values = program.plan[site.weight], float_values(site.nodes[0].inputs[1])
    assert values is not None
    return decision.scheme.bits < BYTE or is_coarse(values, decision, site.axis)
