"""Codes of 2 to 8 bits as initializers that take as many bits, and the nodes that bring them back when a model is loaded.

Runtimes compute with 8-bit codes. They evaluate nodes on constants once, at load, so what is stored at b bits runs at the speed
of int8:

- 8 bits: the initializer itself.
- 4 and 2 bits: an initializer of type INT4, UINT4, INT2 or UINT2 and a Cast, where the target takes that type.
- other widths: bit planes. Bit k of code n is bit n mod 8 of byte n div 8 of plane k, and

      code = sum_k w_k bit_k,     w_k = 2^k, and -2^(b-1) for the sign

  where that saves more than its nodes take, else the next wider type. It is a Gather of each byte's bits from a table (256, 8)
  and a MatMulInteger by the weights w of the planes. Every runtime computes that at load; BitShift would take fewer bytes, but
  OpenVINO rounds where it should truncate.

Codes that are sums of rows (`onnxq.point_rows`) are stored as their rows, at the width of those: a Gather of each channel's rows
and a MatMulInteger by its factors. Tables have more rows than a row has codes, so theirs are not numbered: a ScatterND adds each
further one to where it belongs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.graph import Names, constant
from onnxq.model.surgeon import packed_constant
from onnxq.point_rows import PointRows
from onnxq.scheme import BYTE

Codes = NDArray[np.integer[Any]]

PLANES_OPSET = 10  # MatMulInteger
PLANES_BYTES = 600  # that the nodes of bit planes and their names take in a file
CAST_BYTES = 60  # the same of a Cast
OPSETS = {8: 1, 4: 21, 2: 25}  # that have a type of so many bits


def needed_opset(widths: Iterable[int], packed: Collection[int]) -> int:
    """The oldest operator set in which codes of these widths can be stored.

    Args:
        widths: bits, 2 to 8.
        packed: widths whose own type the target takes.
    """
    return max((max(PLANES_OPSET, OPSETS[_wider(w, packed)]) for w in widths if w != BYTE), default=1)


def _wider(bits: int, packed: Collection[int]) -> int:
    """The narrowest width from `bits` on whose type can be stored."""
    return min(width for width in (*packed, BYTE) if width >= bits)


def stored_bytes(count: int, bits: int, packed: Collection[int]) -> int:
    """About what codes of one tensor take in a file.

    Args:
        count: of codes.
        bits: of each, 2 to 8.
        packed: widths whose own type the target takes.

    >>> [stored_bytes(100_000, bits, (2, 4)) for bits in (8, 6, 4)], stored_bytes(1000, 6, (2, 4))
    ([100000, 75600, 50060], 1000)
    """
    width = _wider(bits, packed)
    if _pays_in_planes(count, bits, width):
        return count * bits // BYTE + PLANES_BYTES
    return count * width // BYTE + (CAST_BYTES if width < BYTE else 0)


def _pays_in_planes(count: int, bits: int, width: int) -> bool:
    """Whether bit planes take less than a type of `width` bits."""
    return count * (width - bits) > BYTE * PLANES_BYTES


class Packer:
    """Writes codes into one graph; what several of them need is written once."""

    def __init__(self, graph: gs.Graph, names: Names, packed: Collection[int] = (2, 4)) -> None:
        self.graph, self.names, self.packed = graph, names, packed
        self._shared: dict[str, gs.Constant] = {}

    def tensor(self, name: str, codes: Codes, bits: int) -> gs.Tensor:
        """A tensor with the codes, int8 or uint8 as they are given, whose storage takes `bits` bits a code.

        Args:
            name: what to name its tensors and nodes after.
            codes: int8 or uint8, any shape, within the range of so many bits.
            bits: 2 to 8.

        Raises:
            ValueError: a code is out of range.
        """
        _check(name, codes, bits)
        width = _wider(bits, self.packed)
        if _pays_in_planes(codes.size, bits, width):
            return self._planes(name, codes, bits)
        if width == BYTE or codes.size == 0:
            return constant(self.names, name, codes)
        stored = packed_constant(self.names.fresh(f"{name}{width}"), codes, width)
        return self._cast(name, stored, codes.dtype, codes.shape)

    def sums(self, name: str, points: PointRows, bits: int) -> gs.Tensor:
        """A tensor with the codes that the rows sum up to, of their type, in the weight's layout.

        Args:
            name: what to name its tensors and nodes after.
            points: rows within the range of `bits` bits.
            bits: of a stored code.
        """
        if points.rows.dtype == np.uint8:
            return self._scattered(name, points, bits)
        channels, shape = len(points.places), points.rows.shape[1:]
        rows = self.tensor(f"{name}_rows", points.rows.reshape(len(points.rows), -1), bits)
        places = self._whole(f"{name}_places", points.places.astype(np.int32), len(points.rows) - 1)
        found = self._append("Gather", "points", [rows, places], np.int8)  # (C, n, K)
        factors = constant(self.names, f"{name}_factors", points.factors[:, None])
        sums = self._append("MatMulInteger", "points", [factors, found], np.int32)  # (C, 1, K)
        shaped = self._append("Reshape", "points", [sums, self._shape((channels, *shape))], np.int32)
        if points.axis == 0:
            return self._cast(name, shaped, np.dtype(np.int8), (channels, *shape))
        order = [*range(1, points.axis + 1), 0, *range(points.axis + 1, len(shape) + 1)]
        moved = self._append("Transpose", "points", [shaped], np.int32, perm=order)
        found_shape = (*shape[: points.axis], channels, *shape[points.axis :])
        return self._cast(name, moved, np.dtype(np.int8), found_shape)

    def _scattered(self, name: str, points: PointRows, bits: int) -> gs.Tensor:
        """Rows of a table, uint8: all first points by their factor, and each further one added where it belongs."""
        rows, sums = len(points.places), None
        for level, factors in enumerate(points.factors.T):
            found = np.flatnonzero(factors)
            if not len(found):
                continue
            digits = self.tensor(f"{name}_rows", points.rows[points.places[found, level]], bits)
            whole = self._append("Cast", "points", [digits], np.int32, to=onnx.TensorProto.INT32)
            factor = self._shared_constant(f"factor_{factors.max()}", np.array(factors.max(), np.int32))
            terms = self._append("Mul", "points", [whole, factor], np.int32)
            if sums is None:
                sums = terms
                continue
            places = self._whole(f"{name}_places", found[:, None].astype(np.int64), rows - 1)
            sums = self._append("ScatterND", "points", [sums, places, terms], np.int32, reduction="add")
        assert sums is not None
        return self._cast(name, sums, points.rows.dtype, (rows, *points.rows.shape[1:]))

    def _whole(self, name: str, numbers: NDArray[np.int32 | np.int64], largest: int) -> gs.Tensor:
        """Whole numbers from 0, in as few bytes as pay."""
        small = numbers.astype(np.min_scalar_type(largest))
        if numbers.nbytes - small.nbytes <= CAST_BYTES:
            return constant(self.names, name, numbers)
        to = onnx.helper.np_dtype_to_tensor_dtype(numbers.dtype)
        return self._append("Cast", "points", [constant(self.names, name, small)], numbers.dtype, to=to)

    def _planes(self, name: str, codes: Codes, bits: int) -> gs.Tensor:
        signed = codes.dtype == np.int8
        planes = bit_planes(codes, bits)
        columns = planes.shape[1] * BYTE
        stored = constant(self.names, f"{name}_planes", planes)  # (bits, M)
        places = self._append("Cast", name, [stored], np.int32, to=onnx.TensorProto.INT32)
        found = self._append("Gather", name, [self._bits_of_bytes(), places], np.uint8)  # (bits, M, 8)
        flat = self._append("Reshape", name, [found, self._shape((bits, columns))], np.uint8)
        sums = self._append("MatMulInteger", name, [self._weights(bits, signed), flat], np.int32)  # (1, 8 M)
        if columns != codes.size:
            ends = [self._shared_constant(f"end_{n}", np.array([n], np.int64)) for n in (0, codes.size, 1)]
            sums = self._append("Slice", name, [sums, *ends], np.int32)
        shaped = self._append("Reshape", name, [sums, self._shape(codes.shape)], np.int32)
        return self._cast(name, shaped, codes.dtype, codes.shape)

    def _cast(
        self, name: str, source: gs.Tensor, dtype: np.dtype[Any], shape: tuple[int, ...]
    ) -> gs.Variable:
        result = gs.Variable(self.names.fresh(name), dtype, list(shape))
        attrs = {"to": onnx.helper.np_dtype_to_tensor_dtype(dtype)}
        self.graph.nodes.append(gs.Node("Cast", result.name, attrs=attrs, inputs=[source], outputs=[result]))
        return result

    def _append(self, op: str, name: str, inputs: list[gs.Tensor], dtype: Any, **attrs: Any) -> gs.Variable:
        result = gs.Variable(self.names.fresh(f"{name}_{op.lower()}"), np.dtype(dtype))
        node = gs.Node(op, result.name, attrs=attrs, inputs=inputs, outputs=[result])
        self.graph.nodes.append(node)
        return result

    def _bits_of_bytes(self) -> gs.Constant:
        bytes_ = np.arange(1 << BYTE, dtype=np.uint8)[:, None]
        return self._shared_constant("bits", np.unpackbits(bytes_, axis=1, bitorder="little"))

    def _weights(self, bits: int, signed: bool) -> gs.Constant:
        weights = 1 << np.arange(bits)
        if signed:
            weights[-1] = -weights[-1]
        return self._shared_constant(
            f"planes_{'' if signed else 'u'}int{bits}", weights[None].astype(np.int8)
        )

    def _shape(self, shape: tuple[int, ...]) -> gs.Constant:
        return self._shared_constant("shape_" + "x".join(map(str, shape)), np.array(shape, np.int64))

    def _shared_constant(self, name: str, values: NDArray[np.generic]) -> gs.Constant:
        if name not in self._shared:
            self._shared[name] = constant(self.names, f"packing_{name}", values)
        return self._shared[name]


def bit_planes(codes: Codes, bits: int) -> NDArray[np.uint8]:
    """Bits of codes in two's complement, uint8 (bits, ceil(N / 8)): bit k of code n is bit n mod 8 of byte n div 8 of row k.

    >>> bit_planes(np.array([1, 2, 3], np.uint8), 2).tolist()
    [[5], [6]]
    """
    flat = np.ravel(codes).view(np.uint8)
    found = (flat >> np.arange(bits, dtype=np.uint8)[:, None]) & 1  # (bits, N)
    return np.packbits(found, axis=1, bitorder="little")


def _check(name: str, codes: Codes, bits: int) -> None:
    low = -(1 << (bits - 1)) if codes.dtype == np.int8 else 0
    if codes.size and not low <= codes.min() <= codes.max() < low + (1 << bits):
        raise ValueError(f"codes of {name!r} do not fit into {bits} bits")
