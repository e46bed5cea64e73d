"""Multiply-adds of each node, from weights and the shapes that a run shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from onnxq.measure.compare import run
from onnxq.model.session import make_session
from onnxq.rules import RECURRENT

PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def count_macs(model: onnx.ModelProto, feeds: Mapping[str, Any], samples: int = 1) -> dict[str, int]:
    """Multiply-adds per sample of each convolution, matrix product and recurrent layer of the top-level graph, by node name.

    Args:
        model: a float model whose nodes have names.
        feeds: one batch for it.
        samples: samples in that batch.

    Raises:
        ModelError: the model cannot be run.
    """
    nodes = [
        n for n in model.graph.node if n.op_type in {*PRODUCTS, *RECURRENT} and n.domain in ("", "ai.onnx")
    ]
    if not nodes:
        return {}
    weights = {t.name: tuple(t.dims) for t in model.graph.initializer}
    known = {i.name for i in model.graph.input} | {o.name for o in model.graph.output} | set(weights)
    inner = {name for n in nodes for name in _sized(n) if name not in known}
    session = make_session(model, threads=1, extra_outputs=sorted(inner))
    shapes = weights | {k: np.shape(v) for k, v in {**feeds, **run(session, feeds)}.items()}
    return {n.name: _macs(n, shapes) // samples for n in nodes}


def guessed_feeds(model: onnx.ModelProto) -> dict[str, Any] | None:
    """Zeros in the shape of each input; None when an input is no tensor of numbers.

    Unknown dimensions are guessed: one sample, images of 224 pixels, sequences of 16.
    """
    feeds: dict[str, Any] = {}
    inner = {t.name for t in model.graph.initializer}
    for value in model.graph.input:
        if value.name in inner:
            continue
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
            return None
        try:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        except KeyError:
            return None
        if dtype.kind not in "biuf":
            return None
        guess = 224 if len(kind.shape.dim) == 4 else 16
        feeds[value.name] = np.zeros(
            [d.dim_value or (guess if i else 1) for i, d in enumerate(kind.shape.dim)], dtype
        )
    return feeds


def _sized(node: onnx.NodeProto) -> tuple[str, str, str]:
    """Tensors whose sizes tell: both factors, and the result; of a recurrent layer the data and both weights."""
    return node.input[0], node.input[1], node.input[2] if node.op_type in RECURRENT else node.output[0]


def _macs(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    left, right, out = (shapes[name] for name in _sized(node))
    if node.op_type in RECURRENT:
        return math.prod(left[:2]) * (math.prod(right) + math.prod(out))
    if node.op_type == "Conv":
        return math.prod(out) * math.prod(right[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(left) * math.prod(right[1:])
    if node.op_type == "Gemm":
        trans_a = next((a.i for a in node.attribute if a.name == "transA"), 0)
        return math.prod(out) * left[0 if trans_a else 1]
    return math.prod(out) * left[-1]
