"""Folding BatchNormalization, Mul and Add: equal outputs in two runtimes, reasons where nothing is folded."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

from onnxq.model.load import load_model
from onnxq.model.prepare import prepare
from onnxq.passes.fold_batchnorm import FoldBatchNorm
from onnxq.pipeline import Context, PassResult
from onnxq.program import Program

C = 4  # output channels

X, Y, Z = "float[2,6,5,4] x", "float[a,b,c,d] y", "float[e,f,h,i] z"
IMAGE, MATRIX = f"g ({X}) => ({Y})", "g (float[3,5] x) => (float[a,b] y)"
NORM = "y = BatchNormalization<epsilon=0.01>(c, gamma, beta, mean, var)"
MUL, ADD = "y = Mul(c, m)", "y = Add(c, m)"


def rand(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape) + 5).normal(size=shape).astype(np.float32)


def norm(channels: int = C) -> dict[str, NDArray[np.float32]]:
    """Parameters of a BatchNormalization."""
    rng = np.random.default_rng(3)
    values = {name: rng.normal(size=channels) for name in ("gamma", "beta", "mean")}
    values["var"] = rng.uniform(0.05, 4.0, channels)
    return {name: value.astype(np.float32) for name, value in values.items()}


CONV = {"w": rand(C, 6, 3, 3), "b": rand(C)}
BN_CONV = {**CONV, **norm()}
GEMM = {"w": rand(5, C), "b": rand(C), "m": rand(C)}


def ops(program: Program) -> list[str]:
    return [n.op for n in program.graph.nodes]


Fold = Callable[..., tuple[Program, PassResult]]


@pytest.fixture
def fold(parse_program: Callable[..., Program], assert_same: Callable[..., None]) -> Fold:
    """Runs the pass on a graph in text and compares what the graph computes before and after."""

    def folded(text: str, weights: dict[str, Any], opset: int = 21, reference: bool = True) -> Any:
        program = parse_program(text, weights, opset)
        before = program.to_model()
        result = FoldBatchNorm().run(program, Context())
        assert_same(before, program.to_model(), reference=reference)
        return program, result

    return folded


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        (f"{IMAGE} {{ c = Conv(x, w, b) {NORM} }}", BN_CONV),
        (f"{IMAGE} {{ c = Conv<pads=[1,1,1,1], strides=[2,1]>(x, w) {NORM} }}", {**norm(), "w": CONV["w"]}),
        (f"{IMAGE} {{ c = Conv<group=2>(x, w, b) {NORM} }}", {**BN_CONV, "w": rand(C, 3, 3, 3)}),
        (f"{IMAGE} {{ c = Conv<group=6>(x, w) {NORM} }}", {**norm(6), "w": rand(6, 1, 3, 3)}),
        (
            f"g (float[2,6,9] x) => (float[a,b,c] y) {{ c = Conv(x, w, b) {MUL} }}",
            {"w": rand(C, 6, 3), "b": rand(C), "m": rand(C, 1)},
        ),
        (
            "g (float[1,2,4,5,3] x) => (float[a,b,c,d,e] y) { c = Conv(x, w) y = Add(m, c) }",
            {"w": rand(C, 2, 2, 2, 2), "m": rand(1, C, 1, 1, 1)},
        ),
        (f"{IMAGE} {{ c = ConvTranspose(x, w) {NORM} }}", {**norm(), "w": rand(6, C, 2, 2)}),
        (
            f"{IMAGE} {{ c = ConvTranspose<group=2, strides=[2,2]>(x, w, b) {NORM} }}",
            {**BN_CONV, "w": rand(6, 2, 3, 2)},
        ),
        (
            f"{IMAGE} {{ c = ConvTranspose<group=3>(x, w) {MUL} }}",
            {"w": rand(6, 2, 3, 2), "m": rand(6, 1, 1)},
        ),
        (f"{MATRIX} {{ c = Gemm(x, w, b) {NORM} }}", {**BN_CONV, "w": rand(5, C)}),
        (f"{MATRIX} {{ c = Gemm<transB=1>(x, w) {NORM} }}", {**norm(), "w": rand(C, 5)}),
        (
            f"{MATRIX} {{ c = Gemm<transB=1>(x, w, b) {MUL} }}",
            {"w": rand(C, 5), "b": rand(1, C), "m": rand(C)},
        ),
        (f"{MATRIX} {{ c = Gemm(x, w, b) {ADD} }}", {**GEMM, "b": np.float32(2), "m": rand(1, C)}),
        (f"{MATRIX} {{ c = Gemm(x, w, b) {MUL} }}", {**GEMM, "b": rand(1, 1)}),
        (f"{MATRIX} {{ c = Gemm(x, w, b) {ADD} }}", {**GEMM, "m": np.float32(2)}),
        *(
            (f"{IMAGE} {{ c = Conv(x, w, b) y = {op}({operands}) }}", {**CONV, "m": rand(*shape)})
            for op in ("Mul", "Add")
            for operands in ("c, m", "m, c")
            for shape in ((1, C, 1, 1), (C, 1, 1), (), (1,), (1, 1, 1))
        ),
    ],
)
def test_one_node_is_folded(fold: Fold, text: str, weights: dict[str, Any]) -> None:
    # ONNX 1.23's evaluator cannot run a ConvTranspose whose groups have several channels.
    program, result = fold(text, weights, reference="ConvTranspose<group" not in text)
    assert len(ops(program)) == 1
    assert result == PassResult(1, {})


def test_opset_7_batch_normalization_is_folded(fold: Fold) -> None:
    # ONNX 1.23's evaluator computes opset 9, to which this is raised, as if in training.
    program, result = fold(f"{IMAGE} {{ c = Conv(x, w, b) {NORM} }}", BN_CONV, 7, False)
    assert (ops(program), result.changed) == (["Conv"], 1)


def test_a_chain_becomes_one_convolution(fold: Fold) -> None:
    text = f"{IMAGE} {{ k = Conv(x, w) c = Add(t, k) {NORM.replace('y =', 'n =')} y = Mul(n, s) }}"
    weights = {"w": CONV["w"], **norm(), "s": rand(C, 1, 1), "t": rand(1, C, 1, 1)}
    program, result = fold(text, weights)
    assert (ops(program), result.changed) == (["Conv"], 3)


def test_a_second_run_changes_nothing(fold: Fold) -> None:
    program, _ = fold(f"{IMAGE} {{ c = Conv(x, w, b) {NORM} }}", BN_CONV)
    assert FoldBatchNorm().run(program, Context()) == PassResult(0, {})


def test_shared_weights_are_copied(fold: Fold) -> None:
    text = f"g ({X}) => ({Y}, {Z}) {{ c = Conv(x, w, b) {NORM} z = Conv(x, w, b) }}"
    program, result = fold(text, BN_CONV)
    first, second = program.graph.nodes
    assert (ops(program), result.changed) == (["Conv", "Conv"], 1)
    np.testing.assert_array_equal(second.inputs[1].values, CONV["w"])
    np.testing.assert_array_equal(second.inputs[2].values, CONV["b"])
    assert first.inputs[1] is not second.inputs[1]


def test_an_add_leaves_the_weights_alone(fold: Fold) -> None:
    program, _ = fold(f"{IMAGE} {{ c = Conv(x, w) {ADD} }}", {"w": CONV["w"], "m": rand(C, 1, 1)})
    assert program.graph.nodes[0].inputs[1].name == "w"


def test_names_that_are_taken_are_not_used(fold: Fold) -> None:
    text = f"g ({X}) => ({Y}, float[e,f,h,i] w_folded) {{ c = Conv(x, w, b) {NORM} w_folded = Relu(x) }}"
    program, _ = fold(text, BN_CONV)
    convolution = next(n for n in program.graph.nodes if n.op == "Conv")
    assert convolution.inputs[1].name == "w_folded_1"


BRANCHES = (
    "z = If(p) <then_branch = t () => (float[a,b,c,d] u) { u = Relu(c) },"
    " else_branch = e () => (float[a,b,c,d] v) { v = Neg(c) }>"
)
TRAINED = "y, m, v = BatchNormalization<training_mode=1>(c, gamma, beta, mean, var)"


@pytest.mark.parametrize(
    ("text", "weights", "reason"),
    [
        (f"g ({X}) => ({Y}, {Z}) {{ c = Conv(x, w, b) {NORM} z = Relu(c) }}", BN_CONV, "read elsewhere"),
        (f"g ({X}) => ({Y}, float[a,b,c,d] c) {{ c = Conv(x, w, b) {NORM} }}", BN_CONV, "read elsewhere"),
        (
            f"g ({X}, bool p) => ({Y}, {Z}) {{ c = Conv(x, w, b) {NORM} {BRANCHES} }}",
            BN_CONV,
            "read elsewhere",
        ),
        (
            f"g ({X}) => ({Y}, float[4] m, float[4] v) {{ c = Conv(x, w, b) {TRAINED} }}",
            BN_CONV,
            "training mode",
        ),
        (f"{IMAGE} {{ r = Conv(x, w, b) c = Relu(r) {NORM} }}", BN_CONV, "no convolution or Gemm comes"),
        (f"{IMAGE} {{ {NORM.replace('(c,', '(x,')} }}", norm(6), "no convolution or Gemm comes"),
        (
            f"g ({X}, float[4,6,3,3] w) => ({Y}) {{ c = Conv(x, w) {MUL} }}",
            {"m": rand(C, 1, 1)},
            "the weights or bias of 'Conv_0' are no float32 initializers",
        ),
        (
            f"g ({X}, float[4] gamma) => ({Y}) {{ c = Conv(x, w, b) {NORM} }}",
            {k: v for k, v in BN_CONV.items() if k != "gamma"},
            "parameters are no float32 initializers",
        ),
        (f"{MATRIX} {{ c = Gemm(x, w, b) {MUL} }}", {**GEMM, "b": rand(3, C)}, "no bias vector"),
        (f"{MATRIX} {{ c = Gemm(x, w, b) {MUL} }}", {**GEMM, "b": rand(3, 1)}, "no bias vector"),
        (f"{MATRIX} {{ c = Gemm<alpha=0.5>(x, w, b) {MUL} }}", GEMM, "has alpha or beta"),
        (f"{MATRIX} {{ c = Gemm<beta=0.5>(x, w, b) {MUL} }}", GEMM, "has alpha or beta"),
        (f"{MATRIX} {{ c = Gemm(x, w, b) {MUL} }}", {**GEMM, "m": rand(3, 1)}, "not per channel"),
        (f"{IMAGE} {{ c = Conv(x, w, b) {MUL} }}", {**CONV, "m": rand(C, 3, 2)}, "not per channel"),
        *(  # every axis is as long as there are channels; the constant lies along another one than theirs
            (
                f"g (float[4,6,6,6] x) => ({Y}) {{ c = Conv(x, w, b) {MUL} }}",
                {**CONV, "m": rand(*shape)},
                "not per channel",
            )
            for shape in ((C,), (C, 1), (C, 1, 1, 1), (C, C))
        ),
        (
            f"g ({X}) => (float[e,a,b,c,d] y) {{ c = Conv(x, w, b) {MUL} }}",
            {**CONV, "m": rand(1, 1, 1, 1, 1)},
            "not per channel",
        ),
    ],
)
def test_what_stays_has_a_reason(fold: Fold, text: str, weights: dict[str, Any], reason: str) -> None:
    program, result = fold(text, weights)
    ((name, found),) = result.skipped.items()
    assert result.changed == 0
    assert re.search(reason, found)
    assert name in {n.name for n in program.graph.nodes}


def test_a_variance_that_is_not_positive_stays(parse_program: Callable[..., Program]) -> None:
    weights = {**BN_CONV, "var": np.array([1, 0, 1, 1], np.float32)}
    program = parse_program(f"{IMAGE} {{ c = Conv(x, w, b) {NORM.replace('0.01', '0.0')} }}", weights)
    reasons = FoldBatchNorm().run(program, Context()).skipped.values()
    assert list(reasons) == ["its variance is not positive"]


def test_other_domains_and_two_variable_operands_are_left(parse_program: Callable[..., Program]) -> None:
    text = f"g ({X}) => ({Y}, {Z}) {{ c = Conv(x, w) y = Mul(c, c) d = Conv(x, w) z = other.Mul(d, m) }}"
    program = parse_program(text, {"w": CONV["w"], "m": rand(C, 1, 1)})
    assert FoldBatchNorm().run(program, Context()) == PassResult(0, {})
    assert ops(program) == ["Conv", "Mul", "Conv", "Mul"]


def test_a_shipped_model(models_dir: Path, assert_same: Callable[..., None]) -> None:
    program = Program.from_model(prepare(load_model(models_dir / "digits_cnn.onnx"), 13)[0])
    before = program.to_model()
    result = FoldBatchNorm().run(program, Context())
    assert result == PassResult(ops(Program.from_model(before)).count("BatchNormalization"), {})
    assert result.changed > 0
    assert "BatchNormalization" not in ops(program)
    assert_same(before, program.to_model(), reference=False)


def test_real_models(data_dir: Path, assert_same: Callable[..., None]) -> None:
    for name in ("cifar10_resnet20_bn", "imagenet_mobilenetv1_025", "kws_dscnn"):
        program = Program.from_model(prepare(load_model(data_dir / "models" / f"{name}.onnx"), 13)[0])
        before = program.to_model()
        assert FoldBatchNorm().run(program, Context()).changed > 8
        assert_same(before, program.to_model(), reference=False)


def test_golden(fold: Fold, golden: Callable[[str, ModelProto], None]) -> None:
    text = (
        f"{IMAGE} {{ c = Conv<pads=[1,1,1,1]>(x, w) {NORM.replace('y =', 'n =')} m = Mul(n, s) y = Relu(m) }}"
    )
    program, _ = fold(text, {"w": CONV["w"], **norm(), "s": np.float32(0.5)})
    golden("fold_batchnorm", program.to_model())
