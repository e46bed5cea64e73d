"""Where branches meet: the way from a node to an Add, and what ends it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from onnxq.branches import branch, depths
from onnxq.graph import Uses
from onnxq.program import Program

ParseProgram = Callable[..., Program]
W = np.ones((4, 4, 1, 1), np.float32)
MAP = "float[n,4,5,5]"


def parsed(parse_program: ParseProgram, body: str, outputs: str = f"{MAP} y") -> Program:
    constants = {"w": W, "k": np.ones((1, 4, 1, 1), np.float32)}
    used = {name: value for name, value in constants.items() if f" {name})" in body or f"({name}," in body}
    return parse_program(f"g ({MAP} x, float[n,4,1,1] z, int64[8] u) => ({outputs}) {{ {body} }}", used)


def found(program: Program) -> tuple[list[str], str] | None:
    """Ops on the way from the node `main`, and the other operand."""
    node = next(n for n in program.graph.nodes if n.name == "main")
    way = branch(Uses(program.graph), node)
    return None if way is None else ([n.op for n in way.nodes], way.other.name)


@pytest.mark.parametrize(
    ("body", "ops", "other"),
    [
        ("[main] c = Conv(x, w) y = Add(c, x)", ["Add"], "x"),
        ("[main] c = Conv(x, w) y = Add(x, c)", ["Add"], "x"),
        ("[main] c = Conv(x, w) r = Relu(c) y = Add(r, x)", ["Relu", "Add"], "x"),
        ("[main] c = Conv(x, w) d = Conv(x, w) r = Relu(d) y = Add(r, c)", ["Add"], "r"),
        ("[main] c = Conv(x, w) p = Pad(x, u) y = Add(c, p)", ["Add"], "p"),  # its shape is open
    ],
)
def test_the_way_to_an_add(body: str, ops: list[str], other: str, parse_program: ParseProgram) -> None:
    assert found(parsed(parse_program, body)) == (ops, other)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("[main] y = Conv(x, w)", f"{MAP} y"),
        ("[main] c = Conv(x, w) y = Add(c, k)", f"{MAP} y"),  # a constant
        ("[main] c = Conv(x, w) y = Add(c, z)", f"{MAP} y"),  # of another shape
        ("[main] c = Conv(x, w) y = Add(c, c)", f"{MAP} y"),
        ("[main] c = Conv(x, w) y = Mul(c, x)", f"{MAP} y"),
        ("[main] c = Conv(x, w) y = Add(c, x)", f"{MAP} y, {MAP} c"),  # an output of the graph
        ("[main] c = Conv(x, w) y = Add(c, x) t = Tanh(c)", f"{MAP} y, {MAP} t"),  # a second reader
        ("[main] c = Conv(x, w) r = Relu(c) y = Add(r, x) t = Tanh(r)", f"{MAP} y, {MAP} t"),
    ],
)
def test_what_ends_the_way(body: str, outputs: str, parse_program: ParseProgram) -> None:
    assert found(parsed(parse_program, body, outputs)) is None


def test_the_rival_stands_in_front_of_its_activation(parse_program: ParseProgram) -> None:
    body = "[main] c = Conv(x, w) [other] d = Conv(x, w) r = Relu(d) y = Add(r, c)"
    program = parsed(parse_program, body)
    way = branch(Uses(program.graph), next(n for n in program.graph.nodes if n.name == "main"))
    assert way is not None
    assert way.rival is not None
    assert way.rival.name == "other"


def test_depths_count_the_longest_way(parse_program: ParseProgram) -> None:
    program = parsed(parse_program, "[a] c = Conv(x, w) [b] r = Relu(c) [c] y = Add(x, r)")
    assert depths(program.graph) == {"a": 1, "b": 2, "c": 3}
