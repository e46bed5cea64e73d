"""Embedding tables as codes: rows are looked up as codes, and only those that were found become float.

At 8 bits a table has one scale where that is good enough, else one for each row. At 4 bits two codes share a byte, and a scale
belongs to a block of a row; where rows are so short that scales would take as much as codes, to a column. onnxruntime's
GatherBlockQuantized does it in one node; nodes of ONNX's own set take about as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.affine import QuantParams, dequantize, quantize, sqnr_db
from onnxq.blocks import quantize_blocks
from onnxq.graph import CONTRIB, float_values, rank
from onnxq.nbits import SMALLEST_BLOCK, packed_rows
from onnxq.quantizers import weight_params
from onnxq.scheme import BYTE, QuantScheme
from onnxq.target import Target
from onnxq.weight_storage import FLOAT, WeightWriter

Floats = NDArray[np.float32]
Codes = NDArray[np.integer[Any]]

UINT8 = QuantScheme.parse("uint8")
GOOD_DB = 40.0  # about what a scale per channel gives convolutions at 8 bits
SAMPLE = 1 << 18  # values, of evenly spaced rows, that tell how good one scale is
LARGE = 1 << 24  # values of a table whose rows get scales without asking whether one would do
NIBBLE, MIDDLE = 4, 8
NARROW = 16  # a scale for each row of fewer values would take more than half of what the codes take
OWN_OPSET = 18  # BitwiseAnd


class TableWriter(WeightWriter):
    """Writes tables into a graph as codes and lets Gather nodes look them up."""

    def __init__(self, graph: gs.Graph, target: Target, search: bool) -> None:
        super().__init__(graph, target)
        self.search = search
        self._bytes_known: dict[str, gs.Constant] = {}

    def store_table(self, nodes: Sequence[gs.Node], scheme: QuantScheme) -> int:
        """Store the table that the nodes look up at 4 bits, or at 8 where the scheme has more than 4; returns which.

        A table of an odd width takes 8 bits too, as two codes of a row share a byte.
        """
        table = nodes[0].inputs[0]
        values = float_values(table)
        assert values is not None
        width = values.shape[1]
        is_own = width < NARROW or not self.target.contrib
        if scheme.bits > NIBBLE or width % 2 or (is_own and self.graph.opset < OWN_OPSET):
            self._bytes(nodes, table, values, scheme.granularity != "tensor")
            return BYTE
        block = min(scheme.block or width, width)
        if width < NARROW:
            self._by_column(nodes, table, values)
        elif is_own:
            self._by_block(nodes, table, values, block)
        else:
            self._contrib(nodes, table, values, block)
        return NIBBLE

    def _bytes(self, nodes: Sequence[gs.Node], table: gs.Tensor, values: Floats, by_row: bool) -> None:
        """Codes of one scale where that is good enough, uint8; else of one for each row, int8."""
        params = _one_scale(values, by_row)
        if params is not None:
            self._one_grid(nodes, table, params, quantize(values, params))
            return
        matrix = quantize_blocks(values, 1, BYTE, values.shape[1], search=False)
        stored = self.constant(f"{table.name}_quantized", matrix.codes)
        scale = self.constant(f"{table.name}_scale", matrix.scale)
        for node in nodes:
            found, rows = self._found(node, stored), node.outputs[0]
            node.outputs = [found]
            self.scaled(node.name, found, self._of_rows(node, scale, rows), rows)

    def _one_grid(
        self, nodes: Sequence[gs.Node], table: gs.Tensor, params: QuantParams, codes: Codes
    ) -> None:
        stored = self.constant(f"{table.name}_quantized", codes)
        scale = self.constant(f"{table.name}_scale", params.scale)
        zero = self.constant(f"{table.name}_zero_point", params.zero_point.astype(codes.dtype))
        for node in nodes:
            found, rows = self._found(node, stored), node.outputs[0]
            node.outputs = [found]
            self.append("DequantizeLinear", node.name, [found, scale, zero], rows)

    def _contrib(self, nodes: Sequence[gs.Node], table: gs.Tensor, values: Floats, block: int) -> None:
        """4-bit codes for GatherBlockQuantized, whose blocks are powers of 2."""
        block = max(1 << (block - 1).bit_length(), SMALLEST_BLOCK)
        matrix = quantize_blocks(values, 1, NIBBLE, block, search=self.search)
        stored = self.constant(f"{table.name}_quantized", packed_rows(matrix.codes, 1, NIBBLE, 2))
        scale = self.constant(f"{table.name}_scale", matrix.scale)
        for node in nodes:
            node.op, node.domain = "GatherBlockQuantized", CONTRIB
            node.inputs = [stored, node.inputs[1], scale]
            node.attrs = {"gather_axis": 0, "quantize_axis": 1, "block_size": block, "bits": NIBBLE}

    def _by_block(self, nodes: Sequence[gs.Node], table: gs.Tensor, values: Floats, block: int) -> None:
        """4-bit codes with a scale for each block of a row, or for the row, in ONNX's own nodes."""
        height, width = values.shape
        ranks = [rank(n.inputs[1]) for n in nodes]
        if width % block or block % 2 or None in ranks:
            block = width
        matrix = quantize_blocks(values, 1, NIBBLE, block, search=self.search)
        shape = (height, width // block, block) if block < width else (height, width)
        stored = self.constant(f"{table.name}_quantized", in_halves(matrix.codes.reshape(shape)))
        scale = self.constant(f"{table.name}_scale", matrix.scale.reshape(*shape[:-1], 1))
        one = self.constant(f"{table.name}_one", np.ones((), np.float32))
        zero = self.constant(f"{table.name}_zero_point", np.full((), MIDDLE, np.uint8))
        for node, dims in zip(nodes, ranks, strict=True):
            name, rows = node.name, node.outputs[0]
            codes = self._unpacked(node, stored)
            floats = self.variable(f"{rows.name}_codes", FLOAT, None)
            self.append("DequantizeLinear", name, [codes, one, zero], floats)
            factors = self._of_rows(node, scale, rows)
            if len(shape) == 2 or dims is None:
                self.append("Mul", name, [floats, factors], rows)
                continue
            blocks = self.variable(f"{rows.name}_blocks", FLOAT, None)
            self.append("Mul", name, [floats, factors], blocks)
            whole = self.constant(f"{name}_shape", np.array([0] * dims + [width], np.int64))
            self.append("Reshape", name, [blocks, whole], rows)

    def _by_column(self, nodes: Sequence[gs.Node], table: gs.Tensor, values: Floats) -> None:
        """4-bit codes with a scale and a zero point for each column, which cost nothing."""
        matrix = quantize_blocks(values, 0, NIBBLE, len(values), symmetric=False, search=self.search)
        assert matrix.zero_point is not None
        stored = self.constant(f"{table.name}_quantized", in_halves(matrix.codes))
        scale = self.constant(f"{table.name}_scale", matrix.scale[0])
        zero = self.constant(f"{table.name}_zero_point", matrix.zero_point[0])
        for node in nodes:
            rows = node.outputs[0]
            codes = self._unpacked(node, stored)
            self.append("DequantizeLinear", node.name, [codes, scale, zero], rows, {"axis": -1})

    def _unpacked(self, node: gs.Node, stored: gs.Constant) -> gs.Variable:
        """Let the node look up bytes, and write the codes that they hold, uint8."""
        name, rows = node.name, node.outputs[0]
        found = self._found(node, stored)
        node.outputs = [found]
        low, top, high, codes = (
            self.variable(f"{rows.name}_{part}", np.uint8, None) for part in ("low", "top", "high", "codes")
        )
        self.append("BitwiseAnd", name, [found, self._byte("low_bits", 15)], low)
        self.append(
            "BitwiseAnd", name, [found, self._byte("high_bits", 240)], top
        )  # OpenVINO's BitShift rounds
        self.append("BitShift", name, [top, self._byte("nibble", NIBBLE)], high, {"direction": "RIGHT"})
        self.append("Concat", name, [low, high], codes, {"axis": -1})
        return codes

    def _found(self, node: gs.Node, stored: gs.Constant) -> gs.Variable:
        """Let the node look up codes; the tensor of those that it finds."""
        node.inputs[0] = stored
        return self.variable(f"{node.outputs[0].name}_quantized", stored.dtype, None)

    def _of_rows(self, node: gs.Node, numbers: gs.Constant, rows: gs.Tensor) -> gs.Variable:
        """What belongs to the rows that the node finds."""
        found = self.variable(f"{rows.name}_scale", FLOAT, None)
        self.append("Gather", f"{node.name}_scale", [numbers, node.inputs[1]], found)
        return found

    def _byte(self, name: str, value: int) -> gs.Constant:
        if name not in self._bytes_known:
            self._bytes_known[name] = self.constant(name, np.full((), value, np.uint8))
        return self._bytes_known[name]


def _one_scale(values: Floats, by_row: bool) -> QuantParams | None:
    """The grid of least squared error, None where rows may have scales of their own and one for all is not good enough."""
    if not by_row:
        return weight_params("mse", values, None, UINT8)
    if values.size > LARGE:
        return None
    sample = values[:: max(values.size // SAMPLE, 1)]
    params = weight_params("mse", sample, None, UINT8)
    return params if all(_is_good(v, params) for v in (sample, values)) else None


def _is_good(values: Floats, params: QuantParams) -> bool:
    return sqnr_db(values, dequantize(quantize(values, params), params)) >= GOOD_DB


def in_halves(codes: Codes) -> NDArray[np.uint8]:
    """4-bit codes, two in a byte: the first half of the last axis in the low bits, the second half in the high ones.

    Args:
        codes: uint8, or int8, to which 8 is added.

    >>> in_halves(np.array([[-8, -7, -6, -5]], np.int8)).tolist()
    [[32, 49]]
    """
    plain = codes.view(np.uint8) + np.uint8(MIDDLE if codes.dtype == np.int8 else 0)
    half = codes.shape[-1] // 2
    return plain[..., :half] | plain[..., half:] << np.uint8(NIBBLE)
