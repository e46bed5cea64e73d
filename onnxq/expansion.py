"""Points as output channels: a layer computes every row of points by itself, and their sums are taken behind it.

This serves kernels that read few-bit codes alone, where points cannot fold into codes of 8 bits. The layer gets as many output
channels as there are rows, and zeros up to a multiple of 8, which kernels like; a Gather brings the rows of each channel
together, with one of zeros where a channel has fewer, and a ReduceSum adds them up.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.affine import QuantParams
from onnxq.graph import constant
from onnxq.point_rows import PointRows

if TYPE_CHECKING:
    from onnxq.borders import Borders

MULTIPLE = 8
FLOAT = np.dtype(np.float32)


def is_expanded(points: PointRows | None) -> TypeGuard[PointRows]:
    """Whether points are computed one by one."""
    return points is not None and points.form == "rows"


def row_codes(points: PointRows) -> NDArray[np.int8]:
    """Codes of all rows and of those of zeros behind them, in the weight's layout."""
    rows = points.rows
    zeros = np.zeros((width(points) - len(rows), *rows.shape[1:]), np.int8)
    return np.ascontiguousarray(np.moveaxis(np.concatenate([rows, zeros]), 0, points.axis))


def row_params(points: PointRows, params: QuantParams) -> QuantParams:
    """The scale of each row: its factor times the scale of its channel."""
    scale = np.full(width(points), params.scale.min(), np.float32)
    own = points.factors > 0
    scale[points.places[own]] = (points.factors * params.scale[:, None])[own]
    return replace(params, scale=scale, zero_point=np.zeros(scale.shape, np.int32))


def row_bias(bias: NDArray[np.float32], points: PointRows) -> NDArray[np.float32]:
    """A bias (C,) as one of each row: that of a channel's finest point, whose scale is the channel's own."""
    finest = points.places[np.arange(len(points.places)), (points.factors > 0).sum(axis=1) - 1]
    values = np.zeros(width(points), np.float32)
    values[finest] = bias.ravel()
    return values


def add_up(borders: Borders, node: gs.Node, points: PointRows) -> None:
    """Sum up the rows behind a layer, whose output becomes as wide as they are."""
    result, axis = node.outputs[0], 1 if node.op == "Conv" else -1
    places = np.where(points.factors > 0, points.places, width(points) - 1).astype(np.int64)
    rows, parts = (gs.Variable(borders.names.fresh(f"{result.name}_{n}"), FLOAT) for n in ("rows", "points"))
    node.outputs = [rows]
    indices = constant(borders.names, f"{node.inputs[1].name}_places", places)
    borders.append("Gather", result.name, [rows, indices], [parts]).attrs["axis"] = axis
    last = constant(borders.names, f"{node.inputs[1].name}_axis", np.array([axis + 1 if axis > 0 else axis]))
    borders.append("ReduceSum", result.name, [parts, last], [result]).attrs["keepdims"] = 0


def width(points: PointRows) -> int:
    """Number of rows with those of zeros, at least one."""
    return len(points.rows) // MULTIPLE * MULTIPLE + MULTIPLE
