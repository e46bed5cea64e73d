"""Tensors whose statistics follow from those of a Concat that holds them, channel by channel.

Every tensor that a session is asked for has to be brought into the layout of the outside, copied and read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs

from onnxq.calibration.statistics import Needs
from onnxq.graph import is_standard, rank


@dataclass(frozen=True)
class Part:
    """Where a tensor lies in another that is gathered: in these of its channels."""

    whole: str
    channels: slice


def find_parts(graph: gs.Graph, needs: Mapping[str, Needs]) -> tuple[dict[str, Needs], dict[str, Part]]:
    """What is left to gather, and the parts by name, whose statistics follow from it.

    Parts need no histogram, and no channels but those along the axis of the Concat, which are gathered of the whole.

    Args:
        graph: its nodes are in order.
        needs: what is asked for, by tensor.
    """
    left: dict[str, Needs] = dict(needs)
    parts: dict[str, Part] = {}
    for node in reversed(graph.nodes):  # the outer of two Concats first: it gets the parts of the inner one
        name, size = node.outputs[0].name, rank(node.outputs[0])
        if node.op != "Concat" or not is_standard(node) or name not in needs or size is None:
            continue
        place = parts.get(name, Part(name, slice(0, None)))
        axis, whole = node.attrs["axis"] % size, left[place.whole]
        if whole.channels is not None and whole.channels % size != axis:
            continue
        inside = {
            tensor: Part(place.whole, slice(place.channels.start + start, place.channels.start + stop))
            for tensor, start, stop in _extents(node, axis)
            if tensor in left and _follows(needs[tensor], axis, size)
        }
        if not inside:
            continue
        left = {tensor: need for tensor, need in left.items() if tensor not in inside}
        power = whole.power or any(needs[tensor].power for tensor in inside)
        left[place.whole] = replace(whole, channels=axis, power=power)
        parts |= inside
    return left, parts


def _extents(node: gs.Node, axis: int) -> list[tuple[str, int, int]]:
    """Inputs of a Concat with where each starts and stops along the axis, as far as sizes are known."""
    found, start = [], 0
    for tensor in node.inputs:
        size = None if tensor.shape is None else tensor.shape[axis]
        if not isinstance(size, int) or size < 1:
            break
        found.append((tensor.name, start, start + size))
        start += size
    return found


def _follows(needs: Needs, axis: int, size: int) -> bool:
    return not needs.histogram and (needs.channels is None or needs.channels % size == axis)
