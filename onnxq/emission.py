"""Units written into the graph as float nodes between DequantizeLinear and QuantizeLinear."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.borders import ALL, FLOAT, Borders, Bounds, Correction, bias_reads, uncorrected
from onnxq.expansion import add_up, is_expanded
from onnxq.graph import float_values, is_constant, present, producer, remove_node, set_input
from onnxq.lines import is_line, own_bounds, summands
from onnxq.program import Program, Unit
from onnxq.rules import RELU
from onnxq.target import Target


def activation(unit: Unit, nodes: Mapping[str, gs.Node]) -> gs.Node | None:
    """The Relu or Clip that the unit absorbs, None when it absorbs none."""
    last = nodes[unit.nodes[-1]]
    return last if len(unit.nodes) > 1 and last.op in RELU else None


def bounds_of(node: gs.Node) -> Bounds:
    """What a Relu or a Clip by constants lets through."""
    if node.op == "Relu":
        return Bounds(low=np.float32(0))
    found = (None if t is None else float_values(t) for t in (present(node, 1), present(node, 2)))
    return Bounds(*(None if v is None else v.ravel()[0] for v in found))


def write_qdq(
    program: Program, target: Target, *, open_plan: bool = False, correction: Correction = uncorrected
) -> Borders:
    """Write all units of a program into its graph as float nodes between DequantizeLinear and QuantizeLinear.

    Args:
        open_plan: whether other grids are to be put into what is written; see `Borders`.
        correction: of biases.
    """
    borders = Borders(program, target, open_plan=open_plan, correction=correction)
    nodes = {n.name: n for n in program.graph.nodes}
    for unit in program.units.values():
        if program.sides == "weights":
            if unit.weight is not None and not unit.is_table:
                store_weight(borders, unit, nodes[unit.name])
                _put_bias(unit, nodes, borders.float_bias(unit))
        elif unit.is_layout:
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


def write_line(borders: Borders, unit: Unit, nodes: Mapping[str, gs.Node]) -> None:
    """Write a line as an addition on codes; see `onnxq.lines`."""
    node, after, inputs = nodes[unit.name], activation(unit, nodes), []
    limits = own_bounds(unit) if after is None else bounds_of(after)
    for operand in summands(borders, unit, nodes):
        floats = gs.Variable(borders.names.fresh(f"{operand[1].name}_dq"), FLOAT, operand[0].shape)
        borders.append("DequantizeLinear", unit.output, list(operand), [floats])
        inputs.append(floats)
    node.op, node.inputs, node.attrs = "Add", inputs, {}
    node.outputs = [borders.quantize_output(unit.output, limits)]


def drop_unit_dilations(node: gs.Node) -> None:
    """Take dilations of 1 off an AveragePool: its integer kernel has no such attribute, and onnxruntime hands it on."""
    if node.op == "AveragePool" and all(d == 1 for d in node.attrs.get("dilations", ())):
        node.attrs.pop("dilations", None)


def surround(borders: Borders, unit: Unit, nodes: Mapping[str, gs.Node]) -> None:
    """Write a unit as its float nodes between DequantizeLinear and QuantizeLinear."""
    if is_line(unit):
        write_line(borders, unit, nodes)
        return
    _quantize_borders(borders, unit, nodes)
    points = borders.points(unit)
    if is_expanded(points):
        add_up(borders, nodes[unit.name], points)


def _quantize_borders(borders: Borders, unit: Unit, nodes: Mapping[str, gs.Node]) -> None:
    keeps_weight = unit.weight is not None and borders.program.sides == "activations"
    for node in (nodes[name] for name in unit.nodes):
        for index, tensor in enumerate(node.inputs):
            if tensor.name in unit.inputs:
                guarded = keeps_weight and node.name == unit.name
                node.inputs[index] = _guarded(borders, node) if guarded else borders.values(tensor.name)
    drop_unit_dilations(nodes[unit.name])
    if unit.weight is not None and not keeps_weight:
        _dequantize_weight(borders, unit, nodes)
    if unit.output not in borders.program.plan:
        return
    last, after, bounds = nodes[unit.nodes[-1]], activation(unit, nodes), ALL
    if after is not None and not borders.target.qdq_only:
        # on codes it is exact, and leaves the kernel in front of it whole
        bounds = bounds_of(after)
        remove_node(borders.graph, after)
        last = nodes[unit.nodes[-2]]
    last.outputs = [borders.quantize_output(unit.output, bounds)]


def _dequantize_weight(borders: Borders, unit: Unit, nodes: Mapping[str, gs.Node]) -> None:
    node, weight = nodes[unit.name], unit.weight
    assert weight is not None
    floats = gs.Variable(borders.names.fresh(f"{weight}_dq"), FLOAT, node.inputs[1].shape)
    dequantize = borders.append("DequantizeLinear", weight, list(borders.weight(weight)), [floats])
    axis = borders.program.params(weight).axis
    if borders.open_plan:
        axis = unit.channel_axis  # another plan may have a scale for each channel
    if axis is not None:
        dequantize.attrs["axis"] = axis
    node.inputs[1] = floats
    codes = borders.bias(unit) if borders.target.bias == "int32" else None
    _put_bias(unit, nodes, None if codes is None else _dequantized_bias(borders, unit, codes))


def _put_bias(unit: Unit, nodes: Mapping[str, gs.Node], bias: gs.Tensor | None) -> None:
    """Let the unit read another tensor as its bias; nothing changes where there is none."""
    if bias is None:
        return
    holder = nodes[unit.nodes[1]] if unit.kind == "MatMul" else nodes[unit.name]
    place = next(i for i, t in enumerate(holder.inputs) if t.name == unit.bias)
    holder.inputs[place] = bias


def store_weight(borders: Borders, unit: Unit, node: gs.Node) -> None:
    """Let a unit that stays float read codes times scale, which runtimes evaluate at load.

    They do not evaluate a DequantizeLinear.
    """
    assert unit.weight is not None
    weight, shape = unit.weight, node.inputs[1].shape
    scale = borders.parameter(f"{weight}_scale", (weight,), lambda p: _broadcast_scale(p, weight, len(shape)))
    floats, result = (
        gs.Variable(borders.names.fresh(f"{weight}_{n}"), FLOAT, shape) for n in ("codes", "dq")
    )
    cast = borders.append("Cast", weight, [borders.weight_codes(weight)], [floats])
    cast.attrs["to"] = onnx.TensorProto.FLOAT
    borders.append("Mul", weight, [floats, scale], [result])
    node.inputs[1] = result


def _broadcast_scale(program: Program, weight: str, ndim: int) -> NDArray[np.float32]:
    params = program.params(weight)
    return params.broadcast(params.scale, ndim)


def _dequantized_bias(borders: Borders, unit: Unit, codes: gs.Constant) -> gs.Variable:
    assert unit.bias is not None
    scale = borders.bias_scale(unit, borders.program)
    factor = borders.parameter(f"{unit.bias}_scale", bias_reads(unit), lambda p: borders.bias_scale(unit, p))
    floats = gs.Variable(borders.names.fresh(f"{unit.bias}_dq"), FLOAT, codes.shape)
    dequantize = borders.append("DequantizeLinear", unit.bias, [codes, factor], [floats])
    if scale.ndim or borders.open_plan:
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
        node.inputs[0] = _guarded(borders, node)


def _guarded(borders: Borders, node: gs.Node) -> gs.Tensor:
    """Values for a layer that stays float."""
    source, weight = node.inputs[0], node.inputs[1]
    if not _is_fixed(weight) or weight.shape is None or node.attrs.get("transA", 0):
        return borders.values(source.name)
    channels, axis = INPUT_CHANNELS[node.op](node, weight.shape)
    return borders.guarded_values(source.name, channels, axis)


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
