"""Multiply-adds that run in integer kernels, told from the names that onnxruntime gives its nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, helper

from onnxq.data import input_specs, open_data
from onnxq.measure.coverage import Coverage, base_names, read_coverage
from onnxq.measure.macs import count_macs
from onnxq.model.session import optimized_model
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program

Array = NDArray[Any]
ParseProgram = Callable[..., Program]


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def covered(program: Program, feeds: Mapping[str, Array], passes: str) -> Coverage:
    """Coverage of the model that the passes make."""
    data = open_data(feeds, input_specs(program.source))
    Pipeline.parse(passes).run(program, Context(data=data, threads=1))
    macs = count_macs(program.source, feeds, len(next(iter(feeds.values()))))
    return read_coverage(optimized_model(program.to_model(), threads=1), macs)


STATIC = "annotate:small=0 calibrate choose-ranges quantize-weights"
IMAGES, ROWS = {"x": normal(0, 5, 3, 9, 8)}, {"x": normal(0, 5, 64)}
TOKENS = {"x": normal(0, 5, 4, 64)}
W, U, M = normal(1, 6, 3, 3, 3), normal(2, 6, 6, 1, 1), normal(3, 64, 64)
CONVOLUTIONS = """g (float[N,3,9,8] x) => (float[N,6,a,b] y, float[N,6,c,d] e) {
    [first_gemm] c = Conv(x, w) [block_Conv_token_3] d = Conv(c, u) [third] e = Conv(c, u) [sum_quant] s = Add(d, e)
    [pool] p = AveragePool<kernel_shape=[2,2]>(s) [last_nhwc] y = Conv(p, u) }"""
PRODUCTS = """g (float[N,{}64] x) => (float[N,{}64] y) {{
    [one] c = MatMul(x, w) [two] r = Relu(c) [three_MatMul_3] d = MatMul(r, w) [four] e = Add(d, b)
    [five_QGemm] y = MatMul(e, w) }}"""
GEMMS = "g (float[N,64] x) => (float[N,64] y) { [one] c = Gemm(x, w, b) [two] r = Relu(c) [three_gemm] y = Gemm(r, w, b) }"
VECTOR = {"w": M, "b": normal(4, 64)}


@pytest.mark.parametrize("form", ["emit-qdq", "emit-integer"])
@pytest.mark.parametrize("flatten", ["", "flatten-matmul "])
@pytest.mark.parametrize(
    ("text", "weights", "feeds"),
    [
        (CONVOLUTIONS, {"w": W, "u": U}, IMAGES),
        (PRODUCTS.format("", ""), VECTOR, ROWS),
        (PRODUCTS.format("4,", "4,"), VECTOR, TOKENS),
        (GEMMS, VECTOR, ROWS),
    ],
    ids=["convolutions", "products of rows", "products of tokens", "gemms"],
)
def test_every_unit_is_found_again(
    text: str,
    weights: Mapping[str, Array],
    feeds: Mapping[str, Array],
    flatten: str,
    form: str,
    parse_program: ParseProgram,
) -> None:
    program = parse_program(text, weights, 17)
    found = covered(program, feeds, f"{flatten}{STATIC} {form}")
    kernels = {u.name for u in program.units.values() if not u.is_layout}
    layers = {n.name for n in program.source.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")}
    # weights that a MatMul and a Gemm share stay with one of the kinds
    kept = {name for name, reason in program.floats.items() if "shared with a node of another kind" in reason}
    assert kernels >= layers - kept
    assert kernels <= found.integer
    assert not kept & found.integer
    assert (found.share == 1.0) == (not kept)
    assert found.integer_macs <= found.total_macs


def test_dynamic_quantization_is_found_as_well(parse_program: ParseProgram) -> None:
    found = covered(parse_program(PRODUCTS.format("4,", "4,"), VECTOR, 17), TOKENS, "quantize-dynamic")
    assert found.share == 1.0
    assert found.kernels["DynamicQuantizeMatMul"] == 3


def test_layers_that_stay_float_do_not_count(parse_program: ParseProgram) -> None:
    program = parse_program(CONVOLUTIONS, {"w": W, "u": U}, 17)
    found = covered(program, IMAGES, f"{STATIC.replace('small=0', 'small=0,skip=third')} emit-qdq")
    plane = 7 * 6
    assert "third" not in found.integer
    assert found.total_macs == 6 * plane * 27 + 2 * 6 * plane * 6 + 6 * 6 * 5 * 6
    assert found.total_macs - found.integer_macs == 6 * plane * 6
    assert found.share == found.integer_macs / found.total_macs


def test_a_float_model_has_no_integers(parse_program: ParseProgram) -> None:
    found = covered(parse_program(CONVOLUTIONS, {"w": W, "u": U}, 17), IMAGES, "fold-constants")
    assert (found.integer, found.share) == (frozenset(), 0.0)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("/layer1/conv2/Conv_token_11", ["/layer1/conv2/Conv"]),
        ("m/MatMulAddFusion", ["m"]),
        ("a_nhwc_token_3/duplicated", ["a_nhwc_token_3", "a_nhwc", "a"]),
        ("conv_token", []),
        ("a_token_1_b", []),
        ("", []),
    ],
)
def test_endings_are_cut_one_by_one(name: str, found: list[str]) -> None:
    assert list(base_names(name)) == [name, *found]


def test_kernels_are_counted_by_name() -> None:
    nodes = [
        helper.make_node(op, ["a"], ["b"], name)
        for op, name in (("QGemm", "q"), ("Relu", "r"), ("Relu", "s"))
    ]
    model = ModelProto(graph=helper.make_graph(nodes, "g", [], []))
    found = read_coverage(model, {"q": 30, "r": 10})
    assert found == Coverage(30, 40, {"QGemm": 1, "Relu": 2}, frozenset({"q"}))
    assert read_coverage(model, {}).share is None
