"""Turn weights into codes: a scale per tensor or channel, and codes that no kernel saturates.

Two things may widen a channel's scale beyond what its weights ask for: neighbouring codes that would overflow 16 bits on machines
without VNNI (`onnxq.saturation`), and a bias that would not fit into int32 at input scale times weight scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.affine import QuantParams, quantize
from onnxq.bias import least_scales
from onnxq.graph import float_values
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program, Unit
from onnxq.quantizers import method_for
from onnxq.saturation import kernel_kind
from onnxq.weights import code_limit, safe_codes, step_params


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Choose scales and codes of weights.

    Attributes:
        method: minmax or mse; `auto` takes minmax at 8 bits and mse below.
        pattern: of scales: of each channel's own `range`, or one step in the pattern of the normalization that was folded
            (`batchnorm`), where there was one.
        saturation: `safe` keeps neighbouring codes within what 16 bits hold on machines without VNNI; `ignore` does not.
    """

    name: ClassVar[str] = "quantize-weights"
    method: str = "auto"
    pattern: Literal["range", "batchnorm"] = "range"
    saturation: str = "safe"

    def run(self, program: Program, ctx: Context) -> PassResult:
        tensors: dict[str, gs.Tensor] = program.graph.tensors()
        nodes = {n.name: n for n in program.graph.nodes}
        touched = {}
        if self.pattern == "range":
            program.folded.clear()
        readers: dict[str, list[Unit]] = {}
        for unit in program.units.values():
            if unit.weight is not None:
                readers.setdefault(unit.weight, []).append(unit)
        for weight, units in readers.items():
            decision, values = program.plan[weight], float_values(tensors[weight])
            assert values is not None
            if decision.params is not None:  # a table, whose grid is that of the activation it becomes
                program.plan[weight] = replace(decision, codes=quantize(values, decision.params))
                continue
            factors = program.folded.get(weight)
            method = method_for(self.method, decision.scheme)
            params = step_params(method, values, units[0].channel_axis, decision.scheme, factors)
            if ctx.target.bias == "int32":
                params = _fit_bias(program, units, params)
            kind = min(kernel_kind(nodes[u.name]) for u in units)  # Conv, the stricter, before Depthwise
            limit = code_limit(program, units, ctx.target) if self.saturation == "safe" else 0
            params, codes, count = safe_codes(values, params, kind, units[0].channel_axis, limit)
            program.plan[weight] = replace(decision, params=params, codes=codes)
            if count:
                touched[weight] = count
        return PassResult(len(readers), facts={"saturating_channels": touched})


def _fit_bias(program: Program, units: list[Unit], params: QuantParams) -> QuantParams:
    """Widen scales so that each bias fits into int32 with room for the products."""
    least = least_scales(program, units)
    scale = np.maximum(params.scale, least if params.scale.ndim else least.max())
    return replace(params, scale=np.asarray(scale, np.float32))
