"""Round quantized weights anew, each so that it makes up for the rounding of the others on the calibration samples.

See `onnxq.rounding` for the method and `onnxq.rounded` for what a channel keeps. E[x x^T] is taken over random patches of the
float layers' inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from onnxq.bias import least_scales
from onnxq.moments import SAMPLES, Site, moment_parts, second_moments, weight_sites
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program, QuantDecision
from onnxq.rounded import LARGEST, WeightRounder, gains
from onnxq.weights import ENOUGH_DB, code_limit

TINY = 1e-12


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Round weights with error feedback, so that the outputs of each layer stay close on the calibration samples.

    Attributes:
        when: `needed` leaves networks of 8-bit weights where half of each layer's channels keep 25 dB; `always` rounds all.
        largest: layers that reduce over more values than this are left; the work grows with the cube.
        samples: calibration samples to look at.
        patches: random inputs of each kernel from one sample.
        steps: `refit` lets each channel below 8 bits that has a step of its own take the one of least error; `kept` leaves all
            steps, as a shared one and a pattern of steps always are.
        saturation: `safe` keeps neighbouring codes within what 16 bits hold on machines without VNNI; `ignore`
            does not.
    """

    name: ClassVar[str] = "round-weights"
    when: Literal["needed", "always"] = "needed"
    largest: int = LARGEST
    samples: int = SAMPLES
    patches: int = 16
    steps: Literal["refit", "kept"] = "refit"
    saturation: str = "safe"

    def run(self, program: Program, ctx: Context) -> PassResult:
        found, skipped = weight_sites(program)
        reasons = {site.weight: self._refusal(program, site) for site in found}
        skipped |= {n.name: why for site in found for n in site.nodes if (why := reasons[site.weight])}
        sites = [site for site in found if not reasons[site.weight]]
        if self.when == "needed" and not any(gains(program, site) for site in sites):
            reason = f"it has 8 bits, and half of its channels keep {ENOUGH_DB:.0f} dB as they are"
            return PassResult(0, skipped | {node.name: reason for site in sites for node in site.nodes})
        if ctx.data is None:
            reason = "there are no calibration samples to round by"
            return PassResult(0, skipped | {node.name: reason for site in sites for node in site.nodes})
        lowered = {}
        for part in moment_parts(sites):
            moments = second_moments(program, ctx, part, self.samples, self.patches)
            for site in part:
                limit = code_limit(program, site.units, ctx.target) if self.saturation == "safe" else 0
                rounder = WeightRounder(site, moments[site.weight], limit)
                program.plan[site.weight], left = self._rounded(program, ctx, site, rounder)
                lowered[site.weight] = 10.0 * math.log10(max(left, TINY))
        return PassResult(len(sites), skipped, {"noise_db": lowered})

    def _rounded(
        self, program: Program, ctx: Context, site: Site, rounder: WeightRounder
    ) -> tuple[QuantDecision, float]:
        """The decision of a weight with other codes, and with other steps where each channel has its own."""
        decision = program.plan[site.weight]
        if (
            self.steps == "kept"
            or program.params(site.weight).scale.ndim == 0
            or site.weight in program.folded
        ):
            return rounder.round(decision)
        least = least_scales(program, site.units) if ctx.target.bias == "int32" else 0.0
        return rounder.refit(decision, least)

    def _refusal(self, program: Program, site: Site) -> str:
        """Why a weight is left, empty when it is not."""
        if program.plan[site.weight].points is not None:
            return "its codes are sums of several points already"
        size = site.shape[2]
        return (
            f"it reduces over {size} values, more than largest={self.largest}" if size > self.largest else ""
        )
