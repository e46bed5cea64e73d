"""The codes inside a quantized model, by which runtimes can be compared tensor by tensor and layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper, shape_inference
from onnx.utils import Extractor

CODES = (TensorProto.INT8, TensorProto.UINT8)
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Part:
    """What a model does between tensors of codes.

    Attributes:
        model: the nodes in between as a model, with their initializers.
        inputs: tensors that it reads: codes, or inputs of the whole.
        output: the codes that it writes.
    """

    model: ModelProto
    inputs: tuple[str, ...]
    output: str


def coded_tensors(model: ModelProto) -> dict[str, ValueInfoProto]:
    """Activations held as 8-bit codes, by name in graph order. What only a Clip reads are not codes yet.

    Args:
        model: of standard operators, whose types can be inferred.
    """
    inferred = shape_inference.infer_shapes(model)
    infos = {v.name: v for v in (*inferred.graph.value_info, *inferred.graph.output)}
    fixed = {t.name for t in model.graph.initializer}
    for node in model.graph.node:
        if all(name in fixed for name in node.input if name):
            fixed.update(node.output)
    last = {n.input[0] for n in model.graph.node if n.op_type == "Clip"}
    last -= {name for n in model.graph.node if n.op_type != "Clip" for name in n.input}
    names = (name for node in model.graph.node for name in node.output if name not in fixed | last)
    return {
        name: infos[name]
        for name in names
        if name in infos and infos[name].type.tensor_type.elem_type in CODES
    }


def with_outputs(model: ModelProto, infos: Mapping[str, ValueInfoProto]) -> ModelProto:
    """The model with further tensors as outputs, behind its own."""
    shown = ModelProto()
    shown.CopyFrom(model)
    own = {output.name for output in model.graph.output}
    shown.graph.output.extend(info for name, info in infos.items() if name not in own)
    return shown


def parts(model: ModelProto) -> Iterator[Part]:
    """What the model does from codes to the next codes, one part for each tensor of `coded_tensors`."""
    coded = coded_tensors(model)
    extractor = Extractor(shape_inference.infer_shapes(model))
    makers = {name: node for node in model.graph.node for name in node.output}
    sources = {info.name for info in model.graph.input} | coded.keys()
    for output in coded:
        inputs = tuple(_reached(makers, makers[output], sources))
        yield Part(extractor.extract_model(list(inputs), [output]), inputs, output)


def up_to(model: ModelProto, infos: Mapping[str, ValueInfoProto]) -> Iterator[tuple[str, ModelProto]]:
    """The model cut off behind each of its tensors: with that as only output, a runtime fuses what stands before it as ever."""
    extractor = Extractor(shape_inference.infer_shapes(model))
    inputs = [info.name for info in model.graph.input]
    for name in infos:
        yield name, extractor.extract_model(inputs, [name])


def _reached(makers: Mapping[str, NodeProto], node: NodeProto, sources: set[str]) -> dict[str, None]:
    """The nearest of the sources that a node computes from, in the order in which they are met."""
    found: dict[str, None] = {}
    seen, waiting = set(), [node]
    while waiting:
        for name in waiting.pop().input:
            if name in sources:
                found[name] = None
            elif name in makers and name not in seen:
                seen.add(name)
                waiting.append(makers[name])
    return found


def on_grid(model: ModelProto, feeds: Arrays, codes: Arrays) -> dict[str, NDArray[Any]]:
    """The feeds with each input that is quantized first replaced by the values of its codes.

    A value half-way between two codes goes to one of them by the last bit of a division. From values on the grid all
    runtimes start from the same codes.

    Args:
        codes: of the tensors that QuantizeLinear makes of inputs, as some runtime gave them for these feeds.
    """
    constants = {t.name: t for t in model.graph.initializer}
    moved = dict(feeds)
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in feeds and node.output[0] in codes:
            scale, zero = (numpy_helper.to_array(constants[name]) for name in node.input[1:3])
            steps = codes[node.output[0]].astype(np.int32) - zero
            moved[node.input[0]] = (steps * scale).astype(np.float32)
    return moved
