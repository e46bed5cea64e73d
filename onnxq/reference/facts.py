"""What is known of a model's tensors: who reads them, which are constant, which are codes, which lie on a grid."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorShapeProto, ValueInfoProto, helper, numpy_helper
from onnx.shape_inference import InferenceError, infer_shapes

from onnxq.model.names import read_names
from onnxq.model.skeleton import declared, split
from onnxq.model.tensors import infos

Array = NDArray[Any]
UINT8, INT8 = np.dtype(np.uint8), np.dtype(np.int8)
BYTES = (UINT8, INT8)


@dataclass(frozen=True)
class Grid:
    """A float tensor that is dequantized: names of its codes, scale and zero point (empty without), and the axis."""

    codes: str
    scale: str
    zero: str
    axis: int

    @property
    def operand(self) -> list[str]:
        """Codes, scale and zero point, as operators take them."""
        return [self.codes, self.scale, self.zero]


class Facts:
    """Knowledge of one model, which grows as its nodes are looked at in order.

    Attributes:
        opsets: version by domain.
        outputs: names of the graph's outputs.
        readers: nodes that read each tensor, once for each reading.
        writers: the node that writes each tensor.
        infos: types and shapes of tensors, where these are known.
        constants: known arrays.
        coded: type of each tensor of 8-bit codes that is no constant.
        grids: dequantized tensors.
    """

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self.opsets = {e.domain: e.version for e in model.opset_import}
        self.outputs = {o.name for o in graph.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in read_names(node):
                self.readers.setdefault(name, []).append(node)
        self.writers = {name: node for node in graph.node for name in node.output}
        self.infos = _infos(model)
        self.constants: dict[str, Array] = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self.coded = {
            i.name: kind
            for i in graph.input
            if i.name not in self.constants
            and (kind := _dtype(i.type.tensor_type.elem_type)) in BYTES
            and kind
        }
        self.grids = {n.output[0]: grid for n in graph.node if (grid := _grid(n)) is not None}
        self._quantized = {n.output[0] for n in graph.node if n.op_type == "QuantizeLinear"}

    def kind(self, name: str) -> np.dtype[Any] | None:
        """Type of a constant or of codes, None for anything else."""
        if name in self.coded:
            return self.coded[name]
        return self.constants[name].dtype if name in self.constants else None

    def is_per_tensor(self, grid: Grid) -> bool:
        """Whether one scale, which is constant, holds for all places."""
        scale = self.constants.get(grid.scale)
        return scale is not None and scale.size == 1

    def takes(self, grid: Grid) -> bool:
        """Whether kernels read such codes as activations: 8 bits, per tensor, with an explicit zero point."""
        return self.is_per_tensor(grid) and bool(grid.zero) and self.kind(grid.codes) in BYTES

    def seen(self, codes: str, kind: np.dtype[Any] | None) -> np.dtype[Any] | None:
        """Type in which kernels see codes: the runtime moves int8 between a QuantizeLinear and one reader to uint8."""
        if kind != INT8 or codes not in self._quantized or codes in self.outputs:
            return kind
        readers = self.readers.get(codes, [])
        if len(readers) != 1 or readers[0].op_type != "DequantizeLinear":
            return kind
        values = readers[0].output[0]
        return UINT8 if len(self.readers.get(values, ())) + (values in self.outputs) == 1 else kind

    def only_reader(self, name: str) -> NodeProto | None:
        """The node that alone reads a tensor, which is no output."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def is_quantized(self, name: str) -> bool:
        """Whether a QuantizeLinear reads the tensor, among others perhaps."""
        return any(n.op_type == "QuantizeLinear" for n in self.readers.get(name, ()))

    def is_matrix(self, name: str) -> bool:
        """Whether a tensor has two axes, or others whose sizes are all known: the runtime then flattens it."""
        if name not in self.infos:
            return False
        dims = _dims(self.infos[name])
        return len(dims) == 2 or all(d.HasField("dim_value") for d in dims)

    def are_constant(self, names: Collection[str]) -> bool:
        """Whether all names that are given are constants."""
        return all(name in self.constants for name in names if name)


def attributes(node: NodeProto) -> dict[str, Any]:
    """Attributes of a node as Python values."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _grid(node: NodeProto) -> Grid | None:
    """The grid that a DequantizeLinear per tensor or channel gives its values."""
    if node.op_type != "DequantizeLinear" or attributes(node).get("block_size", 0):
        return None
    codes, scale, *zero = node.input
    return Grid(codes, scale, zero[0] if zero else "", attributes(node).get("axis", 1))


def _dtype(element: int) -> np.dtype[Any] | None:
    try:
        return np.dtype(helper.tensor_dtype_to_np_dtype(element))
    except (KeyError, TypeError):
        return None


def _infos(model: ModelProto) -> dict[str, ValueInfoProto]:
    """Types and shapes as far as onnx infers them; like the runtime it goes by the model's own declarations.

    Names of sizes that onnx makes up are left out: the runtime makes none, and fuses what has sizes of one name.
    """
    found = declared(*split(model))
    own = {d.dim_param for info in infos(found.graph) for d in _dims(info)}
    with contextlib.suppress(InferenceError):  # what is declared stays
        found = infer_shapes(found)
    known = {info.name: info for info in infos(found.graph) if info.type.tensor_type.HasField("shape")}
    for info in known.values():
        for dim in _dims(info):
            if dim.HasField("dim_param") and dim.dim_param not in own:
                dim.ClearField("dim_param")
    return known


def _dims(info: ValueInfoProto) -> list[TensorShapeProto.Dimension]:
    return list(info.type.tensor_type.shape.dim)
