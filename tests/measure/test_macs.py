"""Multiply-adds against counts by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

from onnxq.errors import ModelError
from onnxq.measure.macs import count_macs, guessed_feeds

Array = NDArray[Any]
ParseModel = Callable[..., ModelProto]


def ones(*shape: int) -> NDArray[np.float32]:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("node", "x", "w", "count"),
    [
        # outputs 6 x 7 x 6, each the sum of 3 x 3 x 3 products
        ("Conv(x, w)", (1, 3, 9, 8), (6, 3, 3, 3), 6 * 7 * 6 * 27),
        ("Conv<pads=[1,1,1,1],strides=[2,2]>(x, w)", (1, 3, 9, 8), (6, 3, 3, 3), 6 * 5 * 4 * 27),
        ("Conv<group=3>(x, w)", (1, 9, 9, 8), (6, 3, 3, 3), 6 * 7 * 6 * 27),
        ("Conv<group=4>(x, w)", (1, 4, 9, 8), (4, 1, 3, 3), 4 * 7 * 6 * 9),
        ("Conv(x, w)", (1, 3, 9), (6, 3, 5), 6 * 5 * 15),
        # every input meets every tap of its group's outputs
        ("ConvTranspose<strides=[2,2]>(x, w)", (1, 4, 5, 6), (4, 3, 2, 2), 4 * 5 * 6 * 3 * 4),
        ("ConvTranspose<group=2>(x, w)", (1, 4, 5, 6), (4, 3, 3, 3), 4 * 5 * 6 * 3 * 9),
        ("Gemm(x, w)", (2, 5), (5, 7), 2 * 5 * 7),
        ("Gemm<transB=1>(x, w)", (2, 5), (7, 5), 2 * 5 * 7),
        ("Gemm<transA=1>(x, w)", (5, 2), (5, 7), 2 * 5 * 7),
        ("Gemm<transA=1,transB=1>(x, w)", (5, 2), (7, 5), 2 * 5 * 7),
        ("MatMul(x, w)", (2, 5), (5, 7), 2 * 5 * 7),
        ("MatMul(x, w)", (4, 3, 2, 5), (5, 7), 4 * 3 * 2 * 5 * 7),
        ("MatMul(x, w)", (3, 2, 5), (4, 1, 5, 7), 4 * 3 * 2 * 5 * 7),
        ("MatMul(x, w)", (5,), (5, 7), 5 * 7),
        ("MatMul(w, x)", (5,), (7, 5), 5 * 7),
        ("MatMul(x, w)", (5,), (5,), 5),
    ],
)
def test_counts_of_one_node(
    node: str, x: tuple[int, ...], w: tuple[int, ...], count: int, parse_model: ParseModel
) -> None:
    rank = len(np.matmul(ones(*x), ones(*w)).shape) if node == "MatMul(x, w)" else len(x)
    rank = 1 if node == "MatMul(w, x)" else rank
    output = f"float[{','.join('abcd'[:rank])}] y" if rank else "float y"
    model = parse_model(
        f"g (float[{','.join(map(str, x))}] x) => ({output}) {{ [n] y = {node} }}", {"w": ones(*w)}
    )
    assert count_macs(model, {"x": ones(*x)}) == {"n": count}


def test_a_batch_counts_for_one_sample_and_inner_tensors_are_measured(parse_model: ParseModel) -> None:
    text = """g (float[N,3,9,8] x) => (float[N,6,7,7] y) {
        [one] c = Conv(x, w) r = Relu(c) t = Transpose<perm=[0,1,3,2]>(r) [two] y = MatMul(r, t) k = Abs(w) }"""
    model = parse_model(text, {"w": ones(6, 3, 3, 3)})
    expected = {"one": 6 * 7 * 6 * 27, "two": 6 * 7 * 6 * 7}
    for samples in (1, 5):
        assert count_macs(model, {"x": ones(samples, 3, 9, 8)}, samples) == expected
    assert [o.name for o in model.graph.output] == ["y"]  # the model itself is not changed


def test_computed_weights_count_too(parse_model: ParseModel) -> None:
    text = "g (float[N,3,9,8] x) => (float[N,6,7,6] y) { k = Abs(w) [n] y = Conv(x, k) }"
    assert count_macs(parse_model(text, {"w": ones(6, 3, 3, 3)}), {"x": ones(2, 3, 9, 8)}, 2) == {
        "n": 6 * 7 * 6 * 27
    }


def test_other_nodes_count_nothing(parse_model: ParseModel) -> None:
    assert count_macs(parse_model("g (float[N] x) => (float[N] y) { y = Exp(x) }"), {"x": ones(2)}) == {}


def test_feeds_that_do_not_run_are_an_error(parse_model: ParseModel) -> None:
    model = parse_model("g (float[N,K] x) => (float[N,2] y) { y = MatMul(x, w) }", {"w": ones(3, 2)})
    with pytest.raises(ModelError, match="onnxruntime failed to run the model"):
        count_macs(model, {"x": ones(1, 5)})


@pytest.mark.parametrize(
    ("inputs", "shapes"),
    [
        ("float[N,3,32,32] x", {"x": ((1, 3, 32, 32), np.float32)}),
        ("float[N,3,H,W] x", {"x": ((1, 3, 224, 224), np.float32)}),
        ("int64[N,S] x, float[2] t", {"x": ((1, 16), np.int64), "t": ((2,), np.float32)}),
        ("float x", {"x": ((), np.float32)}),
        ("bool[N] x", {"x": ((1,), np.bool_)}),
    ],
)
def test_feeds_are_guessed_from_the_inputs(
    inputs: str, shapes: Mapping[str, tuple[tuple[int, ...], type]], parse_model: ParseModel
) -> None:
    model = parse_model(f"g ({inputs}) => (int64[r] y) {{ y = Shape(x) }}")
    found = guessed_feeds(model)
    assert found is not None
    assert {k: (v.shape, v.dtype.type) for k, v in found.items()} == shapes
    assert not any(v.any() for v in found.values())


@pytest.mark.parametrize("kind", ["string[N] x", "bfloat16[N] x", "seq(float[N]) x"])
def test_inputs_that_are_no_arrays_of_numbers_cannot_be_guessed(kind: str, parse_model: ParseModel) -> None:
    op = "SequenceLength" if "seq" in kind else "Shape"
    output = "int64 y" if "seq" in kind else "int64[r] y"
    assert guessed_feeds(parse_model(f"g ({kind}) => ({output}) {{ y = {op}(x) }}")) is None


def test_initializers_among_the_inputs_are_not_fed(parse_model: ParseModel) -> None:
    model = parse_model("g (float[N,3] x, float[3] k) => (float[N,3] y) { y = Add(x, k) }", {"k": ones(3)})
    found = guessed_feeds(model)
    assert found is not None
    assert list(found) == ["x"]
