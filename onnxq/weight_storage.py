"""Forms in which a graph holds the codes of weights that it computes with in float.

- *folded*: codes -> Cast -> (minus zero point) -> times scale. Runtimes evaluate it at load, so it runs as the float weights
  did. (onnxruntime does not fold DequantizeLinear.)
- *kernel*: MatMulNBits reads codes as they are; see `onnxq.nbits`.
- *blocked*: DequantizeLinear with block_size, ONNX's own form, in front of the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.blocks import BlockCodes
from onnxq.graph import CONTRIB, NodeWriter, float_values, present, replace_reads
from onnxq.model.surgeon import packed_constant
from onnxq.nbits import nbits_layout
from onnxq.packing import Packer
from onnxq.scheme import BYTE
from onnxq.target import Target

Codes = NDArray[np.integer[Any]]
Number = TypeVar("Number", bound=np.generic)

FLOAT = np.float32
BLOCKED_OPSET = 21  # block_size of DequantizeLinear


class WeightWriter(NodeWriter):
    """Writes weights into a graph as codes and lets nodes read them."""

    def __init__(self, graph: gs.Graph, target: Target) -> None:
        super().__init__(graph)
        self.target = target
        self.packer = Packer(graph, self.names, target.packed)

    def folded(
        self, nodes: Sequence[gs.Node], weight: gs.Tensor, codes: Codes, scale: NDArray[np.float32], bits: int
    ) -> None:
        """Let the nodes read codes * scale, the scale broadcasting over the codes."""
        packed = self.packer.tensor(f"{weight.name}_quantized", codes, bits)
        result = self.variable(f"{weight.name}_dequantized", FLOAT, weight.shape)
        self.scaled(weight.name, packed, self.constant(f"{weight.name}_scale", scale), result)
        replace_reads(nodes, weight, result)

    def folded_blocks(self, nodes: Sequence[gs.Node], weight: gs.Tensor, matrix: BlockCodes) -> None:
        """Let the nodes read codes in blocks; the last block is stored filled up."""
        name, axis, block = weight.name, matrix.axis, matrix.block
        size, count = matrix.codes.shape[axis], matrix.scale.shape[axis]
        fill = [(0, count * block - size if a == axis else 0) for a in range(matrix.codes.ndim)]
        codes = np.pad(matrix.codes, fill)
        shape = (*codes.shape[:axis], count, block, *codes.shape[axis + 1 :])
        packed: gs.Tensor = self.packer.tensor(f"{name}_quantized", codes.reshape(shape), matrix.bits)
        if matrix.zero_point is not None:
            zero = self.constant(
                f"{name}_zero_point", np.expand_dims(matrix.zero_point.astype(FLOAT), axis + 1)
            )
            packed = self._cast(name, packed, shape)
            shifted = self.variable(f"{name}_shifted", FLOAT, shape)
            self.append("Sub", name, [packed, zero], shifted)
            packed = shifted
        scale = self.constant(f"{name}_scale", np.expand_dims(matrix.scale, axis + 1))
        blocks = self.variable(f"{name}_blocks", FLOAT, shape)
        self.scaled(name, packed, scale, blocks)
        whole = self.variable(f"{name}_dequantized", FLOAT, codes.shape)
        self.append("Reshape", name, [blocks, self._numbers(f"{name}_shape", codes.shape)], whole)
        if codes.shape != matrix.codes.shape:
            cut = self.variable(f"{name}_cut", FLOAT, weight.shape)
            ends = [
                self._numbers(f"{name}_{n}", [v]) for n, v in (("start", 0), ("end", size), ("axis", axis))
            ]
            self.append("Slice", name, [whole, *ends], cut)
            whole = cut
        replace_reads(nodes, weight, whole)

    def kernel(
        self, nodes: Sequence[gs.Node], weight: gs.Tensor, matrix: BlockCodes, block: int, accuracy: int
    ) -> None:
        """Turn the nodes, products that `onnxq.weight_axes.is_plain_product` allows, into MatMulNBits."""
        layout = nbits_layout(matrix, block)
        stored = [
            self.constant(f"{weight.name}_quantized", layout.codes),
            self.constant(f"{weight.name}_scale", layout.scale),
        ]
        if layout.zero_point is not None:
            stored.append(self.constant(f"{weight.name}_zero_point", layout.zero_point))
        for node in nodes:
            bias = self._bias_vector(node, layout.attrs["N"]) if node.op == "Gemm" else None
            node.op, node.domain = "MatMulNBits", CONTRIB
            node.attrs = {**layout.attrs, "accuracy_level": accuracy}
            node.inputs = [node.inputs[0], *stored]
            if bias is not None:
                node.inputs = [
                    *node.inputs,
                    *(gs.Variable.empty() for _ in range(5 - len(node.inputs))),
                    bias,
                ]

    def blocked(self, nodes: Sequence[gs.Node], weight: gs.Tensor, matrix: BlockCodes) -> None:
        """Let the products read codes (K, N) in blocks through DequantizeLinear, Gemms without transB as runtimes fuse those."""
        name, zero = weight.name, matrix.zero_point
        if zero is None:
            zero = np.zeros(matrix.scale.shape, matrix.codes.dtype)  # runtimes look for one
        codes = _inputs_first(matrix.codes, matrix.axis)
        inputs = [
            self._typed(f"{name}_quantized", codes, matrix.bits),
            self.constant(f"{name}_scale", _inputs_first(matrix.scale, matrix.axis)),
            self._typed(f"{name}_zero_point", _inputs_first(zero, matrix.axis), matrix.bits),
        ]
        result = self.variable(f"{name}_dequantized", FLOAT, codes.shape)
        self.append("DequantizeLinear", name, inputs, result, {"axis": 0, "block_size": matrix.block})
        replace_reads(nodes, weight, result)
        for node in nodes:
            node.attrs.pop("transB", None)

    def takes_blocked(self, bits: int) -> bool:
        """Whether the graph's operator set and the target have DequantizeLinear in blocks of so many bits."""
        return bool(self.graph.opset >= BLOCKED_OPSET) and (bits == BYTE or bits in self.target.packed)

    def scaled(self, name: str, codes: gs.Tensor, scale: gs.Tensor, result: gs.Tensor) -> None:
        """Write codes times scale into `result`."""
        floats = codes if codes.dtype == FLOAT else self._cast(result.name, codes, codes.shape)
        self.append("Mul", name, [floats, scale], result)

    def _cast(self, name: str, codes: gs.Tensor, shape: Sequence[int | str] | None) -> gs.Variable:
        floats = self.variable(f"{name}_codes", FLOAT, shape)
        self.append("Cast", name, [codes], floats, {"to": onnx.TensorProto.FLOAT})
        return floats

    def _typed(self, name: str, codes: Codes, bits: int) -> gs.Constant:
        """An initializer whose type has so many bits."""
        return (
            self.constant(name, codes)
            if bits == BYTE
            else packed_constant(self.names.fresh(name), codes, bits)
        )

    def _numbers(self, name: str, numbers: Sequence[int]) -> gs.Constant:
        return self.constant(name, np.array(numbers, np.int64))

    def _bias_vector(self, node: gs.Node, size: int) -> gs.Tensor | None:
        """A Gemm's C as a vector (N,), None without one."""
        bias = present(node, 2)
        if bias is None or tuple(bias.shape) == (size,):
            return bias
        values = float_values(bias)
        assert values is not None
        return self.constant(f"{bias.name}_vector", np.broadcast_to(values.ravel(), (size,)))


def _inputs_first(matrix: NDArray[Number], axis: int) -> NDArray[Number]:
    """A matrix whose inputs lie along `axis` as (inputs, outputs)."""
    return np.ascontiguousarray(matrix.T) if axis == 1 else matrix
