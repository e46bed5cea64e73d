"""Stems with a narrow depthwise convolution and convolutions over one or two channels stay float, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq.passes.keep_stem import KeepStem
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program
from onnxq.target import ORT_CPU, find_target

Array = NDArray[Any]
ParseProgram = Callable[..., Program]

FIRST, DEPTH, POINT = "[first] c = Conv(x, w)", "[depth] d = Conv<group=8>(r, k)", "[point] y = Conv(d, p)"
OUTPUT = "float[N,o,p,q] y"
SCALARS = {"zero": np.float32(0), "six": np.float32(6)}


def weights(channels: int = 8) -> dict[str, Array]:
    ones = np.ones
    return {
        "w": ones((channels, 3, 3, 3), np.float32),
        "k": ones((channels, 1, 3, 3), np.float32),
        "p": ones((8, channels, 1, 1), np.float32),
    }


def kept(
    parse_program: ParseProgram,
    body: str,
    constants: Mapping[str, Array],
    outputs: str = OUTPUT,
    context: Context = Context(),  # noqa: B008
) -> set[str]:
    """Names of nodes that the pass keeps, which annotate then leaves alone."""
    used = {k: v for k, v in {**SCALARS, **constants}.items() if f"{k})" in body or f"{k}," in body}
    program = parse_program(f"g (float[N,3,9,8] x) => ({outputs}) {{ {body} }}", used, 17)
    result = KeepStem().run(program, context)
    assert result.changed == len(result.skipped)
    assert program.floats == result.skipped
    reasons = dict(program.floats)
    Pipeline.parse("annotate:small=0").run(program, Context())
    assert {name: program.floats[name] for name in reasons} == reasons
    assert not set(program.units) & set(reasons)
    assert "point" in program.units or "point" not in body
    return set(reasons)


@pytest.mark.parametrize(
    "between",
    ["r = Relu(c)", "r = Clip(c, zero, six)", "r = LeakyRelu(c)", "s = HardSigmoid(c) r = Mul(c, s)", ""],
)
def test_a_first_convolution_and_a_depthwise_one(between: str, parse_program: ParseProgram) -> None:
    body = f"{FIRST} {between} {DEPTH if between else DEPTH.replace('r,', 'c,')} {POINT}"
    assert kept(parse_program, body, weights()) == {"first", "depth"}


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        (f"{FIRST} r = Tanh(c) {DEPTH} {POINT}", OUTPUT),  # no activation that the pass knows
        (f"{FIRST} s = HardSigmoid(c) r = Mul(s, s) {DEPTH} {POINT}", OUTPUT),
        (
            f"{FIRST} s = HardSigmoid(c) r = Mul(c, s) {DEPTH} {POINT} z = Neg(s)",
            f"{OUTPUT}, float[N,o,p,q] z",
        ),
        (
            f"{FIRST} s = HardSigmoid(c) r = Mul(c, s) {DEPTH} {POINT} z = Neg(c)",
            f"{OUTPUT}, float[N,o,p,q] z",
        ),
        (f"{FIRST} r = Relu(c) [depth] d = Conv(r, f) {POINT}", OUTPUT),  # not depthwise
        (f"{FIRST} r = Relu(c) [depth] d = Conv<group=4>(r, h) {POINT}", OUTPUT),
        (f"{FIRST} r = Relu(c) {DEPTH} {POINT} z = Neg(r)", f"{OUTPUT}, float[N,o,p,q] z"),  # a branch
        (f"{FIRST} r = Relu(c) {DEPTH} {POINT} z = Neg(c)", f"{OUTPUT}, float[N,o,p,q] z"),
        (
            f"{FIRST} r = Relu(c) {DEPTH} {POINT} z = Neg(x)",
            f"{OUTPUT}, float[N,o,p,q] z",
        ),  # a second reader of the input
        (f"{FIRST} r = Relu(c) {DEPTH} {POINT}", f"{OUTPUT}, float[N,o,p,q] c"),
        (f"{FIRST} r = Relu(c) {DEPTH} {POINT}", f"{OUTPUT}, float[N,o,p,q] r"),
        (f"[first] c = Conv(t, w) t = Tanh(x) r = Relu(c) {DEPTH} {POINT}", OUTPUT),  # not the first node
        ("[first] y = Conv(x, w)", OUTPUT),
        ("y = Tanh(x)", OUTPUT),
    ],
)
def test_other_beginnings_are_quantized(body: str, outputs: str, parse_program: ParseProgram) -> None:
    if body.startswith("[first] c = Conv(t"):
        body = f"t = Tanh(x) {body.replace('t = Tanh(x) ', '')}"
    constants = {**weights(), "f": np.ones((8, 8, 3, 3), np.float32), "h": np.ones((8, 2, 3, 3), np.float32)}
    assert kept(parse_program, body, constants, outputs) == set()


@pytest.mark.parametrize(("channels", "keeps"), [(64, True), (65, False)])
def test_wide_depthwise_convolutions_are_quantized(
    channels: int, keeps: bool, parse_program: ParseProgram
) -> None:
    body = f"{FIRST} r = Relu(c) {DEPTH.replace('8', str(channels))} {POINT}"
    assert kept(parse_program, body, weights(channels)) == ({"first", "depth"} if keeps else set())


def test_a_target_without_that_weakness_keeps_nothing(parse_program: ParseProgram) -> None:
    body = f"{FIRST} r = Relu(c) {DEPTH} {POINT}"
    context = Context(target=replace(ORT_CPU, narrow_depthwise=0))
    assert kept(parse_program, body, weights(), context=context) == set()


def test_every_input_may_have_a_stem(parse_program: ParseProgram) -> None:
    text = f"""g (float[N,3,9,8] x, float[N,3,9,8] z) => (float[N,o,p,q] y) {{
        {FIRST} r = Relu(c) {DEPTH} [other] e = Conv(z, w) f = Conv<group=8>(e, k) y = Add(d, f) }}"""
    program = parse_program(text, {k: v for k, v in weights().items() if k != "p"}, 17)
    assert KeepStem().run(program, Context()).changed == 4


@pytest.mark.parametrize(("channels", "keeps"), [(1, True), (2, True), (3, False)])
@pytest.mark.parametrize("form", ["", "<group=1>"])
def test_convolutions_over_few_channels_stay_float(
    channels: int, keeps: bool, form: str, parse_program: ParseProgram
) -> None:
    text = f"""g (float[N,{channels},9,8] x) => (float[N,o,p,q] y) {{
        [first] c = Conv{form}(x, w) r = Relu(c) [second] y = Conv(r, v)
    }}"""
    constants = {"w": np.ones((8, channels, 3, 3), np.float32), "v": np.ones((4, 8, 3, 3), np.float32)}
    program = parse_program(text, constants)
    result = KeepStem().run(program, Context())
    assert set(program.floats) == set(result.skipped) == ({"first"} if keeps else set())
    if keeps:
        assert "faster in float" in program.floats["first"]


def test_an_activation_behind_a_float_convolution_says_so(parse_program: ParseProgram) -> None:
    text = "g (float[N,1,9,8] x) => (float[N,o,p,q] y) { [first] c = Conv(x, w) [after] r = Relu(c) y = Conv(r, v) }"
    constants = {"w": np.ones((8, 1, 3, 3), np.float32), "v": np.ones((4, 8, 3, 3), np.float32)}
    program = parse_program(text, constants)
    Pipeline.parse("keep-stem annotate:small=0").run(program, Context())
    assert program.floats["after"] == "the Conv in front of it stays float"


@pytest.mark.parametrize(
    ("channels", "width", "outputs", "keeps"),
    [(1, 31, 8, True), (1, 32, 8, False), (2, 32, 1, False), (1, 256, 1, True), (2, 31, 64, True)],
)
def test_long_rows_are_copied_fast(
    channels: int, width: int, outputs: int, keeps: bool, parse_program: ParseProgram
) -> None:
    text = f"g (float[N,{channels},1024] x) => (float[N,o,p] y) {{ [first] y = Conv(x, w) }}"
    program = parse_program(text, {"w": np.ones((outputs, channels, width), np.float32)})
    KeepStem().run(program, Context())
    assert set(program.floats) == ({"first"} if keeps else set())


@pytest.mark.parametrize("target", ["onnx", "openvino", "tensorrt"])
def test_targets_that_were_not_measured_keep_nothing(target: str, parse_program: ParseProgram) -> None:
    text = "g (float[N,1,9,8] x) => (float[N,o,p,q] y) { y = Conv(x, w) }"
    program = parse_program(text, {"w": np.ones((8, 1, 3, 3), np.float32)})
    KeepStem().run(program, Context(target=find_target(target)))
    assert not program.floats


@pytest.mark.parametrize("form", ["", "<group=8>"])
def test_weights_that_are_computed_have_no_sizes_to_go_by(form: str, parse_program: ParseProgram) -> None:
    text = f"g (float[N,8,9,8] x, float[o,i,3,3] w) => (float[N,a,b,c] y) {{ r = Conv(x, w) y = Conv{form}(r, w) }}"
    program = parse_program(text, {})
    KeepStem().run(program, Context())
    assert not program.floats


def test_a_depthwise_convolution_has_one_channel_a_group(parse_program: ParseProgram) -> None:
    text = "g (float[N,8,9,8] x) => (float[N,o,p,q] y) { y = Conv<group=8>(x, w) }"
    program = parse_program(text, {"w": np.ones((8, 1, 3, 3), np.float32)})
    KeepStem().run(program, Context())
    assert not program.floats
