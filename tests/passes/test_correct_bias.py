"""Bias correction: with quantized weights, outputs have the mean that they have in float."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

from onnxq.affine import dequantize
from onnxq.bias import matches_outputs
from onnxq.calibration.statistics import Needs, TensorStatistics
from onnxq.data import input_specs, open_data
from onnxq.errors import DataError, OnnxqError, UsageError
from onnxq.model.session import make_session
from onnxq.passes.correct_bias import CorrectBias
from onnxq.pipeline import Context, PassResult, Pipeline
from onnxq.program import Program, QuantDecision, Sides
from onnxq.scheme import QuantScheme

SAMPLES = np.random.default_rng(4).gamma(2.0, size=(64, 6)).astype(np.float32)  # means far from zero


def rand(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def planned(
    parse_program: Callable[..., Program],
    text: str,
    weights: dict[str, Any],
    x: NDArray[np.float32],
    axis: int,
) -> Program:
    """A program whose weights have coarse codes and whose input has statistics of its channels."""
    program = parse_program(text, weights)
    Pipeline.parse("annotate:small=0 quantize-weights").run(program, Context())
    for weight in ("w", "v"):
        if weight in program.plan:
            codes = program.plan[weight].codes
            assert codes is not None
            codes[...] = codes // 16 * 16  # 4 bits, rounded down: errors have one sign and do not cancel
    program.statistics["x"] = TensorStatistics("x", Needs(channels=axis))
    program.statistics["x"].update(x)
    return program


def with_codes(program: Program) -> ModelProto:
    """The program's model with its weights replaced by what their codes stand for."""
    for name, tensor in program.graph.tensors().items():
        decision = program.plan.get(name)
        if decision is not None and decision.codes is not None and decision.params is not None:
            tensor.values = dequantize(decision.codes, decision.params)
    return program.to_model()


def channel_means(model: ModelProto, x: NDArray[np.float32], axis: int) -> NDArray[np.float64]:
    (y,) = make_session(model, threads=1, optimize=False).run(None, {"x": x})
    means: NDArray[np.float64] = (
        np.moveaxis(y, axis, -1).reshape(-1, y.shape[axis]).mean(axis=0, dtype=np.float64)
    )
    return means


# Inputs of the 3x3 convolution are the same at all positions: without padding, each tap then sees the mean.
FLAT = np.broadcast_to(SAMPLES[..., None, None], (64, 6, 4, 4))
POINTS = SAMPLES.reshape(4, 4, 4, 6).transpose(0, 3, 1, 2)
IMAGE, MATRIX = "g (float[n,6,4,4] x) => (float[a,b,c,d] y)", "g (float[n,6] x) => (float[a,b] y)"

CASES = {
    "1x1": (f"{IMAGE} {{ y = Conv(x, w, b) }}", {"w": rand(8, 6, 1, 1), "b": rand(8)}, POINTS, 1),
    "no bias": (f"{IMAGE} {{ y = Conv(x, w) }}", {"w": rand(8, 6, 1, 1)}, POINTS, 1),
    "3x3": (f"{IMAGE} {{ y = Conv(x, w, b) }}", {"w": rand(8, 6, 3, 3), "b": rand(8)}, FLAT, 1),
    "groups": (f"{IMAGE} {{ y = Conv<group=3>(x, w, b) }}", {"w": rand(9, 2, 3, 3), "b": rand(9)}, FLAT, 1),
    "depthwise": (f"{IMAGE} {{ y = Conv<group=6>(x, w) }}", {"w": rand(6, 1, 3, 3)}, FLAT, 1),
    "gemm": (f"{MATRIX} {{ y = Gemm(x, w, b) }}", {"w": rand(6, 8), "b": rand(8)}, SAMPLES, -1),
    "transB": (
        f"{MATRIX} {{ y = Gemm<transB=1>(x, w, b) }}",
        {"w": rand(8, 6), "b": rand(1, 8)},
        SAMPLES,
        -1,
    ),
    "no C": (f"{MATRIX} {{ y = Gemm<transB=1>(x, w) }}", {"w": rand(8, 6)}, SAMPLES, -1),
    "square": (f"{MATRIX} {{ y = Gemm(x, w) }}", {"w": rand(6, 6)}, SAMPLES, -1),
    "matmul": (
        "g (float[n,4,6] x) => (float[a,b,c] y) { m = MatMul(x, w) y = Add(b, m) }",
        {"w": rand(6, 8), "b": rand(8)},
        SAMPLES.reshape(16, 4, 6),
        -1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_means_of_outputs_are_those_of_float_weights(
    parse_program: Callable[..., Program], case: str
) -> None:
    text, weights, x, axis = CASES[case]
    program = planned(parse_program, text, weights, x, axis)
    expected = channel_means(program.to_model(), x, axis)
    shifted = channel_means(with_codes(planned(parse_program, text, weights, x, axis)), x, axis)
    assert CorrectBias().run(program, Context()) == PassResult(1, {})
    corrected = channel_means(with_codes(program), x, axis)
    assert np.abs(shifted - expected).min() > 0.01
    # float32 sums of a few dozen terms of size 10
    np.testing.assert_allclose(corrected, expected, rtol=0, atol=2e-5)
    (unit,) = program.units.values()
    assert unit.bias in {t.name for n in program.graph.nodes for t in n.inputs}


def test_a_bias_that_others_read_keeps_its_values(parse_program: Callable[..., Program]) -> None:
    text = "g (float[n,6] x) => (float[a,b] y, float[c,d] z) { y = Gemm(x, w, b) z = Gemm(x, v, b) }"
    program = planned(parse_program, text, {"w": rand(6, 8), "v": rand(6, 8) + 1, "b": rand(8)}, SAMPLES, -1)
    del program.units[program.graph.nodes[1].name]
    assert CorrectBias().run(program, Context()).changed == 1
    first, second = program.graph.nodes
    assert first.inputs[2].name != "b"
    np.testing.assert_array_equal(second.inputs[2].values, rand(8))


def test_what_is_left_has_a_reason(parse_program: Callable[..., Program]) -> None:
    text, weights, x, axis = CASES["gemm"]
    program = planned(parse_program, text, weights, x, axis)
    del program.statistics["x"]
    assert list(CorrectBias().run(program, Context()).skipped.values()) == [
        "no channel means of its input were gathered"
    ]
    program.statistics["x"] = TensorStatistics("x")
    program.statistics["x"].update(x)
    assert list(CorrectBias().run(program, Context()).skipped.values()) == [
        "no channel means of its input were gathered"
    ]

    program = parse_program(text, weights)
    Pipeline.parse("annotate:small=0").run(program, Context())
    program.statistics["x"] = TensorStatistics("x", Needs(channels=-1))
    program.statistics["x"].update(x)
    assert list(CorrectBias().run(program, Context()).skipped.values()) == ["its weights have no codes yet"]

    text = "g (float[n,6] x) => (float[a,b] y) { y = MatMul(x, w) }"
    program = planned(parse_program, text, {"w": rand(6, 8)}, x, axis)
    assert list(CorrectBias().run(program, Context()).skipped.values()) == ["it has no bias to correct"]


def test_units_without_weights_are_no_business_of_the_pass(parse_program: Callable[..., Program]) -> None:
    program = planned(
        parse_program,
        f"{MATRIX} {{ m = Gemm(x, w) y = Reshape(m, s) }}",
        {"w": rand(6, 8), "s": np.array([-1, 4], np.int64)},
        SAMPLES,
        -1,
    )
    result = CorrectBias().run(program, Context())
    assert result == PassResult(1, {})


@pytest.mark.parametrize(
    ("sides", "error", "message"),
    [
        ("both", DataError, "runs the network on calibration samples; give some with --calib"),
        ("weights", UsageError, "runs integer layers, and weights alone are quantized; take output"),
    ],
)
def test_outputs_are_matched_only_where_integers_run_on_samples(
    parse_program: Callable[..., Program], sides: Sides, error: type[OnnxqError], message: str
) -> None:
    program = parse_program("g (float[N,2] x) => (float[N,2] y) { y = Relu(x) }")
    program.sides = sides
    program.plan["x"] = QuantDecision(QuantScheme(4), "x")  # narrow, which auto would match
    data = None if sides == "both" else open_data({"x": rand(4, 2)}, input_specs(program.source))
    ctx = Context(data)
    assert not matches_outputs(program, ctx, "auto")
    with pytest.raises(error, match=message):
        matches_outputs(program, ctx, "deployed")


def test_golden(parse_program: Callable[..., Program], golden: Callable[[str, ModelProto], None]) -> None:
    text = f"{IMAGE} {{ c = Conv(x, w) y = Relu(c) }}"
    program = planned(parse_program, text, {"w": rand(8, 6, 1, 1)}, POINTS, 1)
    CorrectBias().run(program, Context())
    golden("correct_bias", program.to_model())
