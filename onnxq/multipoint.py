"""Layers whose channels may have several points: what each would gain, and the plan that follows from a choice.

Errors count at the output, E[((w - w_hat) x)^2] with the second moments of the calibration samples, as parts of the mean power of
the layer's outputs, so that layers can be compared.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.affine import QuantParams
from onnxq.bias import least_scales
from onnxq.graph import float_values
from onnxq.moments import Moment, Site
from onnxq.pipeline import Context
from onnxq.point_rows import Form, point_rows
from onnxq.points import (
    Candidates,
    Folded,
    Grid,
    budget_curve,
    fold_free,
    output_errors,
    total_cost,
    total_error,
)
from onnxq.program import Program, QuantDecision
from onnxq.saturation import as_rows, from_rows, partners

TINY = 1e-30
UNEVEN = 3  # bits up to which a grid reaches so much further to one side that a negative ratio pays

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PointLayer(ABC):
    """A weight with what it can become.

    Attributes:
        weight: name of the initializer.
        folded: all channels with 2, 3, ... points.
        candidates: errors of its channels, as parts of the mean power of its outputs.
    """

    weight: str
    folded: Sequence[Folded]
    candidates: Candidates

    @abstractmethod
    def decision(self, decision: QuantDecision, count: Counts) -> QuantDecision:
        """The decision with further points in the channels that have a count above 1, (channels,)."""


@dataclass(frozen=True, eq=False)
class KernelPoints(PointLayer):
    """A weight that activations are multiplied by, with what it can become.

    Attributes:
        site: where it is read.
        form: how points are summed up.
    """

    site: Site
    form: Form

    def decision(self, decision: QuantDecision, count: Counts) -> QuantDecision:
        params, codes, site = decision.params, decision.codes, self.site
        assert params is not None
        assert codes is not None
        scale = np.broadcast_to(params.scale, len(count)).copy()
        rows = as_rows(codes, site.kind, site.axis).copy()
        shape = tuple(np.delete(codes.shape, site.axis))
        further = []
        for each, folded in enumerate(self.folded, 2):
            chosen = np.flatnonzero(count == each)
            if not len(chosen):
                continue
            scale[chosen], rows[chosen] = folded.step[chosen], folded.codes[chosen]
            points = [from_rows(p[chosen], (len(chosen), *shape), site.kind, 0) for p in folded.points]
            further.append((chosen, np.stack(points), folded.ratio[chosen]))
        scheme = replace(decision.scheme, granularity="channel")
        return replace(
            decision,
            scheme=scheme,
            params=QuantParams(scheme, scale, np.zeros(scale.shape, np.int32), site.axis),
            codes=np.ascontiguousarray(from_rows(rows, codes.shape, site.kind, site.axis)),
            points=point_rows(codes, site.axis, further, self.form),
        )


def point_layer(
    program: Program, ctx: Context, site: Site, moment: Moment, most: int, form: Form, limit: int
) -> KernelPoints:
    """A layer with all of its channels at 2 to `most` points.

    Args:
        moment: of its inputs, (groups, K, K).
        form: how points are summed up.
        limit: largest sum of two neighbouring codes of one sign; 0 for none.
    """
    decision = program.plan[site.weight]
    values = float_values(site.nodes[0].inputs[1])
    assert values is not None
    assert decision.codes is not None
    assert decision.params is not None
    rows = as_rows(values, site.kind, site.axis)
    codes = as_rows(decision.codes, site.kind, site.axis)
    scale = np.broadcast_to(decision.params.scale, len(rows))
    scheme = decision.scheme
    # rows that a kernel computes one by one have scales, which are positive
    turned = form == "fold" and scheme.bits <= UNEVEN
    grid = Grid((scheme.qmin, scheme.qmax), partners(values.shape, site.kind, site.axis), limit, turned)
    least = least_scales(program, site.units) if ctx.target.bias == "int32" else 0.0
    counts = range(2, _useful(grid, most) + 1)
    folded = [fold_free(rows, grid, count, moment, least) for count in counts]
    signal = max(float(output_errors(rows, moment).mean()), np.finfo(np.float32).tiny)
    single = output_errors(rows - (codes * scale[:, None]).astype(np.float32), moment)
    errors = np.stack([single, *(f.error for f in folded)], axis=1) / signal
    candidates = Candidates(errors, cost=rows.shape[1], weight=1.0 / len(rows))
    return KernelPoints(site.weight, folded, candidates, site, form)


def _useful(grid: Grid, most: int) -> int:
    """Points up to which a further one makes the codes reach further, at factors that can be stored."""
    count = 2
    while count < most and grid.folded_ends(grid.levels, count) != grid.folded_ends(grid.levels, count + 1):
        count += 1
    return count


def decisions(
    program: Program, layers: Sequence[PointLayer], counts: Sequence[Counts]
) -> dict[str, QuantDecision]:
    """What becomes of the weights that have channels with further points."""
    return {
        layer.weight: layer.decision(program.plan[layer.weight], count)
        for layer, count in zip(layers, counts, strict=True)
        if (count > 1).any()
    }


def _channel_facts(layer: PointLayer, count: Counts) -> Iterator[dict[str, Any]]:
    """What became of each channel with further points; errors as parts of the layer's output power."""
    errors = layer.candidates.errors
    for channel in np.flatnonzero(count > 1).tolist():
        each = int(count[channel])
        folded = layer.folded[each - 2]
        step, ratio = float(folded.step[channel]), int(folded.ratio[channel])
        yield {
            "tensor": layer.weight,
            "channel": channel,
            "points": each,
            "weights": int(layer.candidates.cost),
            "factors": [step * ratio**i for i in reversed(range(each))],
            "error_before": float(errors[channel, 0]),
            "error_after": float(errors[channel, each - 1]),
        }


def figures(program: Program, layers: Sequence[PointLayer], counts: Sequence[Counts]) -> dict[str, Any]:
    """Figures for the report; the curve holds pairs of further weights and the output error left, as parts of all."""
    candidates = [layer.candidates for layer in layers]
    pairs = [(layer, count) for layer, count in zip(layers, counts, strict=True)]
    extra = int(total_cost(candidates, counts))
    every = max(sum(c.cost * len(c.errors) for c in candidates), 1.0)
    whole = max(total_error(candidates, [np.ones(len(count), np.int64) for count in counts]), TINY)
    sizes = [size for d in program.plan.values() if (size := _sizes(d)) is not None]
    weights, bits = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (0, 0)
    return {
        "extra_weights": extra,
        "budget": extra / every,
        "error_left": total_error(candidates, counts) / whole,
        "curve": [[cost / every, error / whole] for cost, error in budget_curve(candidates)],
        "bits_mean": bits / max(weights, 1),
        "channels": [fact for layer, count in pairs for fact in _channel_facts(layer, count)],
        "layers": {layer.weight: _layer_facts(layer, count) for layer, count in pairs},
    }


def _sizes(decision: QuantDecision) -> tuple[int, int] | None:
    """Number of a tensor's weights, and of bits that they take."""
    if decision.codes is None:
        return None
    rows = decision.codes if decision.points is None else decision.points.rows
    return decision.codes.size, rows.size * decision.scheme.bits


def _layer_facts(layer: PointLayer, count: Counts) -> dict[str, Any]:
    """A layer's row: its channels, and its noise at the output in dB below the signal."""
    errors = layer.candidates.errors
    after = np.take_along_axis(errors, count[:, None] - 1, 1)
    before, left = (-10.0 * math.log10(max(float(e.mean()), TINY)) for e in (errors[:, 0], after))
    return {
        "channels": len(count),
        "with_points": int((count > 1).sum()),
        "extra_weights": int(layer.candidates.cost * (count - 1).sum()),
        "sqnr_db_before": before,
        "sqnr_db_after": left,
    }
