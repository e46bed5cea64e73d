"""What onnxruntime's MatMulNBits takes, and the layout in which it takes it.

    y = x W + b        W[k, n] = scale[n, k div block] (code[n, k] - zero[n, k div block])

Codes are unsigned, the zero point 2^(b-1) unless given; several of them share a byte, the first in the low bits. At accuracy
level 4 the input is quantized to int8 by blocks as well, with a relative error near 5e-3; at 0 and 1 it is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.blocks import BlockCodes
from onnxq.scheme import BYTE

Bytes = NDArray[np.uint8]

STRIP = 16
INT8 = 4  # the accuracy level that computes with int8 inputs
ACCURACIES = (0, 1, INT8)
SMALLEST_BLOCK = 16
LARGEST_BLOCK = {2: 128, 4: 1024, 8: 1024}  # beyond, 2 bits leave the kernel; others were not tried


def has_kernel(bits: int, block: int, accuracy: int) -> bool:
    """Whether MatMulNBits runs such codes as fast as floats or faster.

    Without int8 inputs, 2 and 8 bits have no kernel of their own: all weights become floats at each run, which takes many times
    as long as the product of floats does.
    """
    if bits not in LARGEST_BLOCK or (bits != 4 and accuracy != INT8):
        return False
    return SMALLEST_BLOCK <= block <= LARGEST_BLOCK[bits] and block & (block - 1) == 0


def kernel_block(block: int, size: int) -> int:
    """The block of an axis of so many values: not longer than the shortest one of the kernel that holds them all."""
    return min(block, max(1 << (size - 1).bit_length(), SMALLEST_BLOCK))


@dataclass(frozen=True, eq=False)
class NBits:
    """Inputs and attributes of MatMulNBits for a matrix of K inputs and N outputs.

    Attributes:
        codes: uint8 (N, blocks, block * bits / 8).
        scale: float32 (N, blocks).
        zero_point: uint8 (N, ceil(blocks * bits / 8)), None for 2^(bits-1).
        attrs: K, N, bits and block_size.
    """

    codes: Bytes
    scale: NDArray[np.float32]
    zero_point: Bytes | None
    attrs: dict[str, int]


def nbits_layout(matrix: BlockCodes, block: int) -> NBits:
    """The layout of codes whose blocks lie along K: axis 0 of (K, N), axis 1 of (N, K).

    Args:
        block: that the codes were made for, 16 or more; the last block is filled up.
    """
    axis = matrix.axis
    size, columns = matrix.codes.shape[axis], matrix.codes.shape[1 - axis]
    codes = packed_rows(matrix.codes, axis, matrix.bits, block)
    zero = matrix.zero_point
    return NBits(
        codes.reshape(columns, -1, block * matrix.bits // BYTE),
        np.ascontiguousarray(matrix.scale if axis else matrix.scale.T),
        None if zero is None else packed_rows(zero, axis, matrix.bits, BYTE // matrix.bits),
        {"K": size, "N": columns, "bits": matrix.bits, "block_size": block},
    )


def packed_rows(codes: NDArray[np.integer[Any]], axis: int, bits: int, multiple: int) -> Bytes:
    """Codes of a matrix packed along an axis, which comes last, filled up to a multiple of `multiple` codes.

    Args:
        codes: uint8, or int8, to which 2^(bits-1) is added.
        bits: 2, 4 or 8.

    >>> packed_rows(np.array([[1, 2, 3]], np.uint8), 1, 4, 2).tolist()
    [[33, 3]]
    """
    plain = codes.view(np.uint8)
    if codes.dtype == np.int8:
        plain = plain + np.uint8(1 << (bits - 1))  # modulo 256
    missing = -codes.shape[axis] % multiple
    if missing:
        plain = np.pad(plain, [(0, missing if a == axis else 0) for a in (0, 1)])
    lanes = BYTE // bits
    parts = [plain[i::lanes] if axis == 0 else plain[:, i::lanes] for i in range(lanes)]
    found = parts[0]
    for i, part in enumerate(parts[1:], 1):
        found = found | part << np.uint8(bits * i)
    return _transposed(found) if axis == 0 else np.ascontiguousarray(found)


def _transposed(matrix: Bytes) -> Bytes:
    """The transposed matrix, written in strips: about five times as fast as numpy's own copy of the whole."""
    found = np.empty(matrix.shape[::-1], np.uint8)
    for start in range(0, len(matrix), STRIP):
        found[:, start : start + STRIP] = matrix[start : start + STRIP].T
    return found
