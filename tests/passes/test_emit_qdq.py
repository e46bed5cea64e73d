"""The QDQ form: where codes and floats meet, what stays float, and what onnxruntime fuses; borders are those of both forms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from onnxq.affine import QuantParams
from onnxq.data import input_specs, open_data
from onnxq.model.session import make_session, session_and_optimized
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program

Array = NDArray[Any]
ParseProgram = Callable[..., Program]

IMAGES, IMAGE, MAP = (4, 3, 9, 8), "float[N,3,9,8] x", "float[N,6,7,6]"
CODES = {"QuantizeLinear", "DequantizeLinear"}

both_forms = pytest.mark.parametrize("form", ["emit-qdq", "emit-integer"])


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


W, U = normal(1, 6, 3, 3, 3), normal(2, 6, 6, 1, 1)
X = {"x": normal(0, *IMAGES)}


def emitted(
    program: Program,
    feeds: Mapping[str, Array] | list[Mapping[str, Array]] = X,
    form: str = "emit-qdq",
    annotate: str = "annotate:small=0",
) -> ModelProto:
    """The program calibrated on the feeds themselves, or on a list of whole ones, and written."""
    data = open_data(feeds, input_specs(program.to_model()))
    steps = Pipeline.parse(f"{annotate} calibrate choose-ranges quantize-weights {form}")
    steps.run(program, Context(data=data, threads=1))
    model = program.to_model()
    onnx.checker.check_model(model, full_check=True)
    return model


def outputs(model: ModelProto, feeds: Mapping[str, Array] = X, *, optimize: bool = True) -> dict[str, Array]:
    session = make_session(model, threads=1, optimize=optimize)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def kernels(model: ModelProto) -> Counter[str]:
    """Operators of the graph that onnxruntime runs."""
    return Counter(n.op_type for n in session_and_optimized(model, threads=1)[1].graph.node)


def initializers(model: ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def nodes(model: ModelProto, op: str) -> list[NodeProto]:
    return [n for n in model.graph.node if n.op_type == op]


def assert_on_grid(values: Array, params: QuantParams) -> None:
    steps = values / np.float64(params.scale) + int(params.zero_point)
    np.testing.assert_allclose(
        steps, np.rint(steps), atol=1e-4
    )  # float32 holds the product of scale and code
    assert len(np.unique(np.rint(steps))) > 30


@both_forms
def test_an_output_that_is_read_inside_holds_dequantized_codes(
    form: str, parse_program: ParseProgram
) -> None:
    text = f"g ({IMAGE}) => ({MAP} c, {MAP} y) {{ c = Conv(x, w) y = Conv(c, u) }}"
    program = parse_program(text, {"w": W, "u": U}, 17)
    model = emitted(program, form=form)
    found = outputs(model)
    assert_on_grid(found["c"], program.params("c"))
    # The second convolution reads the very values that the first output shows.
    second = program.plan["u"]
    assert second.codes is not None
    assert second.params is not None
    weights = second.codes[..., 0, 0] * second.params.scale[:, None].astype(np.float64)
    truth = np.einsum("oc,nchw->nohw", weights, found["c"])
    assert np.abs(found["y"] - truth).max() <= program.params("y").scale * 0.501  # half a step, and float32
    assert kernels(model)["QLinearConv"] == 2


@both_forms
def test_float_readers_of_a_needed_tensor_read_it_unharmed(form: str, parse_program: ParseProgram) -> None:
    text = f"g ({IMAGE}) => ({MAP} y, float[N,3,9,8] t) {{ y = Conv(x, w) t = Tanh(x) }}"
    found = outputs(emitted(parse_program(text, {"w": W}, 17), form=form))
    np.testing.assert_allclose(found["t"], np.tanh(X["x"]), rtol=1e-6)  # float32, not 8 bits


@both_forms
def test_float_readers_of_a_held_tensor_read_its_codes(form: str, parse_program: ParseProgram) -> None:
    text = f"g ({IMAGE}) => ({MAP} y, {MAP} t, {MAP} c) {{ c = Conv(x, w) y = Conv(c, u) t = Tanh(c) }}"
    program = parse_program(text, {"w": W, "u": U}, 17)
    found = outputs(emitted(program, form=form))
    assert_on_grid(found["c"], program.params("c"))
    np.testing.assert_allclose(found["t"], np.tanh(found["c"]), rtol=1e-6)  # float32


@both_forms
def test_a_body_reads_the_dequantized_value_of_a_held_tensor(form: str, parse_program: ParseProgram) -> None:
    text = f"""g ({IMAGE}, bool b) => ({MAP} y, {MAP} c, {MAP} z) {{
        c = Conv(x, w) z = Conv(c, u)
        y = If(b) <then_branch = t () => ({MAP} p) {{ p = Neg(c) }}, else_branch = e () => ({MAP} q) {{ q = Abs(c) }}>
    }}"""
    feeds = {**X, "b": np.array(True)}
    program = parse_program(text, {"w": W, "u": U}, 17)
    model = emitted(program, [feeds], form)
    found = outputs(model, feeds)
    assert_on_grid(found["c"], program.params("c"))
    np.testing.assert_array_equal(found["y"], -found["c"])
    found = outputs(model, {**feeds, "b": np.array(False)})
    np.testing.assert_array_equal(found["y"], np.abs(found["c"]))


@both_forms
def test_shared_weights_are_stored_once_and_a_shared_bias_for_each_scale(
    form: str, parse_program: ParseProgram
) -> None:
    text = f"""g ({IMAGE}) => (float[N,3,5,4] y, float[N,3,9,8] r) {{
        r = Conv<pads=[1,1,1,1]>(x, w, b) s = Relu(r) t = Conv(s, w, b) y = Conv(t, w, b) }}"""
    w, b = normal(1, 3, 3, 3, 3), normal(2, 3)
    program = parse_program(text, {"w": w, "b": b}, 17)
    model = emitted(program, form=form)
    stored = initializers(model)
    assert [v.shape for v in stored.values() if v.dtype == np.int8 and v.ndim == 4] == [w.shape]
    for tensor, name in (("x", "b_q"), ("s", "b_q_1"), ("t", "b_q_2")):
        scale = program.params(tensor).scale * program.params("w").scale
        np.testing.assert_array_equal(stored[name], np.rint(b / scale.astype(np.float64)))
    assert kernels(model)["QLinearConv"] == 3
    reference = outputs(parse_program(text, {"w": w, "b": b}, 17).to_model())["y"]
    noise = np.mean((outputs(model)["y"] - reference) ** 2) / np.var(reference)
    assert noise < 1e-3  # 30 dB: three layers of 8 bits


@both_forms
def test_a_split_hands_out_codes(form: str, parse_program: ParseProgram) -> None:
    text = f"""g ({IMAGE}) => (float[N,2,7,6] p, float[N,4,7,6] q, {MAP} c) {{
        c = Conv(x, w) [split] p, q = Split<axis=1>(c, sizes) }}"""
    program = parse_program(text, {"w": W, "sizes": np.array([2, 4])}, 17)
    model = emitted(program, form=form)
    found = outputs(model)
    assert_on_grid(found["c"], program.params("c"))
    np.testing.assert_array_equal(np.concatenate([found["p"], found["q"]], 1), found["c"])
    assert nodes(model, "Split")[0].input[0] == "c_q"


@both_forms
@pytest.mark.parametrize("operands", ["amounts", "amounts, zero", "amounts, zero, axes", "amounts, , axes"])
def test_padding_with_zeros_puts_in_the_zero_point(
    operands: str, form: str, parse_program: ParseProgram
) -> None:
    text = f"""g ({IMAGE}) => (float[N,6,10,9] y, {MAP} c) {{
        c = Conv(x, w) p = Pad(c, {operands}) y = MaxPool<kernel_shape=[1,1]>(p) }}"""
    amounts = np.array([2, 1, 1, 2] if "axes" in operands else [0, 0, 2, 1, 0, 0, 1, 2])
    weights = {"w": W, "amounts": amounts, "zero": np.float32(0), "axes": np.array([2, 3])}
    program = parse_program(text, weights, 18)
    model = emitted(program, form=form)
    found = outputs(model)
    assert int(program.params("c").zero_point) not in (0, 255)
    np.testing.assert_array_equal(found["y"], np.pad(found["c"], [(0, 0), (0, 0), (2, 1), (1, 2)]))
    fill = initializers(model)[nodes(model, "Pad")[0].input[2]]
    assert fill.dtype == np.uint8
    assert fill == program.params("c").zero_point


@both_forms
def test_lookups_gather_codes(form: str, parse_program: ParseProgram) -> None:
    text = "g (int64[N,5] i) => (float[N,5,64] y) { y = Gather(table, i) }"
    table = normal(1, 100, 64)
    program = parse_program(text, {"table": table}, 17)
    feeds = {"i": np.random.default_rng(1).integers(0, 100, (8, 5))}
    model = emitted(program, feeds, form)
    gather = nodes(model, "Gather")[0]
    assert initializers(model)[gather.input[0]].dtype == np.uint8
    error = np.abs(outputs(model, feeds)["y"] - table[feeds["i"]])
    assert error.max() <= 2 * float(program.params("table").scale)  # the range may cut off a little


def test_what_the_runtime_needs_stands_on_weights_and_biases(parse_program: ParseProgram) -> None:
    text = f"g ({IMAGE}) => ({MAP} y) {{ c = Conv(x, w, b) d = Relu(c) y = Conv(d, u) }}"
    weights = {"w": W, "b": normal(3, 6), "u": U}
    program = parse_program(text, weights, 17)
    model = emitted(program)
    stored = initializers(model)
    decoded = {n.input[0]: n for n in nodes(model, "DequantizeLinear") if n.input[0] in stored}
    assert set(decoded) == {"w_q", "u_q", "b_q"}
    for name in ("w", "u"):
        zeros = stored[decoded[f"{name}_q"].input[2]]  # without it neither Gemm nor MatMul + Add fuses
        np.testing.assert_array_equal(zeros, np.zeros(6, np.int8))
        assert zeros.dtype == np.int8
        assert decoded[f"{name}_q"].attribute[0].i == 0
    bias = decoded["b_q"]
    assert len(bias.input) == 2
    assert stored["b_q"].dtype == np.int32
    expected = program.params("x").scale * program.params("w").scale
    np.testing.assert_array_equal(stored[bias.input[1]], expected)
    for tensor in ("x", "d", "y"):
        assert stored[f"{tensor}_scale"].shape == stored[f"{tensor}_zp"].shape == ()


def test_scales_of_one_tensor_are_scalars(parse_program: ParseProgram) -> None:
    text = f"g ({IMAGE}) => ({MAP} y) {{ y = Conv(x, w, b) }}"
    program = parse_program(text, {"w": W, "b": normal(3, 6)}, 17)
    model = emitted(program, annotate="annotate:weights=int8:tensor,small=0")
    stored = initializers(model)
    assert {stored[n].shape for n in ("w_scale", "w_zp", "b_scale")} == {()}
    assert not any(n.attribute for n in nodes(model, "DequantizeLinear"))


# Layers that are to stay float between two convolutions that run in integers: their nodes, and the shape of the weights u.
FLOATS: dict[str, tuple[str, tuple[int, ...]]] = {
    "Conv": ("[mid] n = Conv<pads=[1,1,1,1]>(r, u)", (6, 6, 3, 3)),
    "Conv with a bias": ("[mid] n = Conv<pads=[1,1,1,1]>(r, u, b)", (6, 6, 3, 3)),
    "Conv and Relu": ("[mid] m = Conv<pads=[1,1,1,1]>(r, u, b) n = Relu(m)", (6, 6, 3, 3)),
    "depthwise Conv": ("[mid] n = Conv<pads=[1,1,1,1],group=6>(r, u)", (6, 1, 3, 3)),
    "ConvTranspose": ("[mid] n = ConvTranspose<pads=[1,1,1,1]>(r, u)", (6, 6, 3, 3)),
    "MatMul": ("[mid] n = MatMul(r, u)", (6, 6)),
    "MatMul and Add": ("[mid] m = MatMul(r, u) n = Add(m, b)", (6, 6)),
}


@both_forms
@pytest.mark.parametrize("case", FLOATS)
def test_a_layer_that_is_to_stay_float_does(case: str, form: str, parse_program: ParseProgram) -> None:
    """onnxruntime quantizes weights of float layers between codes by itself, one scale for all, unless it is kept from it."""
    body, shape = FLOATS[case]
    text = f"g ({IMAGE}) => ({MAP} y) {{ c = Conv(x, w) r = Relu(c) {body} y = Conv(n, v) }}"
    wide = np.geomspace(0.01, 3, 6).astype(np.float32)  # what a single scale would show to be 8 bits
    weights = {"w": W, "u": normal(5, *shape) * wide.reshape(-1, *(1,) * (len(shape) - 1))}
    weights |= {"v": U, "b": normal(6, 6)}
    program = parse_program(text, weights, 17)
    model = emitted(program, form=form, annotate="annotate:small=0,skip=mid")
    steps = (outputs(model)["y"] - outputs(model, optimize=False)["y"]) / program.params("y").scale
    # a float32 sum in another order crosses a rounding border now and then; 8-bit weights move a third of the codes
    assert np.mean(np.abs(steps) > 0.5) < 0.01
    assert np.abs(steps).max() < 1.5
    assert kernels(model)["QLinearConv"] == 2
    assert not kernels(model).keys() & {"QGemm", "QLinearMatMul", "MatMulIntegerToFloat"}


@both_forms
@pytest.mark.parametrize(
    ("dims", "mid"),
    [
        ("N", "n = Gemm(r, u, b)"),
        ("N", "n = Gemm<transB=1>(r, t, b)"),
        ("N", "n = MatMul(r, u)"),
        ("N", "m = MatMul(r, u) n = Add(m, b)"),
        ("N,4", "n = MatMul(r, u)"),
        ("N,4", "m = MatMul(r, u) n = Add(m, b)"),
        ("N,K", "m = MatMul(r, u) n = Add(m, b)"),
        ("200,4", "m = MatMul(r, u) n = Add(m, b)"),
    ],
)
def test_a_product_that_is_to_stay_float_does(
    dims: str, mid: str, form: str, parse_program: ParseProgram
) -> None:
    text = f"""g (float[{dims},10] x) => (float[{dims},8] y) {{
        c = MatMul(x, w) r = Relu(c) [mid] {mid} [last] y = MatMul(n, v) }}"""
    u = normal(2, 12, 9) * np.geomspace(0.01, 3, 9).astype(
        np.float32
    )  # what a single scale would show to be 8 bits
    weights = {"w": normal(1, 10, 12), "u": u, "t": u.T.copy(), "b": normal(3, 9), "v": normal(4, 9, 8)}
    feeds = {"x": normal(0, 200, *([4] * dims.count(",")), 10)}
    program = parse_program(text, weights, 17)
    model = emitted(program, [feeds] if "200" in dims else feeds, form, "annotate:small=0,skip=mid")
    found, plain = outputs(model, feeds)["y"], outputs(model, feeds, optimize=False)["y"]
    # a float32 sum in another order gives a code more or less now and then: at most a step of n times the largest weight
    step = float(program.params("n").scale) * np.abs(weights["v"]).max() * 1.01
    assert np.abs(found - plain).max() < step + 1e-4
    assert np.mean(np.abs(found - plain) > 1e-4) < 0.02


@both_forms
@pytest.mark.parametrize("opset", [13, 15, 17, 19, 21])
def test_models_load_at_every_operator_set(opset: int, form: str, parse_program: ParseProgram) -> None:
    text = f"""g ({IMAGE}) => (float[N,4] y) {{
        c = Conv(x, w, b) r = Relu(c) m = MaxPool<kernel_shape=[2,2]>(r) d = Conv(m, u) e = Conv(m, v)
        s = Add(d, e) g = GlobalAveragePool(s) f = Flatten(g) y = Gemm(f, t) }}"""
    weights = {"w": W, "b": normal(3, 6), "u": U, "v": normal(4, 6, 6, 1, 1), "t": normal(5, 6, 4)}
    program = parse_program(text, weights, opset)
    model = emitted(program, form=form)
    reference = outputs(parse_program(text, weights, opset).to_model())["y"]
    noise = np.mean((outputs(model)["y"] - reference) ** 2) / np.var(reference)
    assert noise < 2e-3  # 27 dB: five layers of 8 bits
    assert {e.version for e in model.opset_import if not e.domain} == {opset}


# What onnxruntime fuses: nodes between two convolutions c = Conv(x, w), d = Conv(x, v) and a third one that reads s, the channels
# of s, and the kernels that they are to become.
FUSED: dict[str, tuple[str, int, Mapping[str, int]]] = {
    "Conv": ("s = Conv(c, u)", 6, {"QLinearConv": 4}),
    "Conv and Relu": ("t = Conv(c, u, b) s = Relu(t)", 6, {"QLinearConv": 4}),
    "Conv and Clip": ("t = Conv(c, u, b) s = Clip(t, zero, six)", 6, {"QLinearConv": 4}),
    "depthwise Conv": ("s = Conv<group=6>(c, n)", 6, {"QLinearConv": 4}),
    "Add": ("s = Add(c, d)", 6, {"QLinearAdd": 1}),
    "Add and Relu": ("t = Add(c, d) s = Relu(t)", 6, {"QLinearAdd": 1}),
    "Mul": ("s = Mul(c, d)", 6, {"QLinearMul": 1}),
    "Concat": ("s = Concat<axis=1>(c, d)", 12, {"QLinearConcat": 1}),
    "AveragePool": ("s = AveragePool<kernel_shape=[2,2]>(c)", 6, {"QLinearAveragePool": 1}),
    "AveragePool with dilations": (
        "s = AveragePool<kernel_shape=[2,2],dilations=[1,1]>(c)",
        6,
        {"QLinearAveragePool": 1},
    ),
    "GlobalAveragePool": ("s = GlobalAveragePool(c)", 6, {"QLinearGlobalAveragePool": 1}),
    "LeakyRelu": ("s = LeakyRelu<alpha=0.1>(c)", 6, {"QLinearLeakyRelu": 1}),
    "Sigmoid": ("s = Sigmoid(c)", 6, {"QLinearSigmoid": 1}),
    "Softmax": ("s = Softmax<axis=-1>(c)", 6, {"QLinearSoftmax": 1}),
    "MaxPool": ("s = MaxPool<kernel_shape=[2,2]>(c)", 6, {}),
    "Resize": ('s = Resize<mode="nearest">(c, , twice)', 6, {"Resize": 1}),
    "Transpose": ("s = Transpose<perm=[0,1,3,2]>(c)", 6, {}),
    "Reshape": ("s = Reshape(c, shape)", 6, {}),
    "Flatten": ("t = Flatten(c) s = Unsqueeze(t, axis)", 252, {"Flatten": 1}),
    "Squeeze": ("g = GlobalAveragePool(c) q = Squeeze(g, axis) s = Identity(q)", 6, {"Squeeze": 1}),
    "Slice": ("s = Slice(c, begin, end, axes)", 6, {"Slice": 1}),
    "Split": ("s, t = Split<axis=1>(c, halves)", 3, {"Split": 1}),
    "Tile": ("s = Tile(c, repeats)", 6, {"Tile": 1}),
    "Expand": ("g = GlobalAveragePool(c) s = Expand(g, larger)", 6, {"Expand": 1}),
    "Pad": ("s = Pad(c, pads)", 6, {"Pad": 1}),
    "DepthToSpace": ("t = Concat<axis=1>(c, d) s = DepthToSpace<blocksize=2>(t)", 3, {"DepthToSpace": 1}),
    "SpaceToDepth": (
        "t = Slice(c, begin, end, axes) s = SpaceToDepth<blocksize=2>(t)",
        24,
        {"SpaceToDepth": 1},
    ),
}
FUSED_CONSTANTS: dict[str, Array] = {
    "u": normal(2, 6, 6, 1, 1),
    "b": normal(3, 6),
    "n": normal(4, 6, 1, 3, 3),
    "zero": np.array(0, np.float32),
    "six": np.array(6, np.float32),
    "twice": np.array([1, 1, 2, 2], np.float32),
    "shape": np.array([0, 0, 6, 7]),
    "larger": np.array([1, 1, 6, 7]),
    "axis": np.array([2]),
    "begin": np.array([1, 2]),
    "end": np.array([7, 6]),
    "axes": np.array([2, 3]),
    "halves": np.array([3, 3]),
    "repeats": np.array([1, 1, 2, 1]),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
}


@pytest.mark.parametrize("case", FUSED)
def test_the_runtime_fuses(case: str, parse_program: ParseProgram) -> None:
    """A newer onnxruntime that changes one of these rules fails here; `onnxq.target` is then to be changed."""
    body, channels, expected = FUSED[case]
    kernel = (4, channels) + (1,) * (1 if case in ("Flatten", "Squeeze") else 2)
    text = f"g ({IMAGE}) => (float[o,p,{'q' if len(kernel) == 3 else 'q,r'}] y, {MAP} d) {{ "
    text += f"c = Conv(x, w) d = Conv(x, v) {body} y = Conv(s, l) }}"
    weights = {"w": W, "v": normal(7, 6, 3, 3, 3), "l": normal(8, *kernel), **FUSED_CONSTANTS}
    model = emitted(parse_program(text, weights, 19))
    found = kernels(model)
    assert not found.keys() & {
        "Conv",
        "FusedConv",
        "Add",
        "Mul",
        "Relu",
        "Clip",
        "AveragePool",
        "Sigmoid",
        "Softmax",
    }
    assert found["QLinearConv"] >= 3
    assert {op: found[op] for op in expected} == dict(expected)
    assert found["QuantizeLinear"] == 1
    assert found["DequantizeLinear"] == 2  # of the two outputs: everything between works on codes


# Products between c = MatMul(x, w) and y = MatMul(s, l): rank of x, their nodes, kernels of all three.
PRODUCTS: dict[str, tuple[int, str, Mapping[str, int]]] = {
    "Gemm": (2, "s = Gemm(c, u, b)", {"QGemm": 1, "QLinearMatMul": 1, "MatMulIntegerToFloat": 1}),
    "Gemm transB": (
        2,
        "s = Gemm<transB=1>(c, u, b)",
        {"QGemm": 1, "QLinearMatMul": 1, "MatMulIntegerToFloat": 1},
    ),
    "Gemm without C": (2, "s = Gemm(c, u)", {"QGemm": 1, "QLinearMatMul": 1, "MatMulIntegerToFloat": 1}),
    "Gemm and Relu": (2, "t = Gemm(c, u, b) s = Relu(t)", {"QGemm": 1}),
    "MatMul": (2, "s = MatMul(c, u)", {"QLinearMatMul": 2, "MatMulIntegerToFloat": 1}),
    "MatMul and Add": (2, "t = MatMul(c, u) s = Add(t, b)", {"QGemm": 1}),
    "MatMul of a stack": (3, "s = MatMul(c, u)", {"QLinearMatMul": 2, "MatMulIntegerToFloat": 1}),
    "MatMul and Add of a stack": (3, "t = MatMul(c, u) s = Add(t, b)", {"QGemm": 1}),  # by flatten-matmul
    "two activations": (
        3,
        "p = Transpose<perm=[0,2,1]>(c) s = MatMul(c, p)",
        {"QLinearMatMul": 2, "MatMulIntegerToFloat": 1},
    ),
}


@pytest.mark.parametrize("weights", ["int8:channel", "int8:tensor"])
@pytest.mark.parametrize("case", PRODUCTS)
def test_the_runtime_fuses_products(case: str, weights: str, parse_program: ParseProgram) -> None:
    rank, body, expected = PRODUCTS[case]
    dims = "N" if rank == 2 else "N,7"
    text = f"g (float[{dims},10] x) => (float[{dims},5] y) {{ c = MatMul(x, w) {body} y = MatMul(s, l) }}"
    inner = 7 if case == "two activations" else 9
    constants = {"w": normal(1, 10, 9), "u": normal(2, 9, 9), "b": normal(3, 9), "l": normal(4, inner, 5)}
    feeds = {"x": normal(0, 8, *([7] if rank == 3 else []), 10)}
    steps = f"flatten-matmul annotate:small=0,products=all,weights={weights}"
    model = emitted(parse_program(text, constants, 17), feeds, annotate=steps)
    found = kernels(model)
    assert not found.keys() & {"MatMul", "Gemm", "FusedGemm", "FusedMatMul", "Add", "Relu", "MatMulNBits"}
    assert {op: found[op] for op in expected} == dict(expected)
    assert found["QuantizeLinear"] == 1


@pytest.mark.parametrize("bias", [", b", ""])
def test_the_runtime_writes_float_from_a_gemm(bias: str, parse_program: ParseProgram) -> None:
    text = f"g (float[N,10] x) => (float[N,9] y) {{ y = Gemm(x, w{bias}) }}"
    program = parse_program(text, {"w": normal(1, 10, 9), "b": normal(2, 9)}, 17)
    assert kernels(emitted(program, {"x": normal(0, 8, 10)})) == {"QuantizeLinear": 1, "QGemm": 1}


@both_forms
@pytest.mark.parametrize("bits", ["", ",activations=uint4"])
def test_a_max_pool_behind_a_float_layer_stays_float(
    bits: str, form: str, parse_program: ParseProgram
) -> None:
    """The runtime would move the QuantizeLinear to its front, where its kernel takes many times as long."""
    pool = "p = MaxPool<kernel_shape=[2,2],strides=[2,2]>(c)"
    text = f"g ({IMAGE}) => (float[N,6,3,3] y) {{ [mid] c = Conv(x, w) {pool} y = Conv(p, u) }}"
    program = parse_program(text, {"w": W, "u": U}, 17)
    model = emitted(program, form=form, annotate=f"annotate:small=0,skip=mid{bits}")
    optimized = session_and_optimized(model, threads=1)[1]
    (found_pool,) = nodes(optimized, "MaxPool")
    made = next(n.op_type for n in optimized.graph.node if found_pool.input[0] in n.output)
    assert made in ("Conv", "ReorderOutput")
    assert kernels(model)["QLinearConv"] == 1
    found, plain = outputs(model)["y"], outputs(model, optimize=False)["y"]
    assert np.abs(found - plain).max() <= program.params("y").scale * 1.001  # a step where rounding ties


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
    program = parse_program(text, weights, 17)
    golden("emit_qdq", emitted(program, {"x": normal(5, 4, 3, 5, 5)}))
