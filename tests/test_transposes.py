"""A graph whose Transposes are absorbed and restored computes what it did."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto

from onnxq.graph import NodeWriter
from onnxq.program import Program
from onnxq.transposes import absorb_transposes, restore_transposes

RNG = np.random.default_rng(6)
W = RNG.standard_normal((5, 4)).astype(np.float32)
V = RNG.standard_normal((2, 5, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("body", "left", "restored"),
    [
        ("t = Transpose <perm = [1, 0]> (w) y = MatMul(x, t)", 0, 1),
        ("t = Transpose(w) y = MatMul(x, t)", 0, 1),
        ("t = Transpose(w) a = MatMul(x, t) b = MatMul(x, t) y = Add(a, b)", 0, 1),
        ("t = Transpose(w) a = MatMul(x, t) b = Transpose(t) c = MatMul(a, b) y = MatMul(c, t)", 2, 3),
        ("t = Transpose(x) u = Transpose(t) q = Transpose(w) y = MatMul(u, q)", 2, 3),
        ("t = Transpose <perm = [0, 1]> (w) y = MatMul(t, x)", 1, 1),
        ("t = Transpose <perm = [0, 2, 1]> (v) y = MatMul(x, t)", 1, 1),
        ("t = Transpose(w) y = Gemm(x, t)", 1, 1),
    ],
)
def test_products_read_the_matrix_until_they_get_their_transpose_back(
    parse_program: Callable[..., Program],
    assert_same: Callable[[ModelProto, ModelProto], None],
    body: str,
    left: int,
    restored: int,
) -> None:
    shape = "2, 4, 5" if "(v)" in body else "4, 4" if "(t, x)" not in body else "5, 4"
    x = "float[4, 4] x" if "(v)" not in body else "float[2, 4, 4] x"
    columns = {"2, 4, 5": "float[2, 4, 5] y", "4, 4": "float[A, B] y", "5, 4": "float[5, 4] y"}[shape]
    program = parse_program(f"g ({x}) => ({columns}) {{ {body} }}", {"w": W, "v": V})
    before = program.to_model()
    absorb_transposes(program.graph)
    assert [n.op for n in program.graph.nodes].count("Transpose") == left
    restore_transposes(program.graph, NodeWriter(program.graph))
    program.graph.toposort()
    assert [n.op for n in program.graph.nodes].count("Transpose") == restored
    assert_same(before, program.to_model())


def test_a_transpose_that_is_an_output_stays(parse_program: Callable[..., Program]) -> None:
    text = "g (float[4, 4] x) => (float[4, 5] t, float[4, 5] y) { t = Transpose(w) y = MatMul(x, t) }"
    program = parse_program(text, {"w": W})
    absorb_transposes(program.graph)
    assert [n.op for n in program.graph.nodes] == ["Transpose", "MatMul"]
    assert program.graph.nodes[1].inputs[1] is program.graph.nodes[0].inputs[0]
