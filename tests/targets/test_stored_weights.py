"""Weights that are stored and not computed with: OpenVINO gets from a file what onnxruntime gets, to float rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper, parser

import onnxq
from onnxq.model.session import make_session

RNG = np.random.default_rng(9)
TRANSFORMER = "g (int64[N, S] i) => (float[N, S, 96] y) { e = Gather(t, i) a = MatMul(e, u) b = Relu(a) y = MatMul(b, w) }"
CONVOLUTION = "g (float[N, 16, 9, 9] x) => (float[N, 20, 7, 7] y) { y = Conv(x, w) }"
EXACTLY = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def model(text: str, **shapes: tuple[int, ...]) -> ModelProto:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["": 17]> {text}')
    arrays = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    proto.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in arrays.items())
    return proto


def feeds(proto: ModelProto) -> dict[str, NDArray[Any]]:
    (info,) = proto.graph.input
    if helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type) == np.int64:
        return {info.name: np.array([[0, 5, -1], [199, 7, 31]])}
    return {info.name: RNG.standard_normal((2, 16, 9, 9)).astype(np.float32)}


@pytest.mark.parametrize("target", ["openvino", "onnx"])
@pytest.mark.parametrize(
    "weights", [*(f"int{b}:block=32" for b in range(2, 9)), "uint4:block=32", "int4:channel"]
)
@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        (TRANSFORMER, {"t": (200, 96), "u": (96, 100), "w": (100, 96)}),
        (TRANSFORMER, {"t": (200, 8), "u": (8, 400), "w": (400, 96)}),
        (CONVOLUTION, {"w": (20, 16, 3, 3)}),
    ],
    ids=["transformer", "narrow table", "convolution"],
)
def test_openvino_reads_the_same_weights(
    text: str, shapes: dict[str, tuple[int, ...]], weights: str, target: str
) -> None:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    proto = model(text, **shapes)
    pipeline = f"store-weights:weights={weights},first_last=same"
    compiled = onnxq.compile_model(proto, pipeline=pipeline, target=target, threads=1, speed=False).model
    given = feeds(proto)
    (wanted,) = make_session(compiled, threads=1, optimize=False).run(None, given)
    found = openvino.Core().compile_model(
        openvino.Core().read_model(compiled.SerializeToString()), "CPU", EXACTLY
    )(given)[0]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())  # float32 sums
