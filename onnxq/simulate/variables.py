"""The step sizes of a plan as variables: one for each group of activations, one for each weight.

A weight with a scale per channel is one variable too: its steps keep their pattern and are multiplied together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from onnxq.affine import QuantParams, quantize
from onnxq.graph import float_values
from onnxq.point_rows import PointRows
from onnxq.program import Program, QuantDecision, Unit
from onnxq.rounded import WeightRounder, with_codes
from onnxq.rounding import cut_pairs
from onnxq.saturation import as_rows, from_rows, kernel_kind, partners
from onnxq.scheme import BYTE
from onnxq.table_points import recoded
from onnxq.target import Target
from onnxq.weights import code_limit, is_coarse, safe_codes

NO_ROUNDERS: Mapping[str, WeightRounder] = MappingProxyType({})
REMEMBERED = 4  # decisions of a tensor at as many factors


@dataclass(frozen=True)
class Variable:
    """One step size.

    Attributes:
        name: of the group of activations, or of the weight.
        kind: what it scales; a table is both, and counts as activations.
    """

    name: str
    kind: Literal["activation", "weight"]


def find_variables(program: Program) -> tuple[Variable, ...]:
    """Every step size of the plan, in the order in which the network comes to it.

    Activations with the plain 8-bit grid that only additions or pooling read are variables as well: their range matters.
    """
    found: dict[str, Variable] = {}
    for unit in program.units.values():
        for tensor in unit.inputs:
            _add(found, program, tensor)
        if unit.weight is not None and not unit.is_table:
            found.setdefault(unit.weight, Variable(unit.weight, "weight"))
        for tensor in unit.outputs:
            _add(found, program, tensor)
    return tuple(found.values())


def _add(found: dict[str, Variable], program: Program, tensor: str) -> None:
    decision = program.plan.get(tensor)
    if decision is not None:
        found.setdefault(decision.group, Variable(decision.group, "activation"))


def scaled(params: QuantParams, factor: float) -> QuantParams:
    """The grid with its steps multiplied."""
    return replace(params, scale=np.asarray(params.scale * np.float32(factor), np.float32))


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of a program, and how they are quantized again at other steps.

    Attributes:
        values: float weights by name.
        start: decisions at factor 1.
        sites: kind of kernel, output-channel axis and pair limit of each weight that is no table.
        coarse: those that lose much at their start: below 8 bits, or with little signal to noise in half of their channels.
        rounders: make the codes of weights, where they are not rounded to nearest.
    """

    program: Program
    values: dict[str, NDArray[np.float32]]
    start: dict[str, QuantDecision]
    sites: dict[str, tuple[str, int, int]]
    coarse: frozenset[str] = frozenset()
    rounders: Mapping[str, WeightRounder] = field(default_factory=dict)

    @classmethod
    def of(
        cls, program: Program, target: Target, rounders: Mapping[str, WeightRounder] = NO_ROUNDERS
    ) -> Weights:
        """All weights that have codes, tables included."""
        nodes, tensors = {n.name: n for n in program.graph.nodes}, program.graph.tensors()
        readers: dict[str, list[Unit]] = {}
        for unit in program.units.values():
            if unit.weight is not None:
                readers.setdefault(unit.weight, []).append(unit)
        values, start, sites, coarse = {}, {}, {}, set()
        for weight, units in readers.items():
            found = float_values(tensors[weight])
            assert found is not None
            values[weight], start[weight] = found, program.plan[weight]
            if not units[0].is_table:
                kind = min(kernel_kind(nodes[u.name]) for u in units)
                sites[weight] = kind, units[0].channel_axis, code_limit(program, units, target)
            narrow = start[weight].scheme.bits < BYTE
            if narrow or (weight in sites and is_coarse(found, start[weight], units[0].channel_axis)):
                coarse.add(weight)
        return cls(program, values, start, sites, frozenset(coarse), rounders)

    def at(self, weight: str, factor: float) -> QuantDecision:
        """The decision with the steps of the start times a factor.

        At factor 1 it is the start itself, whatever rounding its codes had.
        """
        decision = self.start[weight]
        if factor == 1.0:
            return decision
        assert decision.params is not None
        params = scaled(decision.params, factor)
        return self.coded(weight, params)

    def coded(self, weight: str, params: QuantParams) -> QuantDecision:
        """The decision with these parameters, and codes that no kernel saturates."""
        decision, values = self.start[weight], self.values[weight]
        if weight not in self.sites and decision.points is not None:
            return recoded(decision, values, params)
        if weight not in self.sites:
            return replace(decision, params=params, codes=quantize(values, params))
        if decision.points is not None:
            made = self._pointed(weight, params, decision.points)
        else:
            params, codes, _ = safe_codes(values, params, *self.sites[weight])
            made = replace(decision, params=params, codes=codes)
        return self.rounders[weight].round(made)[0] if weight in self.rounders else made

    def _pointed(self, weight: str, params: QuantParams, points: PointRows) -> QuantDecision:
        """The nearest codes at other steps, of channels that reach as far as their points do."""
        decision, values, (kind, axis, limit) = self.start[weight], self.values[weight], self.sites[weight]
        rows, scale = as_rows(values, kind, axis), np.broadcast_to(params.scale, values.shape[axis])
        low, high = points.reach((decision.scheme.qmin, decision.scheme.qmax))
        codes = np.clip(np.rint(rows / scale[:, None]), low[:, None], high[:, None]).astype(np.int16)
        codes = cut_pairs(codes, partners(values.shape, kind, axis), limit)
        return with_codes(replace(decision, params=params), from_rows(codes, values.shape, kind, axis))


class Steps:
    """A plan at multiples of its steps.

    A *point* is a vector of natural logarithms of factors on the steps of the plan at the start, in the order of `variables`:
    zeros are the plan itself. Equal factors give the same decision objects, by which it is known what changed.

    Attributes:
        variables: the steps.
        plan: at the start.
        weights: float weights, to make codes of.
    """

    def __init__(
        self, program: Program, target: Target, rounders: Mapping[str, WeightRounder] = NO_ROUNDERS
    ) -> None:
        """Of a program whose plan is complete."""
        self.variables = find_variables(program)
        self.plan = dict(program.plan)
        self.weights = Weights.of(program, target, rounders)
        self._places = {v.name: i for i, v in enumerate(self.variables)}
        self._made: dict[str, dict[float, QuantDecision]] = {}

    def at(self, point: NDArray[np.float64]) -> dict[str, QuantDecision]:
        """The plan at a point."""
        factors = np.exp(np.asarray(point, np.float64)).tolist()
        places = {tensor: self._places.get(self._name(tensor)) for tensor in self.plan}
        return {t: self._at(t, 1.0 if place is None else factors[place]) for t, place in places.items()}

    def coarse(self) -> list[int]:
        """Places of the variables that scale what loses much: narrow activations and coarse weights."""
        found = {self._name(t) for t in self.plan if self._loses_much(t)}
        return [i for i, v in enumerate(self.variables) if v.name in found]

    def _loses_much(self, tensor: str) -> bool:
        return tensor in self.weights.coarse or self.plan[tensor].scheme.bits < BYTE

    def _name(self, tensor: str) -> str:
        """The variable that scales a tensor; a table shares that of the activations it becomes."""
        return tensor if tensor in self.weights.sites else self.plan[tensor].group

    def _at(self, tensor: str, factor: float) -> QuantDecision:
        if factor == 1.0:
            return self.plan[tensor]
        made = self._made.setdefault(tensor, {})
        if factor not in made:
            while len(made) >= REMEMBERED:
                del made[next(iter(made))]
            made[factor] = self._make(tensor, factor)
        return made[factor]

    def _make(self, tensor: str, factor: float) -> QuantDecision:
        if tensor in self.weights.start:
            return self.weights.at(tensor, factor)
        decision = self.plan[tensor]
        assert decision.params is not None
        return replace(decision, params=scaled(decision.params, factor))
