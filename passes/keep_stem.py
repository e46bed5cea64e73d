"""Keep the first convolution and a narrow depthwise one behind it in float.

An 8-bit depthwise kernel works on pixels one after the other; below some width the runtime's float kernels are faster by more
than the rest of the network gains. At full image resolution that decides whether the whole model gets faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from onnxq.graph import Uses
from onnxq.hard_sigmoid import swish
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program

ACTIVATIONS = ("Relu", "Clip", "LeakyRelu")


@dataclass(frozen=True)
class KeepStem(Pass):
    """Leave a first convolution and the narrow depthwise convolution behind it in float, where the target's float kernels win."""

    name: ClassVar[str] = "keep-stem"

    def run(self, program: Program, ctx: Context) -> PassResult:
        if not ctx.target.narrow_depthwise:
            return PassResult()
        uses = Uses(program.graph)
        kept: dict[str, str] = {}
        for tensor in program.graph.inputs:
            first = uses.only_reader(tensor)
            second = _behind(uses, first) if first is not None and first.op == "Conv" else None
            if first is None or second is None or not _is_depthwise(second):
                continue
            channels = int(second.inputs[1].shape[0])
            if channels <= ctx.target.narrow_depthwise:
                reason = (
                    f"{ctx.target.name} runs depthwise convolutions of {channels} channels faster in float"
                )
                kept |= {first.name: reason, second.name: reason}
        program.floats |= kept
        return PassResult(len(kept), kept)


def _behind(uses: Uses, node: gs.Node) -> gs.Node | None:
    """The only node that reads this one, past an activation."""
    after = uses.only_reader(node.outputs[0])
    active = after if after is not None and after.op in ACTIVATIONS else swish(uses, node.outputs[0])
    return after if active is None else uses.only_reader(active.outputs[0])


def _is_depthwise(node: gs.Node) -> bool:
    if node.op != "Conv" or node.inputs[1].shape is None:
        return False
    return bool(node.attrs.get("group", 1) > 1 and node.inputs[1].shape[1] == 1)
