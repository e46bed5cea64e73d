"""Choose scale and zero point of every activation from its own statistics, with one of the range methods.

Embedding tables take the range of least squared error over their values, each as often as samples look it up and once more. What
only a hard sigmoid or swish reads takes no more than the range in which that is not constant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.affine import QuantParams, affine_params
from onnxq.calibration.statistics import Needs, TensorStatistics
from onnxq.errors import DataError
from onnxq.graph import Uses, float_values
from onnxq.hard_sigmoid import useful_range
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program, QuantDecision
from onnxq.quantizers import Mse, method_for, parse_quantizer
from onnxq.scheme import QuantScheme

LARGEST_LOSS = 2.0  # a step may become this many times coarser for a cheaper Concat


@dataclass(frozen=True)
class ChooseRanges(Pass):
    """Choose scales and zero points of activations, each tensor on its own.

    Attributes:
        ranges: minmax, percentile, mse, entropy or aciq; `auto` takes minmax at 8 bits and mse below.
    """

    name: ClassVar[str] = "choose-ranges"
    ranges: str = "auto"

    def run(self, program: Program, ctx: Context) -> PassResult:
        tensors = program.graph.tensors()
        tables = {u.weight for u in program.units.values() if u.is_table}
        chosen: dict[str, QuantParams] = {}
        for tensor, decision in program.plan.items():
            if decision.is_weight and tensor in tables:
                values = float_values(tensors[tensor])
                assert values is not None
                chosen[decision.group] = _table_params(program, tensor, values, decision.scheme)
        for decision in program.plan.values():
            if not decision.is_weight and decision.group not in chosen:
                chosen[decision.group] = self._choose(program, decision)
        narrowed = _narrow(program, tensors, chosen)
        tied = _tie_concats(program, ctx, chosen)
        for tensor, decision in program.plan.items():
            if decision.group in chosen:
                program.plan[tensor] = replace(decision, params=chosen[decision.group])
        ranges = {group: [float(p.low), float(p.high)] for group, p in chosen.items()}
        return PassResult(len(chosen), facts={"ranges": ranges, "tied": tied, "narrowed": narrowed})

    def _choose(self, program: Program, decision: QuantDecision) -> QuantParams:
        quantizer = parse_quantizer(method_for(self.ranges, decision.scheme))
        statistics = program.statistics.get(decision.group)
        if statistics is None:
            raise DataError(
                f"tensor {decision.group!r} has no statistics; the pass calibrate must run before"
            )
        if quantizer.needs.histogram and statistics.histogram is None:
            raise DataError(f"ranges {self.ranges!r} need histograms; write calibrate:ranges={self.ranges}")
        return quantizer(statistics, decision.scheme)


def _table_params(
    program: Program, table: str, values: NDArray[np.floating], scheme: QuantScheme
) -> QuantParams:
    """The grid of least squared error over the values of a table, each as often as samples look it up and once more.

    Rows that most samples look up, as those of special tokens are, would be cut off for many that none does.
    """
    own = TensorStatistics(table, Needs(histogram=True))
    own.update(values)
    units = [unit for unit in program.units.values() if unit.is_table and unit.weight == table]
    looked_up = [program.statistics[unit.output] for unit in units if unit.output in program.statistics]
    return Mse()(TensorStatistics.pooled(table, [own, *looked_up]), scheme)


def _narrow(program: Program, tensors: Mapping[str, gs.Tensor], chosen: dict[str, QuantParams]) -> int:
    """Leave out of ranges what no reader tells apart; how many groups have become narrower."""
    uses, narrowed = Uses(program.graph), 0
    alone = Counter(decision.group for decision in program.plan.values())
    for tensor, decision in program.plan.items():
        if decision.is_weight or alone[decision.group] > 1:
            continue
        before, (low, high) = chosen[decision.group], useful_range(uses, tensors[tensor])
        ends = max(low, float(before.low)), min(high, float(before.high))
        if ends != (float(before.low), float(before.high)):
            chosen[decision.group] = affine_params(*ends, decision.scheme)
            narrowed += 1
    return narrowed


def _tie_concats(program: Program, ctx: Context, chosen: dict[str, QuantParams]) -> int:
    """Give the inputs of a Concat one grid with its output where that costs none of them more than a bit; the kernel then copies.

    Returns:
        The number of groups whose grid became another one's.
    """
    tied, own = 0, dict(chosen)  # own: what a chain of Concats may not drift away from
    for unit in program.units.values():
        if not ctx.target.rules[unit.kind].copies_equal:
            continue
        tensors = (*unit.inputs, *unit.outputs)
        if len({program.plan[t].scheme for t in tensors}) > 1:
            continue
        groups = list(dict.fromkeys(program.plan[t].group for t in tensors))
        low, high = (
            float(f(getattr(chosen[g], end) for g in groups)) for f, end in ((min, "low"), (max, "high"))
        )
        shared = affine_params(low, high, program.plan[unit.output].scheme)
        if float(shared.low) < 0 and any(float(own[g].low) >= 0 for g in groups):
            continue  # a Relu vanishes into its kernel only where the zero point is the smallest code
        if all(float(own[g].scale) * LARGEST_LOSS >= float(shared.scale) for g in groups):
            tied += sum(float(chosen[g].scale) != float(shared.scale) for g in groups)
            chosen.update(dict.fromkeys(groups, shared))
    return tied
