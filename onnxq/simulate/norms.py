"""Layer-wise ranges of one method for a whole plan: p-norms are the curve along which LAPQ looks for its start.

    Delta_p = argmin ||Q_Delta(X) - X||_p        for each tensor on its own

(Nahshan et al., arXiv 1911.07190, section 3.2). Activations of 8 bits, and weights that fare well with
them, keep the ranges that they have.
"""

from __future__ import annotations

from dataclasses import replace

from onnxq.affine import QuantParams
from onnxq.errors import DataError
from onnxq.program import Program
from onnxq.quantizers import parse_quantizer
from onnxq.scheme import BYTE
from onnxq.simulate.variables import Weights
from onnxq.weights import step_params


def choose_layerwise(program: Program, layers: Weights, method: str, weights: bool = True) -> None:
    """Write the grids of a range method, such as lp=2.5, into the plan, for every tensor that loses much with its own.

    Args:
        program: with the plan.
        layers: makes the codes of weights.
        method: of ranges.
        weights: whether weights take it too, or activations alone.

    Raises:
        DataError: a tensor has no histogram.
        UsageError: there is no such method, or its option is out of range.
    """
    quantizer = parse_quantizer(method)
    tables = {d.group for t, d in program.plan.items() if d.is_weight and t not in layers.sites}
    chosen: dict[str, QuantParams] = {}
    for tensor, decision in list(program.plan.items()):
        if decision.group in tables or decision.points is not None:
            continue
        if weights and tensor in layers.coarse and tensor in layers.sites:
            assert decision.axis is not None
            factors = program.folded.get(tensor)
            params = step_params(method, layers.values[tensor], decision.axis, decision.scheme, factors)
            program.plan[tensor] = layers.coded(tensor, params)
            continue
        if tensor in layers.sites or decision.scheme.bits >= BYTE:
            continue
        if decision.group not in chosen:
            statistics = program.statistics.get(decision.group)
            if statistics is None or statistics.histogram is None:
                raise DataError(f"tensor {decision.group!r} has no histogram; write calibrate:ranges=mse")
            chosen[decision.group] = quantizer(statistics, decision.scheme)
        program.plan[tensor] = replace(decision, params=chosen[decision.group])
