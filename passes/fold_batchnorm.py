"""Fold BatchNormalization, and Mul and Add by constants per channel, into the convolution or Gemm before.

    y = gamma (w * x + b - mean) / sqrt(var + epsilon) + beta = (f w) * x + (f (b - mean) + beta)

with f = gamma / sqrt(var + epsilon). A fold needs that nobody else reads the output of the convolution.
Shared weights are copied first: other nodes keep theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.graph import (
    Names,
    Uses,
    constant,
    float_values,
    is_constant,
    is_standard,
    present,
    producer,
    remove_node,
    set_input,
)
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold BatchNormalization and constant per-channel Mul and Add into the layer before."""

    name: ClassVar[str] = "fold-batchnorm"

    def run(self, program: Program, ctx: Context) -> PassResult:
        graph, names, uses = program.graph, Names(program.graph), Uses(program.graph)
        folded, skipped = 0, {}
        for node in list(graph.nodes):
            data = _data(node)
            if data is None:
                continue
            layer = _layer(data)
            reason = (
                "no convolution or Gemm comes before it"
                if layer is None
                else _refusal(uses, layer, node, data)
            )
            if layer is not None and reason is None:
                _fold(program, names, layer, node)
                program.shelve([layer])
                folded += 1
            elif reason is not None and (layer is not None or node.op == "BatchNormalization"):
                skipped[node.name] = reason
        return PassResult(folded, skipped)


def _data(node: gs.Node) -> gs.Tensor | None:
    """The tensor x where the node may be x -> factor x + shift, None for other nodes."""
    if node.op not in ("BatchNormalization", "Mul", "Add") or not is_standard(node):
        return None
    if node.op == "BatchNormalization":
        return node.inputs[0]
    left, right = node.inputs
    if is_constant(left) == is_constant(right):
        return None
    return right if is_constant(left) else left


def _layer(data: gs.Tensor) -> gs.Node | None:
    """The convolution or Gemm that writes the tensor."""
    node = producer(data)
    if node is None or node.op not in ("Conv", "ConvTranspose", "Gemm") or not is_standard(node):
        return None
    return node


def _refusal(uses: Uses, layer: gs.Node, node: gs.Node, data: gs.Tensor) -> str | None:
    """Why the node cannot be folded into the layer, None when it can.

    `uses` may be older than earlier folds: they only moved tensors to other producers.
    """
    if uses.only_reader(data) is None:
        return f"the output of {layer.name!r} is read elsewhere too"
    weight, bias = float_values(layer.inputs[1]), present(layer, 2)
    if weight is None or (bias is not None and float_values(bias) is None):
        return f"the weights or bias of {layer.name!r} are no float32 initializers"
    _, channels = _output_axis(layer, weight)
    if bias is not None and bias.shape not in ((), (1,), (channels,), (1, 1), (1, channels)):
        return f"the C of {layer.name!r} is no bias vector"
    if layer.op == "Gemm" and (layer.attrs.get("alpha", 1.0) != 1.0 or layer.attrs.get("beta", 1.0) != 1.0):
        return f"{layer.name!r} has alpha or beta"
    if node.op == "BatchNormalization":
        return _refuse_batchnorm(node)
    value = next(t for t in node.inputs if is_constant(t))
    if float_values(value) is None:
        return "its constant is not float32"
    rank = 2 if layer.op == "Gemm" else weight.ndim
    return None if _is_per_channel(tuple(value.shape), rank, channels) else "its constant is not per channel"


def _refuse_batchnorm(node: gs.Node) -> str | None:
    if node.attrs.get("training_mode", 0) or len(node.outputs) > 1:
        return "it is in training mode"
    values = [float_values(t) for t in node.inputs[1:5]]
    if any(v is None for v in values):
        return "its parameters are no float32 initializers"
    variance = values[3]
    if variance is None or np.any(variance + node.attrs.get("epsilon", 1e-5) <= 0.0):
        return "its variance is not positive"
    return None


def _is_per_channel(shape: tuple[int, ...], rank: int, channels: int) -> bool:
    """Whether a constant of that shape is a scalar or has axis 1 alone, in a result of that rank."""
    aligned = (1,) * (rank - len(shape)) + shape
    return len(aligned) == rank and aligned in ((1,) * rank, (1, channels, *(1,) * (rank - 2)))


def _fold(program: Program, names: Names, layer: gs.Node, node: gs.Node) -> None:
    """Give the layer the node's factor and shift and take the node out."""
    weight, bias = float_values(layer.inputs[1]), present(layer, 2)
    old = np.zeros(1) if bias is None else np.asarray(float_values(bias), np.float64).ravel()
    assert weight is not None
    axis, channels = _output_axis(layer, weight)
    factor, shift = (np.broadcast_to(v, channels) for v in _terms(node))
    if np.any(factor != 1.0):
        name = f"{layer.inputs[1].name.removesuffix('_folded')}_folded"
        before = program.folded.get(layer.inputs[1].name, 1.0)
        layer.inputs[1] = constant(names, name, _scaled(layer, weight, factor, axis))
        program.folded[layer.inputs[1].name] = before * factor
    set_input(layer, 2, constant(names, f"{layer.name}_bias", (old * factor + shift).astype(np.float32)))
    result = node.outputs[0]
    remove_node(program.graph, node)
    layer.outputs[0] = result


def _terms(node: gs.Node) -> tuple[Vector, Vector]:
    """Factor and shift of the node as x -> factor x + shift, (C,) or (1,) each."""
    values = [np.asarray(t.values, np.float64).ravel() for t in node.inputs if is_constant(t)]
    if node.op == "Mul":
        return values[0], np.zeros(1)
    if node.op == "Add":
        return np.ones(1), values[0]
    gamma, beta, mean, variance = values
    factor: Vector = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
    return factor, beta - mean * factor


def _output_axis(layer: gs.Node, weight: NDArray[np.float32]) -> tuple[int, int]:
    """Axis of the output channels in the weight, and how many output channels there are."""
    if layer.op == "Gemm":
        axis = 0 if layer.attrs.get("transB", 0) else 1
        return axis, weight.shape[axis]
    if layer.op == "ConvTranspose":
        return 1, weight.shape[1] * int(layer.attrs.get("group", 1))
    return 0, weight.shape[0]


def _scaled(layer: gs.Node, weight: NDArray[np.float32], factor: Vector, axis: int) -> NDArray[np.float32]:
    """The weight with each output channel multiplied by its factor."""
    if layer.op != "ConvTranspose":
        shape = [1] * weight.ndim
        shape[axis] = -1
        return (weight * factor.reshape(shape)).astype(np.float32)
    group = layer.attrs.get("group", 1)  # the weight is (C_in, C_out / group, ...): C_in picks the group
    per_input = np.repeat(factor.reshape(group, -1), len(weight) // group, axis=0)
    return (weight * per_input.reshape(*per_input.shape, *[1] * (weight.ndim - 2))).astype(np.float32)
