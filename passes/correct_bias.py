"""Correct the mean of each output channel that quantizing the weights shifts.

    E[y_hat] - E[y] = sum_i (w_hat_i - w_i) E[x_i]

is taken out of the bias, with E[x_i] the mean of input channel i over the calibration samples (Nagel et al.,
Data-Free Quantization, ICCV 2019, section 4.2, with measured instead of assumed means; Finkelstein et al.,
2019). Zero padding is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.affine import dequantize
from onnxq.bias import output_shift
from onnxq.graph import Names, constant, float_values, set_input
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program, Unit


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Take the shift of output means that quantized weights cause out of the biases."""

    name: ClassVar[str] = "correct-bias"

    def run(self, program: Program, ctx: Context) -> PassResult:
        names, tensors = Names(program.graph), program.graph.tensors()
        nodes = {n.name: n for n in program.graph.nodes}
        corrected, skipped = 0, {}
        for unit in list(program.units.values()):
            if unit.weight is None or not unit.inputs:
                continue
            reason = _correct(program, names, tensors, nodes, unit)
            if reason is None:
                corrected += 1
            else:
                skipped[unit.name] = reason
        return PassResult(corrected, skipped)


def _correct(
    program: Program, names: Names, tensors: dict[str, gs.Tensor], nodes: dict[str, gs.Node], unit: Unit
) -> str | None:
    """Correct one unit; the reason when it is left."""
    assert unit.weight is not None
    statistics, decision = program.statistics.get(unit.inputs[0]), program.plan[unit.weight]
    if statistics is None or statistics.channels is None:
        return "no channel means of its input were gathered"
    if decision.codes is None or decision.params is None:
        return "its weights have no codes yet"
    if unit.kind == "MatMul" and unit.bias is None:
        return "it has no bias to correct"
    weights = float_values(tensors[unit.weight])
    assert weights is not None
    error = dequantize(decision.codes, decision.params) - weights
    shift = output_shift(error, statistics.channels.mean, unit, nodes[unit.name].attrs.get("group", 1))
    old = float_values(tensors[unit.bias]) if unit.bias is not None else None
    bias = -shift if old is None else old.ravel() - shift
    new = constant(names, f"{unit.name}_bias", bias.astype(np.float32))
    holder = nodes[unit.nodes[1]] if unit.kind == "MatMul" else nodes[unit.name]
    if unit.bias is None:
        set_input(holder, 2, new)
    else:
        place = next(i for i, t in enumerate(holder.inputs) if t.name == unit.bias)
        holder.inputs[place] = new
    program.units[unit.name] = replace(unit, bias=new.name)
    return None
