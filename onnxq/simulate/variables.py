"""The step sizes of a plan as variables: one for each group of activations, one for each weight.

A weight with a scale per channel is one variable too: its steps keep their pattern and are multiplied together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxq.affine import QuantParams, quantize
from onnxq.graph import float_values
from onnxq.program import Program, QuantDecision, Unit
from onnxq.saturation import kernel_kind
from onnxq.target import Target
from onnxq.weights import code_limit, safe_codes


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
    """

    program: Program
    values: dict[str, NDArray[np.float32]]
    start: dict[str, QuantDecision]
    sites: dict[str, tuple[str, int, int]]

    @classmethod
    def of(cls, program: Program, target: Target) -> Weights:
        """All weights that have codes, tables included."""
        nodes, tensors = {n.name: n for n in program.graph.nodes}, program.graph.tensors()
        readers: dict[str, list[Unit]] = {}
        for unit in program.units.values():
            if unit.weight is not None:
                readers.setdefault(unit.weight, []).append(unit)
        values, start, sites = {}, {}, {}
        for weight, units in readers.items():
            found = float_values(tensors[weight])
            assert found is not None
            values[weight], start[weight] = found, program.plan[weight]
            if not units[0].is_table:
                kind = min(kernel_kind(nodes[u.name]) for u in units)
                sites[weight] = kind, units[0].channel_axis, code_limit(program, units, target)
        return cls(program, values, start, sites)

    def at(self, weight: str, factor: float) -> QuantDecision:
        """The decision with the steps of the start times a factor: nearest codes that no kernel saturates.

        At factor 1 it is the start itself, whatever rounding its codes had.
        """
        decision = self.start[weight]
        if factor == 1.0:
            return decision
        assert decision.params is not None
        params = scaled(decision.params, factor)
        if weight not in self.sites:
            return replace(decision, params=params, codes=quantize(self.values[weight], params))
        params, codes, _ = safe_codes(self.values[weight], params, *self.sites[weight])
        return replace(decision, params=params, codes=codes)


def write_factors(program: Program, weights: Weights, factors: dict[str, float]) -> None:
    """Put the steps into the plan; tensors of one group get one grid."""
    for tensor, decision in list(program.plan.items()):
        if decision.is_weight and tensor in weights.start:
            name = decision.group if tensor not in weights.sites else tensor
            program.plan[tensor] = weights.at(tensor, factors.get(name, 1.0))
        elif decision.params is not None:
            factor = factors.get(decision.group, 1.0)
            program.plan[tensor] = replace(decision, params=scaled(decision.params, factor))


def names(variables: Sequence[Variable]) -> list[str]:
    """Their names."""
    return [v.name for v in variables]


Codes = NDArray[np.integer[Any]]
