"""Give the output channels that hurt most a second point, or more: w = sum_i a_i q_i, each q_i of the few bits of the weights.

Liu et al., "Post-training Quantization with Multiple Points", arXiv 2002.09049. The factors stand in whole ratios here, so that
the points fold into the codes of one 8-bit kernel (`onnxq.points.folded`): only the file grows, by the rows of some channels.
Rows of embedding tables can have further points too (`onnxq.table_points`).

A channel is judged by the error at its output, E[((w - w_hat) x)^2] on the calibration samples, with one point and with more. One
knapsack over all layers then spends the budget where it buys the most (`onnxq.points.budget`). Errors count as parts of the mean
power of their layer's outputs, so that layers can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from onnxq.errors import UsageError
from onnxq.moments import Site, moment_parts, second_moments, weight_sites
from onnxq.multipoint import Counts, PointLayer, decisions, figures, point_layer
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.point_rows import Form
from onnxq.points import at_random, below_error, even_error, within_budget
from onnxq.program import Program
from onnxq.scheme import BYTE
from onnxq.simulate import loss_gains
from onnxq.sizes import emitted_bytes, parse_bytes
from onnxq.table_points import Table, lookups, narrow_tables, table_points
from onnxq.target import Target
from onnxq.weights import code_limit

LEAST_FELT = 0.1  # of the median: how much the loss feels a layer at least
TRIALS = 10  # of a budget that meets a size
TINY = 1e-30


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
        form: `fold` sums points up into codes of 8 bits when the model is loaded; `rows` lets layers compute each and adds up
            their outputs; `auto` folds where the target has codes of 8 bits.
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
    form: Literal["auto", "fold", "rows"] = "auto"
    samples: int = 128
    patches: int = 16
    saturation: Literal["safe", "ignore"] = "safe"

    def run(self, program: Program, ctx: Context) -> PassResult:
        self._check()
        form = self._form(ctx.target)
        sites, skipped = _narrow_sites(program, form)
        tables, left = self._tables(program, ctx.target, form)
        for table in tables:
            program.plan.update(table.plan)
        layers = [*self._layers(program, ctx, sites), *self._looked_up(program, ctx, tables)]
        if self.choose == "loss":
            layers = self._weighed(program, ctx, layers)
        counts = self._counts(program, ctx, layers)
        found = decisions(program, layers, counts)
        for table in tables:
            program.plan.update({} if table.weight in found else table.before)
        program.plan.update(found)
        facts = {"form": form} | figures(program, layers, counts)
        return PassResult(len(facts["channels"]), skipped | left, {"multipoint": facts})

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

    def _form(self, target: Target) -> Form:
        if self.form == "auto":
            return "fold" if BYTE in target.bits else "rows"
        return self.form

    def _layers(self, program: Program, ctx: Context, sites: Sequence[Site]) -> Iterator[PointLayer]:
        """Every weight with its errors."""
        form = self._form(ctx.target)
        for part in moment_parts(sites):
            moments = second_moments(program, ctx, part, self.samples, self.patches)
            for done, site in enumerate(part):
                ctx.progress("points", done, len(part))
                limit = code_limit(program, site.units, ctx.target) if self.saturation == "safe" else 0
                yield point_layer(program, ctx, site, moments[site.weight], self.points, form, limit)

    def _tables(self, program: Program, target: Target, form: Form) -> tuple[list[Table], dict[str, str]]:
        """Tables whose rows can have further points, and the reasons of the nodes that are left."""
        if form == "rows":
            units = (unit.name for unit in program.units.values() if unit.is_table)
            return [], dict.fromkeys(units, "rows of a table are no rows of a product (form=rows)")
        return narrow_tables(program, target, self.points, self.saturation == "safe")

    def _looked_up(self, program: Program, ctx: Context, tables: Sequence[Table]) -> Iterator[PointLayer]:
        """Every table with the errors of its rows."""
        seen = lookups(program, ctx, tables, self.samples)
        for table in tables:
            yield table_points(table, seen[table.weight])

    def _weighed(self, program: Program, ctx: Context, layers: Sequence[PointLayer]) -> list[PointLayer]:
        """The layers, each weighed by what the loss gains from two points in all of its channels, per error that they take off.

        A gain that is lost in the noise of the samples counts as a small one.
        """
        both = [np.full(len(layer.candidates.errors), 2) for layer in layers]
        changes = [decisions(program, [layer], [count]) for layer, count in zip(layers, both, strict=True)]
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

    def _counts(self, program: Program, ctx: Context, layers: Sequence[PointLayer]) -> list[Counts]:
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


def _narrow_sites(program: Program, form: Form) -> tuple[list[Site], dict[str, str]]:
    """Weights whose channels can have further points, and the reasons of the nodes that are left."""
    sites, skipped = weight_sites(program)
    reasons = {site.weight: _reason(program, site, form) for site in sites}
    skipped |= {node.name: why for site in sites for node in site.nodes if (why := reasons[site.weight])}
    return [site for site in sites if not reasons[site.weight]], skipped


def _reason(program: Program, site: Site, form: Form) -> str:
    """Why no channel of a weight can have further points, empty where they can."""
    if program.plan[site.weight].scheme.bits >= BYTE:
        return "its weights have 8 bits, which fill the codes of the kernel"
    if form == "rows" and site.shape[0] > 1:
        return "its channels lie in groups, between which no rows of further points fit (form=rows)"
    return ""


def _within_bytes(program: Program, target: Target, layers: Sequence[PointLayer], limit: int) -> list[Counts]:
    """Points of which the file stays below a limit in bytes."""
    least = emitted_bytes(program, target)
    if least > limit:
        raise UsageError(
            f"the file takes about {least:,} bytes without further points, more than the {limit:,} given"
        )
    candidates = [
        replace(layer.candidates, cost=layer.candidates.cost * program.plan[layer.weight].scheme.bits / BYTE)
        for layer in layers
    ]
    low, high = 0.0, float(limit - least)
    best, trial = within_budget(candidates, low), high
    for _ in range(TRIALS):
        counts = within_budget(candidates, trial)
        emitted = replace(program, plan=program.plan | decisions(program, layers, counts))
        fits = emitted_bytes(emitted, target) <= limit
        low, high, best = (trial, high, counts) if fits else (low, trial, best)
        trial = (low + high) / 2.0
    return best
