"""Which layers of a network get how many bits, so that its output has no more noise than allowed, at the fewest bytes.

The noise of the layers adds up at the output much as independent noise does, and a bit more of a layer takes off three quarters
of its part:

    N(b) = c sum_i n_i 4^(b0_i - b_i)

with n_i the noise when only layer i is quantized, at the b0_i bits it has, and c so that this is what was measured of the whole
network. One bit after the other goes where it takes off most noise for the bytes that it adds. That pays less with each bit of a
layer. Where each bit takes as many bytes as the last, no other choice therefore has less noise in as few, but for the last bit.

A layer is computed in float where 8 bits for all of them would not do, the noisiest first, since each costs speed.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from onnxq.packing import stored_bytes
from onnxq.precision import Bits
from onnxq.scheme import BYTE

FALLS = 4.0  # the noise of a layer with each bit

Allocation = dict[str, Bits | None]


@dataclass(frozen=True)
class NoisyLayer:
    """A layer that could have more bits.

    Attributes:
        noise: power of the network's output noise, against its signal, when only this layer is quantized.
        bits: of its weights and of the activations that it alone answers for.
        weights: how many it has.
    """

    noise: float
    bits: Bits
    weights: int


def allocate(
    layers: Mapping[str, NoisyLayer], noise: float, allowed: float, packed: Collection[int]
) -> Allocation:
    """Widths of the layers that need more bits, None for float; nothing where no layer adds noise.

    Args:
        layers: by name.
        noise: of the network's output with all of them at their bits, against the signal.
        allowed: noise that may be left.
        packed: widths below 8 whose own type the target takes.
    """
    total = sum(layer.noise for layer in layers.values())
    if total <= 0.0:
        return {}
    scale = noise / total
    floats = _floats(layers, scale, allowed)
    others = {name: layer for name, layer in layers.items() if name not in floats}
    bits = {name: layer.bits for name, layer in others.items()}
    parts = {name: layer.noise * scale for name, layer in others.items()}
    left = sum(parts.values())
    steps = [step for name in bits if (step := _step(name, others[name], bits[name], parts[name], packed))]
    heapq.heapify(steps)
    while left > allowed and steps:
        step = heapq.heappop(steps)
        name = step.name
        bits[name] = step.bits
        parts[name] -= step.saves
        left -= step.saves
        further = _step(name, others[name], bits[name], parts[name], packed)
        if further is not None:
            heapq.heappush(steps, further)
    more = {name: found for name, found in bits.items() if found != others[name].bits}
    return dict.fromkeys(floats) | more


def _floats(layers: Mapping[str, NoisyLayer], scale: float, allowed: float) -> list[str]:
    """The noisiest layers, as long as 8 bits for all others would leave too much noise.

    Layers of few bits may do each other more harm than their sum. That says nothing of them at 8 bits.
    """
    narrow = any(_missing(layer.bits) for layer in layers.values())
    factor = min(scale, 1.0) if narrow else scale
    least = {name: layer.noise * factor / FALLS ** _missing(layer.bits) for name, layer in layers.items()}
    left, found = sum(least.values()), []
    for name in sorted(least, key=lambda name: -least[name]):
        if left <= allowed or least[name] <= 0.0:
            break
        found.append(name)
        left -= least[name]
    return found


@dataclass(frozen=True, order=True)
class _Step:
    """More bits of one layer; steps that save more noise for a byte come first."""

    rank: float
    name: str
    bits: Bits
    saves: float


def _step(name: str, layer: NoisyLayer, bits: Bits, part: float, packed: Collection[int]) -> _Step | None:
    """The next width of a layer: one bit more, and those that its weights then have for the same bytes. None at 8 bits."""
    if not _missing(bits):
        return None
    size, wider = (stored_bytes(layer.weights, _raised(bits, n).weights, packed) for n in (0, 1))
    count = 1
    while bits.weights + count < BYTE and wider == stored_bytes(
        layer.weights, bits.weights + count + 1, packed
    ):
        count += 1
    saves = part * (1.0 - FALLS**-count)
    return _Step(-saves / max(wider - size, 1), name, _raised(bits, count), saves)


def _missing(bits: Bits) -> int:
    """How many bits the narrower side of a layer has less than 8."""
    return BYTE - min(bits.weights, BYTE if bits.activations is None else bits.activations)


def _raised(bits: Bits, more: int) -> Bits:
    activations = None if bits.activations is None else min(bits.activations + more, BYTE)
    return Bits(min(bits.weights + more, BYTE), activations)
