"""Widths by layer: the shorthand, exceptions by name, and the first and last layers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq.errors import UsageError
from onnxq.precision import Bits, ends, layer_bits, override_bits, parse_override
from onnxq.program import Program

ParseProgram = Callable[..., Program]
Array = NDArray[np.float32]
CONV, HEAD = np.ones((4, 4, 3, 3), np.float32), np.ones((4, 2), np.float32)

CHAIN = """g (float[N,4,8,8] x) => (float[N,2] y) {
    [stem] a = Conv<pads=[1,1,1,1]>(x, w1)
    [one] b = Conv<pads=[1,1,1,1]>(a, w2)
    [two] c = Conv<pads=[1,1,1,1]>(b, w3)
    [sum] s = Add(a, c)
    [mean] m = GlobalAveragePool(s)
    [flat] f = Flatten(m)
    [head] y = MatMul(f, h)
}"""
CHAIN_WEIGHTS = {"w1": CONV, "w2": CONV, "w3": CONV, "h": HEAD}


@pytest.mark.parametrize("text", ["w4a8", "w8a8", "w2a2", "w3", "w7a5"])
def test_the_shorthand_prints_as_it_is_read(text: str) -> None:
    assert str(Bits.parse(text)) == text


@pytest.mark.parametrize("text", ["", "w9a8", "w4a1", "a4", "w4a8x", "W4A4", "w44", "4"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="cannot read the bits"):
        Bits.parse(text)


def test_overrides() -> None:
    assert parse_override("layer1.*=w8a8") == ("layer1.*", Bits(8, 8))
    assert parse_override("a=b=w4") == ("a=b", Bits(4))
    assert parse_override("head=float") == ("head", None)
    assert override_bits(["a=w3a8", "b=float", "c=w5"]) == {3, 5}
    for wrong in ("head", "=w4", "head=", "head=int8"):
        with pytest.raises(UsageError, match="cannot read the"):
            parse_override(wrong)


def widths(program: Program, bits: str, *overrides: str, first_last: str = "8") -> dict[str, str]:
    layers = layer_bits(program, Bits.parse(bits), overrides, first_last)  # type: ignore[arg-type]
    return {name: str(layer.bits) for name, layer in layers.items()}


def test_first_and_last_layers_have_eight_bits(parse_program: ParseProgram) -> None:
    program = parse_program(CHAIN, CHAIN_WEIGHTS)
    assert ends(program.graph) == ({"stem"}, {"head"})
    inner = {"one": "w4a3", "two": "w4a3"}
    assert widths(program, "w4a3") == {"stem": "w8a8", **inner, "head": "w8a8"}
    assert widths(program, "w4a3", first_last="same") == {"stem": "w4a3", **inner, "head": "w4a3"}
    assert widths(program, "w4a3", first_last="float") == {"stem": "None", **inner, "head": "None"}
    assert widths(program, "w8a4")["stem"] == "w8a8"
    assert widths(program, "w4")["stem"] == "w8"
    layers = layer_bits(program, Bits(4, 4), (), "8")
    assert (layers["stem"].why, layers["one"].why, layers["head"].why) == ("first layer", "", "last layer")


def test_eight_bits_need_no_exception(parse_program: ParseProgram) -> None:
    layers = layer_bits(parse_program(CHAIN, CHAIN_WEIGHTS), Bits(8, 8), (), "8")
    assert {layer.why for layer in layers.values()} == {""}


def test_each_branch_from_an_input_has_a_first_layer_and_a_table_is_one(parse_program: ParseProgram) -> None:
    text = """g (int64[N] i, float[N,4] x) => (float[N,2] y, float[N,2] z) {
        [table] e = Gather(t, i)
        [side] p = MatMul(x, v)
        [both] s = Add(e, p)
        [mid] q = MatMul(s, v)
        [left] y = MatMul(q, h)
        [right] z = MatMul(q, h)
    }"""
    weights = {"t": np.ones((9, 4), np.float32), "v": np.ones((4, 4), np.float32), "h": HEAD}
    program = parse_program(text, weights)
    assert ends(program.graph) == ({"table", "side"}, {"left", "right"})


def test_a_single_layer_is_both(parse_program: ParseProgram) -> None:
    program = parse_program("g (float[N,4] x) => (float[N,2] y) { [only] y = MatMul(x, h) }", {"h": HEAD})
    layers = layer_bits(program, Bits(4, 4), (), "8")
    assert (str(layers["only"].bits), layers["only"].why) == ("w8a8", "first and last layer")


def test_overrides_count_before_the_rule_and_the_last_of_them_wins(parse_program: ParseProgram) -> None:
    program = parse_program(CHAIN, CHAIN_WEIGHTS)
    found = widths(program, "w4a4", "stem=w4a4", "Conv=w6a6", "two=float")
    assert found == {"stem": "w6a6", "one": "w6a6", "two": "None", "head": "w8a8"}
    assert widths(program, "w4a8", "one=w2")["one"] == "w2a8"  # activations as the others have them


def test_overrides_that_name_nothing_or_contradict(parse_program: ParseProgram) -> None:
    program = parse_program(CHAIN, CHAIN_WEIGHTS)
    with pytest.raises(
        UsageError, match="override 'heed' matches no node name and no op type; did you mean 'head'"
    ):
        layer_bits(program, Bits(4, 4), ("heed=w8a8",), "8")
    with pytest.raises(UsageError, match="asks for integer activations where all others are float; write w8"):
        layer_bits(program, Bits(4), ("one=w8a8",), "8")


def test_what_is_raised_goes_by_whole_names_and_counts_before_all(parse_program: ParseProgram) -> None:
    program = parse_program(CHAIN, CHAIN_WEIGHTS)
    next(n for n in program.graph.nodes if n.name == "one").name = "a/stem"
    raised = ("stem=w8a8", "two=w6a8", "head=float")
    layers = layer_bits(program, Bits(4, 4), ("two=w2a2", "head=w8a8"), "same", raised)
    assert {name: layer.bits for name, layer in layers.items()} == {
        "stem": Bits(8, 8),
        "a/stem": Bits(4, 4),
        "two": Bits(6, 8),
        "head": None,
    }
    assert layers["two"].why == "raised"
    assert "keeps its SQNR" in layers["head"].why
    with pytest.raises(UsageError, match="unknown node 'tow' of raised 'tow=w8a8'; did you mean 'two'"):
        layer_bits(program, Bits(4, 4), (), "same", ("tow=w8a8",))
