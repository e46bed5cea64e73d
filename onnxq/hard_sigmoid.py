"""HardSigmoid, clip(alpha x + beta, 0, 1), which runs on codes as an addition that saturates (`onnxq.lines`).

What only it reads needs no range where it is constant.
"""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs

from onnxq.graph import Uses, is_standard
from onnxq.rules import SLOPE_AND_SHIFT

HARD_SIGMOID = "HardSigmoid"
EVERYTHING = (-math.inf, math.inf)


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
