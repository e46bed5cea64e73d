"""Gather the statistics that the range methods and bias correction read, in one run over the calibration samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.calibration.collect import collect
from onnxq.calibration.statistics import Needs
from onnxq.errors import DataError
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program
from onnxq.quantizers import method_for, parse_quantizer


@dataclass(frozen=True)
class Calibrate(Pass):
    """Run the calibration samples and gather statistics of the tensors in the plan.

    Attributes:
        ranges: range method to gather for; all but minmax need histograms; `auto` is that of choose-ranges.
    """

    name: ClassVar[str] = "calibrate"
    ranges: str = "auto"

    def run(self, program: Program, ctx: Context) -> PassResult:
        wanted = needs(program, self.ranges)
        missing = {name: need for name, need in wanted.items() if not _has(program, name, need)}
        if missing and ctx.data is None and program.statistics:
            raise DataError(
                f"the calibration table lacks {next(iter(missing))!r}; it was saved with other options"
            )
        if missing:
            program.statistics |= collect(program, ctx, missing, "calibrating")
        return PassResult(len(missing))


def _has(program: Program, name: str, need: Needs) -> bool:
    if name not in program.statistics:
        return False
    have = program.statistics[name].needs
    return (
        (have.histogram or not need.histogram)
        and (have.power or not need.power)
        and need.channels in (None, have.channels)
    )


def needs(program: Program, ranges: str) -> dict[str, Needs]:
    """What to gather: the first tensor of each group (the others hold the same values), and channel means of layer inputs.

    The values of a table are known; of its group it is what is looked up, where samples are read at all. No means are gathered
    of a tensor that layers disagree on.
    """
    groups = {d.group for d in program.plan.values() if not d.is_weight}
    groups -= {tensor for tensor, d in program.plan.items() if d.is_weight}
    found = {
        group: Needs(
            histogram=parse_quantizer(method_for(ranges, program.plan[group].scheme)).needs.histogram
        )
        for group in sorted(groups)
    }
    axes: dict[str, set[int]] = {}
    for unit in program.units.values():
        if unit.weight is not None and unit.inputs:
            axes.setdefault(unit.inputs[0], set()).add(1 if unit.kind == "Conv" else -1)
    for tensor, wanted in axes.items():
        if len(wanted) == 1:
            found[tensor] = found.get(tensor, Needs()) | Needs(channels=wanted.pop())
    tables = [unit for unit in program.units.values() if unit.is_table]
    for unit in tables if found else ():
        found[unit.output] = found.get(unit.output, Needs()) | Needs(histogram=True)
    return found
