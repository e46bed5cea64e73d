"""Correct what quantization does to the mean of each output channel, and to its spread.

Of weights alone,

    E[y_hat] - E[y] = sum_i (w_hat_i - w_i) E[x_i]

is taken out of the bias, with E[x_i] the mean of input channel i over the calibration samples (Nagel et al.,
Data-Free Quantization, ICCV 2019, section 4.2, with measured instead of assumed means; Finkelstein et al.,
2019). Zero padding is not looked at. Where weights have fewer than 8 bits their means can be kept exactly instead, for any
input: see `onnxq.mean_point`. What that leaves is taken out of the bias as well.

Below 8 bits inputs are not what they were either. Then outputs are matched with those of the float network in the network as it
will run, layer by layer: see `onnxq.simulate.outputs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.bias import (
    BiasCorrection,
    corrected_bias,
    float_bias,
    matches_outputs,
    set_bias,
    uncorrectable,
)
from onnxq.graph import Names, float_values
from onnxq.mean_point import with_means, with_spread
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program, Unit
from onnxq.saturation import kernel_kind
from onnxq.scheme import BYTE
from onnxq.weights import code_limit

if TYPE_CHECKING:
    from onnxq.simulate import Matched


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Take the shift of output means that quantization causes out of the biases.

    Attributes:
        correction: `output` takes out what quantized weights do to means; `exact` keeps the means of weights below 8 bits first,
            by a shared point of ones; `deployed` matches means and spreads in the network as it will run, layer by layer, by
            biases and scales; `better` is the one of `deployed` and `output` with which the network's output has less noise
            on samples; `auto` is `better` where something has fewer than 8 bits and there are samples, else `output`; `none`
            leaves all as it is. Behind search-steps, the biases that it ended with stay where matching anew has clearly more
            noise.
        samples: calibration samples to look at where outputs are matched.
        patches: random inputs of each kernel from one sample, there.
        spread: whether the scale of each channel below 8 bits makes up for the spread that its codes have lost or gained.
    """

    name: ClassVar[str] = "correct-bias"
    correction: BiasCorrection = "auto"
    samples: int = 128
    patches: int = 16
    spread: bool = False

    def run(self, program: Program, ctx: Context) -> PassResult:
        if self.correction == "none" and not self.spread:
            return PassResult(0)
        tensors, nodes = program.graph.tensors(), {n.name: n for n in program.graph.nodes}
        facts: dict[str, Any] = self._change_weights(program, ctx, tensors, nodes)
        if self.correction == "none":
            return PassResult(0, facts=facts)
        biases: Mapping[str, NDArray[np.float32]] = {}
        if matches_outputs(program, ctx, self.correction):
            from onnxq.simulate import matched  # a simulator that 8 bits do not need

            outputs = matched(program, ctx, self.correction, self.samples, self.patches)
            facts["outputs"] = {"matched": bool(outputs.plan or outputs.biases), "sqnr_db": outputs.sqnr_db}
            _keep_own(program, outputs, tensors, nodes)
            program.plan.update(outputs.plan)
            biases = outputs.biases
        names = Names(program.graph)
        corrected, skipped = 0, {}
        for unit in list(program.units.values()):
            if unit.weight is None or not unit.inputs:
                continue
            reason = uncorrectable(unit, program)
            if reason is not None:
                skipped[unit.name] = reason
                continue
            found = biases.get(unit.name)
            found = _corrected(program, unit, tensors, nodes) if found is None else found
            set_bias(program, names, nodes, unit, found)
            corrected += 1
        return PassResult(corrected, skipped, facts)

    def _change_weights(
        self, program: Program, ctx: Context, tensors: dict[str, gs.Tensor], nodes: dict[str, gs.Node]
    ) -> dict[str, dict[str, str]]:
        """Keep spreads and means of the weights below 8 bits; the reasons where means are not kept."""
        readers: dict[str, list[Unit]] = {}
        for unit in program.units.values():
            if unit.weight is not None and unit.inputs:
                readers.setdefault(unit.weight, []).append(unit)
        left: dict[str, str] = {}
        for weight, units in readers.items():
            decision, values = program.plan[weight], float_values(tensors[weight])
            if decision.scheme.bits >= BYTE or decision.codes is None or decision.points is not None:
                continue
            assert values is not None
            if self.spread:
                decision = program.plan[weight] = with_spread(decision, values)
            if self.correction != "exact":
                continue
            kind = min(kernel_kind(nodes[u.name]) for u in units)  # Conv, the stricter, before Depthwise
            found = with_means(decision, values, kind, code_limit(program, units, ctx.target))
            if isinstance(found, str):
                left[weight] = found
            else:
                program.plan[weight] = found
        return {"means_not_kept": left} if left else {}


def _corrected(
    program: Program, unit: Unit, tensors: Mapping[str, gs.Tensor], nodes: Mapping[str, gs.Node]
) -> NDArray[np.float32]:
    """The bias (C,) of a unit less what its own weights shift means by."""
    assert unit.weight is not None
    weights, bias = float_values(tensors[unit.weight]), float_bias(unit, tensors)
    assert weights is not None
    if bias is None:
        bias = np.zeros(weights.shape[unit.channel_axis], np.float32)
    return corrected_bias(program, unit, bias, weights, nodes[unit.name].attrs.get("group", 1))


def _keep_own(
    program: Program, outputs: Matched, tensors: Mapping[str, gs.Tensor], nodes: Mapping[str, gs.Node]
) -> None:
    """Remember layers as they are before matching, which makes up for the noise of others: alone they would have none of it."""
    if program.reference is None:
        return
    program.reference.plan.update({tensor: program.plan[tensor] for tensor in outputs.plan})
    matched_units = (program.units[name] for name in outputs.biases)
    correctable = [unit for unit in matched_units if uncorrectable(unit, program) is None]
    program.reference.biases.update({u.name: _corrected(program, u, tensors, nodes) for u in correctable})
