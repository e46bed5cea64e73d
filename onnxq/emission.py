"""Where codes and floats meet: QuantizeLinear and DequantizeLinear at the borders of units, shared by the emission passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.affine import QuantParams, quantize
from onnxq.bias import bias_codes, bias_params
from onnxq.expansion import add_up, is_expanded, row_bias, row_codes, row_params
from onnxq.graph import Names, constant, float_values, is_constant, present, producer, remove_node, set_input
from onnxq.packing import Packer
from onnxq.point_rows import PointRows
from onnxq.program import Program, Unit
from onnxq.rules import RELU
from onnxq.scheme import QuantScheme
from onnxq.target import Target

FLOAT = np.dtype(np.float32)


def storage(scheme: QuantScheme) -> np.dtype[np.integer]:
    """Type of a code as the kernels read it."""
    return np.dtype(np.int8 if scheme.signed else np.uint8)


class Borders:
    """Codes and dequantized values of the tensors of a plan, made when first asked for.

    A tensor that is held as codes keeps its name for the dequantized value, so float readers, graph outputs and control-flow
    bodies read it without being touched. A tensor that is only needed as codes keeps its name for the float value.
    """

    def __init__(self, program: Program, target: Target) -> None:
        self.program = program
        self.graph = program.graph
        self.names = Names(program.graph)
        self.target = target
        self.packer = Packer(program.graph, self.names, target.packed)
        self.tensors: dict[str, gs.Tensor] = program.graph.tensors()
        self._codes: dict[str, gs.Variable] = {}
        self._values: dict[str, gs.Tensor] = {}
        self._grids: dict[str, tuple[gs.Constant, gs.Constant]] = {}
        self._zero_points: dict[tuple[np.dtype[np.integer], tuple[int, ...]], gs.Constant] = {}
        self._limits: dict[tuple[np.dtype[np.integer], int, int], tuple[gs.Constant, gs.Constant]] = {}
        self._weights: dict[str, tuple[gs.Tensor, gs.Constant, gs.Constant]] = {}

    def grid(self, tensor: str) -> tuple[gs.Constant, gs.Constant]:
        """Scale () float32 and zero point () of an activation, one pair of initializers for each group."""
        group = self.program.plan[tensor].group
        if group not in self._grids:
            params = self.program.params(tensor)
            self._grids[group] = (
                constant(self.names, f"{group}_scale", params.scale),
                constant(self.names, f"{group}_zp", params.zero_point.astype(storage(params.scheme))),
            )
        return self._grids[group]

    def weight(self, tensor: str) -> tuple[gs.Tensor, gs.Constant, gs.Constant]:
        """Codes, scale and explicit zero point of a weight, one set for all units that share it."""
        if tensor not in self._weights:
            params, points = self.program.params(tensor), self.program.plan[tensor].points
            if is_expanded(points):
                params = row_params(points, params)
            scale = constant(self.names, f"{tensor}_scale", params.scale)
            self._weights[tensor] = self.weight_codes(tensor), scale, self._zeros(tensor, params)
        return self._weights[tensor]

    def _zeros(self, tensor: str, params: QuantParams) -> gs.Constant:
        """Zero point of a weight; weights of one shape of scales share theirs where it is 0."""
        zero = params.zero_point.astype(storage(params.scheme))
        key = (zero.dtype, zero.shape)
        if zero.any() or key not in self._zero_points:
            made = constant(self.names, f"{tensor}_zp", zero)
            if zero.any():
                return made
            self._zero_points[key] = made
        return self._zero_points[key]

    def points(self, unit: Unit) -> PointRows | None:
        """Rows of points that the unit's weights are stored as."""
        return None if unit.weight is None else self.program.plan[unit.weight].points

    def weight_codes(self, tensor: str) -> gs.Tensor:
        """Codes of a weight, int8 or uint8, stored at as many bits as they have."""
        decision = self.program.plan[tensor]
        if is_expanded(decision.points):
            return self.packer.tensor(f"{tensor}_q", row_codes(decision.points), decision.scheme.bits)
        if decision.points is not None:
            return self.packer.sums(f"{tensor}_q", decision.points, decision.scheme.bits)
        assert decision.codes is not None
        codes = decision.codes.astype(storage(decision.scheme))
        return self.packer.tensor(f"{tensor}_q", codes, decision.scheme.bits)

    def bias(self, unit: Unit) -> gs.Constant | None:
        """The unit's bias (C,) as int32 codes at input scale times weight scale, None when it has none."""
        if unit.bias is None:
            return None
        values = float_values(self.tensors[unit.bias])
        assert values is not None
        points = self.row_points(unit)
        if points is not None:
            values = row_bias(values, points)
        return constant(self.names, f"{unit.bias}_q", bias_codes(values, self.bias_scale(unit)))

    def bias_scale(self, unit: Unit) -> NDArray[np.float32]:
        """Scale of the bias as the layer reads it, () or (C,); of each row where points are computed one by one."""
        points, weight = self.row_points(unit), unit.weight
        if points is None or weight is None:
            return bias_params(unit, self.program)
        rows = row_params(points, self.program.params(weight)).scale
        return np.asarray(self.program.params(unit.inputs[0]).scale * rows, np.float32)

    def row_points(self, unit: Unit) -> PointRows | None:
        """Points that a layer with a bias of its own computes one by one; a MatMul's bias is added to their sums."""
        points = self.points(unit)
        return points if is_expanded(points) and unit.kind != "MatMul" else None

    def codes(self, tensor: str) -> gs.Variable:
        """Codes of a tensor; a QuantizeLinear after the float tensor when nobody holds them."""
        if tensor not in self._codes:
            self._quantize(tensor, self.tensors[tensor], self._new_codes(tensor))
        return self._codes[tensor]

    def values(self, tensor: str) -> gs.Tensor:
        """Dequantized values of a tensor."""
        if tensor not in self._values:
            codes = self.codes(tensor)
            floats = gs.Variable(self.names.fresh(f"{tensor}_dq"), FLOAT, self.tensors[tensor].shape)
            self.append("DequantizeLinear", tensor, [codes, *self.grid(tensor)], [floats])
            self._values[tensor] = floats
        return self._values[tensor]

    def guarded_values(self, tensor: str, channels: int, axis: int) -> gs.Tensor:
        """Values of a tensor held as codes for a layer that stays float.

        onnxruntime quantizes the weights of a float layer behind a per-tensor DequantizeLinear by itself. It leaves the layer
        alone behind one with equal scales along an axis, or behind a LeakyRelu of slope 1; the numbers are the same.
        """
        floats = gs.Variable(self.names.fresh(f"{tensor}_dq"), FLOAT, self.tensors[tensor].shape)
        if self.target.guard == "slope":
            self.append("LeakyRelu", tensor, [self.values(tensor)], [floats]).attrs["alpha"] = 1.0
            return floats
        scale, zero = (np.full(channels, t.values, t.values.dtype) for t in self.grid(tensor))
        grid = [constant(self.names, f"{tensor}_{n}", v) for n, v in (("scales", scale), ("zps", zero))]
        self.append("DequantizeLinear", tensor, [self.codes(tensor), *grid], [floats]).attrs["axis"] = axis
        return floats

    def is_held(self, tensor: str) -> bool:
        """Whether only codes of the tensor are written, so far."""
        return self._values.get(tensor) is not None and self._values[tensor] is self.tensors[tensor]

    def hold(self, tensor: str) -> gs.Variable:
        """Codes for a kernel to write; from here on the tensor's own name is their dequantized value."""
        floats = self.tensors[tensor]
        floats.inputs.clear()
        codes = self._new_codes(tensor)
        self.append("DequantizeLinear", tensor, [codes, *self.grid(tensor)], [floats])
        self._values[tensor] = floats
        return codes

    def quantize_output(self, tensor: str, bounds: tuple[int, int] | None = None) -> gs.Variable:
        """A float32 variable for a kernel to write, quantized and dequantized again into the tensor.

        Args:
            bounds: smallest and largest code to let through; None for all.
        """
        raw = gs.Variable(self.names.fresh(f"{tensor}_float"), FLOAT, self.tensors[tensor].shape)
        self._quantize(tensor, raw, self.hold(tensor), bounds)
        return raw

    def _quantize(
        self, tensor: str, floats: gs.Tensor, codes: gs.Variable, bounds: tuple[int, int] | None = None
    ) -> None:
        limits = self.limits(tensor, bounds)
        if limits is None:
            self.append("QuantizeLinear", tensor, [floats, *self.grid(tensor)], [codes])
            return
        open_codes = gs.Variable(self.names.fresh(f"{tensor}_raw"), codes.dtype, codes.shape)
        self.append("QuantizeLinear", tensor, [floats, *self.grid(tensor)], [open_codes])
        self.append("Clip", tensor, [open_codes, *limits], [codes])

    def limits(
        self, tensor: str, bounds: tuple[int, int] | None = None
    ) -> tuple[gs.Constant, gs.Constant] | None:
        """Smallest and largest code of a tensor as initializers, None where its storage saturates there by itself.

        Args:
            bounds: codes that an absorbed activation lets through; None for all of the tensor's grid.
        """
        scheme = self.program.plan[tensor].scheme
        low, high = bounds or (scheme.qmin, scheme.qmax)
        kind = storage(scheme)
        if (low, high) == (np.iinfo(kind).min, np.iinfo(kind).max):
            return None
        if (kind, low, high) not in self._limits:
            self._limits[kind, low, high] = (
                constant(self.names, f"{tensor}_low", np.array(low, kind)),
                constant(self.names, f"{tensor}_high", np.array(high, kind)),
            )
        return self._limits[kind, low, high]

    def append(
        self, op: str, name: str, inputs: list[gs.Tensor], outputs: list[gs.Tensor], domain: str = ""
    ) -> gs.Node:
        """A new node named after its output where that is new too, else after a tensor or node."""
        known = self.tensors.get(outputs[0].name) is outputs[0]
        node_name = self.names.fresh(f"{name}_dq") if known else outputs[0].name
        node = gs.Node(op, node_name, inputs=inputs, outputs=outputs, domain=domain)
        self.graph.nodes.append(node)
        return node

    def finish(self) -> None:
        """Drop conversions that nobody reads and restore the order of nodes."""
        self.graph.cleanup(remove_unused_graph_inputs=False).toposort()

    def _new_codes(self, tensor: str) -> gs.Variable:
        scheme = self.program.plan[tensor].scheme
        shape = self.tensors[tensor].shape
        self._codes[tensor] = gs.Variable(self.names.fresh(f"{tensor}_q"), storage(scheme), shape)
        return self._codes[tensor]


def activation(unit: Unit, nodes: Mapping[str, gs.Node]) -> gs.Node | None:
    """The Relu or Clip that the unit absorbs, None when it absorbs none."""
    last = nodes[unit.nodes[-1]]
    return last if len(unit.nodes) > 1 and last.op in RELU else None


def code_bounds(node: gs.Node, params: QuantParams) -> tuple[int, int]:
    """Smallest and largest code that a Relu or Clip by constants lets through.

    Rounding keeps order, so clipping codes at the codes of the bounds gives the codes of the clipped values.
    """
    bounds = [params.scheme.qmin, params.scheme.qmax]
    limits = [present(node, 1), present(node, 2)]
    for end, limit in enumerate(limits):
        values = None if limit is None else float_values(limit)
        if values is not None:
            bounds[end] = int(quantize(values.ravel()[0], params))
    if node.op == "Relu":
        bounds[0] = int(quantize(np.zeros((), np.float32), params))
    return bounds[0], bounds[1]


def is_saturation(node: gs.Node, params: QuantParams) -> bool:
    """Whether a Relu or Clip does no more than codes do by themselves: it lets every code through."""
    return code_bounds(node, params) == (params.scheme.qmin, params.scheme.qmax)


def write_qdq(program: Program, target: Target) -> Borders:
    """Write all units of a program into its graph as float nodes between DequantizeLinear and QuantizeLinear."""
    borders = Borders(program, target)
    nodes = {n.name: n for n in program.graph.nodes}
    for unit in program.units.values():
        if unit.is_layout:
            move_codes(borders, unit, nodes[unit.name])
        elif target.rules[unit.kind].role == "table":
            look_up_codes(borders, unit, nodes[unit.name])
        else:
            surround(borders, unit, nodes)
    guard_floats(borders)
    borders.finish()
    return borders


def move_codes(borders: Borders, unit: Unit, node: gs.Node) -> None:
    """Let a node that only moves values work on codes; zero padding becomes the zero point."""
    codes = borders.codes(unit.inputs[0])
    outputs = [borders.hold(t) for t in unit.outputs]
    node.inputs[0] = codes
    node.outputs = outputs
    if node.op == "Pad" and node.attrs.get("mode", "constant") == "constant":
        zero = borders.grid(unit.inputs[0])[1]
        set_input(node, 2, zero)


def look_up_codes(borders: Borders, unit: Unit, node: gs.Node) -> None:
    """Let an embedding lookup gather codes, which are dequantized afterwards: a whole table never is."""
    assert unit.weight is not None
    node.inputs[0] = borders.weight_codes(unit.weight)
    node.outputs = [borders.hold(unit.output)]


def drop_unit_dilations(node: gs.Node) -> None:
    """Take dilations of 1 off an AveragePool: its integer kernel has no such attribute, and onnxruntime hands it on."""
    if node.op == "AveragePool" and all(d == 1 for d in node.attrs.get("dilations", ())):
        node.attrs.pop("dilations", None)


def surround(borders: Borders, unit: Unit, nodes: Mapping[str, gs.Node]) -> None:
    """Write a unit as its float nodes between DequantizeLinear and QuantizeLinear."""
    _quantize_borders(borders, unit, nodes)
    points = borders.points(unit)
    if is_expanded(points):
        add_up(borders, nodes[unit.name], points)


def _quantize_borders(borders: Borders, unit: Unit, nodes: Mapping[str, gs.Node]) -> None:
    for node in (nodes[name] for name in unit.nodes):
        for index, tensor in enumerate(node.inputs):
            if tensor.name in unit.inputs:
                node.inputs[index] = borders.values(tensor.name)
    drop_unit_dilations(nodes[unit.name])
    if unit.weight is not None:
        _dequantize_weight(borders, unit, nodes)
    if unit.output not in borders.program.plan:
        return
    last, after, bounds = nodes[unit.nodes[-1]], activation(unit, nodes), None
    if after is not None and not borders.target.qdq_only:
        # on codes it is exact, since rounding keeps the order, and leaves the kernel in front of it whole
        params = borders.program.params(unit.output)
        bounds = None if is_saturation(after, params) else code_bounds(after, params)
        remove_node(borders.graph, after)
        last = nodes[unit.nodes[-2]]
    last.outputs = [borders.quantize_output(unit.output, bounds)]


def _dequantize_weight(borders: Borders, unit: Unit, nodes: Mapping[str, gs.Node]) -> None:
    node, weight = nodes[unit.name], unit.weight
    assert weight is not None
    floats = gs.Variable(borders.names.fresh(f"{weight}_dq"), FLOAT, node.inputs[1].shape)
    dequantize = borders.append("DequantizeLinear", weight, list(borders.weight(weight)), [floats])
    axis = borders.program.params(weight).axis
    if axis is not None:
        dequantize.attrs["axis"] = axis
    node.inputs[1] = floats
    codes = borders.bias(unit) if borders.target.bias == "int32" else None
    if codes is None:
        return
    holder = nodes[unit.nodes[1]] if unit.kind == "MatMul" else node
    place = next(i for i, t in enumerate(holder.inputs) if t.name == unit.bias)
    holder.inputs[place] = _dequantized_bias(borders, unit, codes)


def _dequantized_bias(borders: Borders, unit: Unit, codes: gs.Constant) -> gs.Variable:
    assert unit.bias is not None
    scale = borders.bias_scale(unit)
    factor = constant(borders.names, f"{unit.bias}_scale", scale)
    floats = gs.Variable(borders.names.fresh(f"{unit.bias}_dq"), FLOAT, codes.shape)
    dequantize = borders.append("DequantizeLinear", unit.bias, [codes, factor], [floats])
    if scale.ndim:
        dequantize.attrs["axis"] = 0
    return floats


def guard_floats(borders: Borders) -> None:
    """Let layers that are to stay float read codes in a way that the runtime does not quantize them for."""
    if borders.target.guard == "none":
        return
    inside = {name for unit in borders.program.units.values() for name in unit.nodes}
    for node in list(borders.graph.nodes):
        if node.name in inside or node.op not in INPUT_CHANNELS or not borders.is_held(node.inputs[0].name):
            continue
        weight = node.inputs[1]
        if _is_fixed(weight) and weight.shape is not None and not node.attrs.get("transA", 0):
            channels, axis = INPUT_CHANNELS[node.op](node, weight.shape)
            node.inputs[0] = borders.guarded_values(node.inputs[0].name, channels, axis)


def _is_fixed(tensor: gs.Tensor) -> bool:
    """Whether the tensor is an initializer or computed from initializers alone, which the runtime does once."""
    made = producer(tensor)
    return is_constant(tensor) or (made is not None and all(_is_fixed(t) for t in made.inputs))


# Channels of the input and their axis, from the node and the shape of its weights.
INPUT_CHANNELS: dict[str, Callable[[gs.Node, Sequence[int]], tuple[int, int]]] = {
    "Conv": lambda node, shape: (shape[1] * node.attrs.get("group", 1), 1),
    "ConvTranspose": lambda node, shape: (shape[0], 1),
    "Gemm": lambda node, shape: (shape[1 if node.attrs.get("transB", 0) else 0], 1),
    "MatMul": lambda node, shape: (shape[-2] if len(shape) > 1 else shape[0], -1),
}
