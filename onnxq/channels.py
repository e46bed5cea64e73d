"""Along which channels of a graph positive factors can move.

Ops that are positively homogeneous in each channel hand a factor on, sums tie the channels of their operands
together, and layers with constant weights end it on one side and start another (`onnxq.channel_classes`). Whatever
else reads or writes a tensor keeps its channels at 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.channel_classes import Channels, Layer, Move, Walk
from onnxq.graph import float_values, is_standard, present, rank

LARGEST = (
    1 << 23
)  # entries of a weight matrix (C_out, C_in / group); a balance holds a few of them in float64

Found = Move | str | None  # how channels move, why they cannot, or nothing where the input has none


def find_channels(graph: gs.Graph) -> Channels:
    """Classes of all channels of a graph in topological order."""
    walk = Walk(graph)
    for node in graph.nodes:
        known = is_standard(node) and node.op in OPS
        found = OPS[node.op](walk, node) if known else f"{node.op} {node.name!r} reads it"
        if isinstance(found, str):
            for tensor in node.inputs:
                walk.fix(tensor, found)
        elif found is not None:
            walk.move(found)
        for tensor in node.outputs:
            if walk.uses.escapes(tensor):
                walk.fix(tensor, "it leaves the graph")
    return walk.classes()


def _layer(walk: Walk, node: gs.Node) -> Found:
    reason = _refusal(walk, node)
    if reason is not None:
        walk.refused[node.name] = reason
        return f"{node.op} {node.name!r} cannot absorb factors: {reason}"
    values = np.asarray(node.inputs[1].values)
    group, axis = 1, 1
    if node.op == "Conv":
        group = node.attrs.get("group", 1)
        matrix = values.reshape(*values.shape[:2], -1)
    else:
        axis = 1 if node.op == "Gemm" else len(node.inputs[0].shape) - 1
        matrix = (values if node.attrs.get("transB", 0) else values.T)[:, :, None]
    data, size = node.inputs[0], matrix.shape[1] * group
    source = walk.numbers.get(data.name, np.zeros(size, np.intp))
    if walk.axes.get(data.name, axis) != axis or len(source) != size:
        walk.fix(data, f"{node.op} {node.name!r} mixes its channels")
        source = np.zeros(size, np.intp)
    target = walk.start(node.outputs[0], len(matrix), axis)
    walk.layers[node.name] = Layer(node, matrix, group, source, target)
    return None


def _refusal(walk: Walk, node: gs.Node) -> str | None:
    """Why a node cannot absorb factors, None when it can."""
    weight, bias = float_values(node.inputs[1]), present(node, 2)
    if weight is None or not np.isfinite(weight).all():
        return "its weights are no float32 initializer of finite numbers"
    if len(walk.uses.readers(node.inputs[1])) > 1 or walk.uses.escapes(node.inputs[1]):
        return "its weights are used elsewhere too"
    if weight.size == 0 or (weight.ndim != 2 if node.op != "Conv" else weight.ndim < 3):
        return f"its weights have shape {weight.shape}"
    if weight.shape[0] * weight.shape[1] > LARGEST:
        return f"its {weight.size} weights are too many to balance"
    if node.op == "MatMul":
        return "the rank of its input is unknown" if (rank(node.inputs[0]) or 0) < 2 else None
    if node.attrs.get("transA", 0):
        return "transA is set"
    if bias is None:
        return None
    values = float_values(bias)
    columns = weight.shape[0 if node.op == "Conv" or node.attrs.get("transB", 0) else 1]
    fits = values is not None and (values.size == 1 or (values.size == columns == values.shape[-1]))
    return None if fits else "its bias is no float32 vector"


def _same(walk: Walk, node: gs.Node) -> Found:
    """Ops that commute with a positive factor in each element."""
    data = node.inputs[0]
    if data.name not in walk.numbers:
        return None
    if len(node.outputs) != 1 or not all(t.is_empty() or isinstance(t, gs.Constant) for t in node.inputs[1:]):
        return f"{node.op} {node.name!r} reads it"
    walk.axes[node.outputs[0].name] = walk.axes[data.name]
    return Move(node, (walk.identity(data),))


def _pool(walk: Walk, node: gs.Node) -> Found:
    """Ops over the positions behind axis 1."""
    data = node.inputs[0]
    if walk.axes.get(data.name, 1) != 1:
        return f"{node.op} {node.name!r} mixes its channels"
    found = _same(walk, node)
    if not isinstance(found, Move) or "Average" not in node.op:
        return found
    kernel = node.attrs.get("kernel_shape") or [d for d in (data.shape or ())[2:] if isinstance(d, int)]
    return Move(node, found.inputs, 1.0 / max(math.prod(kernel), 1))


def _clip(walk: Walk, node: gs.Node) -> Found:
    limits = [-math.inf, math.inf]
    for i in (0, 1):
        bound = present(node, i + 1)
        values = float_values(bound) if bound is not None else limits[i]
        if values is None:
            return f"the limits of Clip {node.name!r} are not constant"
        limits[i] = float(np.ravel(values)[0])
    if not limits[0] <= 0.0 <= limits[1]:
        return f"Clip {node.name!r} does not let zero through"
    found = _same(walk, node)
    if isinstance(found, Move):
        walk.clips[node.outputs[0].name] = (limits[0], limits[1])
    return found


def _sum(walk: Walk, node: gs.Node) -> Found:
    """Ops that commute with one factor on all their operands."""
    axes, ranks = {walk.axes.get(t.name) for t in node.inputs}, {rank(t) for t in node.inputs}
    sizes = {len(walk.numbers[t.name]) for t in node.inputs if t.name in walk.numbers}
    if None in axes | ranks or len(axes) > 1 or len(ranks) > 1 or len(sizes) > 1:
        return f"{node.op} {node.name!r} puts it together with a tensor of other channels"
    walk.axes[node.outputs[0].name] = axes.pop()  # type: ignore[assignment]
    return Move(node, tuple(walk.identity(t) for t in node.inputs))


def _concat(walk: Walk, node: gs.Node) -> Found:
    axes, size = {walk.axes.get(t.name) for t in node.inputs}, rank(node.inputs[0])
    if None in axes or len(axes) > 1 or size is None:
        return f"Concat {node.name!r} puts it together with a tensor of other channels"
    axis = axes.pop()
    assert axis is not None
    if node.attrs["axis"] % size != axis:
        return _sum(walk, node)
    widths = [len(walk.numbers[t.name]) for t in node.inputs]
    place, start, inputs = np.arange(sum(widths)), 0, []
    for tensor, width in zip(node.inputs, widths, strict=True):
        inside = (place >= start) & (place < start + width)
        inputs.append((tensor.name, np.where(inside, place - start, -1)))
        start += width
    walk.axes[node.outputs[0].name] = axis
    return Move(node, tuple(inputs))


def _pad(walk: Walk, node: gs.Node) -> Found:
    data, amounts, fill = node.inputs[0], present(node, 1), present(node, 2)
    if data.name not in walk.numbers:
        return None
    if not isinstance(amounts, gs.Constant) or len(node.inputs) > 3:
        return f"the amounts of Pad {node.name!r} are not constant"
    constant = node.attrs.get("mode", "constant") == "constant"
    if constant and fill is not None and not (isinstance(fill, gs.Constant) and not np.any(fill.values)):
        return f"Pad {node.name!r} pads with something other than zero"
    axis, (begin, end) = walk.axes[data.name], np.split(np.asarray(amounts.values, np.int64), 2)
    before, after = int(begin[axis]), int(end[axis])
    if min(before, after) < 0 or (max(before, after) > 0 and not constant):
        return f"Pad {node.name!r} crops or repeats its channels"
    name, index = walk.identity(data)
    walk.axes[node.outputs[0].name] = axis
    return Move(node, ((name, np.pad(index, (before, after), constant_values=-1)),))


def _slice(walk: Walk, node: gs.Node) -> Found:
    data, size = node.inputs[0], rank(node.inputs[0])
    if data.name not in walk.numbers:
        return None
    given = [present(node, i) for i in range(1, 5)]
    if size is None or not all(t is None or isinstance(t, gs.Constant) for t in given):
        return f"the range of Slice {node.name!r} is not constant"
    starts, ends, axes, steps = ([] if t is None else [int(v) for v in np.ravel(t.values)] for t in given)
    axis = walk.axes[data.name]
    name, index = walk.identity(data)
    for i, place in enumerate(axes or range(len(starts))):
        if place % size == axis:
            index = index[slice(starts[i], ends[i], steps[i] if steps else 1)]
    if not len(index):
        return f"Slice {node.name!r} keeps no channel"
    walk.axes[node.outputs[0].name] = axis
    return Move(node, ((name, index),))


def _reshape(walk: Walk, node: gs.Node) -> Found:
    """Flatten and Reshape that leave the last axis alone or put all behind the first one together."""
    data, result = node.inputs[0], node.outputs[0]
    if data.name not in walk.numbers:
        return None
    old, new = list(data.shape or []), list(result.shape or [])
    axis, (name, index) = walk.axes[data.name], walk.identity(data)
    if old and new and axis == len(old) - 1 and old[-1] == new[-1] == len(index):
        walk.axes[result.name] = len(new) - 1
        return Move(node, ((name, index),))
    behind = old[1:]
    if (
        axis != 1
        or len(new) != 2
        or not all(isinstance(d, int) for d in behind)
        or new[1] != math.prod(behind)
    ):
        return f"{node.op} {node.name!r} mixes its channels"
    walk.axes[result.name] = 1
    return Move(node, ((name, np.repeat(index, math.prod(behind[1:]))),))


def _transpose(walk: Walk, node: gs.Node) -> Found:
    data, size = node.inputs[0], rank(node.inputs[0])
    if data.name not in walk.numbers:
        return None
    if size is None:
        return f"the rank of the input of Transpose {node.name!r} is unknown"
    order = list(node.attrs.get("perm", range(size)[::-1]))
    walk.axes[node.outputs[0].name] = order.index(walk.axes[data.name])
    return Move(node, (walk.identity(data),))


OPS: dict[str, Callable[[Walk, gs.Node], Found]] = {
    **dict.fromkeys(("Conv", "Gemm", "MatMul"), _layer),
    **dict.fromkeys(("Relu", "LeakyRelu", "PRelu", "Identity"), _same),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"), _pool),
    **dict.fromkeys(("Add", "Sub", "Sum", "Max", "Min"), _sum),
    **dict.fromkeys(("Flatten", "Reshape"), _reshape),
    "Clip": _clip,
    "Concat": _concat,
    "Pad": _pad,
    "Slice": _slice,
    "Transpose": _transpose,
}
