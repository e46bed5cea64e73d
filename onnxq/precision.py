"""How many bits each layer gets: the shorthand `w4a8`, exceptions by name, and eight bits for the first and last layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_graphsurgeon as gs

from onnxq.errors import UsageError
from onnxq.graph import is_constant
from onnxq.program import Program
from onnxq.rules import WEIGHTED
from onnxq.scheme import BYTE
from onnxq.selection import matching_nodes, nearest_node

Ends = Literal["same", "8", "float"]

GRAMMAR = "wB for weights alone or wBaB for weights and activations, B from 2 to 8"
RAISED = "raised"
TEXT = re.compile(r"w([2-8])(?:a([2-8]))?")


@dataclass(frozen=True)
class Bits:
    """Widths of a layer's weights and of the activations that it multiplies.

    Attributes:
        weights: 2 to 8.
        activations: 2 to 8; None for float.

    >>> Bits.parse("w4a8")
    Bits(weights=4, activations=8)
    >>> str(Bits(4)), str(Bits(8, 8))
    ('w4', 'w8a8')
    """

    weights: int
    activations: int | None = None

    @classmethod
    def parse(cls, text: str) -> Bits:
        """Read `w4a8` or `w4`.

        Raises:
            UsageError: the text does not follow the grammar.
        """
        found = TEXT.fullmatch(text.strip())
        if found is None:
            raise UsageError(f"cannot read the bits {text!r}; they are {GRAMMAR}")
        return cls(int(found[1]), None if found[2] is None else int(found[2]))

    def __str__(self) -> str:
        return f"w{self.weights}" + ("" if self.activations is None else f"a{self.activations}")

    def at_least(self, least: int) -> Bits:
        """These widths, none of them below `least`."""
        return Bits(
            max(self.weights, least), None if self.activations is None else max(self.activations, least)
        )


@dataclass(frozen=True)
class Layer:
    """What is decided on one node.

    Attributes:
        bits: its widths; None when it stays float.
        why: the reason where they are not those of the other layers, else empty.
    """

    bits: Bits | None
    why: str = ""


def parse_override(text: str) -> tuple[str, Bits | None]:
    """Read `GLOB=w8a8` or `GLOB=float`; None for float.

    Raises:
        UsageError: there is no pattern, or the bits cannot be read.
    """
    pattern, equals, value = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(
            f"cannot read the override {text!r}; it is GLOB=BITS or GLOB=float, BITS being {GRAMMAR}"
        )
    return pattern, None if value.strip() == "float" else Bits.parse(value)


def override_bits(overrides: Sequence[str]) -> frozenset[int]:
    """Widths of weights that overrides ask for.

    Raises:
        UsageError: one cannot be read.
    """
    parsed = [parse_override(text)[1] for text in overrides]
    return frozenset(bits.weights for bits in parsed if bits is not None)


def layer_bits(
    program: Program, bits: Bits, overrides: Sequence[str], first_last: Ends, raised: Sequence[str] = ()
) -> dict[str, Layer]:
    """Widths of every node that multiplies by or looks up weights, or multiplies two activations, by node name.

    The first and last layers (`ends`) get at least 8 bits or stay float, by `first_last`; an override that names a node counts
    before that, the last of several. What is raised counts before all.

    Args:
        bits: of the other layers; without activations for weight-only quantization.
        overrides: as `parse_override` reads them.
        raised: the same with whole names in place of patterns.

    Raises:
        UsageError: an override, or what is raised, cannot be read or names no node, or asks for what `bits` leaves out.
    """
    first, last = ends(program.graph)
    chosen: dict[str, Layer] = {}
    for node in program.graph.nodes:
        if node.op not in WEIGHTED:
            continue
        place = " and ".join(p for p, names in (("first", first), ("last", last)) if node.name in names)
        if not place or first_last == "same" or (bits == bits.at_least(BYTE) and first_last == "8"):
            chosen[node.name] = Layer(bits)
        elif first_last == "8":
            chosen[node.name] = Layer(bits.at_least(BYTE), f"{place} layer")
        else:
            chosen[node.name] = Layer(None, f"it is the {place} layer (first-last=float)")
    for text in overrides:
        pattern, wanted = parse_override(text)
        wanted = _complete(text, wanted, bits)
        for name in matching_nodes(program, pattern, "override"):
            why = f"override {text!r}"
            chosen[name] = Layer(wanted, why if wanted is not None else f"it is float by {why}")
    names = {node.name for node in program.graph.nodes}
    for text in raised:
        name, wanted = parse_override(text)
        if name not in names:
            raise UsageError(f"unknown node {name!r} of raised {text!r}{nearest_node(name, names)}")
        wanted = _complete(text, wanted, bits)
        chosen[name] = Layer(
            wanted, RAISED if wanted is not None else "it is float so that the output keeps its SQNR"
        )
    return chosen


def _complete(text: str, wanted: Bits | None, bits: Bits) -> Bits | None:
    """The override's widths, activations included exactly where the other layers have them."""
    if wanted is None or (wanted.activations is None) == (bits.activations is None):
        return wanted
    if wanted.activations is None:
        return Bits(wanted.weights, bits.activations)
    raise UsageError(
        f"override {text!r} asks for integer activations where all others are float; write w{wanted.weights}"
    )


def weights_of(node: gs.Node) -> gs.Constant | None:
    """The weights that a node multiplies by or looks up, None when it has none."""
    if node.op not in WEIGHTED:
        return None
    tensor = node.inputs[WEIGHTED[node.op]]
    return tensor if is_constant(tensor) and len(tensor.shape) >= 2 else None


def ends(graph: gs.Graph) -> tuple[set[str], set[str]]:
    """Names of the first and of the last nodes with weights: none lies before the first, none behind the last.

    Nodes inside bodies of control-flow nodes do not count.
    """
    nodes = list(graph.nodes)
    first = _unpreceded([(n, n.inputs, n.outputs) for n in nodes])
    last = _unpreceded([(n, n.outputs, n.inputs) for n in reversed(nodes)])
    return first, last


def _unpreceded(steps: Iterable[tuple[gs.Node, Sequence[gs.Tensor], Sequence[gs.Tensor]]]) -> set[str]:
    """Nodes with weights that read nothing another one has a part in; a step is a node, what it reads and what it writes."""
    found: set[str] = set()
    behind: set[str] = set()
    for node, sources, results in steps:
        is_behind = any(t.name in behind for t in sources)
        has_weights = weights_of(node) is not None
        if has_weights and not is_behind:
            found.add(node.name)
        if has_weights or is_behind:
            behind.update(t.name for t in results if not t.is_empty())
    return found
