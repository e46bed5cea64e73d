"""Keep convolutions in float that 8 bits make slower, and spectrograms.

An 8-bit depthwise kernel works on pixels one after the other; below some width the runtime's float kernels are faster by more
than the rest of the network gains. At full image resolution that decides whether the whole model gets faster. In front of an
8-bit product each row of each window is copied, all channels of its pixels together; over one or two channels the copies of short
rows take longer than the float convolution, and so do those for a single output ([measured](../bench/results/narrow.json)).

Of a spectrogram 8 bits leave the loud alone, and a logarithm makes what they add to the quiet large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from onnxq.graph import Uses, is_constant
from onnxq.hard_sigmoid import swish
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program
from onnxq.spectrogram import spectrogram_layers
from onnxq.target import Target

ACTIVATIONS = ("Relu", "Clip", "LeakyRelu")
LONG_ROW = 32  # pixels, which are copied as fast as they are multiplied
LOGARITHM = "its result goes through a logarithm, which makes the noise of small values large"


@dataclass(frozen=True)
class KeepStem(Pass):
    """Leave in float spectrograms, and where that is faster narrow convolutions at the start."""

    name: ClassVar[str] = "keep-stem"

    def run(self, program: Program, ctx: Context) -> PassResult:
        graph, target = program.graph, ctx.target
        kept = _over_few_channels(graph, target) | _stems(graph, target)
        kept |= dict.fromkeys(spectrogram_layers(graph), LOGARITHM)
        program.floats |= kept
        return PassResult(len(kept), kept)


def _over_few_channels(graph: gs.Graph, target: Target) -> dict[str, str]:
    """Reasons of convolutions over few channels by name."""
    kept = {}
    for node in graph.nodes:
        if node.op != "Conv" or not is_constant(node.inputs[1]) or node.attrs.get("group", 1) > 1:
            continue
        outputs, channels, *_, row = map(int, node.inputs[1].shape)
        if channels <= target.narrow_inputs and (row < LONG_ROW or outputs == channels == 1):
            of = "one channel" if channels == 1 else f"{channels} channels"
            kept[node.name] = f"{target.name} runs convolutions over {of} faster in float"
    return kept


def _stems(graph: gs.Graph, target: Target) -> dict[str, str]:
    """Reasons of first convolutions and narrow depthwise ones behind them by name."""
    uses, kept = Uses(graph), dict[str, str]()
    for tensor in graph.inputs:
        first = uses.only_reader(tensor)
        second = _behind(uses, first) if first is not None and first.op == "Conv" else None
        if first is None or second is None or not _is_depthwise(second):
            continue
        channels = int(second.inputs[1].shape[0])
        if channels <= target.narrow_depthwise:
            reason = f"{target.name} runs depthwise convolutions of {channels} channels faster in float"
            kept |= {first.name: reason, second.name: reason}
    return kept


def _behind(uses: Uses, node: gs.Node) -> gs.Node | None:
    """The only node that reads this one, past an activation."""
    after = uses.only_reader(node.outputs[0])
    active = after if after is not None and after.op in ACTIVATIONS else swish(uses, node.outputs[0])
    return after if active is None else uses.only_reader(active.outputs[0])


def _is_depthwise(node: gs.Node) -> bool:
    if node.op != "Conv" or not is_constant(node.inputs[1]):
        return False
    return bool(node.attrs.get("group", 1) > 1 and node.inputs[1].shape[1] == 1)
