"""Along which channels of a graph positive factors can move.

A factor scales one channel of a tensor, x'_c = f_c x_c. Ops that are positively homogeneous in each channel hand it on, sums tie
the channels of their operands together, and layers with constant weights end it on one side and start another:

    W'_oc = W_oc f_o / f_c        b'_o = b_o f_o

Channels that must share one factor form a class. Whatever else reads or writes a tensor keeps its channels at f = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from onnxq.graph import Uses, float_values, is_standard, present, rank

Ids = NDArray[np.intp]

FIXED = 0  # the class of channels that keep the factor 1
ZERO = -1  # channels that are zero whatever their factor
LARGEST = 1 << 23  # entries of a weight matrix (C_out, C_in / group); a balance holds a few of them in float64


@dataclass(frozen=True, eq=False)
class Layer:
    """A node with constant weights that can absorb factors.

    Attributes:
        node: a Conv, Gemm or MatMul.
        weight: (C_out, C_in / group, taps).
        group: of a convolution.
        source: classes of the input's channels, (C_in,).
        target: classes of the output's channels, (C_out,).
    """

    node: gs.Node
    weight: NDArray[np.float32]
    group: int
    source: Ids
    target: Ids

    @property
    def columns(self) -> Ids:
        """Input channel of each entry of the weight matrix, (C_out, C_in / group)."""
        out, per_group = self.weight.shape[:2]
        return np.arange(out)[:, None] * self.group // out * per_group + np.arange(per_group)


@dataclass(frozen=True, eq=False)
class Move:
    """A node that hands channels on.

    Attributes:
        node: the node.
        inputs: tensors that it reads, each with the channel that every output channel comes from, -1 for none.
        share: part of an input value's noise power that arrives at an output value: 1 / n for a mean of n values.
    """

    node: gs.Node
    inputs: tuple[tuple[str, Ids], ...]
    share: float = 1.0


@dataclass(frozen=True, eq=False)
class Channels:
    """Classes of the channels of a graph.

    Attributes:
        count: number of classes; class 0 is the one of all channels that keep the factor 1.
        tensors: classes of each tensor's channels, (C,); -1 for channels of zeros. Tensors that are absent keep their values.
        axes: channel axis of those tensors.
        layers: nodes that absorb factors, by name, in graph order.
        moves: nodes that hand channels on, by name.
        clips: limits (low, high) of each Clip, by its output.
        reasons: why nodes keep the factor of their output at 1.
    """

    count: int
    tensors: dict[str, Ids]
    axes: dict[str, int]
    layers: dict[str, Layer]
    moves: dict[str, Move]
    clips: dict[str, tuple[float, float]]
    reasons: dict[str, str]


def find_channels(graph: gs.Graph) -> Channels:
    """Classes of all channels of a graph in topological order."""
    walk = _Walk(graph)
    for node in graph.nodes:
        walk.visit(node)
    return walk.classes()


@dataclass
class _Walk:
    """The state of one walk over a graph. Channels have numbers of their own until `classes` puts them together."""

    graph: gs.Graph
    count: int = 1
    numbers: dict[str, Ids] = field(default_factory=dict)
    axes: dict[str, int] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    moves: dict[str, Move] = field(default_factory=dict)
    clips: dict[str, tuple[float, float]] = field(default_factory=dict)
    ties: list[tuple[Ids, Ids]] = field(default_factory=list)
    fixed: list[tuple[Ids, str]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.uses = Uses(self.graph)

    def visit(self, node: gs.Node) -> None:
        """Take in one node."""
        found = OPS[node.op](self, node) if is_standard(node) and node.op in OPS else f"{node.op} {node.name!r} reads it"
        if isinstance(found, str):
            for tensor in node.inputs:
                self.fix(tensor, found)
        elif found is not None:
            self.move(found)
        for tensor in node.outputs:
            if self.uses.escapes(tensor):
                self.fix(tensor, "it leaves the graph")

    def fix(self, tensor: gs.Tensor, reason: str) -> None:
        """Keep the factors of a tensor at 1."""
        if tensor.name in self.numbers:
            self.fixed.append((self.numbers[tensor.name], reason))

    def move(self, move: Move) -> None:
        """Hand numbers on from the inputs of a node to its output."""
        merged = np.full(len(move.inputs[0][1]), ZERO)
        for tensor, index in move.inputs:
            mine = np.where(index >= 0, self.numbers[tensor][index], ZERO)
            both = (merged >= 0) & (mine >= 0)
            self.ties.append((merged[both], mine[both]))
            merged = np.where(merged >= 0, merged, mine)
        self.moves[move.node.name] = move
        self.numbers[move.node.outputs[0].name] = merged

    def start(self, tensor: gs.Tensor, channels: int, axis: int) -> Ids:
        """New numbers for a tensor that a layer writes."""
        found = np.arange(self.count, self.count + channels)
        self.count += channels
        self.numbers[tensor.name], self.axes[tensor.name] = found, axis
        return found

    def identity(self, tensor: gs.Tensor) -> tuple[str, Ids]:
        """A tensor with each of its channels going to the same place."""
        return tensor.name, np.arange(len(self.numbers[tensor.name]))

    def classes(self) -> Channels:
        """Put channels that are tied into classes; class 0 takes all that are fixed."""
        left, right = (np.concatenate([np.zeros(0, np.intp), *side]) for side in zip(*self.ties, ([], []), strict=True))
        links = coo_array((np.ones(len(left)), (left, right)), shape=(self.count, self.count))
        labels = connected_components(links, directed=False)[1]
        reasons: dict[int, str] = {}
        for numbers, reason in self.fixed:
            for label in np.unique(labels[numbers[numbers >= 0]]):
                reasons.setdefault(int(label), reason)
        held = np.isin(labels, [int(labels[FIXED]), *reasons])
        classes = np.zeros(self.count, np.intp)
        free, classes[~held] = np.unique(labels[~held], return_inverse=True)
        classes[~held] += 1

        def named(numbers: Ids) -> Ids:
            return np.where(numbers >= 0, classes[numbers], ZERO)

        layers = {
            name: Layer(site.node, site.weight, site.group, named(site.source), named(site.target))
            for name, site in self.layers.items()
        }
        why = {n: reasons[int(labels[self.layers[n].target[0]])] for n, s in layers.items() if not s.target.any()}
        tensors = {name: named(numbers) for name, numbers in self.numbers.items()}
        return Channels(
            len(free) + 1, tensors, self.axes, layers, self.moves, self.clips, self.refused | why
        )


Found = Move | str | None  # how channels move, why they cannot, or nothing where the input has none


def _layer(walk: _Walk, node: gs.Node) -> Found:
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
        axis = 1 if node.op == "Gemm" else rank(node.inputs[0]) - 1
        matrix = (values if node.attrs.get("transB", 0) else values.T)[:, :, None]
    data, size = node.inputs[0], matrix.shape[1] * group
    source = walk.numbers.get(data.name, np.zeros(size, np.intp))
    if walk.axes.get(data.name, axis) != axis or len(source) != size:
        walk.fix(data, f"{node.op} {node.name!r} mixes its channels")
        source = np.zeros(size, np.intp)
    target = walk.start(node.outputs[0], len(matrix), axis)
    walk.layers[node.name] = Layer(node, matrix, group, source, target)
    return None


def _refusal(walk: _Walk, node: gs.Node) -> str | None:
    """Why a node cannot absorb factors, None when it can."""
    weight, bias = float_values(node.inputs[1]), present(node, 2)
    if weight is None or not np.isfinite(weight).all():
        return "its weights are no float32 initializer of finite numbers"
    if len(walk.uses.readers(node.inputs[1])) > 1 or walk.uses.escapes(node.inputs[1]):
        return "its weights are used elsewhere too"
    if weight.size == 0 or weight.ndim < 3 and node.op == "Conv" or weight.ndim != 2 and node.op != "Conv":
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


def _same(walk: _Walk, node: gs.Node) -> Found:
    """Ops that commute with a positive factor in each element."""
    data = node.inputs[0]
    if data.name not in walk.numbers:
        return None
    if len(node.outputs) != 1 or not all(t.is_empty() or isinstance(t, gs.Constant) for t in node.inputs[1:]):
        return f"{node.op} {node.name!r} reads it"
    walk.axes[node.outputs[0].name] = walk.axes[data.name]
    return Move(node, (walk.identity(data),))


def _pool(walk: _Walk, node: gs.Node) -> Found:
    """Ops over the positions behind axis 1."""
    data = node.inputs[0]
    if walk.axes.get(data.name, 1) != 1:
        return f"{node.op} {node.name!r} mixes its channels"
    found = _same(walk, node)
    if not isinstance(found, Move) or "Average" not in node.op:
        return found
    kernel = node.attrs.get("kernel_shape") or [d for d in (data.shape or ())[2:] if isinstance(d, int)]
    return Move(node, found.inputs, 1.0 / max(math.prod(kernel), 1))


def _clip(walk: _Walk, node: gs.Node) -> Found:
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


def _sum(walk: _Walk, node: gs.Node) -> Found:
    """Ops that commute with one factor on all their operands."""
    axes, ranks = {walk.axes.get(t.name) for t in node.inputs}, {rank(t) for t in node.inputs}
    sizes = {len(walk.numbers[t.name]) for t in node.inputs if t.name in walk.numbers}
    if None in axes | ranks or len(axes) > 1 or len(ranks) > 1 or len(sizes) > 1:
        return f"{node.op} {node.name!r} puts it together with a tensor of other channels"
    walk.axes[node.outputs[0].name] = axes.pop()  # type: ignore[assignment]
    return Move(node, tuple(walk.identity(t) for t in node.inputs))


def _concat(walk: _Walk, node: gs.Node) -> Found:
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


def _pad(walk: _Walk, node: gs.Node) -> Found:
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


def _slice(walk: _Walk, node: gs.Node) -> Found:
    data, size = node.inputs[0], rank(node.inputs[0])
    if data.name not in walk.numbers:
        return None
    given = [present(node, i) for i in range(1, 5)]
    if size is None or not all(t is None or isinstance(t, gs.Constant) for t in given):
        return f"the range of Slice {node.name!r} is not constant"
    starts, ends, axes, steps = (None if t is None else [int(v) for v in np.ravel(t.values)] for t in given)
    assert starts is not None and ends is not None
    axis = walk.axes[data.name]
    name, index = walk.identity(data)
    for i, place in enumerate(axes if axes is not None else range(len(starts))):
        if place % size == axis:
            index = index[slice(starts[i], ends[i], steps[i] if steps else 1)]
    if not len(index):
        return f"Slice {node.name!r} keeps no channel"
    walk.axes[node.outputs[0].name] = axis
    return Move(node, ((name, index),))


def _reshape(walk: _Walk, node: gs.Node) -> Found:
    """Flatten and Reshape that leave the last axis alone or put all behind the first one together."""
    data, result = node.inputs[0], node.outputs[0]
    if data.name not in walk.numbers:
        return None
    old, new, axis = data.shape or (), result.shape or (), walk.axes[data.name]
    name, index = walk.identity(data)
    if old and new and axis == len(old) - 1 and old[-1] == new[-1] == len(index):
        walk.axes[result.name] = len(new) - 1
        return Move(node, ((name, index),))
    behind = list(old[1:])
    if axis != 1 or len(new) != 2 or not all(isinstance(d, int) for d in behind) or new[1] != math.prod(behind):
        return f"{node.op} {node.name!r} mixes its channels"
    walk.axes[result.name] = 1
    return Move(node, ((name, np.repeat(index, math.prod(behind[1:]))),))


def _transpose(walk: _Walk, node: gs.Node) -> Found:
    data, size = node.inputs[0], rank(node.inputs[0])
    if data.name not in walk.numbers:
        return None
    if size is None:
        return f"the rank of the input of Transpose {node.name!r} is unknown"
    order = list(node.attrs.get("perm", range(size)[::-1]))
    walk.axes[node.outputs[0].name] = order.index(walk.axes[data.name])
    return Move(node, (walk.identity(data),))


OPS: dict[str, Callable[[_Walk, gs.Node], Found]] = {
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
