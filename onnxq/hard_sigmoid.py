"""HardSigmoid on codes: an addition whose result saturates.

    clip(alpha x + beta, 0, 1)        x = s (q - z)

The codes of x read at the scale alpha s are alpha x, for nothing. What is left is to add beta and to round to a grid that ends at
0 and 1, which the integer Add of a runtime does in one pass.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.borders import Borders, Bounds
from onnxq.graph import Uses, constant, is_standard
from onnxq.program import Unit
from onnxq.rules import SLOPE_AND_SHIFT

HARD_SIGMOID = "HardSigmoid"
EVERYTHING = (-math.inf, math.inf)
UNIT_INTERVAL = Bounds(np.float32(0), np.float32(1))

Operand = tuple[gs.Tensor, gs.Tensor, gs.Tensor]


def slope_and_shift(node: gs.Node) -> tuple[float, float]:
    """alpha and beta of a HardSigmoid."""
    alpha, beta = (float(node.attrs.get(name, default)) for name, default in SLOPE_AND_SHIFT.items())
    return alpha, beta


def useful_range(uses: Uses, tensor: gs.Tensor) -> tuple[float, float]:
    """The interval in which values of a tensor tell its readers anything: what lies outside may saturate.

    A HardSigmoid is 0 below -beta / alpha and 1 above (1 - beta) / alpha; x times it, a hard swish, is 0 below as well.
    """
    readers = uses.readers(tensor)
    ramps = [node for node in readers if node.op == HARD_SIGMOID and is_standard(node)]
    if not ramps or uses.escapes(tensor):
        return EVERYTHING
    results = {node.outputs[0].name for node in ramps}
    others = [node for node in readers if node.op != HARD_SIGMOID]
    if not all(node.op == "Mul" and any(t.name in results for t in node.inputs) for node in others):
        return EVERYTHING
    slopes = [slope_and_shift(node) for node in ramps]
    low = min(-beta / alpha for alpha, beta in slopes)
    return low, max((1.0 - beta) / alpha for alpha, beta in slopes) if not others else math.inf


def swish(uses: Uses, tensor: gs.Tensor) -> gs.Node | None:
    """The Mul of a tensor by its own HardSigmoid where nothing else reads it, else None."""
    readers = uses.readers(tensor)
    ramps = [node for node in readers if node.op == HARD_SIGMOID and is_standard(node)]
    if len(ramps) != 1 or len(readers) != 2 or uses.escapes(tensor):
        return None
    product = uses.only_reader(ramps[0].outputs[0])
    is_swish = product is not None and product.op == "Mul" and any(product is node for node in readers)
    return product if is_swish else None


def summands(borders: Borders, unit: Unit, node: gs.Node) -> tuple[Operand, Operand]:
    """Codes, scale and zero point of alpha x and of beta."""
    alpha, beta = slope_and_shift(node)
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
