"""Models of single kernels, and what they give in onnxruntime and in the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto, helper, numpy_helper

from onnxq.model.session import make_session
from onnxq.reference.agreement import unreadable
from onnxq.reference.run import Reference
from onnxq.reference.sums import Arithmetic

Arrays = Mapping[str, NDArray[Any]]
MICROSOFT = "com.microsoft"


@pytest.fixture(scope="session")
def arithmetic() -> Arithmetic:
    """The arithmetic of this machine, from a product whose pairs overflow 16 bits."""
    a, b = np.full((4, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
    model = build([helper.make_node("MatMulInteger", ["a", "b"], ["y"])], {"a": a}, {"b": b})
    (sums,) = make_session(model, threads=1).run(None, {"a": a})
    return "exact" if sums[0, 0] == 255 * 127 * 64 else "avx2"


@pytest.fixture(scope="session")
def build_model() -> Callable[..., ModelProto]:
    return build


def build(
    nodes: list[onnx.NodeProto],
    feeds: Arrays,
    constants: Arrays,
    outputs: tuple[str, ...] = ("y",),
    opset: int = 21,
) -> ModelProto:
    """A model of these nodes; its inputs have the types and ranks of the feeds."""
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), [None] * x.ndim)
            for n, x in feeds.items()
        ],
        [ValueInfoProto(name=n) for n in outputs],
        [numpy_helper.from_array(np.asarray(x), n) for n, x in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.fixture(scope="session")
def assert_exact(arithmetic: Arithmetic) -> Callable[..., dict[str, NDArray[Any]]]:
    """Asserts that the reference gives what onnxruntime gives, bit by bit: codes of all quantized tensors, and all outputs.

    Float layers between codes may be fused otherwise once codes are returned, so what they round may differ where `floats`
    allows it: by how much of the largest value.

    Returns the reference's tensors.
    """

    def equal(found: NDArray[Any], expected: NDArray[Any], floats: float, message: str) -> None:
        if floats and expected.dtype == np.float32:
            np.testing.assert_allclose(
                found, expected, rtol=0, atol=floats * np.abs(expected).max(), err_msg=message
            )
        else:
            np.testing.assert_array_equal(found, expected, err_msg=message)

    def check(model: ModelProto, feeds: Arrays, floats: float = 0.0) -> dict[str, NDArray[Any]]:
        reference = Reference(model, arithmetic, threads=1)
        seen = [name for name in reference.code_names if name not in unreadable(model)]
        session = make_session(model, threads=1, extra_outputs=seen)
        names = [o.name for o in session.get_outputs()]
        expected = dict(zip(names, session.run(names, dict(feeds)), strict=True))
        found = reference.tensors(feeds, names)
        for name in names:
            assert (found[name].dtype, found[name].shape) == (expected[name].dtype, expected[name].shape), (
                name
            )
            equal(found[name], expected[name], floats, name)
        deployed = make_session(model, threads=1)
        for name, value in zip(reference.outputs, deployed.run(None, dict(feeds)), strict=True):
            equal(value, expected[name], floats, f"{name} once codes are read")
        return found

    return check
