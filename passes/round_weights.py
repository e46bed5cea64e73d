"""Round quantized weights anew, each so that it makes up for the rounding of the others on the calibration samples.

See `onnxq.rounding` for the method. E[x x^T] is taken over random patches of the float layers' inputs. A channel
keeps the codes of least expected error at its output, E[((w - s q) x)^2], so none gets worse than rounded to nearest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from onnxq.affine import dequantize
from onnxq.graph import float_values
from onnxq.moments import Moment, Site, moment_parts, second_moments, weight_sites
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program, QuantDecision
from onnxq.rounding import feed_back, output_error
from onnxq.saturation import as_rows, from_rows, partners
from onnxq.weights import code_limit, typical_sqnr_db

TINY = 1e-12
ENOUGH_DB = 25.0


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Round weights with error feedback, so that the outputs of each layer stay close on the calibration samples.

    Attributes:
        when: `needed` leaves networks in whose layers half of the channels keep 25 dB on their grid; `always` rounds all.
        largest: layers that reduce over more values than this are left; the work grows with the cube.
        samples: calibration samples to look at.
        patches: random inputs of each kernel from one sample.
        saturation: `safe` keeps neighbouring codes within what 16 bits hold on machines without VNNI; `ignore`
            does not.
    """

    name: ClassVar[str] = "round-weights"
    when: Literal["needed", "always"] = "needed"
    largest: int = 1152
    samples: int = 128
    patches: int = 16
    saturation: str = "safe"

    def run(self, program: Program, ctx: Context) -> PassResult:
        sites, skipped = self._sites(program)
        if self.when == "needed" and all(_keeps_enough(program, site) for site in sites):
            reason = f"half of its channels keep {ENOUGH_DB:.0f} dB as they are"
            return PassResult(0, skipped | {node.name: reason for site in sites for node in site.nodes})
        if ctx.data is None:
            reason = "there are no calibration samples to round by"
            return PassResult(0, skipped | {node.name: reason for site in sites for node in site.nodes})
        tensors, lowered = program.graph.tensors(), {}
        for part in moment_parts(sites):
            moments = second_moments(program, ctx, part, self.samples, self.patches)
            for site in part:
                values = float_values(tensors[site.weight])
                assert values is not None
                old, weight = program.plan[site.weight], site.weight
                limit = code_limit(program, site.units, ctx.target) if self.saturation == "safe" else 0
                program.plan[weight], lowered[weight] = _rounded(old, site, values, moments[weight], limit)
        return PassResult(len(sites), skipped, {"noise_db": lowered})

    def _sites(self, program: Program) -> tuple[list[Site], dict[str, str]]:
        """Weights to round, and the reasons of the nodes that are left."""
        sites, skipped = weight_sites(program)
        reasons = {site.weight: self._refusal(program, site) for site in sites}
        skipped |= {node.name: why for site in sites for node in site.nodes if (why := reasons[site.weight])}
        return [site for site in sites if not reasons[site.weight]], skipped

    def _refusal(self, program: Program, site: Site) -> str:
        """Why a weight is left, empty when it is not."""
        if program.plan[site.weight].points is not None:
            return "its codes are sums of several points already"
        size = site.shape[2]
        return (
            f"it reduces over {size} values, more than largest={self.largest}" if size > self.largest else ""
        )


def _keeps_enough(program: Program, site: Site) -> bool:
    """Whether half of the output channels keep ENOUGH_DB with the codes that they have."""
    decision = program.plan[site.weight]
    values = float_values(site.nodes[0].inputs[1])
    assert values is not None
    assert decision.codes is not None
    assert decision.params is not None
    return typical_sqnr_db(values, dequantize(decision.codes, decision.params), site.axis) >= ENOUGH_DB


def _rounded(
    decision: QuantDecision, site: Site, values: NDArray[np.float32], moment: Moment, limit: int
) -> tuple[QuantDecision, float]:
    """The decision with the better codes of each channel, and by how many dB they lower the expected error."""
    params, codes = decision.params, decision.codes
    assert params is not None
    assert codes is not None
    rows, nearest = (
        as_rows(w.astype(np.float64), site.kind, site.axis).reshape(site.shape) for w in (values, codes)
    )
    scale = np.broadcast_to(params.scale.astype(np.float64), codes.shape[site.axis]).reshape(site.shape[:2])
    scheme = decision.scheme
    least = -scheme.qmax if scheme.bits == 8 else scheme.qmin  # with few codes, each counts
    order = partners(codes.shape, site.kind, site.axis)
    fed = feed_back(rows, scale, moment, order, limit, (least, scheme.qmax))
    before, after = (output_error(rows - trial * scale[:, :, None], moment) for trial in (nearest, fed))
    best = np.where((after < before)[:, :, None], fed, nearest)
    flat = best.reshape(-1, site.shape[2]).astype(codes.dtype)
    left = float(np.minimum(after, before).sum() / max(before.sum(), TINY))
    new = from_rows(flat, codes.shape, site.kind, site.axis)
    return replace(decision, codes=new), 10.0 * math.log10(max(left, TINY))
