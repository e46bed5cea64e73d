"""The fake-quantized graph of a plan: what will be emitted, computed in float, with its activation steps as inputs.

It is the emitted graph itself, so that quantizers, roundings and saturations stand at the same places. Only the conversions of
weights and biases, which depend on nothing that runs, are replaced by their float values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxq.affine import dequantize
from onnxq.bias import bias_codes, bias_params, output_shift
from onnxq.emission import write_qdq
from onnxq.graph import float_values
from onnxq.model.surgeon import to_graph
from onnxq.program import Program, QuantDecision, Unit
from onnxq.simulate.segments import typed
from onnxq.target import Target

BYTE = 8
Array = NDArray[np.generic]


@dataclass(frozen=True, eq=False)
class Simulation:
    """A fake-quantized model and where a plan's numbers stand in it.

    Attributes:
        model: inputs are those of the network and one float32 scalar for each group of activations.
        scales: group -> name of its input.
        weights: weight -> names of the initializers with its values; of a table, with its codes.
        biases: unit name -> name of the initializer with its bias.
    """

    model: ModelProto
    scales: Mapping[str, str]
    weights: Mapping[str, tuple[str, ...]]
    biases: Mapping[str, str]


def simulate(program: Program, target: Target) -> Simulation:
    """The fake-quantized graph of a program whose plan is complete; the program is not changed."""
    copy = _copy(program)
    # activations stay in front of their quantizers: where they end on a grid depends on its step
    borders = write_qdq(copy, replace(target, guard="none", bias="int32", qdq_only=True))
    groups = {d.group: t for t, d in program.plan.items() if not d.is_weight}
    model = copy.to_model()
    stored = {t.name for t in model.graph.initializer}
    scales = {g: borders.grid(t)[0].name for g, t in groups.items()}
    scales = {g: name for g, name in scales.items() if name in stored}
    weights, biases = _places(program, model)
    _replace_conversions(model, stored)
    _as_inputs(model, set(scales.values()))
    return Simulation(typed(model), scales, weights, biases)


def _copy(program: Program) -> Program:
    """A program with a graph of its own, whose weights are stored as plain 8-bit codes."""
    plan = {
        tensor: replace(d, scheme=replace(d.scheme, bits=BYTE), points=None) if d.is_weight else d
        for tensor, d in program.plan.items()
    }
    model = program.to_model()
    return Program(to_graph(model), model, plan, dict(program.units), dict(program.floats))


def _places(program: Program, model: ModelProto) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Names of the tensors that stand for each weight, and for each unit's bias, where the units read them."""
    nodes = {n.name: n for n in model.graph.node}
    weights: dict[str, tuple[str, ...]] = {}
    biases: dict[str, str] = {}
    for unit in program.units.values():
        if unit.weight is None:
            continue
        node = nodes[unit.name]
        place = node.input[0 if unit.is_table else 1]
        weights[unit.weight] = tuple(dict.fromkeys((*weights.get(unit.weight, ()), place)))
        if unit.bias is None or unit.is_table:
            continue
        made = {n.output[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear"}
        holder = nodes[unit.nodes[1]] if unit.kind == "MatMul" else node
        candidates = holder.input[2:3] if unit.kind != "MatMul" else holder.input
        biases[unit.name] = next(
            n for n in candidates if n in made and made[n].input[0].startswith(unit.bias)
        )
    return weights, biases


def _replace_conversions(model: ModelProto, stored: set[str]) -> None:
    """Put zeros of the right shape where weights and biases are dequantized; the values follow."""
    shapes = {t.name: list(t.dims) for t in model.graph.initializer}
    kept, made = [], []
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            zeros = np.zeros(shapes[node.input[0]], np.float32)
            made.append(numpy_helper.from_array(zeros, node.output[0]))
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    read = {name for node in kept for name in node.input}
    constants = [t for t in model.graph.initializer if t.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*constants, *made])


def _as_inputs(model: ModelProto, names: set[str]) -> None:
    constants = [t for t in model.graph.initializer if t.name not in names]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
    model.graph.input.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, []) for n in sorted(names))


def weight_array(decision: QuantDecision, is_table: bool) -> Array:
    """What stands for a weight in the fake-quantized graph: its dequantized values, or the codes of a table."""
    assert decision.codes is not None
    assert decision.params is not None
    return decision.codes if is_table else dequantize(decision.codes, decision.params)


def bias_array(
    program: Program, unit: Unit, bias: NDArray[np.float32], weights: NDArray[np.float32] | None, group: int
) -> NDArray[np.float32]:
    """A unit's bias as its int32 codes give it back, (C,), without the shift of quantized weights where that is corrected.

    Args:
        program: with the decisions of the unit's input and weight.
        unit: the layer.
        bias: float bias.
        weights: float weights, to correct by the means of the unit's input; None not to.
        group: of a convolution.
    """
    assert unit.weight is not None
    values = bias.ravel()
    decision, statistics = program.plan[unit.weight], program.statistics.get(unit.inputs[0])
    if weights is not None and statistics is not None and statistics.channels is not None:
        assert decision.codes is not None
        assert decision.params is not None
        error = dequantize(decision.codes, decision.params) - weights
        values = values - output_shift(error, statistics.channels.mean, unit, group).astype(np.float32)
    scale = bias_params(unit, program)
    result: NDArray[np.float32] = (bias_codes(values, scale) * scale.astype(np.float64)).astype(np.float32)
    return result


def unit_bias(program: Program, unit: Unit) -> NDArray[np.float32] | None:
    """The unit's float bias, None when it has none."""
    if unit.bias is None:
        return None
    return float_values(program.graph.tensors()[unit.bias])
