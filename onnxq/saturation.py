"""Weights that no 8-bit kernel can saturate.

x86 machines without VNNI multiply uint8 activations by int8 weights with an instruction that adds neighbouring
products in 16 bits. For weights a, b next to each other along the reduction and activation codes up to 255, the
sum stays exact when

    max(a, 0) + max(b, 0) <= 128   and   min(a, 0) + min(b, 0) >= -128        (32767 // 255 = 128)

The order of the reduction is (kh, kw, cin) of one output channel for convolutions, the rows for matrix
products. Depthwise kernels, with one input and one output channel per group, accumulate in 32 bits.

Rounding to nearest keeps the limit by itself at scales of at least peak / (limit - 1), where peak is the largest
sum of two neighbours of one sign: a + b <= limit - 1 gives round(a) + round(b) <= a + b + 1 <= limit.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

Number = TypeVar("Number", bound=np.generic)

INT16_MAX = 32767
COLOURS, WORD = 3, 4  # the pass pad-channels widens convolutions over three channels to four


def pair_limit(largest_activation: int = 255) -> int:
    """Largest sum of two neighbouring weight codes of one sign for activation codes up to the given one."""
    return INT16_MAX // largest_activation


def kernel_kind(node: gs.Node) -> str:
    """`Depthwise` for a Conv of one input and one output channel per group, the op of any other node."""
    if node.op != "Conv" or tuple(node.inputs[1].shape[:2]) != (node.attrs.get("group", 1), 1):
        return str(node.op)
    return "Depthwise"


def as_rows(weights: NDArray[Number], kind: str, axis: int) -> NDArray[Number]:
    """Weights as (channels, K) in the order in which the kernel reduces.

    Args:
        weights: in the operator's layout.
        kind: Conv, Depthwise, Gemm or MatMul; see `kernel_kind`.
        axis: output-channel axis.
    """
    if kind in ("Conv", "Depthwise"):
        return np.moveaxis(weights, 1, -1).reshape(len(weights), -1)
    return weights if axis == 0 else weights.T


def from_rows(rows: NDArray[Number], shape: tuple[int, ...], kind: str, axis: int) -> NDArray[Number]:
    """The inverse of `as_rows` for weights of the given shape."""
    if kind in ("Conv", "Depthwise"):
        return np.moveaxis(rows.reshape(shape[0], *shape[2:], shape[1]), -1, 1)
    return rows if axis == 0 else rows.T


def partners(shape: tuple[int, ...], kind: str, axis: int) -> NDArray[np.intp]:
    """Neighbours of each place of a row, (orders, K); K stands for none.

    There is one order, none for depthwise kernels, and two for convolutions over three channels: as they are, and
    padded to four.

    Args:
        shape: of the weights in the operator's layout.
        kind, axis: as for `as_rows`.
    """
    is_conv = kind in ("Conv", "Depthwise")
    size = int(np.prod(shape[1:])) if is_conv else shape[1 - axis]
    place: NDArray[np.intp] = np.arange(size)
    if kind == "Depthwise":
        return np.zeros((0, size), np.intp)
    own: NDArray[np.intp] = np.minimum(place ^ 1, size)
    if not is_conv or shape[1] != COLOURS:
        return own[None]
    padded = np.where(place % COLOURS == 2, size, place // COLOURS * COLOURS + (place % COLOURS ^ 1))
    return np.stack([own, padded])


def peaks(weights: NDArray[Number], kind: str, axis: int) -> NDArray[Number]:
    """Largest magnitude of the sum of two neighbours of one sign in each output channel, (channels,).

    It is at least the largest magnitude of a weight; 0 for depthwise kernels.

    Args:
        weights, kind, axis: as for `as_rows`.
    """
    rows = as_rows(weights, kind, axis)
    largest = np.zeros(len(rows), weights.dtype)
    for order in range(len(partners(weights.shape, kind, axis))):
        pairs = _paired(rows if order == 0 else _widened(rows))
        for signed in (np.maximum(pairs, 0), -np.minimum(pairs, 0)):
            largest = np.maximum(largest, signed.sum(2).max(axis=1, initial=0))
    return largest


def excess(codes: NDArray[np.integer], kind: str, axis: int, limit: int) -> NDArray[np.int64]:
    """How far the worst pair of each output channel passes the limit, (channels,); 0 where all are safe."""
    beyond: NDArray[np.int64] = np.maximum(peaks(codes.astype(np.int64), kind, axis) - limit, 0)
    return beyond


def _paired(rows: NDArray[Number]) -> NDArray[Number]:
    return np.pad(rows, ((0, 0), (0, rows.shape[1] % 2))).reshape(len(rows), -1, 2)


def _widened(rows: NDArray[Number]) -> NDArray[Number]:
    taps = rows.reshape(len(rows), -1, COLOURS)
    return np.pad(taps, ((0, 0), (0, 0), (0, WORD - COLOURS))).reshape(len(rows), -1)
