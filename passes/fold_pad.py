"""Turn a zero Pad in front of a convolution or an average pool into that node's own pads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.graph import is_standard, present, producer
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program


@dataclass(frozen=True)
class FoldPad(Pass):
    """Merge a Pad with zeros into the pads of the Conv or AveragePool that reads it."""

    name: ClassVar[str] = "fold-pad"

    def run(self, program: Program, ctx: Context) -> PassResult:
        folded, skipped = 0, {}
        for node in program.graph.nodes:
            pad = _pad_before(node)
            while pad is not None:
                reason = _fold(node, pad)
                if reason is not None:
                    skipped[pad.name] = reason
                    break
                folded += 1
                pad = _pad_before(node)
        if folded:
            program.graph.cleanup(remove_unused_graph_inputs=False)
        return PassResult(folded, skipped)


def _pad_before(node: gs.Node) -> gs.Node | None:
    """The Pad whose output a convolution or average pool takes as its data."""
    if node.op not in ("Conv", "AveragePool") or not is_standard(node):
        return None
    pad = producer(node.inputs[0])
    return pad if pad is not None and pad.op == "Pad" and is_standard(pad) else None


def _fold(node: gs.Node, pad: gs.Node) -> str | None:
    """Merge one Pad into the node after it; the reason when it must stay."""
    amounts, fill = present(pad, 1), present(pad, 2)
    if pad.attrs.get("mode", "constant") != "constant":
        return f"its mode is {pad.attrs['mode']}"
    if not isinstance(amounts, gs.Constant) or present(pad, 3) is not None:
        return "it does not pad all axes by constant amounts"
    if fill is not None and not (isinstance(fill, gs.Constant) and not np.any(fill.values)):
        return "it pads with something other than zero"
    begin, end = np.split(np.asarray(amounts.values, np.int64), 2)
    if begin[:2].any() or end[:2].any() or min(begin.min(), end.min()) < 0:
        return "it pads the batch or channels, or crops"
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return f"{node.name!r} chooses its own pads ({node.attrs['auto_pad']})"
    old = np.asarray(node.attrs.get("pads", [0] * (2 * (len(begin) - 2))), np.int64)
    new = old + np.concatenate([begin[2:], end[2:]])
    if node.op == "AveragePool":
        reason = _refuse_pool(node, old, new)
        if reason is not None:
            return reason
        node.attrs["count_include_pad"] = 1
    node.attrs.pop("auto_pad", None)
    node.attrs["pads"] = new.tolist()
    node.inputs[0] = pad.inputs[0]
    return None


def _refuse_pool(node: gs.Node, old: NDArray[np.int64], new: NDArray[np.int64]) -> str | None:
    """Why an average pool cannot take the pads although its data could; pads are (2 * spatial rank,)."""
    if old.any() and not node.attrs.get("count_include_pad", 0):
        return f"{node.name!r} leaves its own padding out of the mean"
    if node.attrs.get("ceil_mode", 0):
        return f"{node.name!r} rounds its size up"
    if np.any(new >= np.tile(node.attrs["kernel_shape"], 2)):
        return f"{node.name!r} would get pads as large as its kernel, which runtimes refuse"
    return None
