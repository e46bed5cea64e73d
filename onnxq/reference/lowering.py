"""From the nodes of a model to steps: integer kernels, moves of codes, and operators that stay float.

Operators on codes become steps as they are. In the QDQ form, a float operator between DequantizeLinear and QuantizeLinear
becomes the kernel that onnxruntime makes of it, under the conditions under which it does (read from its source and measured;
they are stated here again, independently of the runtime, so that a difference shows):

- all its operands are dequantized per tensor (weights per channel), a bias from int32;
- its result is read by one QuantizeLinear alone, of the type of its input, perhaps through a Relu or Clip that the grid implies;
- a Gemm and a MatMul may also write float32, and an Add of an int32 bias after a MatMul of matrices joins it.

What matches nothing stays float. Values keep their grid through operators that only move them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from onnxq.model.tensors import all_graphs, subgraphs
from onnxq.reference.arithmetic import quantize_linear
from onnxq.reference.evaluate import evaluator
from onnxq.reference.kernels import KERNELS, MOVES, ON_CODES, Kernel, Step
from onnxq.reference.products import SHIFTED

Array = NDArray[Any]
BYTES = (np.dtype(np.uint8), np.dtype(np.int8))
STANDARD = ("", "ai.onnx")
OWN = (*STANDARD, "com.microsoft")

UNARY = ("AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Softmax")
BINARY = ("Add", "Mul")


@dataclass(frozen=True)
class Grid:
    """A float tensor that is dequantized: names of its codes, scale and zero point (empty without), and the axis."""

    codes: str
    scale: str
    zero: str
    axis: int


@dataclass
class Lowered:
    """A model as steps.

    Attributes:
        work: integer kernels, and nodes that stay float, in an order in which they can run.
        constants: known arrays by name.
        codes: names of the 8-bit tensors that the model computes, in that order.
    """

    work: list[Step | NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    codes: list[str] = field(default_factory=list)


def lower(model: ModelProto) -> Lowered:
    """The steps of a model."""
    return _Lowering(model).run()


class _Lowering:
    def __init__(self, model: ModelProto) -> None:
        self.graph = model.graph
        self.opsets = {e.domain: e.version for e in model.opset_import}
        self.outputs = {o.name for o in self.graph.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.graph.node:
            for name in read_names(node):
                self.readers.setdefault(name, []).append(node)
        self.shapes = _shapes(model)
        self.result = Lowered()
        self.constants = self.result.constants
        self.constants |= {t.name: numpy_helper.to_array(t) for t in self.graph.initializer}
        self.coded: dict[str, np.dtype[Any]] = {}
        self.grids: dict[str, Grid] = {}
        self.done: set[int] = set()

    def run(self) -> Lowered:
        for info in self.graph.input:
            dtype = _dtype(info.type.tensor_type.elem_type)
            if dtype in BYTES and info.name not in self.constants:
                self.coded[info.name] = dtype
        for node in self.graph.node:
            if id(node) not in self.done:
                self._lower(node)
        return self.result

    def _lower(self, node: NodeProto) -> None:
        if node.op_type == "DequantizeLinear" and node.domain in OWN:
            self._dequantize(node)
        elif self._is_constant(node):
            self._fold(node)
        elif node.op_type in KERNELS and node.domain in OWN:
            self._step(KERNELS[node.op_type], node.op_type, node.input, node.output, attributes(node))
        elif node.domain in STANDARD and self._is_coded(node.input[0] if node.input else ""):
            self._on_codes(node)
        elif node.domain in STANDARD and (self._fuse(node) or self._keep_grid(node)):
            pass
        else:
            self._stay_float(node)

    def _is_constant(self, node: NodeProto) -> bool:
        if any(True for _ in subgraphs(node)) or node.domain not in STANDARD:
            return False
        given = [name for name in node.input if name]
        return all(n in self.constants for n in given) and bool(given or node.op_type == "Constant")

    def _fold(self, node: NodeProto) -> None:
        arrays = [self.constants[name] for name in node.input if name]
        found = evaluator(node, self.opsets)(arrays)
        self.constants |= dict(zip((n for n in node.output if n), found, strict=True))

    def _dequantize(self, node: NodeProto) -> None:
        codes, scale, *zero = node.input
        given = attributes(node)
        if not given.get("block_size", 0):
            self.grids[node.output[0]] = Grid(codes, scale, zero[0] if zero else "", given.get("axis", 1))
        self._step(KERNELS["DequantizeLinear"], node.op_type, node.input, node.output, given)

    def _step(
        self,
        kernel: Kernel,
        op: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        attributes: Mapping[str, Any],
    ) -> None:
        self.result.work.append(Step(kernel, op, tuple(inputs), tuple(outputs), attributes))
        kind = self._kind(op, inputs)
        if kind in BYTES:
            self._hold(outputs[0], kind)

    def _kind(self, op: str, inputs: Sequence[str]) -> np.dtype[Any] | None:
        """Type of what a kernel writes, where that is known to be codes."""
        if op == "DynamicQuantizeLinear":
            return BYTES[0]
        place = {"QuantizeLinear": 2, "QLinearConcat": 1, "QLinearConv": 7, "QGemm": 8}
        at = place.get(op, len(inputs) - 1 if op.startswith("QLinear") else len(inputs))
        if op == "QuantizeLinear" and len(inputs) == 2:
            return BYTES[0]
        return self.constants[inputs[at]].dtype if at < len(inputs) and inputs[at] else None

    def _hold(self, name: str, dtype: np.dtype[Any]) -> None:
        self.coded[name] = dtype
        self.result.codes.append(name)

    def _is_coded(self, name: str) -> bool:
        return name in self.coded or (name in self.constants and self.constants[name].dtype in BYTES)

    def _on_codes(self, node: NodeProto) -> None:
        """A standard operator whose first input is codes."""
        kernel = self._mover(node)
        if kernel is None:
            self._stay_float(node)
            if node.op_type != "Resize":
                return
        else:
            work = Step(kernel, node.op_type, tuple(node.input), tuple(node.output), attributes(node))
            self.result.work.append(work)
        first = node.input[0]
        dtype = self.coded[first] if first in self.coded else self.constants[first].dtype
        for name in node.output:
            self._hold(name, dtype)

    def _mover(self, node: NodeProto) -> Kernel | None:
        """What runs the operator on codes; None where the runtime has to."""
        if node.op_type in ON_CODES and len(node.output) == 1:
            return ON_CODES[node.op_type]
        if node.op_type not in MOVES:
            return None
        run = evaluator(node, self.opsets)
        return lambda attributes, inputs, arithmetic: run([x for x in inputs if x is not None])

    def _keep_grid(self, node: NodeProto) -> bool:
        """Move the codes of a dequantized tensor instead of its values."""
        grid = self.grids.get(node.input[0] if node.input else "")
        if grid is None or node.op_type in ("Concat", "Clip", "Min", "Max", "Pad"):
            return False
        if not self._is_per_tensor(grid) or grid.codes not in self.coded:
            return False
        kernel = self._mover(node)
        if kernel is None:
            return False
        moved = tuple(f"{name}·codes" for name in node.output)
        inputs = (grid.codes, *node.input[1:])
        self.result.work.append(Step(kernel, node.op_type, inputs, moved, attributes(node)))
        for name, codes in zip(node.output, moved, strict=True):
            self.coded[codes] = self.coded[grid.codes]
            self.grids[name] = Grid(codes, grid.scale, grid.zero, grid.axis)
            ends = [n for n in (codes, grid.scale, grid.zero) if n]
            self._step(KERNELS["DequantizeLinear"], "DequantizeLinear", ends, [name], {})
        return True

    def _stay_float(self, node: NodeProto) -> None:
        self.result.work.append(node)

    # Patterns of the QDQ form. Each returns whether it has written the node.

    def _fuse(self, node: NodeProto) -> bool:
        names = [name for name in node.input if name]
        known = [self.grids[name] for name in names if name in self.grids]
        if not known or len(known) < len(names) or not self._takes(known[0]):
            return False
        if node.op_type in ("Conv", "Gemm"):
            return self._fuse_weighted(node, known)
        if node.op_type == "MatMul":
            return self._fuse_matmul(node, known)
        if node.op_type in (*UNARY, *BINARY, "Concat"):
            return self._fuse_kernel(node, known)
        return False

    def _takes(self, grid: Grid) -> bool:
        """Whether kernels read the codes: per tensor, uint8, or int8 straight from a QuantizeLinear."""
        if not self._is_per_tensor(grid) or not grid.zero:
            return False
        if self._type(grid) == BYTES[0]:
            return True
        return self._type(grid) == BYTES[1] and self._is_shifted(grid)

    def _is_shifted(self, grid: Grid) -> bool:
        """Whether the runtime moves int8 codes to uint8: they lie between QuantizeLinear and DequantizeLinear alone."""
        readers = self.readers.get(grid.codes, [])
        written = any(
            isinstance(w, Step) and grid.codes in w.outputs and w.op not in MOVES for w in self.result.work
        )
        return (
            self._type(grid) == BYTES[1]
            and written
            and grid.codes not in self.outputs
            and all(n.op_type == "DequantizeLinear" for n in readers)
        )

    def _is_per_tensor(self, grid: Grid) -> bool:
        scale = self.constants.get(grid.scale)
        return scale is not None and scale.size == 1

    def _type(self, grid: Grid) -> np.dtype[Any] | None:
        if grid.codes in self.coded:
            return self.coded[grid.codes]
        return self.constants[grid.codes].dtype if grid.codes in self.constants else None

    def _quantized(self, node: NodeProto, data: Grid) -> NodeProto | None:
        """The QuantizeLinear that alone reads the node's result, perhaps through an activation that its grid implies."""
        reader = self._only_reader(node.output[0])
        if reader is None:
            return None
        passed = []
        if reader.op_type in ("Relu", "Clip"):
            passed, reader = [reader], self._only_reader(reader.output[0])
        if reader is None or reader.op_type != "QuantizeLinear" or len(reader.input) < 3:
            return None
        scale, zero = (self.constants.get(name) for name in reader.input[1:3])
        if scale is None or zero is None or scale.size != 1 or zero.dtype != self._type(data):
            return None
        if any(not self._is_implied(n, scale, zero) for n in passed):
            return None
        self.done |= {id(n) for n in (*passed, reader)}
        return reader

    def _only_reader(self, name: str) -> NodeProto | None:
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def _is_implied(self, node: NodeProto, scale: Array, zero: Array) -> bool:
        info = np.iinfo(zero.dtype)
        if node.op_type == "Relu":
            return int(zero.item()) == info.min
        for end, name in zip((info.min, info.max), node.input[1:], strict=False):
            bound = self.constants.get(name)
            if name and (bound is None or quantize_linear(bound, scale, zero).item() != end):
                return False
        return True

    def _fuse_weighted(self, node: NodeProto, grids: list[Grid]) -> bool:
        """Conv and Gemm."""
        data, weight, *bias = grids
        if bias and self._type(bias[0]) != np.int32:
            return False
        if self._type(weight) not in BYTES or (bias and attributes(node).get("beta", 1.0) != 1.0):
            return False
        end = self._quantized(node, data)
        if end is None and (node.op_type == "Conv" or self._is_quantized_somewhere(node.output[0])):
            return False
        tail = end.input[1:3] if end is not None else ()
        codes = bias[0].codes if bias else ""
        operands = [*self._operand(data), *self._operand(weight)]
        output = node.output[0] if end is None else end.output[0]
        if node.op_type == "Conv":
            self._write("QLinearConv", [*operands, *tail, codes], output, node, data)
        else:
            self._write("QGemm", [*operands, codes, *tail], output, node, data)
        return True

    def _fuse_matmul(self, node: NodeProto, grids: list[Grid]) -> bool:
        data, other = grids
        if self._type(other) not in BYTES:
            return False
        operands = [*self._operand(data), *self._operand(other)]
        end = self._quantized(node, data)
        if end is not None:
            self._write("QLinearMatMul", [*operands, *end.input[1:3]], end.output[0], node, data)
            return True
        if self._is_quantized_somewhere(node.output[0]):
            return False
        if self._fuse_bias(node, data, operands):
            return True
        a, a_scale, a_zero, b, b_scale, b_zero = operands
        self._write(
            "MatMulIntegerToFloat", [a, b, a_scale, b_scale, a_zero, b_zero], node.output[0], node, data
        )
        return True

    def _fuse_bias(self, node: NodeProto, data: Grid, operands: list[str]) -> bool:
        """A MatMul and the Add of its bias, where the runtime makes a Gemm of them."""
        add = self._only_reader(node.output[0])
        if add is None or add.op_type != "Add" or not self._is_matrix(node.input[0]):
            return False
        name = next((n for n in add.input if n != node.output[0]), "")
        bias = self.grids.get(name)
        if bias is None or self._type(bias) != np.int32:
            return False
        end = self._quantized(add, data)
        if end is None and self._is_quantized_somewhere(add.output[0]):
            return False
        self.done.add(id(add))
        tail = end.input[1:3] if end is not None else ()
        output = add.output[0] if end is None else end.output[0]
        self._write("QGemm", [*operands, bias.codes, *tail], output, node, data)
        return True

    def _is_matrix(self, name: str) -> bool:
        """Whether it has two axes, or more of known sizes, which the runtime then flattens."""
        shape = self.shapes.get(name)
        return shape is not None and (len(shape) == 2 or all(isinstance(d, int) for d in shape))

    def _is_quantized_somewhere(self, name: str) -> bool:
        return any(n.op_type == "QuantizeLinear" for n in self.readers.get(name, ()))

    def _fuse_kernel(self, node: NodeProto, grids: list[Grid]) -> bool:
        """Kernels whose operands are all activations."""
        data = grids[0]
        if any(not self._takes(g) or self._type(g) != self._type(data) for g in grids):
            return False
        end = self._quantized(node, data)
        if end is None:
            return False
        operands = [name for grid in grids for name in self._operand(grid)]
        tail = list(end.input[1:3])
        inputs = [*tail, *operands] if node.op_type == "Concat" else [*operands, *tail]
        self._write(f"QLinear{node.op_type}", inputs, end.output[0], node, data)
        return True

    def _operand(self, grid: Grid) -> list[str]:
        return [grid.codes, grid.scale, grid.zero]

    def _write(self, op: str, inputs: Sequence[str], output: str, node: NodeProto, data: Grid) -> None:
        given = attributes(node) | ({SHIFTED: 1} if self._type(data) == BYTES[1] else {})
        if op == "QLinearSoftmax":
            given["opset"] = self.opsets.get("", 1)
        self._step(KERNELS[op], op, inputs, [output], given)


def read_names(node: NodeProto) -> list[str]:
    """Tensors that a node reads, those that its bodies take from outside included, once for each reading."""
    names = [name for name in node.input if name]
    for body in subgraphs(node):
        for graph in all_graphs(body):
            own = {t.name for t in graph.initializer} | {i.name for i in graph.input}
            own |= {name for inner in graph.node for name in inner.output}
            names += [name for inner in graph.node for name in inner.input if name and name not in own]
            names += [o.name for o in graph.output if o.name not in own]
    return names


def attributes(node: NodeProto) -> dict[str, Any]:
    """Attributes of a node as Python values."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _dtype(element: int) -> np.dtype[Any] | None:
    try:
        return np.dtype(helper.tensor_dtype_to_np_dtype(element))
    except (KeyError, TypeError):
        return None


def _shapes(model: ModelProto) -> dict[str, tuple[int | None, ...]]:
    """Known shapes of tensors; None for an open size."""
    graph = model.graph
    known = {}
    for info in (*graph.input, *graph.value_info, *graph.output):
        if info.type.tensor_type.HasField("shape"):
            dims = info.type.tensor_type.shape.dim
            known[info.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
    return known
