"""Correct the mean of each output channel that quantizing the weights shifts.

    E[y_hat] - E[y] = sum_i (w_hat_i - w_i) E[x_i]

is taken out of the bias, with E[x_i] the mean of input channel i over the calibration samples (Nagel et al.,
Data-Free Quantization, ICCV 2019, section 4.2, with measured instead of assumed means; Finkelstein et al.,
2019). Zero padding is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.bias import corrected_bias, float_bias, set_bias, uncorrectable
from onnxq.graph import Names, float_values
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program


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
            reason = uncorrectable(unit, program)
            if reason is not None:
                skipped[unit.name] = reason
                continue
            weights, bias = float_values(tensors[unit.weight]), float_bias(unit, tensors)
            assert weights is not None
            if bias is None:
                bias = np.zeros(weights.shape[unit.channel_axis], np.float32)
            group = nodes[unit.name].attrs.get("group", 1)
            set_bias(program, names, nodes, unit, corrected_bias(program, unit, bias, weights, group))
            corrected += 1
        return PassResult(corrected, skipped)
