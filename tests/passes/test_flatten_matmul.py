"""MatMul and bias as a two-dimensional Gemm: the same values, and no reshape more than needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

from onnxq.passes.flatten_matmul import FlattenMatMul
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program

Array = NDArray[Any]
ParseProgram = Callable[..., Program]
Flattened = Callable[..., tuple[ModelProto, Mapping[str, str]]]


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


W, V, B = normal(1, 6, 8), normal(2, 8, 6), normal(3, 8)


@pytest.fixture
def flattened(parse_program: ParseProgram, assert_same: Callable[..., None]) -> Flattened:
    """The model after the pass, proven equal to the one before, and the reasons of products that it left."""

    def run(
        text: str, weights: Mapping[str, Array], changed: int = 1
    ) -> tuple[ModelProto, Mapping[str, str]]:
        program = parse_program(text, weights, 17)
        result = FlattenMatMul().run(program, Context())
        model = program.to_model()
        assert_same(program.source, model)
        assert result.changed == changed
        assert [o.type for o in model.graph.output] == [o.type for o in program.source.graph.output]
        return model, result.skipped

    return run


def ops(model: ModelProto) -> Counter[str]:
    return Counter(n.op_type for n in model.graph.node)


@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        ("5", {"Gemm": 1}),
        ("N", {"Gemm": 1}),
        ("3,5", {"Gemm": 1, "Reshape": 2}),
        ("N,5", {"Gemm": 1, "Reshape": 2}),
        ("2,N,5,3", {"Gemm": 1, "Reshape": 2}),
        ("N,M", {"Gemm": 1, "Reshape": 2, "Shape": 1, "Slice": 1, "Concat": 1}),
        ("N,3,M", {"Gemm": 1, "Reshape": 2, "Shape": 1, "Slice": 1, "Concat": 1}),
    ],
)
@pytest.mark.parametrize("add", ["Add(m, b)", "Add(b, m)"])
def test_every_rank_and_open_dimensions(
    dims: str, expected: dict[str, int], add: str, flattened: Flattened
) -> None:
    text = f"g (float[{dims},6] x) => (float[{dims},8] y) {{ [here] m = MatMul(x, w) y = {add} }}"
    model, _ = flattened(text, {"w": W, "b": B})
    assert ops(model) == expected
    assert [n.name for n in model.graph.node if n.op_type == "Gemm"] == [
        "here"
    ]  # reports and --skip know the name


@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 1, 8)])
def test_a_bias_may_have_leading_ones(shape: tuple[int, ...], flattened: Flattened) -> None:
    text = "g (float[N,5,6] x) => (float[N,5,8] y) { m = MatMul(x, w) y = Add(m, b) }"
    model, _ = flattened(text, {"w": W, "b": B.reshape(shape)})
    gemm = next(n for n in model.graph.node if n.op_type == "Gemm")
    assert next(list(t.dims) for t in model.graph.initializer if t.name == gemm.input[2]) == [8]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_single_column_has_a_single_bias(shape: tuple[int, ...], flattened: Flattened) -> None:
    text = "g (float[N,5,6] x) => (float[N,5,1] y) { m = MatMul(x, w) y = Add(m, b) }"
    model, _ = flattened(text, {"w": normal(1, 6, 1), "b": np.full(shape, 0.5, np.float32)})
    assert ops(model)["Gemm"] == 1


@pytest.mark.parametrize(
    ("body", "weights", "reason"),
    [
        ("y = MatMul(x, w)", {"w": W}, "no bias is added to it"),
        ("m = MatMul(x, w) y = Mul(m, b)", {"w": W, "b": B}, "no bias is added to it"),
        ("m = MatMul(x, w) y = Add(m, m)", {"w": W}, "no bias is added to it"),
        ("m = MatMul(x, w) y = Add(m, b)", {"w": W, "b": normal(3, 5, 8)}, "is no bias vector"),
        ("m = MatMul(x, w) y = Add(m, b)", {"w": W, "b": normal(3, 5, 1)}, "is no bias vector"),
        ("m = MatMul(x, w) y = Add(m, b)", {"w": W, "b": normal(3, 1)}, "is no bias vector"),
        ("m = MatMul(x, w) y = Add(m, b)", {"w": normal(1, 2, 6, 8), "b": B}, "no constant matrix"),
        ("n = Abs(w) m = MatMul(x, n) y = Add(m, b)", {"w": W, "b": B}, "no constant matrix"),
        ("m = MatMul(x, w) n = Neg(b) y = Add(m, n)", {"w": W, "b": B}, "is no bias vector"),
    ],
)
def test_what_is_left_says_why(
    body: str, weights: Mapping[str, Array], reason: str, flattened: Flattened
) -> None:
    text = f"g (float[2,5,6] x) => (float[2,5,8] y) {{ {body} }}"
    model, skipped = flattened(text, weights, 0)
    assert ops(model)["MatMul"] == 1
    assert [reason in r for r in skipped.values()] == [True]


def test_a_bias_that_adds_dimensions_stays(flattened: Flattened) -> None:
    text = "g (float[N,6] x) => (float[1,N,8] y) { m = MatMul(x, w) y = Add(m, b) }"
    _, skipped = flattened(text, {"w": W, "b": B.reshape(1, 1, 8)}, 0)
    assert list(skipped.values()) == ["what is added to it adds dimensions"]
    _, skipped = flattened(
        "g (float[6] x) => (float[8] y) { m = MatMul(x, w) y = Add(m, b) }", {"w": W, "b": B}, 0
    )
    assert list(skipped.values()) == ["the rank of its input is unknown or below 2"]


@pytest.mark.parametrize(
    ("more", "outputs"),
    [
        ("z = Tanh(m)", "float[N,5,8] z"),
        ("z = Tanh(y)", "float[N,5,8] m"),
        (
            "z = If(c) <then_branch = t () => (float[N,5,8] p) { p = Neg(m) },"
            " else_branch = e () => (float[N,5,8] q) { q = Abs(m) }>",
            "float[N,5,8] z",
        ),
    ],
)
def test_a_product_that_others_read_stays(more: str, outputs: str, flattened: Flattened) -> None:
    inputs = "float[N,5,6] x, bool c" if "If" in more else "float[N,5,6] x"
    text = f"g ({inputs}) => (float[N,5,8] y, {outputs}) {{ m = MatMul(x, w) y = Add(m, b) {more} }}"
    _, skipped = flattened(text, {"w": W, "b": B}, 0)
    assert list(skipped.values()) == ["no bias is added to it"]


@pytest.mark.parametrize(
    ("more", "outputs"),
    [
        ("z = Reshape(y, s)", "float[N,40] z, float[N,5,8] y"),
        ("z = Reshape(y, s) v = Tanh(y)", "float[N,40] z, float[N,5,8] v"),
    ],
)
def test_a_sum_that_others_read_keeps_its_shape(more: str, outputs: str, flattened: Flattened) -> None:
    text = f"g (float[N,5,6] x) => ({outputs}) {{ m = MatMul(x, w) y = Add(m, b) {more} }}"
    model, _ = flattened(text, {"w": W, "b": B, "s": np.array([-1, 40])})
    assert ops(model)["Reshape"] == 3


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        ("z = Reshape(y, s)", 1),  # [-1, 4, 10] says all
        ("z = Reshape(y, zero)", 2),  # [0, 4, 10] copies the first dimension of its input
        ("z = Reshape<allowzero=1>(y, s)", 1),
        ("d = Shape(x) g = Gather(d, i) t = Concat<axis=0>(g, four, ten) z = Reshape(y, t)", 1),
        (
            "d = Shape(x) n = Slice(d, i, four) l = Slice(n, i, one) t = Concat<axis=0>(l, four, ten) z = Reshape(y, t)",
            1,
        ),
        ("d = Shape(x) g = Gather(d, i) t = Concat<axis=0>(i, four, ten) z = Reshape(y, t)", 2),
        ("d = Cast<to=7>(sizes) t = Concat<axis=0>(d, four, ten) z = Reshape(y, t)", 2),  # may hold a 0
    ],
)
def test_a_reshape_is_dropped_when_the_next_one_says_the_shape(
    target: str, kept: int, flattened: Flattened
) -> None:
    constants = {
        "s": np.array([-1, 4, 10]),
        "zero": np.array([0, 4, 10]),
        "i": np.array([0]),
        "one": np.array([1]),
        "four": np.array([4]),
        "ten": np.array([10]),
        "sizes": np.array([0.0], np.float32),
    }
    text = f"g (float[2,5,6] x) => (float[2,4,10] z) {{ m = MatMul(x, w) y = Add(m, b) {target} }}"
    model, _ = flattened(text, {"w": W, "b": B, **{k: v for k, v in constants.items() if k in target}})
    assert ops(model)["Reshape"] == kept + 1  # and the one that flattens


def test_a_reshape_in_front_is_skipped_over(flattened: Flattened) -> None:
    text = "g (float[N,5,3,2] x) => (float[N,5,8] y) { r = Reshape(x, s) m = MatMul(r, w) y = Add(m, b) }"
    model, _ = flattened(text, {"w": W, "b": B, "s": np.array([-1, 5, 6])})
    assert ops(model) == {"Gemm": 1, "Reshape": 2}


def test_queries_keys_and_values_share_one_flat_input(flattened: Flattened) -> None:
    text = """g (float[N,5,6] x) => (float[N,5,8] p, float[N,5,8] q, float[N,5,8] r) {
        h = Tanh(x) k = MatMul(h, w) p = Add(k, b) l = MatMul(h, w) q = Add(b, l) o = MatMul(h, u) r = Add(o, b) }"""
    model, _ = flattened(text, {"w": W, "u": normal(5, 6, 8), "b": B}, 3)
    assert ops(model) == {"Tanh": 1, "Gemm": 3, "Reshape": 4}


def test_a_flat_tensor_inside_a_body_is_not_read_outside(flattened: Flattened) -> None:
    text = """g (float[N,5,6] x, bool c) => (float[N,5,8] y, float[M,6] z) {
        z = If(c) <then_branch = t () => (float[M,6] p) { p = Reshape(x, s) },
                   else_branch = e () => (float[M,6] q) { r = Reshape(x, s) q = Abs(r) }>
        m = MatMul(x, w) y = Add(m, b) }"""
    model, _ = flattened(text, {"w": W, "b": B, "s": np.array([-1, 6])})
    assert ops(model) == {"If": 1, "Gemm": 1, "Reshape": 2}


def test_a_chain_of_layers(flattened: Flattened) -> None:
    text = """g (float[N,5,6] x) => (float[N,5,6] y) {
        m = MatMul(x, w) a = Add(m, b) n = MatMul(a, v) y = Add(n, d) }"""
    model, _ = flattened(text, {"w": W, "b": B, "v": V, "d": normal(4, 6)}, 2)
    assert ops(model) == {"Gemm": 2, "Reshape": 2}  # one at each end


@pytest.mark.parametrize("dims", ["N,5", "N,M"])
@pytest.mark.parametrize("activation", ["Relu(a)", "Clip(a, zero, one)"])
def test_an_activation_stays_next_to_the_product(
    activation: str, dims: str, flattened: Flattened, parse_program: ParseProgram
) -> None:
    text = f"""g (float[{dims},6] x) => (float[{dims},6] y) {{
        m = MatMul(x, w) a = Add(m, b) r = {activation} n = MatMul(r, v) y = Add(n, d) }}"""
    weights = {"w": W, "b": B, "v": V, "d": normal(4, 6), "zero": np.float32(0), "one": np.float32(1)}
    weights = {k: v for k, v in weights.items() if k in text}
    flattened(text, weights, 2)
    program = parse_program(text, weights, 17)
    Pipeline.parse("flatten-matmul annotate:small=0").run(program, Context())
    first = next(unit for unit in program.units.values() if unit.kind == "Gemm")
    assert [n.op for n in program.graph.nodes if n.name in first.nodes] == ["Gemm", activation[:4]]
    assert first.output in program.plan
    assert all(unit.is_layout or unit.kind == "Gemm" for unit in program.units.values())


@pytest.mark.parametrize("outputs", ["float[N,5,8] a, float[N,5,8] r", "float[N,5,8] r, float[N,5,8] t"])
def test_an_activation_whose_input_others_read_keeps_its_place(outputs: str, flattened: Flattened) -> None:
    text = f"g (float[N,5,6] x) => ({outputs}) {{ m = MatMul(x, w) a = Add(m, b) r = Relu(a) t = Tanh(a) }}"
    model, _ = flattened(text, {"w": W, "b": B})
    made = {n.output[0]: n for n in model.graph.node}
    assert made[made["r"].input[0]].op_type == "Reshape"


def test_the_pass_has_nothing_left_to_do(parse_program: ParseProgram) -> None:
    program = parse_program(
        "g (float[N,5,6] x) => (float[N,5,8] y) { m = MatMul(x, w) y = Add(m, b) }", {"w": W, "b": B}
    )
    assert FlattenMatMul().run(program, Context()).changed == 1
    before = program.to_model()
    assert FlattenMatMul().run(program, Context()).changed == 0
    assert program.to_model() == before
