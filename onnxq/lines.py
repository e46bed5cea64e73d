"""Straight lines on codes: an addition.

    alpha x + beta        x = s (q - z), alpha > 0

The codes of x read at the scale alpha s are alpha x, for nothing. What is left is to add beta and to round to the grid of the
result, which the integer Add of a runtime does in one pass. A HardSigmoid is a line whose result saturates at 0 and 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.borders import ALL, Borders, Bounds
from onnxq.graph import constant, with_number
from onnxq.hard_sigmoid import HARD_SIGMOID, slope_and_shift
from onnxq.program import Unit

UNIT_INTERVAL = Bounds(np.float32(0), np.float32(1))

Operand = tuple[gs.Tensor, gs.Tensor, gs.Tensor]


def is_line(unit: Unit) -> bool:
    """Whether the unit is a line: a HardSigmoid, or a Mul or Add whose other operand is a number."""
    return unit.kind == HARD_SIGMOID or (unit.kind in ("Mul", "Add") and len(unit.inputs) == 1)


def own_bounds(unit: Unit) -> Bounds:
    """Where the result of a unit saturates by itself."""
    return UNIT_INTERVAL if unit.kind == HARD_SIGMOID else ALL


def summands(borders: Borders, unit: Unit, nodes: Mapping[str, gs.Node]) -> tuple[Operand, Operand]:
    """Codes, scale and zero point of alpha x and of beta."""
    alpha, beta = _coefficients(unit, nodes)
    tensor = unit.inputs[0]
    codes, zero = borders.codes(tensor), borders.grid(tensor)[1]
    scale = borders.parameter(
        f"{tensor}_slanted", (tensor,), lambda p: np.asarray(p.params(tensor).scale * np.float32(alpha))
    )
    names, kind = borders.names, codes.dtype
    one, none = (
        constant(names, f"{unit.output}_{n}", np.array(v, kind)) for n, v in (("one", 1), ("none", 0))
    )
    step = constant(names, f"{unit.output}_shift", np.array(abs(beta) or 1.0, np.float32))
    if beta == 0.0:
        one = none
    return (codes, scale, zero), (one, step, none) if beta >= 0.0 else (none, step, one)


def _coefficients(unit: Unit, nodes: Mapping[str, gs.Node]) -> tuple[float, float]:
    """alpha and beta."""
    if unit.kind == HARD_SIGMOID:
        return slope_and_shift(nodes[unit.name])
    alpha, beta = 1.0, 0.0
    for node in (nodes[name] for name in unit.nodes):
        if node.op == "Mul":
            alpha = with_number(node, "Mul")[1]
        elif node.op == "Add":
            beta = with_number(node, "Add")[1]
    return alpha, beta
