"""Conversions of single nodes between operator sets that onnx's converter gets wrong or does not have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper

from onnxq.model.names import FreshNames

ALONG_AXIS = {"Softmax", "LogSoftmax", "Hardmax"}


class NoConversionError(Exception):
    """Why a node cannot be converted."""


@dataclass(frozen=True)
class Scope:
    """A graph with what its nodes can read, captured tensors included: types and constants by name."""

    graph: GraphProto
    types: Mapping[str, TypeProto]
    constants: Mapping[str, TensorProto]

    @classmethod
    def inside(cls, graph: GraphProto, outer: Scope | None) -> Scope:
        """The scope of a graph inside another."""
        infos = (*graph.value_info, *graph.input, *graph.output)
        types = {i.name: i.type for i in infos if i.HasField("type")}
        constants = {t.name: t for t in graph.initializer}
        if outer is None:
            return cls(graph, types, constants)
        return cls(graph, {**outer.types, **types}, {**outer.constants, **constants})

    def type(self, name: str, is_bare: bool) -> TypeProto | None:
        """Type of a tensor, None when unknown; `is_bare` leaves its shape out."""
        if not is_bare:
            return self.types.get(name)
        if name in self.constants:
            return helper.make_tensor_type_proto(self.constants[name].data_type, None)
        declared = self.types.get(name)
        if declared is None or not declared.HasField("tensor_type"):
            return declared
        return helper.make_tensor_type_proto(declared.tensor_type.elem_type, None)

    def shape(self, name: str) -> list[int | None] | None:
        """Dimensions of a tensor, None for unknown ones; None when the rank is unknown."""
        if name in self.constants:
            return list(self.constants[name].dims)
        declared = self.types.get(name)
        if declared is None or not declared.tensor_type.HasField("shape"):
            return None
        return [d.dim_value if d.HasField("dim_value") else None for d in declared.tensor_type.shape.dim]


def over_one_axis(node: NodeProto, scope: Scope) -> bool:
    """Whether a Softmax of version 12 or older, over all axes from `axis` on, runs over one that is not 1 at most.

    Then it means the same later, when it runs over one axis; an axis left out is written down, as its default changed.
    """
    shape, axis = scope.shape(node.input[0]), _axis(node)
    if shape is None or not -len(shape) <= axis < len(shape) or any(n != 1 for n in shape[axis:][1:]):
        return False
    if not node.attribute:
        node.attribute.append(helper.make_attribute("axis", 1))
    return True


def flattened(node: NodeProto, fresh: FreshNames) -> list[NodeProto]:
    """Softmax over the last axis of a matrix. The converter forgets Hardmax."""
    shape, matrix, result = (fresh(f"{node.output[0]}_{part}") for part in ("shape", "matrix", "rows"))
    flatten = helper.make_node("Flatten", [node.input[0]], [matrix], axis=_axis(node))
    before = [helper.make_node("Shape", [node.input[0]], [shape]), flatten]
    after = helper.make_node("Reshape", [result, shape], [node.output[0]])
    node.input[:], node.output[:] = [matrix], [result]
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("axis", -1))
    return [*before, node, after]


def slopes_by_channel(node: NodeProto, scope: Scope, fresh: FreshNames) -> list[NodeProto]:
    """PRelu up to version 6 takes slopes (C,) along axis 1; later they broadcast, so they become (C, 1, …).

    Raises:
        NoConversionError: the rank of an input is not known.
    """
    shape, slopes = scope.shape(node.input[0]), scope.shape(node.input[1])
    if shape is None or slopes is None:
        raise NoConversionError("the ranks of its inputs are not known")
    if len(slopes) != 1 or slopes == [1] or len(shape) < 3:
        return [node]
    form, slope = fresh(f"{node.output[0]}_form"), fresh(f"{node.output[0]}_slope")
    scope.graph.initializer.append(numpy_helper.from_array(np.array([-1] + [1] * (len(shape) - 2)), form))
    reshape = helper.make_node("Reshape", [node.input[1], form], [slope])
    node.input[1] = slope
    return [reshape, node]


def keep_sampling(resize: NodeProto, source: NodeProto, graph: GraphProto) -> None:
    """Up to version 10 samples lie at index / scale, rounded down where it grows and up where it shrinks.

    Later that is one of several modes, and not the default.

    Args:
        resize: what the converter made of `source`, in place.
        graph: holds the constants that `resize` reads.

    Raises:
        NoConversionError: the rounding cannot be told.
    """
    present = {a.name: a for a in resize.attribute}
    resize.attribute.append(helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
    if "mode" in present and present["mode"].s != b"nearest":
        return
    resize.attribute.append(helper.make_attribute("nearest_mode", _rounding(resize, source, graph)))


def _rounding(resize: NodeProto, source: NodeProto, graph: GraphProto) -> str:
    if source.op_type == "Upsample":  # whose scales are at least 1
        return "floor"
    stored = {t.name: t for t in graph.initializer}
    stored |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant"}
    if resize.input[2] not in stored:
        raise NoConversionError("the rounding of nearest samples is unknown when the scales are not constant")
    scales = numpy_helper.to_array(stored[resize.input[2]])
    if (scales < 1).any() and (scales > 1).any():
        raise NoConversionError("nearest samples were rounded up where it shrinks and down where it grows")
    return "ceil" if (scales < 1).any() else "floor"


def _axis(node: NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "axis"), 1)
