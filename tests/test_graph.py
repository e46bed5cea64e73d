"""Helpers over graphs: who reads what, control-flow bodies included, and edits that keep both sides in step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from onnxq.graph import (
    Names,
    Uses,
    all_nodes,
    bodies,
    captured,
    constant,
    float_values,
    is_constant,
    is_standard,
    present,
    producer,
    rank,
    remove_node,
    replace_reads,
    set_input,
)
from onnxq.program import Program

TEXT = """g (float[2,3] x, bool p) => (float[2,3] y, float[2,3] a) {
    a = Relu(x)
    b = Neg(a)
    c = Mul(b, b)
    d = Add(c, w)
    e = Abs(c)
    f = Neg(e)
    y = If(p) <
        then_branch = t () => (float[2,3] u) {
            u = If(p) <
                then_branch = tt () => (float[2,3] deep) { deep = Add(d, v) },
                else_branch = te () => (float[2,3] other) { other = Neg(v) }
            >
        },
        else_branch = e () => (float[2,3] s) { s = Add(f, w) }
    >
}"""


@pytest.fixture
def graph(parse_program: Callable[..., Program]) -> gs.Graph:
    weights = {"w": np.ones(3, np.float32), "v": np.ones(3, np.float32)}
    return parse_program(TEXT, weights).graph


def test_nodes_and_bodies_at_any_depth(graph: gs.Graph) -> None:
    assert len(list(bodies(graph))) == 4
    expected = ["Relu", "Neg", "Mul", "Add", "Abs", "Neg", "If", "Add", "If", "Add", "Neg"]
    assert sorted(n.op for n in all_nodes(graph)) == sorted(expected)


def test_what_bodies_capture(graph: gs.Graph) -> None:
    assert {"d", "f", "v", "w", "p"} <= captured(graph)
    assert not {"x", "a", "b", "c", "e", "y"} & captured(graph)


def test_a_tensor_that_an_inner_body_returns_is_captured() -> None:
    outer = gs.Variable("outer", np.dtype(np.float32), (1,))
    inner = gs.Graph(nodes=[], outputs=[outer])
    middle = gs.Graph(nodes=[gs.Node("If", "inner", {"then_branch": inner}, outputs=[gs.Variable("z")])])
    graph = gs.Graph(nodes=[gs.Node("If", "middle", {"then_branch": middle}, outputs=[gs.Variable("y")])])
    assert "outer" in captured(graph)
    assert "y" not in captured(graph)


def test_readers_and_escapes(graph: gs.Graph) -> None:
    uses, tensors = Uses(graph), graph.tensors()
    assert [n.op for n in uses.readers(tensors["c"])] == ["Add", "Abs"]
    assert [n.op for n in uses.readers(tensors["b"])] == ["Mul"]  # once, although it reads it twice
    assert uses.readers(tensors["y"]) == []
    assert [t for t in "xabcdefy" if uses.escapes(tensors[t])] == ["a", "d", "f", "y"]


@pytest.mark.parametrize(
    ("tensor", "op"),
    [
        ("e", "Neg"),
        ("a", None),  # a graph output as well
        ("b", None),  # read twice by one node
        ("c", None),  # two readers
        ("f", None),  # read by a body only
        ("d", None),  # read by a body of a body
        ("y", None),  # read by nobody
    ],
)
def test_the_only_reader(graph: gs.Graph, tensor: str, op: str | None) -> None:
    reader = Uses(graph).only_reader(graph.tensors()[tensor])
    assert (reader.op if reader is not None else None) == op


def test_an_input_that_is_left_out_has_no_readers() -> None:
    empty = gs.Variable.empty()
    x, y = gs.Variable("x", np.dtype(np.float32), (1,)), gs.Variable("y", np.dtype(np.float32), (1,))
    clip = gs.Node("Clip", "clip", inputs=[x, empty, gs.Constant("hi", np.ones((), np.float32))], outputs=[y])
    graph = gs.Graph(nodes=[clip], inputs=[x], outputs=[y])
    assert Uses(graph).readers(empty) == []
    assert [present(clip, i) is not None for i in range(4)] == [True, False, True, False]


def test_constants(graph: gs.Graph) -> None:
    tensors = graph.tensors()
    assert is_constant(tensors["w"])
    assert not is_constant(tensors["c"])
    np.testing.assert_array_equal(float_values(tensors["w"]), np.ones(3, np.float32))
    assert float_values(tensors["c"]) is None
    assert float_values(gs.Constant("k", np.ones(2, np.int64))) is None
    assert float_values(gs.Constant("k", np.ones(2, np.float64))) is None


def test_producers_ranks_and_domains(graph: gs.Graph) -> None:
    tensors = graph.tensors()
    made = producer(tensors["c"])
    assert made is not None
    assert (made.op, producer(tensors["x"]), producer(tensors["w"])) == ("Mul", None, None)
    assert (rank(tensors["x"]), rank(tensors["w"]), rank(gs.Variable("k"))) == (2, 1, None)
    domains = (None, "", "ai.onnx", "com.microsoft")
    assert [is_standard(gs.Node("F", domain=d)) for d in domains] == [True, True, True, False]


def test_fresh_names_avoid_tensors_and_nodes_everywhere(graph: gs.Graph) -> None:
    names = Names(graph)
    assert names.fresh("deep") == "deep_1"
    assert names.fresh("deep") == "deep_2"
    assert names.fresh("new") == "new"
    assert names.fresh("new") == "new_1"
    assert names.fresh(graph.nodes[0].name) != graph.nodes[0].name
    assert names.fresh("x") == "x_1"


def test_fresh_names_avoid_the_inputs_of_bodies() -> None:
    unread = gs.Variable("unread", np.dtype(np.int64), ())
    body = gs.Graph(nodes=[], inputs=[unread], outputs=[])
    graph = gs.Graph(nodes=[gs.Node("Loop", "loop", {"body": body})])
    assert Names(graph).fresh("unread") == "unread_1"


def test_new_constants_keep_their_shape() -> None:
    names = Names(gs.Graph())
    scalar, matrix = (
        constant(names, "k", np.asarray(2.0, np.float32)),
        constant(names, "k", np.ones((2, 3)).T),
    )
    assert (scalar.name, scalar.values.shape) == ("k", ())
    assert (matrix.name, matrix.values.shape, matrix.values.flags.c_contiguous) == ("k_1", (3, 2), True)


def test_edits_keep_both_sides_in_step(graph: gs.Graph) -> None:
    tensors, uses = graph.tensors(), Uses(graph)
    b, c, x = tensors["b"], tensors["c"], tensors["x"]
    replace_reads(uses.readers(b), b, x)
    (mul,) = (n for n in graph.nodes if n.op == "Mul")
    assert [t.name for t in mul.inputs] == ["x", "x"]
    assert b.outputs == []
    set_input(mul, 1, tensors["a"])
    set_input(mul, 2, tensors["w"])
    assert [t.name for t in mul.inputs] == ["x", "a", "w"]
    count = len(graph.nodes)
    remove_node(graph, mul)
    assert len(graph.nodes) == count - 1
    assert (c.inputs, mul in x.outputs) == ([], False)
