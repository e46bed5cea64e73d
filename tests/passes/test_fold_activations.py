"""Folding spelled-out activations: equal outputs in the runtime, and nothing else is taken for one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from onnxq.passes.fold_activations import FoldActivations
from onnxq.pipeline import Context
from onnxq.program import Program
from onnxq.target import ONNX

Number = np.float32
GRAPH = "g (float[2,3,4,5] x) => (float[a,b,c,d] y)"
CONSTANTS: dict[str, Any] = {
    "zero": Number(0), "half": Number(0.5), "one": Number(1), "two": Number(2), "three": Number(3), "six": Number(6),
    "sixth": Number(1 / 6), "root": Number(2**0.5), "slope": Number(0.5**0.5), "listed": np.array([3], np.float32),
}  # fmt: skip
RAMP, SWISH, GELU = {"HardSigmoid": 1}, {"HardSigmoid": 1, "Mul": 1}, {"Gelu": 1}
SPELLINGS = {
    "swish of four nodes": ("a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six)", SWISH),
    "its factor a product": (
        "a = Add(listed, x) c = Clip(a, zero, six) m = Mul(c, x) y = Mul(sixth, m)",
        SWISH,
    ),
    "its factor in front": ("a = Add(x, three) c = Clip(a, zero, six) d = Div(c, six) y = Mul(x, d)", SWISH),
    "the operator": ("y = HardSwish(x)", SWISH),
    "a ramp": ("a = Add(x, three) c = Clip(a, zero, six) y = Div(c, six)", RAMP),
    "a steep ramp": ("a = Add(x, one) c = Clip(a, zero, two) y = Mul(c, half)", RAMP),
    "a gate": (
        "a = Add(x, one) c = Clip(a, zero, two) r = Relu(x) m = Mul(r, c) y = Mul(m, half)",
        SWISH | {"Relu": 1},
    ),
    "gelu": ("d = Div(x, root) e = Erf(d) a = Add(e, one) m = Mul(x, a) y = Mul(m, half)", GELU),
    "gelu by halves": ("d = Mul(slope, x) e = Erf(d) a = Add(one, e) h = Mul(half, x) y = Mul(h, a)", GELU),
    "gelu by division": ("d = Div(x, root) e = Erf(d) a = Add(e, one) m = Mul(a, x) y = Div(m, two)", GELU),
}
OTHERS = {
    "another factor": "a = Add(x, three) c = Clip(a, zero, six) y = Div(c, two)",
    "no factor": "a = Add(x, three) y = Clip(a, zero, six)",
    "another floor": "a = Add(x, three) c = Clip(a, one, six) y = Div(c, six)",
    "no ceiling": "a = Add(x, three) c = Clip(a, zero) y = Div(c, six)",
    "a clip that is read elsewhere": "a = Add(x, three) c = Clip(a, zero, six) d = Div(c, six) y = Mul(d, c)",
    "a division of the constant": "a = Add(x, three) c = Clip(a, zero, six) b = Add(c, one) y = Div(six, b)",
    "no number": "a = Add(x, x) c = Clip(a, zero, six) y = Div(c, six)",
    "another slope": "d = Div(x, two) e = Erf(d) a = Add(e, one) m = Mul(x, a) y = Mul(m, half)",
    "another height": "d = Div(x, root) e = Erf(d) a = Add(e, one) m = Mul(x, a) y = Mul(m, two)",
    "another product": "d = Div(x, root) e = Erf(d) a = Add(e, one) r = Relu(x) m = Mul(r, a) y = Mul(m, half)",
    "erf alone": "d = Div(x, root) y = Erf(d)",
}


def parsed(parse_program: Callable[..., Program], body: str) -> Program:
    used = {name: value for name, value in CONSTANTS.items() if name in body}
    return parse_program(f"{GRAPH} {{ {body} }}", used)


def ops(program: Program) -> dict[str, int]:
    return dict(Counter(node.op for node in program.graph.nodes))


@pytest.mark.parametrize("case", SPELLINGS)
def test_each_spelling_becomes_the_operator(
    case: str, parse_program: Callable[..., Program], assert_same: Callable[..., None]
) -> None:
    body, wanted = SPELLINGS[case]
    program = parsed(parse_program, body)
    assert FoldActivations().run(program, Context()).changed == 1
    assert ops(program) == wanted
    # onnx's own evaluator has no operators of com.microsoft
    assert_same(program.source, program.to_model(), reference="Gelu" not in wanted)


@pytest.mark.parametrize("case", OTHERS)
def test_nothing_else_is_taken_for_one(case: str, parse_program: Callable[..., Program]) -> None:
    program = parsed(parse_program, OTHERS[case])
    before = program.to_model()
    assert FoldActivations().run(program, Context()).changed == 0
    assert program.to_model() == before


def test_an_inner_output_of_the_graph_stays(parse_program: Callable[..., Program]) -> None:
    body = "a = Add(x, three) c = Clip(a, zero, six) y = Div(c, six)"
    text = f"g (float[2,3,4,5] x) => (float[a,b,c,d] y, float[a,b,c,d] c) {{ {body} }}"
    program = parse_program(text, {name: CONSTANTS[name] for name in ("zero", "three", "six")})
    assert FoldActivations().run(program, Context()).changed == 0


def test_a_target_without_gelu_keeps_erf(parse_program: Callable[..., Program]) -> None:
    program = parsed(parse_program, SPELLINGS["gelu"][0])
    assert FoldActivations().run(program, Context(target=ONNX)).changed == 0


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (
            "d = Mul(x, slope) e = Erf(d) a = Add(e, one) h = Mul(x, half) g = Mul(h, a) f = Add(g, d) y = Add(f, h)",
            {"Gelu": 1, "Mul": 2, "Add": 2},
        ),
        (
            "a = Add(x, three) c = Clip(a, zero, six) d = Div(c, six) y = Mul(d, a)",
            {"Add": 1, "HardSigmoid": 1, "Mul": 1},
        ),
    ],
)
def test_nodes_that_others_read_stay(
    body: str, wanted: dict[str, int], parse_program: Callable[..., Program], assert_same: Callable[..., None]
) -> None:
    program = parsed(parse_program, body)
    assert FoldActivations().run(program, Context()).changed == 1
    assert ops(program) == wanted
    assert_same(program.source, program.to_model(), reference="Gelu" not in wanted)


def test_double_precision_stays(parse_program: Callable[..., Program]) -> None:
    names = {name: np.float64(CONSTANTS[name]) for name in ("zero", "three", "six")}
    text = "g (double[2] x) => (double[a] y) { a = Add(x, three) c = Clip(a, zero, six) y = Div(c, six) }"
    assert FoldActivations().run(parse_program(text, names), Context()).changed == 0
