"""Dynamic quantization: values against the formulas of the ONNX specification in numpy, kernels against the runtime."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from onnxq.affine import sqnr_db
from onnxq.errors import UsageError
from onnxq.measure.coverage import read_coverage
from onnxq.model.prepare import prepare
from onnxq.model.session import make_session, session_and_optimized
from onnxq.passes.quantize_dynamic import QuantizeDynamic
from onnxq.pipeline import Context, PassResult
from onnxq.program import Program
from onnxq.scheme import QuantScheme
from onnxq.target import ORT_CPU
from onnxq.verify import node_rows

Floats = NDArray[np.float32]

CONTEXT = Context()
RNG = np.random.default_rng(7)
W = RNG.standard_normal((64, 48)).astype(np.float32)
B = RNG.standard_normal(48).astype(np.float32)
X = RNG.standard_normal((5, 64)).astype(np.float32)
GOOD_DB = (
    32.0  # 8 bits of a normal sample leave about 40 dB for x and for w each; pairs over the limit cost some
)


def model(body: str, **weights: Floats) -> onnx.ModelProto:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["": 17]> g {body}')
    proto.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in weights.items())
    return prepare(proto, 13)[0]


def quantized(
    proto: onnx.ModelProto, ctx: Context = CONTEXT, **options: Any
) -> tuple[Program, onnx.ModelProto, PassResult]:
    program = Program.from_model(proto)
    result = QuantizeDynamic(**options).run(program, ctx)
    return program, program.to_model(), result


def outputs(proto: onnx.ModelProto, feeds: dict[str, NDArray[Any]]) -> list[Floats]:
    return list(make_session(proto, threads=1).run(None, feeds))


def kernels(proto: onnx.ModelProto) -> Counter[str]:
    return Counter(n.op_type for n in session_and_optimized(proto, threads=1)[1].graph.node)


def initializer(proto: onnx.ModelProto, name: str) -> NDArray[Any]:
    return numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == name))


def dynamically_quantized(x: Floats) -> tuple[NDArray[np.int64], np.float32, int]:
    """DynamicQuantizeLinear as the specification words it: codes as int64, scale, zero point."""
    low, high = np.minimum(x.min(), np.float32(0)), np.maximum(x.max(), np.float32(0))
    scale = np.float32((high - low) / np.float32(255))
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int64), scale, int(zero)


@pytest.mark.parametrize("weights", ["int8:channel", "int8:tensor"])
def test_a_product_follows_the_formula(weights: str) -> None:
    proto = model("(float[N, 64] x) => (float[N, 48] y) { y = MatMul(x, w) }", w=W)
    _, compiled, _ = quantized(proto, weights=QuantScheme.parse(weights))
    codes, scale, zero = dynamically_quantized(X)
    w_codes, w_scale = initializer(compiled, "w_quantized"), initializer(compiled, "w_scale")
    assert w_codes.dtype == np.int8
    assert w_scale.shape == ((48,) if weights == "int8:channel" else ())
    expected = (codes - zero) @ w_codes.astype(np.int64) * (scale.astype(np.float64) * w_scale)
    (got,) = outputs(compiled, {"x": X})
    assert np.abs(got - expected).max() <= 1e-6 * np.abs(expected).max()  # three roundings of float32
    assert sqnr_db(X @ W, got) > GOOD_DB


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64), (2, 3, 4, 64)])
def test_product_and_bias_become_one_kernel_at_any_rank(shape: tuple[int, ...]) -> None:
    dims = ", ".join(map(str, shape))
    out = ", ".join(map(str, (*shape[:-1], 48)))
    proto = model(f"(float[{dims}] x) => (float[{out}] y) {{ m = MatMul(x, w) y = Add(b, m) }}", w=W, b=B)
    program, compiled, result = quantized(proto)
    assert result.changed == 1
    assert kernels(compiled) == {"DynamicQuantizeMatMul": 1}
    x = RNG.standard_normal(shape).astype(np.float32)
    assert sqnr_db(x @ W + B, outputs(compiled, {"x": x})[0]) > GOOD_DB
    (unit,) = program.units.values()
    assert len(unit.nodes) == 2
    assert unit.outputs == ("y",)


def test_an_empty_batch_gives_an_empty_result() -> None:
    proto = model("(float[N, 64] x) => (float[N, 48] y) { y = MatMul(x, w) }", w=W)
    assert outputs(quantized(proto)[1], {"x": X[:0]})[0].shape == (0, 48)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("alpha", [1.0, -0.5])
@pytest.mark.parametrize("beta", [1.0, 3.0, 0.0])
@pytest.mark.parametrize("shape", [None, (48,), (1, 48), (1,), ()])
def test_gemm_is_folded_into_a_product_and_a_bias(
    transposed: int, alpha: float, beta: float, shape: tuple[int, ...] | None
) -> None:
    weights = {"w": W.T.copy() if transposed else W}
    if shape is not None:
        weights["c"] = RNG.standard_normal(shape).astype(np.float32)
    attributes = f"transB: int = {transposed}, alpha: float = {alpha}, beta: float = {beta}"
    inputs = "x, w" if shape is None else "x, w, c"
    proto = model(f"(float[N, 64] x) => (float[N, 48] y) {{ y = Gemm <{attributes}> ({inputs}) }}", **weights)
    _, compiled, _ = quantized(proto)
    assert kernels(compiled) == {"DynamicQuantizeMatMul": 1}
    expected = alpha * (X @ W) + beta * weights.get("c", np.float32(0))
    assert sqnr_db(expected, outputs(compiled, {"x": X})[0]) > GOOD_DB


def test_readers_of_one_tensor_quantize_it_once() -> None:
    proto = model(
        "(float[N, 64] x) => (float[N, 48] y, float[N, 48] z) { y = MatMul(x, w) z = MatMul(x, v) }",
        w=W,
        v=W[::-1].copy(),
    )
    _, compiled, _ = quantized(proto)
    assert [n.op_type for n in compiled.graph.node].count("DynamicQuantizeLinear") == 1
    assert kernels(compiled) == {"DynamicQuantizeLinear": 1, "MatMulIntegerToFloat": 2}
    y, z = outputs(compiled, {"x": X})
    assert sqnr_db(X @ W, y) > GOOD_DB
    assert sqnr_db(X @ W[::-1], z) > GOOD_DB


def test_shared_weights_are_stored_once() -> None:
    proto = model(
        "(float[N, 64] x, float[N, 64] u) => (float[N, 48] y, float[N, 48] z)"
        " { y = MatMul(x, w) z = MatMul(u, w) }",
        w=W,
    )
    _, compiled, _ = quantized(proto)
    sizes = Counter(tuple(t.dims) for t in compiled.graph.initializer)
    assert sizes[(64, 48)] == 1
    y, z = outputs(compiled, {"x": X, "u": 2 * X})
    assert sqnr_db(X @ W, y) > GOOD_DB
    assert np.allclose(z, 2 * y, rtol=1e-6)  # a power of two changes scales only


def test_the_same_weights_transposed_and_scaled_are_different_weights() -> None:
    square = RNG.standard_normal((64, 64)).astype(np.float32)
    proto = model(
        "(float[N, 64] x) => (float[N, 64] y, float[N, 64] z, float[N, 64] a) { y = MatMul(x, w)"
        " z = Gemm <transB: int = 1> (x, w) a = Gemm <alpha: float = 2.0> (x, w) }",
        w=square,
    )
    y, z, a = outputs(quantized(proto)[1], {"x": X})
    assert sqnr_db(X @ square, y) > GOOD_DB
    assert sqnr_db(X @ square.T, z) > GOOD_DB
    assert sqnr_db(2 * X @ square, a) > GOOD_DB


@pytest.mark.parametrize(
    ("body", "outs"),
    [
        ("m = MatMul(x, w) y = Add(m, b)", "float[N, 48] m, float[N, 48] y"),
        ("m = MatMul(x, w) y = Add(m, b) n = Neg(m)", "float[N, 48] y, float[N, 48] n"),
    ],
    ids=["graph output", "second consumer"],
)
def test_a_product_that_others_read_does_not_absorb_its_bias(body: str, outs: str) -> None:
    proto = model(f"(float[N, 64] x) => ({outs}) {{ {body} }}", w=W, b=B)
    program, compiled, _ = quantized(proto)
    (unit,) = program.units.values()
    assert unit.nodes == (next(n.name for n in proto.graph.node if n.op_type == "MatMul"),)
    product = X @ W
    expected = {"m": product, "y": product + B, "n": -product}
    for info, got in zip(compiled.graph.output, outputs(compiled, {"x": X}), strict=True):
        assert sqnr_db(expected[info.name], got) > GOOD_DB


def test_the_runtimes_kernels_are_found_again_by_name() -> None:
    proto = model(
        "(float[N, 64] x) => (float[N, 48] y, float[N, 48] z) { m = MatMul(x, w) a = Add(m, b) y = Relu(a)"
        " z = Gemm(x, v, b) }",
        w=W,
        v=W[::-1].copy(),
        b=B,
    )
    program, compiled, _ = quantized(proto)
    coverage = read_coverage(session_and_optimized(compiled, threads=1)[1], {"nothing": 1})
    status = {row.op: row.status for row in node_rows(proto, program, coverage)}
    assert status == {"MatMul": "integer", "Add": "integer", "Relu": "float", "Gemm": "integer"}


@pytest.mark.parametrize(
    ("body", "weights", "reason"),
    [
        ("y = MatMul(x, w)", {"w": W[:, :32].copy()}, "its 2048 weights are too few"),
        ("y = MatMul(x, x)", {}, "it multiplies two activations"),
        ("y = MatMul(w, x)", {"w": W.T.copy()}, "its left operand is constant"),
        ("y = MatMul(x, w)", {"w": np.stack([W, W])}, "its weights have rank 3"),
        ("y = Gemm <transA: int = 1> (x, w)", {"w": W}, "transA is set"),
        ("y = Gemm(x, w, c)", {"w": W, "c": np.ones((64, 1), np.float32)}, "its C is no bias vector"),
        ("y = Gemm(x, w, x)", {"w": RNG.standard_normal((64, 64)).astype(np.float32)}, "its C is no float32"),
        ("y = Exp(x)", {}, "ort-cpu has no integer kernel for Exp"),
        ("y = Sigmoid(x)", {}, "there is no calibration data"),
    ],
)
def test_what_stays_float_has_a_reason(body: str, weights: dict[str, Floats], reason: str) -> None:
    proto = model(f"(float[64, 64] x) => (float y) {{ {body} }}", **weights)
    program, compiled, result = quantized(proto)
    assert result.changed == 0
    assert list(program.floats) == [proto.graph.node[0].name]
    assert program.floats[proto.graph.node[0].name].startswith(reason)
    x = RNG.standard_normal((64, 64)).astype(np.float32)
    assert np.array_equal(outputs(proto, {"x": x})[0], outputs(compiled, {"x": x})[0])


def test_a_product_inside_a_body_stays_float_with_a_reason() -> None:
    proto = model(
        "(bool c, float[N, 64] x) => (float[N, 48] y) { y = If (c) <"
        "then_branch = t () => (float[N, 48] p) { p = MatMul(x, w) },"
        "else_branch = e () => (float[N, 48] q) { q = MatMul(x, w) } > }",
        w=W,
    )
    program, compiled, _ = quantized(proto)
    reasons = [r for r in program.floats.values() if "inside a body of If" in r]
    assert len(reasons) == 2
    feeds = {"c": np.array(True), "x": X}
    assert np.array_equal(outputs(proto, feeds)[0], outputs(compiled, feeds)[0])


def test_skipped_nodes_stay_float_and_a_wrong_pattern_is_an_error() -> None:
    proto = model("(float[N, 64] x) => (float[N, 48] y) { m = MatMul(x, w) y = Add(m, b) }", w=W, b=B)
    program, _, result = quantized(proto, skip=("MatMul",))
    assert result.changed == 0
    assert "skipped by pattern 'MatMul'" in program.floats.values()
    (unit,) = quantized(proto, skip=("Add",))[0].units.values()
    assert len(unit.nodes) == 1
    with pytest.raises(
        UsageError, match="'MatMull' matches no node name and no op type; did you mean 'MatMul'"
    ):
        quantized(proto, skip=("MatMull",))


def test_weights_that_the_target_cannot_take_are_refused() -> None:
    proto = model("(float[N, 64] x) => (float[N, 48] y) { y = MatMul(x, w) }", w=W)
    with pytest.raises(UsageError, match=r"takes weights .*, not int8:block=32"):
        quantized(proto, weights=QuantScheme.parse("int8:block=32"))


def test_neighbouring_codes_fit_16_bits_unless_the_target_does_not_ask() -> None:
    wide = RNG.uniform(-1, 1, (64, 48)).astype(np.float32)
    proto = model("(float[N, 64] x) => (float[N, 48] y) { y = MatMul(x, w) }", w=wide)

    def worst(compiled: onnx.ModelProto) -> int:
        pairs = initializer(compiled, "w_quantized").astype(int).reshape(32, 2, 48)
        return 255 * int(max(np.maximum(pairs, 0).sum(1).max(), np.maximum(-pairs, 0).sum(1).max()))

    _, compiled, result = quantized(proto)
    assert worst(compiled) <= 32767
    assert result.facts["saturating_channels"]["w"] > 0
    free = Context(target=replace(ORT_CPU, pair_limit=0))
    assert worst(quantized(proto, free)[1]) > 32767


def test_the_result_passes_the_checker_and_keeps_the_interface() -> None:
    proto = model("(float[N, 64] x) => (float[N, 48] y) { m = MatMul(x, w) y = Add(m, b) }", w=W, b=B)
    _, compiled, _ = quantized(proto)
    onnx.checker.check_model(compiled, full_check=True)
    assert [str(i) for i in compiled.graph.input] == [str(i) for i in proto.graph.input]
    assert [str(o) for o in compiled.graph.output] == [str(o) for o in proto.graph.output]


def test_weights_that_must_stay_in_float_are_not_stored_twice() -> None:
    proto = model(
        "(float[N,64] x) => (float[N,48] y, float[a,b] z) { y = MatMul(x, w) z = ReduceSum(w) }", w=W
    )
    _, quantized_model, result = quantized(proto)
    assert result.skipped["MatMul_0"] == "its weights 'w' are needed in float32 by node 'ReduceSum_1'"
    assert [t.name for t in quantized_model.graph.initializer] == ["w"]
