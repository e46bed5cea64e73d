"""The emitted graph of a plan, into which other grids and codes of the same tensors can be put.

It is the graph that would be deployed, run by the same integer kernels: a loss evaluated on it is the deployed loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxq.bias import corrected_bias, float_bias, set_bias, uncorrectable
from onnxq.borders import Correction, Recipe, uncorrected
from onnxq.emission import write_qdq
from onnxq.graph import Names, float_values
from onnxq.model.surgeon import to_graph
from onnxq.program import Program, QuantDecision, Unit
from onnxq.scheme import BYTE
from onnxq.simulate.segments import typed
from onnxq.target import Target

Array = NDArray[Any]
Plan = Mapping[str, QuantDecision]
Biases = Mapping[str, NDArray[np.float32]]

NO_BIASES: Biases = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Emitted:
    """An emitted model and how its initializers follow from a plan.

    Attributes:
        model: with the types of its inner tensors; weights are stored as 8-bit codes.
        recipes: of initializers, by name.
        program: what it was emitted from; its units and statistics are those of every plan.
    """

    model: ModelProto
    recipes: Mapping[str, Recipe]
    program: Program

    def array(self, name: str, plan: Plan) -> Array:
        """Values of an initializer by a plan."""
        return self.recipes[name].make(replace(self.program, plan=dict(plan)))


def emit(
    program: Program,
    target: Target,
    *,
    correct: bool,
    biases: Biases = NO_BIASES,
    starts: Biases = NO_BIASES,
) -> Emitted:
    """The emitted graph of a program whose plan is complete; the program is not changed.

    Args:
        program: its graph is still float.
        target: runtime whose form is taken; it is onnxruntime that runs it here.
        correct: whether the shift that quantized weights cause is taken out of the biases, as the pass correct-bias does.
        biases: to take instead, (C,) by the name of a unit; looked up whenever a bias is made.
        starts: biases that belong to the weights of this plan; of another plan, what its weights shift beyond them is taken out.
    """
    copy = _copy(program)
    correction = _correction(copy, biases, starts) if correct else uncorrected
    borders = write_qdq(
        copy, replace(target, bias="int32", qdq_only=False), open_plan=True, correction=correction
    )
    model = copy.to_model()
    stored = {t.name for t in model.graph.initializer}
    recipes = {name: recipe for name, recipe in borders.recipes.items() if name in stored}
    return Emitted(typed(model), recipes, copy)


def _copy(program: Program) -> Program:
    """The program with a graph of its own, whose weights are to be stored as plain 8-bit codes."""
    plan = {
        tensor: replace(d, scheme=replace(d.scheme, bits=BYTE), points=None) if d.is_weight else d
        for tensor, d in program.plan.items()
    }
    model = program.to_model()
    units, floats = dict(program.units), dict(program.floats)
    return Program(
        to_graph(model), model, plan, units, floats, statistics=program.statistics, sides=program.sides
    )


def _correction(program: Program, biases: Biases, starts: Biases) -> Correction:
    """What correct-bias does, for any plan; units that it gives a bias get one of zeros."""
    names, tensors = Names(program.graph), program.graph.tensors()
    nodes = {n.name: n for n in program.graph.nodes}
    weights: dict[str, NDArray[np.float32]] = {}
    groups = {name: node.attrs.get("group", 1) for name, node in nodes.items()}
    for unit in list(program.units.values()):
        if unit.weight is None or not unit.inputs or uncorrectable(unit, program) is not None:
            continue
        values = float_values(tensors[unit.weight])
        assert values is not None
        weights[unit.name] = program.plan[unit.weight].values if unit.name in starts else values
        if float_bias(unit, tensors) is None:
            zeros = np.zeros(values.shape[unit.channel_axis], np.float32)
            set_bias(program, names, nodes, unit, zeros)

    def correct(view: Program, unit: Unit, bias: NDArray[np.float32]) -> NDArray[np.float32]:
        if unit.name in biases:
            return biases[unit.name]
        if unit.name not in weights:
            return bias
        start = starts.get(unit.name, bias)
        return corrected_bias(view, unit, start, weights[unit.name], groups[unit.name])

    return correct
