"""Give convolutions over three channels a fourth one of zeros, so that the integer kernel reads whole words.

The codes are padded with the zero point and the weights with zeros: the result is the same to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.graph import Names, constant, float_values
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program, Unit

WORD = 4
LEAST_OUTPUTS = 16


@dataclass(frozen=True)
class PadChannels(Pass):
    """Pad the input of quantized convolutions over three channels to four, which is faster and exact."""

    name: ClassVar[str] = "pad-channels"

    def run(self, program: Program, ctx: Context) -> PassResult:
        names = Names(program.graph)
        nodes = {n.name: n for n in program.graph.nodes}
        readers = [u.weight for u in program.units.values()]
        units, changed = {}, 0
        for unit in program.units.values():
            if (
                unit.kind == "Conv"
                and ctx.target.pads_channels
                and _gains(nodes[unit.name], readers.count(unit.weight))
            ):
                pad, unit = _pad(program, names, nodes[unit.name], unit)
                units[pad.name] = pad
                changed += 1
            units[unit.name] = unit
        program.units = units
        return PassResult(changed)


def _gains(node: gs.Node, readers: int) -> bool:
    shape = node.inputs[1].shape
    return (
        shape[1] == WORD - 1
        and node.attrs.get("group", 1) == 1
        and shape[0] >= LEAST_OUTPUTS
        and readers == 1
    )


def _pad(program: Program, names: Names, node: gs.Node, unit: Unit) -> tuple[Unit, Unit]:
    """Insert a Pad in front of the convolution; the units of both."""
    data, weight = node.inputs[0], node.inputs[1]
    values, decision = float_values(weight), program.plan[weight.name]
    assert values is not None
    assert decision.codes is not None
    rank = values.ndim
    extra = [(0, 0), (0, 1)] + [(0, 0)] * (rank - 2)
    amounts = np.zeros(2 * rank, np.int64)
    amounts[rank + 1] = 1
    shape = None if data.shape is None else [data.shape[0], WORD, *data.shape[2:]]
    wide = gs.Variable(names.fresh(f"{data.name}_padded"), data.dtype, shape)
    pads = constant(names, f"{data.name}_pads", amounts)
    zero = constant(names, f"{data.name}_fill", np.zeros((), np.float32))
    pad = gs.Node("Pad", names.fresh(f"{data.name}_Pad"), inputs=[data, pads, zero], outputs=[wide])
    program.graph.nodes.insert(program.graph.nodes.index(node), pad)
    wider = constant(names, f"{weight.name}_padded", np.pad(values, extra))
    node.inputs[0], node.inputs[1] = wide, wider
    program.plan[wide.name] = program.plan[data.name]
    points = decision.points
    if points is not None:
        points = replace(
            points, rows=np.pad(points.rows, extra)
        )  # a Conv's channel axis is the first already
    codes = np.pad(decision.codes, extra)
    program.plan[wider.name] = replace(program.plan.pop(weight.name), codes=codes, points=points)
    layout = Unit("Pad", (pad.name,), (data.name,), (wide.name,), is_layout=True)
    return layout, replace(unit, inputs=(wide.name,), weight=wider.name)
