"""Integer operators: their codes against integer arithmetic in numpy, against real arithmetic, and against the QDQ form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

from onnxq.affine import QuantParams, affine_params, quantize
from onnxq.compiler import compile_model
from onnxq.data import input_specs, open_data
from onnxq.measure.coverage import read_coverage
from onnxq.model.session import make_session, session_and_optimized
from onnxq.pipeline import Context, PassResult, Pipeline
from onnxq.program import Program
from onnxq.rules import Rule
from onnxq.scheme import QuantScheme
from onnxq.target import ORT_CPU, Target

Array = NDArray[Any]
Floats = NDArray[np.floating]
ParseProgram = Callable[..., Program]
Shapes = Mapping[str, tuple[int, ...]]

FORMS = ("emit-integer", "emit-qdq")
UINT8 = QuantScheme.parse("uint8")
IMAGES, ROWS, TOKENS = (4, 3, 9, 8), (6, 10), (2, 5, 10)
IMAGE = "float[N,3,9,8] x"
MICROSOFT = "com.microsoft"


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def batched(shape: tuple[int, ...]) -> str:
    """A type in ONNX text whose first dimension is free."""
    return f"float[N,{','.join(map(str, shape[1:]))}]"


def planned(
    program: Program,
    feeds: Mapping[str, Array],
    annotate: str = "annotate:small=0",
    target: Target = ORT_CPU,
) -> Program:
    """The program with a full plan, calibrated on the feeds themselves."""
    data = open_data(dict(feeds), input_specs(program.to_model()))
    steps = Pipeline.parse(f"{annotate} calibrate choose-ranges quantize-weights")
    steps.run(program, Context(data=data, threads=1, target=target))
    return program


def emit(program: Program, form: str, target: Target = ORT_CPU) -> tuple[ModelProto, PassResult]:
    result = Pipeline.parse(form).run(program, Context(target=target))[0].result
    model = program.to_model()
    onnx.checker.check_model(model, full_check=True)
    return model, result


def outputs(model: ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    session = make_session(model, threads=1)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def operators(model: ModelProto) -> Counter[str]:
    return Counter(n.op_type for n in model.graph.node)


def codes(values: Array, params: QuantParams) -> NDArray[np.int64]:
    """Codes of values that lie on the grid."""
    steps = values / np.float64(params.scale)
    assert np.abs(steps - np.rint(steps)).max() < 1e-3  # float32 holds the product of scale and code
    return np.rint(steps).astype(np.int64) + int(params.zero_point)


def requantized(acc: NDArray[np.int64], program: Program, inputs: tuple[str, str], output: str) -> Array:
    """int32 sums as codes of the output: times one float32 factor, half to even, saturated."""
    data, weight, result = (program.params(t) for t in (*inputs, output))
    factor = data.scale * weight.scale / result.scale  # float32, () or (columns,)
    assert factor.dtype == np.float32
    assert np.abs(acc).max() < 2**31
    return np.clip(np.rint(acc.astype(np.float32) * factor) + result.zero_point, 0, 255)


def integer_bias(bias: Floats, program: Program, data: str, weight: str) -> NDArray[np.int64]:
    scale = program.params(data).scale * program.params(weight).scale
    found: NDArray[np.int64] = np.rint(bias / scale.astype(np.float64)).astype(np.int64)
    return found


def weight_codes(program: Program, name: str) -> NDArray[np.int64]:
    found = program.plan[name].codes
    assert found is not None
    return found.astype(np.int64)


def centred(values: Floats, params: QuantParams) -> NDArray[np.int64]:
    """Codes less the zero point, by ONNX's definition of QuantizeLinear."""
    q = np.clip(np.rint(values / params.scale) + params.zero_point, 0, 255)
    steps: NDArray[np.int64] = (q - params.zero_point).astype(np.int64)
    return steps


def convolved(
    x: NDArray[np.int64], w: NDArray[np.int64], pads: tuple[int, ...], stride: int, group: int
) -> NDArray[np.int64]:
    """Integer convolution over any number of spatial dimensions; pads are all begins, then all ends."""
    dims = w.ndim - 2
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:dims], pads[dims:], strict=True)])
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], axis=tuple(range(2, 2 + dims)))
    windows = windows[(slice(None), slice(None), *(slice(None, None, stride),) * dims)]
    parts = zip(np.split(windows, group, axis=1), np.split(w, group), strict=True)
    axes = ([1, *range(2 + dims, 2 + 2 * dims)], list(range(1, 2 + dims)))
    sums: list[NDArray[np.int64]] = [np.moveaxis(np.tensordot(a, b, axes), -1, 1) for a, b in parts]
    return np.concatenate(sums, axis=1)


CONVS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...], int, int, bool]] = {
    # attributes, input, weights, pads, stride, group, with bias
    "plain": ("", (4, 3, 9, 8), (6, 3, 3, 3), (0, 0, 0, 0), 1, 1, True),
    "padded": ("pads=[1,0,2,1]", (4, 3, 9, 8), (6, 3, 3, 3), (1, 0, 2, 1), 1, 1, True),
    "strided": ("strides=[2,2]", (4, 3, 9, 8), (8, 3, 2, 2), (0, 0, 0, 0), 2, 1, False),
    "same": ('auto_pad="SAME_UPPER"', (4, 3, 9, 8), (6, 3, 2, 3), (0, 1, 1, 1), 1, 1, True),
    "grouped": ("group=2", (4, 6, 7, 7), (8, 3, 3, 3), (0, 0, 0, 0), 1, 2, True),
    "depthwise": ("group=6", (4, 6, 7, 7), (6, 1, 3, 3), (0, 0, 0, 0), 1, 6, True),
    "1-d": ("", (4, 5, 12), (6, 5, 3), (0, 0), 1, 1, True),
    "3-d": ("", (2, 3, 5, 5, 5), (4, 3, 2, 2, 2), (0,) * 6, 1, 1, True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", ["int8:channel", "int8:tensor"])
@pytest.mark.parametrize("case", CONVS)
def test_convolutions_equal_integer_arithmetic(
    case: str, weights: str, form: str, parse_program: ParseProgram
) -> None:
    attributes, shape, kernel, pads, stride, group, has_bias = CONVS[case]
    feeds, bias = {"x": normal(1, *shape)}, normal(3, kernel[0])
    signature = f"{batched(shape)} x) => (float[{','.join('abcde'[: len(shape)])}] y"
    body = f"[main] c = Conv<{attributes}>(x, w{', b' if has_bias else ''}) y = Relu(c)"
    constants = {"w": normal(2, *kernel)} | ({"b": bias} if has_bias else {})
    program = parse_program(f"g ({signature}) {{ {body.replace('<>', '')} }}", constants, 17)
    planned(program, feeds, f"annotate:small=0,weights={weights}")
    model, _ = emit(program, form)
    acc = convolved(centred(feeds["x"], program.params("x")), weight_codes(program, "w"), pads, stride, group)
    if has_bias:
        acc = acc + integer_bias(bias, program, "x", "w").reshape(-1, *(1,) * (len(shape) - 2))
    expected = np.moveaxis(requantized(np.moveaxis(acc, 1, -1), program, ("x", "w"), "y"), -1, 1)
    np.testing.assert_array_equal(codes(outputs(model, feeds)["y"], program.params("y")), expected)
    assert len(np.unique(expected)) > 60  # of at most 256
    if form == "emit-integer":
        assert operators(model) == {"QuantizeLinear": 1, "QLinearConv": 1, "DequantizeLinear": 1}


PRODUCTS: dict[str, tuple[tuple[int, ...], str, tuple[int, ...], int | None, str]] = {
    # input, nodes, weights, axis of the bias, operator; the output of Relu is held as codes, that of the others is float
    "gemm": (ROWS, "y = Gemm(x, w, b)", (10, 7), 0, "QGemm"),
    "gemm transposed": (ROWS, "y = Gemm<transB=1>(x, w, b)", (7, 10), 0, "QGemm"),
    "gemm without bias": (ROWS, "y = Gemm(x, w)", (10, 7), None, "QGemm"),
    "gemm relu": (ROWS, "c = Gemm<transB=1>(x, w, b) y = Relu(c)", (7, 10), 0, "QGemm"),
    "gemm relu without bias": (ROWS, "c = Gemm(x, w) y = Relu(c)", (10, 7), None, "QGemm"),
    "matrix": (ROWS, "y = MatMul(x, w)", (10, 7), None, "MatMulIntegerToFloat"),
    "matrix bias": (ROWS, "c = MatMul(x, w) y = Add(b, c)", (10, 7), 0, "QGemm"),
    "matrix relu": (ROWS, "c = MatMul(x, w) y = Relu(c)", (10, 7), None, "QLinearMatMul"),
    "matrix bias relu": (ROWS, "c = MatMul(x, w) d = Add(c, b) y = Relu(d)", (10, 7), 0, "QGemm"),
    "stack": (TOKENS, "y = MatMul(x, w)", (10, 7), None, "MatMulIntegerToFloat"),
    "stack bias": (TOKENS, "c = MatMul(x, w) y = Add(c, b)", (10, 7), 0, "MatMulIntegerToFloat"),
    "stack relu": (TOKENS, "c = MatMul(x, w) y = Relu(c)", (10, 7), None, "QLinearMatMul"),
    "stack bias relu": (
        TOKENS,
        "c = MatMul(x, w) d = Add(c, b) y = Relu(d)",
        (10, 7),
        0,
        "MatMulIntegerToFloat",
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", ["int8:channel", "int8:tensor"])
@pytest.mark.parametrize("case", PRODUCTS)
def test_products_equal_integer_arithmetic(
    case: str, weights: str, form: str, parse_program: ParseProgram
) -> None:
    shape, body, kernel, bias_axis, operator = PRODUCTS[case]
    feeds, bias = {"x": normal(1, *shape)}, normal(3, 7)
    constants = {"w": normal(2, *kernel)} | ({} if bias_axis is None else {"b": bias})
    signature = f"{batched(shape)} x) => (float[{','.join('abc'[: len(shape)])}] y"
    program = parse_program(f"g ({signature}) {{ {body} }}", constants, 17)
    planned(program, feeds, f"annotate:small=0,weights={weights}")
    model, result = emit(program, form)
    w = weight_codes(program, "w")
    acc = centred(feeds["x"], program.params("x")) @ (w.T if kernel[0] == 7 else w)
    if bias_axis is not None:
        acc = acc + integer_bias(bias, program, "x", "w")
    found = outputs(model, feeds)["y"]
    if "y" in program.plan:
        expected = requantized(acc, program, ("x", "w"), "y")
        np.testing.assert_array_equal(codes(found, program.params("y")), expected)
    else:
        scale = program.params("x").scale * program.params("w").scale
        # the kernel rounds the product and the sum with the bias to float32, 6e-8 each
        np.testing.assert_allclose(
            found, acc * scale.astype(np.float64), rtol=0, atol=2e-7 * np.abs(found).max()
        )
    if form == "emit-integer":
        assert (result.changed, dict(result.skipped)) == (1, {})
        assert operators(model)[operator] == 1
        assert not operators(model).keys() & {"Gemm", "MatMul", "Add", "Relu"}


def half_step(found: Array, truth: Floats, params: QuantParams) -> None:
    """The codes found are the nearest to real values on this grid, saturated."""
    real = np.clip(truth / np.float64(params.scale) + int(params.zero_point), 0, 255)
    error = np.abs(codes(found, params) - real)
    assert (
        error.max() <= 0.5 + 1e-3
    )  # kernels compute the real value in float32: up to 255 steps, a few roundings


def pooled(x: Floats, size: int) -> Floats:
    """Means over windows of size by size with a pad of 1 around that is not counted."""
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))
    means: Floats = np.nanmean(windows, axis=(-2, -1))
    return means


def softmax(x: Floats) -> Floats:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    shares: Floats = e / e.sum(axis=-1, keepdims=True)
    return shares


KERNELS: dict[str, tuple[str, Callable[[Floats, Floats], Floats], str]] = {
    "add": ("s = Add(c, d)", lambda c, d: c + d, "QLinearAdd"),
    "add relu": ("t = Add(c, d) s = Relu(t)", lambda c, d: np.maximum(c + d, 0), "QLinearAdd"),
    "add to itself": ("s = Add(c, c)", lambda c, d: c + c, "QLinearAdd"),
    "add broadcast": ("s = Add(d, c)", lambda c, d: d + c, "QLinearAdd"),
    "mul": ("s = Mul(c, d)", lambda c, d: c * d, "QLinearMul"),
    "mul broadcast": ("s = Mul(c, d)", lambda c, d: c * d, "QLinearMul"),
    "concat": ("s = Concat<axis=1>(c, d)", lambda c, d: np.concatenate([c, d], 1), "QLinearConcat"),
    "average pool": (
        "s = AveragePool<kernel_shape=[3,3],pads=[1,1,1,1]>(c)",
        lambda c, d: pooled(c, 3),
        "QLinearAveragePool",
    ),
    "global average pool": (
        "s = GlobalAveragePool(c)",
        lambda c, d: c.mean(axis=(2, 3), keepdims=True),
        "QLinearGlobalAveragePool",
    ),
    "leaky relu": (
        "s = LeakyRelu<alpha=0.3>(c)",
        lambda c, d: np.where(c < 0, 0.3 * c, c),
        "QLinearLeakyRelu",
    ),
    "sigmoid": ("s = Sigmoid(c)", lambda c, d: 1 / (1 + np.exp(-c)), "QLinearSigmoid"),
    "softmax": ("s = Softmax(c)", lambda c, d: softmax(c), "QLinearSoftmax"),
}


@pytest.mark.parametrize("opset", [13, 17, 21])
@pytest.mark.parametrize("case", KERNELS)
def test_kernels_between_codes_equal_real_arithmetic(
    case: str, opset: int, parse_program: ParseProgram
) -> None:
    body, truth, operator = KERNELS[case]
    channels = 12 if case == "concat" else 6
    text = f"""g ({IMAGE}) => (float[N,a,b,e] y, float[N,6,h,i] c, float[N,6,j,k] d, float[N,l,m,n] s) {{
        c = Conv(x, w) d = Conv(x, v) {body.replace("s = ", "[main] s = ")} y = Conv(s, u) }}"""
    window = IMAGES[2:] if "broadcast" in case else (3, 3)  # that of the whole image leaves one pixel
    weights = {
        "w": normal(1, 6, 3, 3, 3),
        "v": 3 * normal(2, 6, 3, *window),
        "u": normal(4, 6, channels, 1, 1),
    }
    feeds, found = {"x": normal(5, *IMAGES)}, {}
    for form in FORMS:
        program = planned(parse_program(text, weights, opset), feeds)
        model, _ = emit(program, form)
        found[form] = outputs(model, feeds)
        if form == "emit-integer":
            assert operators(model)[operator] == 1
            domains = {e.domain: e.version for e in model.opset_import}
            assert domains == {"": opset, MICROSOFT: 1}
        c, d, s = (found[form][name].astype(np.float64) for name in "cds")
        half_step(s, truth(c, d), program.params("s"))
    # the runtime fuses the QDQ form to the same kernels with the same parameters
    for name, value in found["emit-integer"].items():
        np.testing.assert_array_equal(value, found["emit-qdq"][name])


def test_products_of_two_activations(parse_program: ParseProgram) -> None:
    text = """g (float[N,3,5,8] a, float[N,3,8,4] b) => (float[N,3,5,4] y, float[N,3,5,4] z) {
        y = MatMul(a, b) c = MatMul(a, b) z = Relu(c) }"""
    feeds = {"a": normal(1, 2, 3, 5, 8), "b": normal(2, 2, 3, 8, 4)}
    for form in FORMS:
        program = planned(parse_program(text, {}, 17), feeds, "annotate:products=all")
        model, _ = emit(program, form)
        found = outputs(model, feeds)
        acc = centred(feeds["a"], program.params("a")) @ centred(feeds["b"], program.params("b"))
        scale = program.params("a").scale * program.params("b").scale
        np.testing.assert_allclose(found["y"], acc * np.float64(scale), rtol=2e-7)  # two roundings to float32
        expected = requantized(acc, program, ("a", "b"), "z")
        np.testing.assert_array_equal(codes(found["z"], program.params("z")), expected)
        if form == "emit-integer":
            assert {"MatMulIntegerToFloat", "QLinearMatMul"} < operators(model).keys()


def test_a_concat_of_equal_grids_only_copies(parse_program: ParseProgram) -> None:
    text = f"g ({IMAGE}) => (float[N,12,7,6] y) {{ c = Conv(x, w) d = Conv(x, v) [main] y = Concat<axis=1>(c, d) }}"
    w = normal(1, 6, 3, 3, 3)
    feeds = {"x": normal(5, *IMAGES)}
    program = planned(parse_program(text, {"w": w, "v": -w}, 17), feeds)
    model, _ = emit(program, "emit-integer")
    assert operators(model)["Concat"] == 1
    assert program.units["main"].moves_codes  # so the report counts it as integer
    program = planned(parse_program(text, {"w": w, "v": -w}, 17), feeds)
    np.testing.assert_array_equal(
        outputs(model, feeds)["y"], outputs(emit(program, "emit-qdq")[0], feeds)["y"]
    )


ACTIVE = {
    "conv": (IMAGES, "c = Conv(x, w)", (6, 3, 3, 3), 0, "QLinearConv"),
    "gemm": (ROWS, "c = Gemm(x, w, b)", (10, 7), 7, "QGemm"),
    "matmul": (TOKENS, "c = MatMul(x, w)", (10, 7), 0, "QLinearMatMul"),
    "matmul bias": (TOKENS, "m = MatMul(x, w) c = Add(m, b)", (10, 7), 7, "MatMulIntegerToFloat"),
    "add": (IMAGES, "p = Conv(x, w) q = Conv(x, w) c = Add(p, q)", (6, 3, 3, 3), 0, "QLinearAdd"),
}


@pytest.mark.parametrize(("after", "low", "high"), [("Relu(c)", 0.0, 4.0), ("Clip(c, zero, one)", 0.0, 1.0)])
@pytest.mark.parametrize("case", ACTIVE)
def test_an_activation_that_the_grid_does_not_imply_clips_codes(
    case: str, after: str, low: float, high: float, parse_program: ParseProgram
) -> None:
    shape, body, kernel, bias, operator = ACTIVE[case]
    feeds, grid = {"x": normal(1, *shape)}, affine_params(-3.0, 4.0, UINT8)
    constants = {"w": normal(2, *kernel), "zero": np.float32(0), "one": np.float32(1)}
    constants |= {"b": normal(3, bias)} if bias else {}
    text = f"g ({batched(shape)} x) => (float[{','.join('abcd'[: len(shape)])}] y) {{ {body} y = {after} }}"

    def written(form: str) -> tuple[NDArray[np.int64], ModelProto]:
        program = planned(parse_program(text, constants, 17), feeds)
        program.plan["y"] = replace(program.plan["y"], params=grid)
        model, _ = emit(program, form)
        return codes(outputs(model, feeds)["y"], grid), model

    found, model = written("emit-integer")
    assert operators(model)[operator] == operators(model)["Clip"] == 1
    assert not operators(model).keys() & {"Conv", "Gemm", "MatMul", "Relu"}
    assert (found.min(), found.max()) == tuple(quantize(np.array([low, high], np.float32), grid))
    # The QDQ form applies it in float; there onnxruntime leaves the unit in float, which sums products in another order.
    difference = found - written("emit-qdq")[0]
    assert np.abs(difference).max() <= 1
    assert np.mean(difference != 0) < 0.01


def test_units_keep_their_names_and_run_in_integers(parse_program: ParseProgram) -> None:
    text = f"""g ({IMAGE}) => (float[N,4] y) {{
        [stem] a = Conv(x, w) b = Relu(a) [pool] p = MaxPool<kernel_shape=[2,2]>(b)
        [left] l = Conv(p, u) [right] r = Conv(p, v) [sum] s = Add(l, r) [mean] m = GlobalAveragePool(s)
        [flat] f = Flatten(m) [head] y = Gemm<transB=1>(f, t, c) }}"""
    weights = {"w": normal(1, 6, 3, 3, 3), "u": normal(2, 8, 6, 1, 1), "v": normal(3, 8, 6, 1, 1)}
    weights |= {"t": normal(4, 4, 8), "c": normal(5, 4)}
    feeds = {"x": normal(6, *IMAGES)}
    program = planned(parse_program(text, weights, 17), feeds)
    model, result = emit(program, "emit-integer")
    assert (result.changed, dict(result.skipped)) == (8, {})
    names = ["stem", "left", "right", "sum", "mean", "head"]
    assert set(names) <= {n.name for n in model.graph.node}
    _, optimized = session_and_optimized(model, threads=1)
    coverage = read_coverage(optimized, dict.fromkeys(("stem", "left", "right", "head"), 1))
    assert set(names) <= coverage.integer
    assert coverage.share == 1.0
    ends = Counter(n.op_type for n in optimized.graph.node if "antizeLinear" in n.op_type)
    assert ends == {"QuantizeLinear": 1}  # the head writes float, and nothing in between is converted


def test_a_unit_without_an_operator_keeps_the_qdq_form(parse_program: ParseProgram) -> None:
    text = f"g ({IMAGE}) => (float[N,6,h,i] y) {{ c = Conv(x, w) [curve] y = Tanh(c) }}"
    feeds, weights = {"x": normal(5, *IMAGES)}, {"w": normal(1, 6, 3, 3, 3)}
    target = replace(ORT_CPU, rules={**ORT_CPU.rules, "Tanh": Rule("kernel")})
    found = {}
    for form in FORMS:
        program = planned(parse_program(text, weights, 17), feeds, target=target)
        model, _ = emit(program, form, target)
        found[form] = outputs(model, feeds)["y"]
        assert operators(model)["Tanh"] == 1
    np.testing.assert_array_equal(found["emit-integer"], found["emit-qdq"])
    result = emit(planned(parse_program(text, weights, 17), feeds, target=target), "emit-integer", target)[1]
    assert dict(result.skipped) == {
        "curve": "there is no integer operator for Tanh, so it is written in the QDQ form"
    }
    assert result.changed == 1


def test_golden(parse_program: ParseProgram, golden: Callable[[str, ModelProto], None]) -> None:
    text = """g (float[N,3,5,5] x) => (float[N,2] y, float[N,4,3,3] r) {
        [first] c = Conv(x, w, b) r = Relu(c) [other] d = Conv(x, v) [sum] s = Add(r, d)
        [mean] m = GlobalAveragePool(s) [flat] f = Flatten(m) [head] y = Gemm<transB=1>(f, u) }"""
    weights = {
        "w": normal(1, 4, 3, 3, 3),
        "b": normal(2, 4),
        "v": normal(3, 4, 3, 3, 3),
        "u": normal(4, 2, 4),
    }
    program = planned(parse_program(text, weights, 17), {"x": normal(5, 4, 3, 5, 5)})
    golden("emit_integer", emit(program, "emit-integer")[0])


def assert_forms_agree(
    model: Path, calibration: Any, feeds: Mapping[str, Array], output: str, floats: int = 0
) -> None:
    """Both forms of the preset give the same bits and run as much in integers, all but so many convolutions."""
    forms = [
        compile_model(model, calibration, form=form, samples=32, threads=1, speed=False)
        for form in ("qdq", "integer")
    ]
    fused, integer = (outputs(f.model, feeds)[output] for f in forms)
    np.testing.assert_array_equal(integer, fused)
    assert np.ptp(integer) > 1.0
    for form in forms:
        assert form.report.coverage is not None
        assert (form.report.coverage.share or 0.0) > 0.9
    rows = [[(r.name, r.status) for r in f.report.nodes] for f in forms]
    assert rows[0] == rows[1]
    assert operators(forms[1].model)["Conv"] == floats


@pytest.mark.parametrize("name", ["digits_cnn", "digits_transformer"])
def test_models_that_ship_give_the_same_bits_in_both_forms(name: str, models_dir: Path) -> None:
    with np.load(models_dir / "digits_test.npz") as file:
        feeds = {"image": file["image"][:64]}
    calib = models_dir / "digits_calib.npz"
    assert_forms_agree(models_dir / f"{name}.onnx", calib, feeds, "logits", floats=1)  # over one channel


def test_a_residual_network_gives_the_same_bits_in_both_forms(data_dir: Path) -> None:
    feeds = {"input": normal(1, 32, 3, 32, 32)}
    assert_forms_agree(data_dir / "models" / "cifar10_resnet20.onnx", feeds, feeds, "logits")
