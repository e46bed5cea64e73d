"""Which nodes become units, which tensors get a scheme, and why the rest stays float."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxq.errors import UsageError
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program, Unit

Array = NDArray[Any]
ParseProgram = Callable[..., Program]
Annotated = Callable[..., Program]

IMAGE, MAP = "float[N,3,9,8] x", "float[N,6,7,6]"


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


W, V, U = normal(1, 6, 3, 3, 3), normal(2, 6, 3, 3, 3), normal(3, 6, 6, 1, 1)
BIG = normal(4, 64, 64)


@pytest.fixture
def annotated(parse_program: ParseProgram) -> Annotated:
    def annotate(
        body: str,
        weights: Mapping[str, Array],
        options: str = "small=0",
        inputs: str = IMAGE,
        outputs: str = f"{MAP} y",
        before: str = "",
    ) -> Program:
        program = parse_program(f"g ({inputs}) => ({outputs}) {{ {body} }}", weights, 17)
        Pipeline.parse(f"{before} annotate{options and ':'}{options}").run(program, Context(threads=1))
        return program

    return annotate


def kinds(program: Program) -> list[str]:
    return [unit.kind for unit in program.units.values()]


def unit_that_writes(program: Program, tensor: str) -> Unit:
    return next(u for u in program.units.values() if tensor in u.outputs)


def reason_of(program: Program, op: str) -> str:
    """The reason of the only node of that op that stays float."""
    (found,) = [
        program.floats[n.name] for n in program.graph.nodes if n.op == op and n.name in program.floats
    ]
    return found


# ---- layers with weights


@pytest.mark.parametrize(
    ("node", "weight", "axis", "outputs"),
    [
        ("y = Conv(x, w)", W, 0, f"{MAP} y"),
        ("y = Conv<group=3>(x, w)", normal(1, 6, 1, 3, 3), 0, f"{MAP} y"),
        ("f = Flatten(x) y = Gemm(f, w)", normal(1, 216, 6), 1, "float[N,6] y"),
        ("f = Flatten(x) y = Gemm<transB=1>(f, w)", normal(1, 6, 216), 0, "float[N,6] y"),
        ("y = MatMul(x, w)", normal(1, 8, 6), 1, "float[N,3,9,6] y"),
    ],
)
def test_a_layer_is_a_unit_with_its_weights_and_input_in_the_plan(
    node: str, weight: Array, axis: int, outputs: str, annotated: Annotated
) -> None:
    program = annotated(node, {"w": weight}, outputs=outputs)
    unit = unit_that_writes(program, "y")
    assert (unit.weight, unit.bias, unit.channel_axis, unit.is_layout) == ("w", None, axis, False)
    assert unit.float_output == (unit.kind != "Conv")  # onnxruntime has no float output for QLinearConv
    assert not program.plan[unit.inputs[0]].is_weight
    decision = program.plan["w"]
    assert (str(decision.scheme), decision.is_weight, decision.axis) == ("int8:channel", True, axis)
    assert ("y" in program.plan) == (unit.kind == "Conv")


@pytest.mark.parametrize(
    ("body", "weights", "nodes", "bias"),
    [
        ("y = Conv(x, w, b)", {"w": W, "b": normal(5, 6)}, ["Conv"], "b"),
        ("c = Conv(x, w, b) y = Relu(c)", {"w": W, "b": normal(5, 6)}, ["Conv", "Relu"], "b"),
        ("c = Conv(x, w) y = Clip(c, zero, six)", {"w": W}, ["Conv", "Clip"], None),
        ("c = Conv(x, w) y = Clip(c, zero)", {"w": W}, ["Conv", "Clip"], None),
        ("c = Conv(x, w) y = Clip(c, six)", {"w": W}, ["Conv"], None),  # starts at 6
        ("c = Conv(x, w) y = Clip(c, , six)", {"w": W}, ["Conv"], None),  # has no start
        ("c = Conv(x, w) y = Tanh(c)", {"w": W}, ["Conv"], None),
        ("m = MatMul(x, w) y = Add(m, b)", {"w": normal(1, 8, 6), "b": normal(5, 6)}, ["MatMul", "Add"], "b"),
        ("m = MatMul(x, w) y = Add(b, m)", {"w": normal(1, 8, 6), "b": normal(5, 6)}, ["MatMul", "Add"], "b"),
        (
            "m = MatMul(x, w) a = Add(b, m) y = Relu(a)",
            {"w": normal(1, 8, 6), "b": normal(5, 6)},
            ["MatMul", "Add", "Relu"],
            "b",
        ),
        ("m = MatMul(x, w) y = Add(m, b)", {"w": normal(1, 8, 6), "b": normal(5, 1)}, ["MatMul"], None),
    ],
)
def test_biases_and_activations_that_start_at_zero_vanish_into_a_layer(
    body: str, weights: dict[str, Array], nodes: list[str], bias: str | None, annotated: Annotated
) -> None:
    constants = {"zero": np.float32(0), "six": np.float32(6), **weights}
    used = {k: v for k, v in constants.items() if k in body}
    outputs = "float[N,3,9,6] y" if "MatMul" in body else f"{MAP} y"
    program = annotated(body, used, outputs=outputs)
    ops = {n.name: n.op for n in program.graph.nodes}
    (unit,) = program.units.values()
    assert [ops[name] for name in unit.nodes] == nodes
    assert unit.bias == bias
    assert (unit.output == "y") == (len(nodes) == len(ops))
    assert not program.floats.keys() & set(unit.nodes)
    if nodes[-1] in ("Relu", "Clip"):
        assert not unit.float_output  # the activation needs a zero point


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("c = Conv(x, w) y = Relu(c) z = Tanh(c)", f"{MAP} y, {MAP} z"),
        ("c = Conv(x, w) y = Relu(c)", f"{MAP} y, {MAP} c"),
        (
            "c = Conv(x, w) y = Relu(c) z = If(b) <then_branch = t () => (float[N,6,7,6] p) { p = Neg(c) },"
            " else_branch = e () => (float[N,6,7,6] q) { q = Abs(c) }>",
            f"{MAP} y, {MAP} z",
        ),
    ],
)
def test_an_activation_stays_where_its_input_has_another_reader(
    body: str, outputs: str, annotated: Annotated
) -> None:
    inputs = f"{IMAGE}, bool b" if "If" in body else IMAGE
    program = annotated(body, {"w": W}, inputs=inputs, outputs=outputs)
    (unit,) = program.units.values()
    assert unit.output == "c"
    assert "Relu" in reason_of(program, "Relu")


def test_a_bias_stays_where_the_product_has_another_reader(annotated: Annotated) -> None:
    weights = {"w": normal(1, 8, 6), "b": normal(5, 6)}
    program = annotated(
        "m = MatMul(x, w) y = Add(m, b)", weights, outputs="float[N,3,9,6] y, float[N,3,9,6] m"
    )
    (unit,) = program.units.values()
    assert (unit.output, unit.bias) == ("m", None)
    assert reason_of(program, "Add") == "an operand is constant"


@pytest.mark.parametrize(
    ("body", "weights", "reason"),
    [
        ("n = Abs(w) y = Conv(x, n)", {"w": W}, "its weights are no float32 initializer"),
        ("n = Abs(b) y = Conv(x, w, n)", {"w": W, "b": normal(5, 6)}, "its bias is no float32 initializer"),
        ("f = Flatten(x) n = Abs(w) y = Gemm(f, n)", {"w": normal(1, 216, 6)}, "its weights are no float32"),
        ("f = Reshape(x, s) y = Gemm<transA=1>(f, w)", {"w": normal(1, 216, 6)}, "transA is set"),
        ("f = Flatten(x) y = Gemm<alpha=0.5>(f, w)", {"w": normal(1, 216, 6)}, "alpha or beta is not 1"),
        ("f = Flatten(x) y = Gemm<beta=0.5>(f, w)", {"w": normal(1, 216, 6)}, "alpha or beta is not 1"),
        ("f = Flatten(x) y = Gemm(f, w, b)", {"w": normal(1, 216, 6), "b": normal(5, 1)}, "no bias vector"),
        (
            "f = Flatten(x) y = Gemm(f, w, b)",
            {"w": normal(1, 216, 6), "b": normal(5, 6, 1)},
            "no bias vector",
        ),
        ("y = MatMul(w, x)", {"w": normal(1, 5, 9)}, "its left operand is constant"),
        ("y = MatMul(x, w)", {"w": normal(1, 3, 8, 6)}, "its weights have rank 3"),
    ],
)
def test_a_layer_that_no_kernel_takes_says_why(
    body: str, weights: dict[str, Array], reason: str, annotated: Annotated
) -> None:
    if "Reshape" in body:
        weights = {**weights, "s": np.array([216, -1])}
    program = annotated(body, weights, outputs="float[o,p] y" if "f =" in body else "float[o,p,q,r] y")
    op = "Conv" if "Conv" in body else "Gemm" if "Gemm" in body else "MatMul"
    assert reason in reason_of(program, op)
    assert not program.units
    assert not program.plan


@pytest.mark.parametrize("shape", [(1, 6), (6,)])
def test_the_c_of_a_gemm_is_a_bias_when_it_is_a_row(shape: tuple[int, ...], annotated: Annotated) -> None:
    weights = {"w": normal(1, 216, 6), "b": normal(5, *shape)}
    program = annotated("f = Flatten(x) y = Gemm(f, w, b)", weights, outputs="float[N,6] y")
    assert unit_that_writes(program, "y").bias == "b"


def test_a_layer_that_computes_in_another_type_stays(annotated: Annotated) -> None:
    program = annotated(
        "y = Conv(x, w)", {"w": W.astype(np.float64)}, inputs="double[N,3,9,8] x", outputs="double[N,6,7,6] y"
    )
    assert not program.units
    assert reason_of(program, "Conv") == "its weights are no float32 initializer"


def test_an_operator_of_another_domain_is_none_of_onnx(annotated: Annotated) -> None:
    program = annotated("c = Conv(x, w) y = other.Conv(c, u)", {"w": W, "u": U})
    assert kinds(program) == ["Conv"]


def test_weights_that_two_kinds_share_stay_with_the_first(annotated: Annotated) -> None:
    program = annotated(
        "y = MatMul(x, w) z = Gemm<transB=1>(x, w)",
        {"w": BIG},
        inputs="float[N,64] x",
        outputs="float[N,64] y, float[N,64] z",
    )
    assert kinds(program) == ["MatMul"]
    assert reason_of(program, "Gemm") == "its weights 'w' are shared with a node of another kind"
    program = annotated(
        "y = MatMul(x, w) z = MatMul(y, w)", {"w": BIG}, inputs="float[N,64] x", outputs="float[N,64] z"
    )
    assert kinds(program) == ["MatMul", "MatMul"]


# ---- skipping


SKIPPABLE = "[stem] c = Conv(x, w) [head_a] d = Conv(c, u) [head_b] y = Conv(d, u)"


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("stem", ["head_a", "head_b"]),
        ("head_*", ["stem"]),
        ("head_?", ["stem"]),
        ("*_b|stem", ["head_a"]),
        ("Conv", []),
    ],
)
def test_skipped_nodes_say_which_pattern_named_them(skip: str, left: list[str], annotated: Annotated) -> None:
    program = annotated(SKIPPABLE, {"w": W, "u": U}, f"skip={skip}")
    assert list(program.units) == left
    for name in {"stem", "head_a", "head_b"} - set(left):
        assert program.floats[name].removeprefix("skipped by pattern ").strip("'") in skip.split("|")


@pytest.mark.parametrize(
    ("skip", "near"), [("head_c", "did you mean 'head_"), ("conv", "did you mean 'Conv'")]
)
def test_a_pattern_that_names_nothing_is_an_error(skip: str, near: str, annotated: Annotated) -> None:
    with pytest.raises(
        UsageError, match=f"skip pattern {skip!r} matches no node name and no op type; {near}"
    ):
        annotated(SKIPPABLE, {"w": W, "u": U}, f"skip={skip}")


def test_a_pattern_still_names_what_other_passes_made_of_a_node(annotated: Annotated) -> None:
    """A MatMul that is a Gemm by now is meant by its own op; a folded node is nothing that could be skipped."""
    body = "[one] m = MatMul(x, w) a = Add(m, b) r = Relu(a) [two] y = Gemm(r, w)"
    weights, before = {"w": BIG, "b": normal(5, 64)}, "flatten-matmul"
    sizes = {"inputs": "float[N,64] x", "outputs": "float[N,64] y", "before": before}
    program = annotated(body, weights, "skip=MatMul", **sizes)
    assert [n.op for n in program.graph.nodes] == ["Gemm", "Relu", "Gemm"]
    assert list(program.units) == ["two"]
    assert program.floats["one"] == "skipped by pattern 'MatMul'"
    assert list(annotated(body, weights, "skip=Add", **sizes).units) == ["one", "two"]


def test_skipping_the_bias_or_the_activation_keeps_it_out(annotated: Annotated) -> None:
    body = "[m] m = MatMul(x, w) [a] a = Add(m, b) [r] y = Relu(a)"
    weights = {"w": BIG, "b": normal(5, 64)}
    for skip, nodes in (("a", ("m",)), ("r", ("m", "a"))):
        program = annotated(body, weights, f"skip={skip}", inputs="float[N,64] x", outputs="float[N,64] y")
        assert program.units["m"].nodes == nodes
        assert program.floats[skip] == f"skipped by pattern {skip!r}"


def test_what_an_earlier_pass_keeps_out_stays_out(parse_program: ParseProgram) -> None:
    program = parse_program(f"g ({IMAGE}) => ({MAP} y) {{ {SKIPPABLE} }}", {"w": W, "u": U}, 17)
    program.floats["stem"] = "it comes first"
    Pipeline.parse("annotate").run(program, Context())
    assert list(program.units) == ["head_a", "head_b"]
    assert program.floats == {"stem": "it comes first"}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("weights=uint4", "takes weights intB:tensor or intB:channel, B from 2 to 8, not uint4"),
        ("weights=int8:block=32", "not int8:block=32"),
        ("weights=int8:asymmetric", "not int8:asymmetric"),
        ("activations=uint4:channel", "activations have one scale a tensor, which uint4:channel has not"),
    ],
)
def test_schemes_that_no_kernel_takes_are_refused(options: str, complaint: str, annotated: Annotated) -> None:
    with pytest.raises(UsageError, match=complaint):
        annotated("y = Conv(x, w)", {"w": W}, options)


# ---- kernels between codes


@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_arithmetic_between_convolutions_works_on_codes(op: str, annotated: Annotated) -> None:
    body = f"c = Conv(x, w) d = Conv(x, v) s = {op}(c, d) r = Relu(s) y = Conv(r, u)"
    program = annotated(body, {"w": W, "v": V, "u": U})
    assert kinds(program) == ["Conv", "Conv", op, "Conv"]
    unit = unit_that_writes(program, "r")
    assert (len(unit.nodes), unit.inputs) == (2, ("c", "d"))
    assert len({program.plan[t].group for t in ("c", "d", "r")}) == 3  # each its own scale


def test_a_residual_between_floats_stays_float(annotated: Annotated) -> None:
    """The Add of a transformer's block: one float product, one float stream, a float norm behind."""
    body = "m = MatMul(x, w) s = Add(x, m) n = LayerNormalization(s, g) y = MatMul(n, w)"
    weights = {"w": BIG, "g": np.ones(64, np.float32)}
    program = annotated(body, weights, inputs="float[N,5,64] x", outputs="float[N,5,64] y")
    assert kinds(program) == ["MatMul", "MatMul"]
    assert reason_of(program, "Add") == "no quantized kernel feeds it, so integers would only add conversions"
    assert "no integer kernel for LayerNormalization" in reason_of(program, "LayerNormalization")
    assert set(program.plan) == {"x", "w", "n"}


def test_an_add_with_a_float_operand_stays_unless_its_sum_is_needed(annotated: Annotated) -> None:
    body = "c = Conv(x, w) t = Tanh(c) s = Add(c, t)"
    program = annotated(f"{body} y = Abs(s)", {"w": W})
    assert reason_of(program, "Add") == "not all of its inputs come from quantized kernels"
    program = annotated(f"{body} y = Conv(s, u)", {"w": W, "u": U})
    assert kinds(program) == ["Conv", "Add", "Conv"]


def test_an_add_of_a_constant_stays(annotated: Annotated) -> None:
    program = annotated(
        "c = Conv(x, w) s = Add(c, k) y = Conv(s, u)", {"w": W, "u": U, "k": normal(5, 6, 1, 1)}
    )
    assert reason_of(program, "Add") == "an operand is constant"


def test_a_concat_works_on_codes_when_all_of_it_does(annotated: Annotated) -> None:
    body, weights = "c = Conv(x, w) d = Conv(x, v) t = Tanh(c)", {"w": W, "v": V}
    program = annotated(
        f"{body} y = Concat<axis=1>(c, d)", weights, outputs="float[N,12,7,6] y, float[N,6,7,6] t"
    )
    assert kinds(program) == ["Conv", "Conv", "Concat"]
    program = annotated(f"{body} y = Concat<axis=1>(d, t)", weights, outputs="float[N,12,7,6] y")
    assert kinds(program) == ["Conv", "Conv"]
    assert reason_of(program, "Concat") == "not all of its inputs come from quantized kernels"


@pytest.mark.parametrize(
    ("node", "kind"),
    [
        ("AveragePool<kernel_shape=[2,2]>(c)", "AveragePool"),
        ("GlobalAveragePool(c)", "GlobalAveragePool"),
        ("LeakyRelu<alpha=0.1>(c)", "LeakyRelu"),
        ("MaxPool<kernel_shape=[2,2]>(c)", "MaxPool"),
    ],
)
def test_kernels_behind_codes_work_on_them_and_in_front_of_none_stay(
    node: str, kind: str, annotated: Annotated
) -> None:
    program = annotated(f"c = Conv(x, w) y = {node}", {"w": W}, outputs="float[N,6,p,q] y")
    assert kinds(program) == ["Conv", kind]
    assert (program.plan["y"].group == "c") == (kind == "MaxPool")  # which copies, so it shares the scale
    program = annotated(f"c = Tanh(x) y = {node}", {}, outputs="float[N,3,p,q] y")
    assert "no quantized kernel feeds it" in reason_of(program, kind)


@pytest.mark.parametrize("curve", ["Sigmoid(c)", "Softmax<axis=1>(c)"])
def test_a_curve_pays_only_in_front_of_codes(curve: str, annotated: Annotated) -> None:
    op = curve.partition("<")[0].partition("(")[0]
    program = annotated(f"c = Conv(x, w) y = {curve}", {"w": W})
    assert "its output leaves in float" in reason_of(program, op)
    program = annotated(f"c = Conv(x, w) t = {curve} y = Tanh(t)", {"w": W})
    assert "its output leaves in float" in reason_of(program, op)
    program = annotated(f"c = Conv(x, w) t = {curve} y = Conv(t, u)", {"w": W, "u": U})
    assert kinds(program) == ["Conv", op, "Conv"]


def test_a_swish_works_on_codes(annotated: Annotated) -> None:
    program = annotated("c = Conv(x, w) t = Sigmoid(c) s = Mul(c, t) y = Conv(s, u)", {"w": W, "u": U})
    assert kinds(program) == ["Conv", "Sigmoid", "Mul", "Conv"]


# ---- layout


LAYOUT = {
    "MaxPool": "l = MaxPool<kernel_shape=[2,2]>(c)",
    "Resize": 'l = Resize<mode="nearest">(c, , twice)',
    "Transpose": "l = Transpose<perm=[0,1,3,2]>(c)",
    "Reshape": "l = Reshape(c, shape)",
    "Flatten": "l = Flatten(c)",
    "Slice": "l = Slice(c, one, two, one)",
    "Split": "l, m = Split<axis=1>(c, halves)",
    "Pad": "l = Pad(c, pads)",
    "Identity": "l = Identity(c)",
    "Gather": "l = Gather<axis=1>(c, one)",
    "Tile": "l = Tile(c, twos)",
}
LAYOUT_CONSTANTS: dict[str, Array] = {
    "twice": np.array([1, 1, 2, 2], np.float32),
    "shape": np.array([0, 0, 6, 7]),
    "one": np.array([1]),
    "two": np.array([2]),
    "halves": np.array([3, 3]),
    "twos": np.array([1, 1, 2, 2]),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
}


@pytest.mark.parametrize("op", LAYOUT)
def test_layout_hands_codes_on_under_one_scale(op: str, annotated: Annotated) -> None:
    others = ", float[N,3,7,6] m" if op == "Split" else ""
    shape = "o,p" if op == "Flatten" else "o,p,q,r"
    constants = {"w": W, **{k: v for k, v in LAYOUT_CONSTANTS.items() if k in LAYOUT[op]}}
    program = annotated(f"c = Conv(x, w) {LAYOUT[op]}", constants, outputs=f"float[{shape}] l{others}")
    unit = unit_that_writes(program, "l")
    assert (unit.kind, unit.is_layout, unit.inputs) == (op, True, ("c",))
    assert {program.plan[t].group for t in unit.outputs} == {"c"}
    assert unit.outputs == (("l", "m") if op == "Split" else ("l",))


@pytest.mark.parametrize(
    ("op", "node", "reason"),
    [
        ("Resize", 'Resize<mode="linear">(c, , twice)', "mode linear changes codes"),
        (
            "Resize",
            'Resize<mode="nearest",coordinate_transformation_mode="tf_crop_and_resize">(c, roi, twice)',
            "it fills with a constant outside its input",
        ),
        ("Pad", "Pad(c, pads, k)", "it pads with something other than zero"),
        ("Pad", "Pad(c, pads, n)", "it pads with something other than zero"),
        ("MaxPool", "MaxPool<kernel_shape=[2,2]>(c)", "it also writes indices"),
    ],
)
def test_layout_that_changes_values_stays(op: str, node: str, reason: str, annotated: Annotated) -> None:
    pool = ", i = " if op == "MaxPool" else " = "
    constants = {
        **LAYOUT_CONSTANTS,
        "k": np.float32(1),
        "roi": np.array([0, 0, 0, 0, 1, 1, 2, 2], np.float32),
    }
    used = {"w": W, **{k: v for k, v in constants.items() if k in node.partition("(")[2].split(")")[0]}}
    body = f"c = Conv(x, w) n = ReduceMax<keepdims=0>(x) y{pool}{node}"
    program = annotated(body, used, outputs="float[o,p,q,r] y")
    assert reason_of(program, op) == reason


def test_a_chain_of_layout_shares_one_scale_named_after_its_first_tensor(annotated: Annotated) -> None:
    body = "c = Conv(x, w) a = MaxPool<kernel_shape=[2,2]>(c) b = Transpose(a) y = Identity(b) z = Conv(a, u)"
    program = annotated(body, {"w": W, "u": U}, outputs="float[o,p,q,N] y, float[N,6,o,p] z")
    assert {program.plan[t].group for t in "caby"} == {"c"}
    assert program.plan["z"].group == "z"


@pytest.mark.parametrize(
    ("node", "constants"),
    [
        ("l = Reshape(t, shape)", {"shape": np.array([0, 3, 8, 9])}),
        ("l = Transpose<perm=[0,1,3,2]>(t)", {}),
        ("l = Pad(t, pads)", {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}),
        ("k = Transpose<perm=[0,1,3,2]>(t) l = Identity(k)", {}),
    ],
)
def test_codes_are_made_before_a_reshape_that_only_feeds_a_kernel(
    node: str, constants: dict[str, Array], annotated: Annotated
) -> None:
    body, outputs = f"t = Tanh(x) {node} y = Conv(l, w)", "float[N,6,o,p] y"
    program = annotated(body, {"w": W, **constants}, outputs=outputs)
    assert all(unit.is_layout for unit in program.units.values() if unit.kind != "Conv")
    assert len(program.units) == len(program.graph.nodes) - 1  # all but Tanh
    assert {program.plan[t].group for t in ("t", "l")} == {"t"}


@pytest.mark.parametrize(
    ("more", "outputs"),
    [
        ("z = Abs(l)", "float[N,3,8,9] z"),
        ("z = Identity(l)", "float[N,3,8,9] l"),
        ("z = Abs(t)", "float[N,3,9,8] z"),
    ],
)
def test_codes_are_made_behind_a_reshape_that_a_float_node_reads(
    more: str, outputs: str, annotated: Annotated
) -> None:
    body = f"t = Tanh(x) l = Transpose<perm=[0,1,3,2]>(t) y = Conv(l, w) {more}"
    program = annotated(body, {"w": W}, outputs=f"float[N,6,6,7] y, {outputs}")
    assert "t" not in program.plan
    assert not unit_that_writes(program, "y").is_layout
    assert (
        "no quantized kernel feeds it"
        in program.floats[next(n.name for n in program.graph.nodes if n.op == "Transpose")]
    )


def test_a_product_in_front_of_a_reshape_writes_codes_then(annotated: Annotated) -> None:
    body = "m = MatMul(x, w) l = Reshape(m, shape) y = MatMul(l, w)"
    weights = {"w": BIG, "shape": np.array([-1, 64])}
    program = annotated(body, weights, inputs="float[N,5,64] x", outputs="float[o,64] y")
    assert [u.is_layout for u in program.units.values()] == [False, True, False]
    assert program.plan["m"].group == program.plan["l"].group == "m"


# ---- products


def test_products_of_two_activations_pay_only_between_codes(annotated: Annotated) -> None:
    sizes = {"inputs": "float[N,5,64] x, float[N,64,7] z", "outputs": "float[N,5,7] y"}
    program = annotated("y = MatMul(x, z)", {}, **sizes)
    assert "(products=all)" in reason_of(program, "MatMul")
    program = annotated("y = MatMul(x, z)", {}, "products=all", **sizes)
    unit = unit_that_writes(program, "y")
    assert (unit.inputs, unit.weight, unit.float_output) == (("x", "z"), None, True)
    assert set(program.plan) == {"x", "z"}


def test_a_product_of_two_held_activations_works_on_codes(annotated: Annotated) -> None:
    body = "c = Conv(x, w) d = Conv(x, v) t = Transpose<perm=[0,1,3,2]>(d) y = MatMul(c, t)"
    program = annotated(body, {"w": W, "v": V}, outputs="float[N,6,7,7] y")
    assert kinds(program) == ["Conv", "Conv", "Transpose", "MatMul"]


def test_a_small_product_pays_only_behind_codes(annotated: Annotated) -> None:
    sizes = {"inputs": "float[N,64] x", "outputs": "float[N,o] y"}
    small = normal(1, 64, 32)  # 2048 weights, the default limit
    program = annotated("y = MatMul(x, w)", {"w": small}, "", **sizes)
    assert reason_of(program, "MatMul") == "so small that conversions cost more than integers save"
    assert kinds(annotated("y = MatMul(x, w)", {"w": normal(1, 64, 33)}, "", **sizes)) == ["MatMul"]
    assert kinds(annotated("y = MatMul(x, w)", {"w": small}, "small=2047", **sizes)) == ["MatMul"]
    body = "a = MatMul(x, v) r = Relu(a) y = MatMul(r, w)"
    program = annotated(body, {"v": BIG, "w": small}, "", **sizes)
    assert kinds(program) == ["MatMul", "MatMul"]
    program = annotated(f"{body} ".replace("y =", "c =") + "y = Relu(c)", {"v": BIG, "w": small}, "", **sizes)
    assert kinds(program) == ["MatMul"]  # the Relu would need codes behind it
    program = annotated(body, {"v": BIG, "w": normal(1, 64, 3)}, "", **sizes)
    assert kinds(program) == ["MatMul"]  # under 256 weights


# ---- tables


def test_an_embedding_lookup_is_a_table_of_the_activations_scheme(annotated: Annotated) -> None:
    sizes = {"inputs": "int64[N,5] i", "outputs": "float[N,5,64] y"}
    program = annotated("y = Gather(t, i)", {"t": normal(1, 100, 64)}, "", **sizes)
    (unit,) = program.units.values()
    assert (unit.is_table, unit.weight, unit.inputs) == (True, "t", ())
    assert {name: (str(d.scheme), d.group, d.is_weight) for name, d in program.plan.items()} == {
        "t": ("uint8", "t", True),
        "y": ("uint8", "t", False),
    }
    program = annotated("y = Gather(t, i)", {"t": normal(1, 64, 64)}, "", **sizes)
    assert reason_of(program, "Gather") == "its table is small"


def test_what_becomes_a_unit_keeps_its_weights_where_they_are(annotated: Annotated) -> None:
    """Read values would be held beside those of the model, all of a network's at once."""
    program = annotated(
        "e = Gather(t, i) y = MatMul(e, w)",
        {"t": normal(1, 100, 64), "w": BIG},
        inputs="int64[N,5] i",
        outputs="float[N,5,64] y",
    )
    assert sorted(kinds(program)) == ["Gather", "MatMul"]
    tensors = program.graph.tensors()
    assert all(isinstance(tensors[name]._values, LazyValues) for name in ("t", "w"))


@pytest.mark.parametrize(
    ("node", "table"),
    [
        ("y = Gather(t, k)", normal(1, 100, 64)),
        ("y = Gather(t, i)", normal(1, 100, 8, 8)),
        ("y = Gather<axis=1>(t, i)", normal(1, 100, 64)),
    ],
)
def test_other_lookups_stay(node: str, table: Array, annotated: Annotated) -> None:
    weights = {"t": table} | ({"k": np.arange(50)} if "k" in node else {})
    program = annotated(
        f"j = Neg(i) {node}",
        weights,
        "",
        inputs="int64[N] i",
        outputs="float[*] y".replace("*", "a,b" + ",c" * (table.ndim - 2)),
    )
    assert reason_of(program, "Gather") == "it is no embedding lookup (rows of a matrix)"


def test_lookups_in_one_table_share_its_scale(annotated: Annotated) -> None:
    body = "y = Gather(t, i) z = Gather(t, j)"
    sizes = {"inputs": "int64[N] i, int64[N] j", "outputs": "float[N,64] y, float[N,64] z"}
    program = annotated(body, {"t": normal(1, 100, 64)}, **sizes)
    assert kinds(program) == ["Gather", "Gather"]
    assert {d.group for d in program.plan.values()} == {"t"}


def test_a_table_that_is_a_layer_as_well_belongs_to_the_first(annotated: Annotated) -> None:
    sizes = {"inputs": "int64[N] i, float[N,64] x", "outputs": "float[N,64] y, float[N,100] z"}
    program = annotated("y = Gather(t, i) z = Gemm<transB=1>(x, t)", {"t": normal(1, 100, 64)}, **sizes)
    assert kinds(program) == ["Gather"]
    assert "shared with a node of another kind" in reason_of(program, "Gemm")


# ---- what is not known


def test_without_inferred_types_layers_are_still_found(annotated: Annotated) -> None:
    """Behind an operator that nobody knows there are no types: what needs one stays, what does not is a unit."""
    body = """o = other.Odd(x) c = Conv(o, w) q = other.Odd(x) m = MaxPool<kernel_shape=[2,2]>(q) p = MatMul(q, q)
        y = other.Join(c, m, p)"""
    program = annotated(body, {"w": W}, "products=all")
    assert kinds(program) == ["Conv"]
    assert program.graph.tensors()["q"].dtype is None
    matmul = next(n.name for n in program.graph.nodes if n.op == "MatMul")
    assert program.floats[matmul] == "its operands are not float32"


def test_integer_nodes_are_nobodys_loss(annotated: Annotated) -> None:
    program = annotated(
        "j = Reshape(i, s) y = Add(j, j)", {"s": np.array([-1])}, inputs="int64[N,2] i", outputs="int64[o] y"
    )
    assert not program.units
    assert not program.floats


def test_layers_in_a_body_stay_and_say_where_they_are(annotated: Annotated) -> None:
    body = """y = If(b) <then_branch = t () => (float[N,6,7,6] p) { [inner] p = Conv(x, w) },
                         else_branch = e () => (float[N,6,7,6] q) { r = Conv(x, w) q = Abs(r) }>"""
    program = annotated(body, {"w": W}, inputs=f"{IMAGE}, bool b")
    assert not program.units
    assert "inside a body of If node" in program.floats["inner"]


def test_units_stand_in_graph_order_and_every_float_node_has_a_reason(annotated: Annotated) -> None:
    body = """c = Conv(x, w) r = Relu(c) t = Tanh(r) d = Conv(t, u) p = MaxPool<kernel_shape=[2,2]>(d)
              e = Exp(p) s = Sigmoid(p) y = Add(e, s)"""
    program = annotated(body, {"w": W, "u": U}, outputs="float[N,6,o,p] y")
    order = [n.name for n in program.graph.nodes]
    assert list(program.units) == [n for n in order if n in program.units]
    absorbed = {name for unit in program.units.values() for name in unit.nodes}
    assert absorbed | set(program.floats) == set(order)
    assert not absorbed & set(program.floats)


@pytest.mark.parametrize(
    ("other", "where"),
    [
        ("z = ReduceSum(w)", "by node 'ReduceSum_1'"),
        ("z = If(take) < then_branch = g1 () => (float[a,b] s) { s = Identity(w) }, "
         "else_branch = g2 () => (float[a,b] s) { s = Neg(w) } >", "outside the graph's own nodes"),
    ],
)  # fmt: skip
def test_weights_that_must_stay_in_float_are_not_stored_twice(
    other: str, where: str, annotated: Annotated
) -> None:
    program = annotated(
        f"y = MatMul(x, w) {other}",
        {"w": BIG},
        inputs="float[N,64] x, bool take",
        outputs="float[N,64] y, float[c,d] z",
    )
    assert reason_of(program, "MatMul") == f"its weights 'w' are needed in float32 {where}"
