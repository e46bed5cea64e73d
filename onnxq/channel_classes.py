"""Classes of channels that must share one positive factor.

A factor scales one channel of a tensor, x'_c = f_c x_c; layers with constant weights absorb it:

    W'_oc = W_oc f_o / f_c        b'_o = b_o f_o
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.graph import Uses

Ids = NDArray[np.intp]

FIXED = 0  # the class of channels that keep the factor 1
ZERO = -1  # channels that are zero whatever their factor


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
        first = np.arange(out) * self.group // out * per_group
        columns: Ids = first[:, None] + np.arange(per_group)
        return columns


@dataclass(frozen=True, eq=False)
class Move:
    """A node that hands channels on.

    Attributes:
        node: the node.
        inputs: tensors that it reads, each with the channel that every output channel comes from, -1 for none.
        share: how much of its inputs' noise power it hands on: 1 / n for a mean of n values.
    """

    node: gs.Node
    inputs: tuple[tuple[str, Ids], ...]
    share: float = 1.0


@dataclass(frozen=True, eq=False)
class Channels:
    """Classes of the channels of a graph.

    Attributes:
        count: number of classes; class 0 is the one of all channels that keep the factor 1.
        tensors: classes of each tensor's channels, (C,), -1 for channels of zeros; absent tensors keep their values.
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


@dataclass
class Walk:
    """The state of a walk over a graph; channels have numbers of their own until `classes` puts them together."""

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
        import scipy

        none = np.zeros(0, np.intp)
        left, right = (np.concatenate([none, *side]) for side in zip(*self.ties, (none, none), strict=True))
        links = scipy.sparse.coo_array((np.ones(len(left)), (left, right)), shape=(self.count, self.count))
        labels = scipy.sparse.csgraph.connected_components(links, directed=False)[1]
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
        stuck = [name for name, layer in layers.items() if not layer.target.any()]
        why = {name: reasons[int(labels[self.layers[name].target[0]])] for name in stuck}
        tensors = {name: named(numbers) for name, numbers in self.numbers.items()}
        reasons_of_nodes = self.refused | why
        return Channels(len(free) + 1, tensors, self.axes, layers, self.moves, self.clips, reasons_of_nodes)
