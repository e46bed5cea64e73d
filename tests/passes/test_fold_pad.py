"""Folding Pad into convolutions and average pools: equal outputs in two runtimes, reasons where a Pad stays."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

from onnxq.passes.fold_pad import FoldPad
from onnxq.pipeline import Context, PassResult
from onnxq.program import Program

X, Y = "float[2,3,6,5] x", "float[a,b,c,d] y"
GRAPH = f"g ({X}) => ({Y})"
CONV, POOL = "y = Conv(p, w)", "y = AveragePool<kernel_shape=[3,2]>(p)"
W = np.random.default_rng(0).normal(size=(4, 3, 3, 2)).astype(np.float32)
ZERO = np.float32(0)


Amounts = NDArray[np.int64]


def pads(*values: int) -> Amounts:
    """All begins, then all ends."""
    return np.array(values, np.int64)


SAME = pads(0, 0, 1, 1, 0, 0, 1, 1)
UNEQUAL = pads(0, 0, 2, 0, 0, 0, 1, 1)

Fold = Callable[..., tuple[Program, PassResult]]


@pytest.fixture
def fold(parse_program: Callable[..., Program], assert_same: Callable[..., None]) -> Fold:
    """Runs the pass on a graph in text and compares what the graph computes before and after."""

    def folded(text: str, amounts: Amounts, opset: int = 21, **weights: Any) -> Any:
        program = parse_program(text, {"amounts": amounts, "w": W, **weights}, opset)
        before = program.to_model()
        result = FoldPad().run(program, Context())
        # ONNX 1.23's evaluator cannot crop. The order of float32 sums may differ where zeros are read or left out:
        # 1e-6 of the largest output.
        assert_same(before, program.to_model(), tolerance=1e-6, reference=bool(amounts.min() >= 0))
        return program, result

    return folded


def ops(program: Program) -> list[str]:
    return [n.op for n in program.graph.nodes]


@pytest.mark.parametrize(
    ("text", "amounts", "expected"),
    [
        (f"{GRAPH} {{ p = Pad(x, amounts) {CONV} }}", SAME, [1, 1, 1, 1]),
        (f"{GRAPH} {{ p = Pad(x, amounts) {CONV} }}", UNEQUAL, [2, 0, 1, 1]),
        (f"{GRAPH} {{ p = Pad(x, amounts, zero) {CONV} }}", UNEQUAL, [2, 0, 1, 1]),
        (
            f'{GRAPH} {{ p = Pad<mode="constant">(x, amounts) y = Conv<auto_pad="VALID">(p, w) }}',
            SAME,
            [1, 1, 1, 1],
        ),
        (f"{GRAPH} {{ p = Pad(x, amounts) y = Conv<pads=[0,1,2,3]>(p, w) }}", UNEQUAL, [2, 1, 3, 4]),
        (
            f"{GRAPH} {{ p = Pad(x, amounts) y = Conv<strides=[2,2]>(p, w) }}",
            pads(0, 0, 9, 0, 0, 0, 0, 7),
            [9, 0, 0, 7],
        ),
        (f"{GRAPH} {{ p = Pad(x, amounts) {POOL} }}", SAME, [1, 1, 1, 1]),
        (f"{GRAPH} {{ p = Pad(x, amounts, zero) {POOL} }}", UNEQUAL, [2, 0, 1, 1]),
        (
            f"{GRAPH} {{ p = Pad(x, amounts)"
            " y = AveragePool<kernel_shape=[3,2], pads=[1,0,0,0], count_include_pad=1>(p) }",
            SAME,
            [2, 1, 1, 1],
        ),
        (f"{GRAPH} {{ q = Pad(x, amounts) p = Pad(q, amounts) {CONV} }}", UNEQUAL, [4, 0, 2, 2]),
    ],
)
def test_zero_pads_become_the_nodes_own(fold: Fold, text: str, amounts: Amounts, expected: list[int]) -> None:
    program, result = fold(text, amounts, zero=ZERO)
    (node,) = program.graph.nodes
    assert node.attrs["pads"] == expected
    assert result == PassResult(len(re.findall(r"\bPad\b", text)), {})


def test_opset_11_and_a_one_dimensional_convolution(fold: Fold) -> None:
    text = "g (float[2,3,9] x) => (float[a,b,c] y) { p = Pad(x, amounts) y = Conv(p, v) }"
    program, result = fold(text, pads(0, 0, 2, 0, 0, 1), 11, v=W[..., 0])
    assert (ops(program), result.changed) == (["Conv"], 1)


def test_a_pad_with_other_readers_stays_for_them(fold: Fold) -> None:
    outputs = f"{Y}, float[e,f,h,i] z, float[e,f,h,i] p"
    text = f"g ({X}) => ({outputs}) {{ p = Pad(x, amounts) {CONV} z = Relu(p) }}"
    program, result = fold(text, SAME)
    pad, convolution, relu = program.graph.nodes
    assert (pad.op, result.changed) == ("Pad", 1)
    assert convolution.inputs[0] is pad.inputs[0]
    assert relu.inputs[0] is pad.outputs[0]


def test_a_pad_that_only_a_branch_reads_besides_stays(fold: Fold) -> None:
    branches = (
        "z = If(q) <then_branch = t () => (float[a,b,c,d] u) { u = Relu(p) },"
        " else_branch = e () => (float[a,b,c,d] v) { v = Neg(p) }>"
    )
    text = f"g ({X}, bool q) => ({Y}, float[e,f,h,i] z) {{ p = Pad(x, amounts) {CONV} {branches} }}"
    program, result = fold(text, SAME)
    assert (sorted(ops(program)), result.changed) == (["Conv", "If", "Pad"], 1)


@pytest.mark.parametrize(
    ("text", "amounts", "reason"),
    [
        (f"{GRAPH} {{ p = Pad(x, amounts) {CONV} }}", pads(0, 0, -1, 1, 0, 0, 1, 1), "crops"),
        (f"{GRAPH} {{ p = Pad(x, amounts) {CONV} }}", pads(1, 0, 1, 1, 0, 0, 1, 1), "batch or channels"),
        (
            f"g (float[2,2,6,5] x) => ({Y}) {{ p = Pad(x, amounts) {CONV} }}",
            pads(0, 0, 1, 1, 0, 1, 1, 1),
            "batch or channels",
        ),
        *(
            (f'{GRAPH} {{ p = Pad<mode="{mode}">(x, amounts) {CONV} }}', SAME, f"its mode is {mode}")
            for mode in ("reflect", "edge", "wrap")
        ),
        (f"{GRAPH} {{ p = Pad(x, amounts, one) {CONV} }}", SAME, "other than zero"),
        (f"{GRAPH} {{ p = Pad(x, amounts, , axes) {CONV} }}", pads(1, 1, 1, 1), "all axes"),
        (
            f'{GRAPH} {{ p = Pad(x, amounts) y = Conv<auto_pad="SAME_UPPER">(p, w) }}',
            SAME,
            r"'Conv_1' chooses its own pads \(SAME_UPPER\)",
        ),
        (
            f"{GRAPH} {{ p = Pad(x, amounts) y = AveragePool<kernel_shape=[3,2], pads=[1,0,0,0]>(p) }}",
            SAME,
            "leaves its own padding out of the mean",
        ),
        (
            f"{GRAPH} {{ p = Pad(x, amounts)"
            " y = AveragePool<kernel_shape=[3,2], strides=[2,2], ceil_mode=1>(p) }",
            SAME,
            "rounds its size up",
        ),
        (f"{GRAPH} {{ p = Pad(x, amounts) {POOL} }}", pads(0, 0, 0, 2, 0, 0, 0, 0), "as large as its kernel"),
    ],
)
def test_what_stays_has_a_reason(fold: Fold, text: str, amounts: Amounts, reason: str) -> None:
    program, result = fold(text, amounts, one=np.float32(1), axes=pads(2, 3))
    ((name, found),) = result.skipped.items()
    assert result.changed == 0
    assert re.search(reason, found)
    assert name in {n.name for n in program.graph.nodes if n.op == "Pad"}


def test_amounts_that_are_computed_stay(parse_program: Callable[..., Program]) -> None:
    program = parse_program(f"g ({X}, int64[8] amounts) => ({Y}) {{ p = Pad(x, amounts) {CONV} }}", {"w": W})
    reasons = FoldPad().run(program, Context()).skipped.values()
    assert list(reasons) == ["it does not pad all axes by constant amounts"]


def test_other_readers_of_a_pad_are_no_business_of_the_pass(fold: Fold) -> None:
    program, result = fold(f"{GRAPH} {{ p = Pad(x, amounts) y = MaxPool<kernel_shape=[2,2]>(p) }}", SAME)
    assert (ops(program), result) == (["Pad", "MaxPool"], PassResult(0, {}))


def test_golden(fold: Fold, golden: Callable[[str, ModelProto], None]) -> None:
    text = f"{GRAPH} {{ q = Pad(x, amounts) c = Conv(q, w) p = Pad(c, amounts) {POOL} }}"
    program, _ = fold(text, UNEQUAL)
    golden("fold_pad", program.to_model())
