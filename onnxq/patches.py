"""What layers with weights multiply: random patches of a convolution's input, rows of a product's."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def input_patches(node: gs.Node, x: Floats, rng: np.random.Generator, count: int) -> Floats:
    """Random inputs of the kernel, (groups, patches, K), K in the order of `onnxq.saturation.as_rows`.

    Args:
        node: a Conv, Gemm or MatMul with constant weights.
        x: a batch of its input, in the operator's layout.
        rng: chooses the places.
        count: patches for each entry of the leading axis.
    """
    if node.op != "Conv":
        rows = x.reshape(-1, x.shape[-1])
        wanted = min(len(rows), count * len(x))
        return rows[rng.choice(len(rows), wanted, replace=False)][None]
    batch, group, kernel = len(x), node.attrs.get("group", 1), node.inputs[1].shape[2:]
    dims = len(kernel)
    strides, dilations = (node.attrs.get(name, [1] * dims) for name in ("strides", "dilations"))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = conv_pads(node, x.shape[2:], strides, reach)
    padded = np.pad(x, [(0, 0), (0, 0), *pads])
    places = []
    for i in range(dims):
        positions = (padded.shape[2 + i] - reach[i]) // strides[i] + 1
        corner = rng.integers(0, positions, (batch, count)) * strides[i]
        taps = (corner[:, :, None] + np.arange(kernel[i]) * dilations[i]).reshape(
            batch, count, *(kernel[i] if j == i else 1 for j in range(dims))
        )
        places.append(taps)
    sample = np.arange(batch).reshape(batch, *[1] * (dims + 1))
    found = np.moveaxis(padded, 1, -1)[(sample, *places)]  # (batch, count, *kernel, C_in)
    grouped = found.reshape(batch * count, -1, group, x.shape[1] // group)
    patches: Floats = grouped.transpose(2, 0, 1, 3).reshape(group, batch * count, -1)
    return patches


def conv_pads(
    node: gs.Node, shape: tuple[int, ...], strides: list[int], reach: list[int]
) -> list[tuple[int, int]]:
    """Zeros before and behind each spatial axis of a Conv's input.

    Args:
        shape: of the spatial axes.
        strides: of the kernel.
        reach: extent of the dilated kernel.
    """
    mode = node.attrs.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        given = node.attrs.get("pads", [0] * (2 * len(shape)))
        return list(zip(given[: len(shape)], given[len(shape) :], strict=True))
    if mode == "VALID":
        return [(0, 0)] * len(shape)
    pads = []
    for size, stride, extent in zip(shape, strides, reach, strict=True):
        total = max((-(-size // stride) - 1) * stride + extent - size, 0)
        small, large = total // 2, total - total // 2
        pads.append((small, large) if mode == "SAME_UPPER" else (large, small))
    return pads
