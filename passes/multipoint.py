"""Give the output channels that hurt most a second point, or more: w = sum_i a_i q_i, each q_i of the few bits of the weights.

Liu et al., "Post-training Quantization with Multiple Points", arXiv 2002.09049. The factors stand in whole ratios here, so that
the points fold into the codes of one 8-bit kernel (`onnxq.points.folded`): only the file grows, by the rows of some channels.

A channel is judged by the error at its output, E[((w - w_hat) x)^2] on the calibration samples, with one point and with more. One
knapsack over all layers then spends the budget where it buys the most (`onnxq.points.budget`). Errors count as parts of the mean
power of their layer's outputs, so that layers can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from onnxq.affine import QuantParams
from onnxq.bias import least_scales
from onnxq.errors import UsageError
from onnxq.graph import float_values
from onnxq.moments import Site, moment_parts, second_moments, weight_sites
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.point_rows import point_rows
from onnxq.points import (
    Candidates,
    Folded,
    Grid,
    at_random,
    below_error,
    even_error,
    fold_free,
    output_errors,
    total_cost,
    within_budget,
)
from onnxq.program import Program, QuantDecision
from onnxq.saturation import as_rows, from_rows, partners
from onnxq.simulate import loss_gains
from onnxq.sizes import emitted_bytes, parse_bytes
from onnxq.target import Target
from onnxq.weights import code_limit

BYTE = 8
LEAST_FELT = 0.1  # of the median: how much the loss feels a layer at least
TRIALS = 10  # of a budget that meets a size
TINY = 1e-30

Counts = NDArray[np.int64]
Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Layer:
    """A weight with what it can become.

    Attributes:
        site: where it is read.
        folded: all channels with 2, 3, ... points.
        candidates: errors of its channels, as parts of the mean power of its outputs.
    """

    site: Site
    folded: Sequence[Folded]
    candidates: Candidates


@dataclass(frozen=True)
class Multipoint(Pass):
    """Store further rows of codes for the output channels whose error they lower most.

    Attributes:
        share: further weights, as a part of those that have fewer than 8 bits.
        error: instead of a share, the largest error of a channel's output, as a part of the mean power of its layer's outputs.
        size: instead, the size of the file to stay within, such as 400kB.
        choose: by `error` at the output; by `loss`, which weighs errors by how much the network's loss feels their layer; by
            `threshold`, the same error of all; or at `random`, to compare with.
        loss: of choose=loss: auto, cross-entropy, kl, mse, cosine or FILE.py:FUNCTION.
        points: most of one channel.
        samples: calibration samples to look at.
        patches: random inputs of each kernel from one sample.
        saturation: `safe` keeps neighbouring codes within what 16 bits hold on machines without VNNI; `ignore` does not.
    """

    name: ClassVar[str] = "multipoint"
    share: float | None = None
    error: float | None = None
    size: str | None = None
    choose: Literal["error", "loss", "threshold", "random"] = "error"
    loss: str = "auto"
    points: int = 2
    samples: int = 128
    patches: int = 16
    saturation: Literal["safe", "ignore"] = "safe"

    def run(self, program: Program, ctx: Context) -> PassResult:
        self._check()
        sites, skipped = _narrow_sites(program)
        layers = list(self._layers(program, ctx, sites))
        if self.choose == "loss":
            layers = self._weighed(program, ctx, layers)
        counts = self._counts(program, ctx, layers)
        program.plan.update(_decisions(program, layers, counts))
        facts = _facts(program, layers, counts)
        return PassResult(len(facts["channels"]), skipped, {"multipoint": facts})

    def _check(self) -> None:
        given = {n: v for n in ("share", "error", "size") if (v := getattr(self, n)) is not None}
        if len(given) != 1:
            raise UsageError("multipoint takes one of share (0.1), error (0.01) and size (400kB)")
        for name in ("share", "error"):
            if given.get(name, 0.0) < 0.0:
                raise UsageError(f"{name} of multipoint is {given[name]:g}; it must not be negative")
        if self.error is not None and self.choose == "loss":
            raise UsageError(
                "choose=loss weighs errors against a budget; give share or size instead of error"
            )
        if self.share is None and self.choose in ("random", "threshold"):
            raise UsageError(f"choose={self.choose} of multipoint spends a share; give share=0.1")
        if self.points < 2:
            raise UsageError(f"points is {self.points}; it must be at least 2, the first point included")

    def _layers(self, program: Program, ctx: Context, sites: Sequence[Site]) -> Iterator[_Layer]:
        """Every weight with its errors."""
        for part in moment_parts(sites):
            moments = second_moments(program, ctx, part, self.samples, self.patches)
            for done, site in enumerate(part):
                ctx.progress("points", done, len(part))
                yield self._layer(program, ctx, site, moments[site.weight])

    def _layer(self, program: Program, ctx: Context, site: Site, moment: NDArray[np.float32]) -> _Layer:
        decision = program.plan[site.weight]
        values = float_values(site.nodes[0].inputs[1])
        assert values is not None
        assert decision.codes is not None
        assert decision.params is not None
        rows = as_rows(values, site.kind, site.axis)
        codes = as_rows(decision.codes, site.kind, site.axis)
        scale = np.broadcast_to(decision.params.scale, len(rows))
        limit = code_limit(program, site.units, ctx.target) if self.saturation == "safe" else 0
        scheme = decision.scheme
        grid = Grid((scheme.qmin, scheme.qmax), partners(values.shape, site.kind, site.axis), limit)
        least = least_scales(program, site.units) if ctx.target.bias == "int32" else 0.0
        counts = range(2, _useful(grid, self.points) + 1)
        folded = [fold_free(rows, grid, count, moment, least) for count in counts]
        signal = max(float(output_errors(rows, moment).mean()), np.finfo(np.float32).tiny)
        single = output_errors(rows - (codes * scale[:, None]).astype(np.float32), moment)
        errors = np.stack([single, *(f.error for f in folded)], axis=1) / signal
        return _Layer(site, folded, Candidates(errors, cost=rows.shape[1], weight=1.0 / len(rows)))

    def _weighed(self, program: Program, ctx: Context, layers: Sequence[_Layer]) -> list[_Layer]:
        """The layers, each weighed by what the loss gains from two points in all of its channels, per error that they take off.

        A gain that is lost in the noise of the samples counts as a small one.
        """
        both = [np.full(len(layer.candidates.errors), 2) for layer in layers]
        changes = [_decisions(program, [layer], [count]) for layer, count in zip(layers, both, strict=True)]
        gains = loss_gains(program, ctx, changes, self.loss, self.samples)
        falls = [max(float((e[:, 0] - e[:, 1]).mean()), TINY) for e in (x.candidates.errors for x in layers)]
        felt = np.array([gain / fall for gain, fall in zip(gains, falls, strict=True)])
        least = LEAST_FELT * np.median(felt[felt > 0.0]) if (felt > 0.0).any() else 1.0
        return [
            replace(
                layer, candidates=replace(layer.candidates, weight=float(max(weight, least)) / len(count))
            )
            for layer, weight, count in zip(layers, felt, both, strict=True)
        ]

    def _counts(self, program: Program, ctx: Context, layers: Sequence[_Layer]) -> list[Counts]:
        """Points of each channel of each layer."""
        candidates = [layer.candidates for layer in layers]
        alike = [replace(c, weight=1.0) for c in candidates]
        if self.error is not None:
            return below_error(alike, self.error)
        if self.size is not None:
            return _within_bytes(program, ctx.target, layers, parse_bytes(self.size))
        assert self.share is not None
        budget = self.share * sum(c.cost * len(c.errors) for c in candidates)
        if self.choose == "random":
            return at_random(candidates, budget, ctx.rng())
        if self.choose == "threshold":
            return even_error(alike, budget)
        return within_budget(candidates, budget)


def _narrow_sites(program: Program) -> tuple[list[Site], dict[str, str]]:
    """Weights whose channels can have further points, and the reasons of the nodes that are left."""
    sites, skipped = weight_sites(program)
    wide = [s for s in sites if program.plan[s.weight].scheme.bits >= BYTE]
    reason = "its weights have 8 bits, which fill the codes of the kernel"
    skipped |= {node.name: reason for site in wide for node in site.nodes}
    tables = {
        u.name: "it looks codes up on the grid of its output" for u in program.units.values() if u.is_table
    }
    return [s for s in sites if s not in wide], skipped | tables


def _useful(grid: Grid, most: int) -> int:
    """Points up to which a further one makes the codes reach further, at factors that can be stored."""
    count = 2
    while count < most and grid.folded_ends(grid.levels, count) != grid.folded_ends(grid.levels, count + 1):
        count += 1
    return count


def _within_bytes(program: Program, target: Target, layers: Sequence[_Layer], limit: int) -> list[Counts]:
    """Points of which the file stays below a limit in bytes."""
    least = emitted_bytes(program, target)
    if least > limit:
        raise UsageError(
            f"the file takes about {least:,} bytes without further points, more than the {limit:,} given"
        )
    candidates = [
        replace(
            layer.candidates, cost=layer.candidates.cost * program.plan[layer.site.weight].scheme.bits / BYTE
        )
        for layer in layers
    ]
    low, high = 0.0, float(limit - least)
    best, trial = within_budget(candidates, low), high
    for _ in range(TRIALS):
        counts = within_budget(candidates, trial)
        emitted = replace(program, plan=program.plan | _decisions(program, layers, counts))
        fits = emitted_bytes(emitted, target) <= limit
        low, high, best = (trial, high, counts) if fits else (low, trial, best)
        trial = (low + high) / 2.0
    return best


def _decisions(
    program: Program, layers: Sequence[_Layer], counts: Sequence[Counts]
) -> dict[str, QuantDecision]:
    """What becomes of the weights that have channels with further points."""
    return {
        layer.site.weight: _with_points(program.plan[layer.site.weight], layer, count)
        for layer, count in zip(layers, counts, strict=True)
        if (count > 1).any()
    }


def _with_points(decision: QuantDecision, layer: _Layer, count: Counts) -> QuantDecision:
    """The decision with further points in the channels that have a count above 1."""
    params, codes, site = decision.params, decision.codes, layer.site
    assert params is not None
    assert codes is not None
    scale = np.broadcast_to(params.scale, len(count)).copy()
    rows = as_rows(codes, site.kind, site.axis).copy()
    shape = tuple(np.delete(codes.shape, site.axis))
    further = []
    for each, folded in enumerate(layer.folded, 2):
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
        points=point_rows(codes, site.axis, further),
    )


def _channel_facts(layer: _Layer, count: Counts) -> Iterator[dict[str, Any]]:
    """What became of each channel with further points; errors as parts of the layer's output power."""
    errors = layer.candidates.errors
    for channel in np.flatnonzero(count > 1).tolist():
        each = int(count[channel])
        folded = layer.folded[each - 2]
        step, ratio = float(folded.step[channel]), int(folded.ratio[channel])
        yield {
            "tensor": layer.site.weight,
            "channel": channel,
            "points": each,
            "factors": [step * ratio**i for i in reversed(range(each))],
            "error_before": float(errors[channel, 0]),
            "error_after": float(errors[channel, each - 1]),
        }


def _facts(program: Program, layers: Sequence[_Layer], counts: Sequence[Counts]) -> dict[str, Any]:
    """Figures for the report."""
    pairs = [(layer, count) for layer, count in zip(layers, counts, strict=True)]
    extra = int(total_cost([layer.candidates for layer in layers], counts))
    sizes = [size for d in program.plan.values() if (size := _sizes(d)) is not None]
    weights, bits = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (0, 0)
    return {
        "form": "fold",
        "extra_weights": extra,
        "budget": extra / max(sum(layer.candidates.cost * len(count) for layer, count in pairs), 1.0),
        "bits_mean": bits / max(weights, 1),
        "channels": [fact for layer, count in pairs for fact in _channel_facts(layer, count)],
        "layers": {layer.site.weight: _layer_facts(layer, count) for layer, count in pairs},
    }


def _sizes(decision: QuantDecision) -> tuple[int, int] | None:
    """Number of a tensor's weights, and of bits that they take."""
    if decision.codes is None:
        return None
    rows = decision.codes if decision.points is None else decision.points.rows
    return decision.codes.size, rows.size * decision.scheme.bits


def _layer_facts(layer: _Layer, count: Counts) -> dict[str, Any]:
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
