"""Operators that only move or decode values, by onnx's own reference evaluator, which is plain numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

Array = NDArray[Any]
Evaluate = Callable[[Sequence[Array]], tuple[Array, ...]]


def evaluator(node: NodeProto, opsets: Mapping[str, int]) -> Evaluate:
    """A function from the node's inputs, in order and without absent ones, to its outputs."""
    names = list(dict.fromkeys(name for name in node.input if name))
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in names],
        [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in node.output if name],
    )
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    machine = ReferenceEvaluator(helper.make_model(graph, opset_imports=imports))

    def run(arrays: Sequence[Array]) -> tuple[Array, ...]:
        given = dict(zip((name for name in node.input if name), arrays, strict=True))
        return tuple(np.asarray(value) for value in machine.run(None, given))

    return run
