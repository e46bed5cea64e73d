"""Which layers make a spectrogram: those whose result goes through a logarithm before further layers read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import onnxq
from onnxq.program import Program
from onnxq.spectrogram import spectrogram_layers

ParseProgram = Callable[..., Program]

SHAPES = {"w": (8, 1, 32), "v": (8, 8, 3), "m": (8, 5), "f": (5, 5), "two": ()}
WAVES = "[sine] s = Conv(x, w) [cosine] c = Conv(x, w) ss = Mul(s, s) cc = Mul(c, c) power = Add(ss, cc)"
NET = "[net] y = Conv(n, v)"


def layers(parse_program: ParseProgram, body: str, outputs: str = "float[N,o,p] y") -> set[str]:
    weights = {k: np.ones(v, np.float32) for k, v in SHAPES.items() if f" {k})" in body}
    return spectrogram_layers(
        parse_program(f"g (float[N,1,128] x) => ({outputs}) {{ {body} }}", weights, 17).graph
    )


@pytest.mark.parametrize(
    "between",
    [
        "n = Log(power)",
        "r = Sqrt(power) p = Pow(r, two) l = Log(p) n = Mul(l, two)",
        "l = Log(power) n = Add(l, power)",  # on one of the ways
        "l = Log(power) r = Relu(l) n = Softmax(r)",
    ],
)
def test_a_transform_and_a_logarithm(between: str, parse_program: ParseProgram) -> None:
    assert layers(parse_program, f"{WAVES} {between} {NET}") == {"sine", "cosine"}


def test_a_filter_bank_in_front_of_the_logarithm(parse_program: ParseProgram) -> None:
    bank = "t = Transpose<perm=[0,2,1]>(power) [bank] b = MatMul(t, m) l = Log(b) [net] y = MatMul(l, f)"
    assert layers(parse_program, f"{WAVES} {bank}") == {"sine", "cosine", "bank"}


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        (f"{WAVES} n = Sqrt(power) {NET}", "float[N,o,p] y"),  # no logarithm
        (f"{WAVES} y = Log(power)", "float[N,o,p] y"),  # nothing listens to it, as to log-probabilities
        (f"{WAVES} l = Log(power) n = Sqrt(power) {NET}", "float[N,o,p] y, float[N,o,p] l"),
        (f"l = Log(x) [one] n = Conv(l, w) {NET}", "float[N,o,p] y"),  # the input itself
        (f"{WAVES} a = Conv(power, v) b = Conv(a, v) l = Log(b) n = Neg(l) {NET}", "float[N,o,p] y"),  # deep
        (
            "s = Conv(x, w) a = Conv(s, v) b = Conv(a, v) n = Neg(b) [net] o = Conv(n, v) y = Log(o)",
            "float[N,o,p] y",
        ),
    ],
)
def test_other_layers_are_none(body: str, outputs: str, parse_program: ParseProgram) -> None:
    assert layers(parse_program, body, outputs) == set()


def test_quiet_sounds_survive(parse_model: Callable[..., Any]) -> None:
    """Tones from loud to 80 dB below, told apart by a product behind the logarithm, against the float network."""
    rng, time = np.random.default_rng(0), np.arange(400)
    waves = np.exp(2j * np.pi * np.arange(1, 9)[:, None] * np.arange(64) / 64)[:, None]
    weights = {
        "w": waves.real.astype(np.float32),
        "u": waves.imag.astype(np.float32),
        "v": rng.standard_normal((16, 8, 3)).astype(np.float32),
        "tiny": np.float32(1e-9),
    }
    text = """g (float[N,1,400] x) => (float[N,16,o] y) {
        s = Conv(x, w) c = Conv(x, u) ss = Mul(s, s) cc = Mul(c, c)
        p = Add(ss, cc) q = Add(p, tiny) l = Log(q) y = Conv(l, v) }"""
    loud = 10.0 ** rng.uniform(-4, 0, (32, 1))
    tones = loud * np.sin(2 * np.pi * rng.integers(1, 9, (32, 1)) * time / 64)
    samples = {"x": (tones + 1e-5 * rng.standard_normal(tones.shape)).astype(np.float32)[:, None]}
    done = onnxq.compile_model(parse_model(text, weights, 17), samples, speed=False)
    difference = done.report.difference
    assert difference is not None
    assert difference.main is not None
    assert (difference.main.sqnr_db or 0.0) > 30.0  # with the waves in 8 bits it is below 15
