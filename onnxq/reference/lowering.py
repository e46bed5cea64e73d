"""From the nodes of a model to integer kernels, moves of codes, and operators that stay float.

Operators on codes become steps as they are, and so does what `onnxq.reference.patterns` finds in the QDQ form. Values keep their
grid through operators that only move them. What matches nothing stays float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, ValueInfoProto

from onnxq.graph import CONTRIB
from onnxq.model.tensors import subgraphs
from onnxq.reference.evaluate import evaluator
from onnxq.reference.facts import BYTES, UINT8, Facts, Grid, attributes
from onnxq.reference.kernels import KERNELS, MOVES, ON_CODES, Kernel, Step
from onnxq.reference.patterns import match

Array = NDArray[Any]
STANDARD = ("", "ai.onnx")
OWN = (*STANDARD, CONTRIB)
KEPT_GRID = (
    "MaxPool",
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Identity",
)  # as the runtime's propagation

# Where an operator's input list names the zero point of its output; for others of their kind it is the last one.
OUTPUT_ZERO = {"QuantizeLinear": 2, "QLinearConcat": 1, "QLinearConv": 7, "QGemm": 8}


@dataclass(frozen=True)
class Lowered:
    """A model as steps.

    Attributes:
        work: integer kernels, and nodes that stay float, in an order in which they can run.
        constants: known arrays by name.
        codes: names of the 8-bit tensors that the model computes, in that order.
        reads: how often the model reads each tensor.
        infos: types and shapes of tensors, where these are known.
    """

    work: tuple[Step | NodeProto, ...]
    constants: Mapping[str, Array]
    codes: tuple[str, ...]
    reads: Mapping[str, int]
    infos: Mapping[str, ValueInfoProto]


def lower(model: ModelProto) -> Lowered:
    """The steps of a model, whose constant parts are evaluated."""
    return _Lowering(model).run()


class _Lowering:
    def __init__(self, model: ModelProto) -> None:
        self.nodes = model.graph.node
        self.facts = Facts(model)
        self.work: list[Step | NodeProto] = []
        self.codes: list[str] = []
        self.absorbed: set[int] = set()

    def run(self) -> Lowered:
        for node in self.nodes:
            if id(node) not in self.absorbed:
                self._lower(node)
        reads = {name: len(nodes) for name, nodes in self.facts.readers.items()}
        return Lowered(tuple(self.work), self.facts.constants, tuple(self.codes), reads, self.facts.infos)

    def _lower(self, node: NodeProto) -> None:
        op, is_own = node.op_type, node.domain in OWN
        if op == "DequantizeLinear" and is_own:
            self._step(KERNELS[op], op, node.input, node.output, attributes(node))
        elif self._is_constant(node):
            self._fold(node)
        elif op == "QuantizeLinear" and not self._is_plain(node):
            self.work.append(self._evaluated(node, node.input, node.output))
        elif op == "MatMulInteger" and self._fuse(node):
            pass
        elif op in KERNELS and is_own:
            self._step(KERNELS[op], op, node.input, node.output, attributes(node))
        elif node.domain in STANDARD and node.input and self.facts.kind(node.input[0]) in BYTES:
            self._on_codes(node)
        elif node.domain not in STANDARD or not (self._fuse(node) or self._keep_grid(node)):
            self.work.append(node)

    def _is_constant(self, node: NodeProto) -> bool:
        if any(True for _ in subgraphs(node)) or node.domain not in STANDARD:
            return False
        return self.facts.are_constant(node.input) and (any(node.input) or node.op_type == "Constant")

    def _fold(self, node: NodeProto) -> None:
        arrays = [self.facts.constants[name] for name in node.input if name]
        found = evaluator(node, self.facts.opsets)(arrays)
        self.facts.constants |= dict(zip((n for n in node.output if n), found, strict=True))

    def _is_plain(self, node: NodeProto) -> bool:
        """Whether a QuantizeLinear is per tensor or channel, to a type that numpy has."""
        given = attributes(node)
        zero = self.facts.constants.get(node.input[2]) if len(node.input) > 2 else None
        is_known = zero is None or zero.dtype.kind in "iu"
        return is_known and not given.get("block_size", 0) and not given.get("output_dtype", 0)

    def _step(
        self,
        kernel: Kernel,
        op: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        given: Mapping[str, Any],
    ) -> None:
        self.work.append(Step(kernel, op, tuple(inputs), tuple(outputs), given))
        kind = self._written(op, inputs)
        if kind in BYTES and kind is not None:
            self._hold(outputs[0], kind)

    def _written(self, op: str, inputs: Sequence[str]) -> np.dtype[Any] | None:
        """Type of what a kernel writes, where that is known to be codes."""
        if op == "DynamicQuantizeLinear" or (op == "QuantizeLinear" and len(inputs) == 2):
            return UINT8
        place = OUTPUT_ZERO.get(op, len(inputs) - 1 if op.startswith("QLinear") else len(inputs))
        return self.facts.kind(inputs[place]) if place < len(inputs) and inputs[place] else None

    def _hold(self, name: str, kind: np.dtype[Any]) -> None:
        self.facts.coded[name] = kind
        self.codes.append(name)

    def _fuse(self, node: NodeProto) -> bool:
        """Write the kernel that stands for the node in the QDQ form; False when it stays float."""
        found = match(node, self.facts)
        if found is None:
            return False
        given = attributes(node)
        if found.op == "QLinearSoftmax":
            given["opset"] = self.facts.opsets.get("", 1)
        self.absorbed |= {id(n) for n in found.absorbed}
        self._step(found.kernel(self.facts), found.op, found.inputs, [found.output], given)
        return True

    def _on_codes(self, node: NodeProto) -> None:
        """A standard operator whose first input is codes; where the runtime runs it, only a Resize is known to give codes."""
        kind = self.facts.kind(node.input[0])
        moved = self._moved(node, node.input, node.output)
        self.work.append(node if moved is None else moved)
        if kind is None or (moved is None and node.op_type != "Resize"):
            return
        for name in node.output:
            self._hold(name, kind)

    def _keep_grid(self, node: NodeProto) -> bool:
        """Move the codes of a dequantized tensor instead of its values."""
        grid = self.facts.grids.get(node.input[0] if node.input else "")
        if grid is None or node.op_type not in KEPT_GRID or not self.facts.is_per_tensor(grid):
            return False
        kind = self.facts.coded.get(grid.codes)
        names = [f"{name} codes" for name in node.output]
        moved = self._moved(node, (grid.codes, *node.input[1:]), names)
        if kind is None or moved is None:
            return False
        self.work.append(moved)
        for name, codes in zip(node.output, names, strict=True):
            self.facts.coded[codes] = kind
            self.facts.grids[name] = Grid(codes, grid.scale, grid.zero, grid.axis)
            ends = [n for n in (codes, grid.scale, grid.zero) if n]
            self._step(KERNELS["DequantizeLinear"], "DequantizeLinear", ends, [name], {})
        return True

    def _moved(self, node: NodeProto, inputs: Sequence[str], outputs: Sequence[str]) -> Step | None:
        """The step that runs a standard operator on codes; None where the runtime has to."""
        if node.op_type in ON_CODES and len(outputs) == 1:
            return Step(ON_CODES[node.op_type], node.op_type, tuple(inputs), tuple(outputs), attributes(node))
        return self._evaluated(node, inputs, outputs) if node.op_type in MOVES else None

    def _evaluated(self, node: NodeProto, inputs: Sequence[str], outputs: Sequence[str]) -> Step:
        run = evaluator(node, self.facts.opsets)

        def kernel(given: Mapping[str, Any], arrays: Sequence[Any], arithmetic: str) -> tuple[Array, ...]:
            return run([x for x in arrays if x is not None])

        return Step(kernel, node.op_type, tuple(inputs), tuple(outputs))
