"""Statistics of what goes into a Concat, which follow from those of the Concat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq.calibration.collect import collect
from onnxq.calibration.parts import Part, find_parts
from onnxq.calibration.statistics import Needs
from onnxq.data import input_specs, open_data
from onnxq.model.session import make_session
from onnxq.pipeline import Context
from onnxq.program import Program

ParseProgram = Callable[..., Program]

TEXT = """g (float[N,2,3,4] x, float[N,3,3,4] z) => (float[N,14,3,4] y) {
    a = Relu(x) b = Tanh(z) c = Concat<axis=1>(a, b) d = Neg(a) e = Concat<axis=-3>(d, c, x, a) y = Identity(e) }"""
NAMES = ("a", "b", "c", "d", "e", "x")


@pytest.fixture
def program(parse_program: ParseProgram) -> Program:
    return parse_program(TEXT, {}, 17)


def feeds(seed: int) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(9, 2, 3, 4)), "z": rng.normal(size=(9, 3, 3, 4))}


def test_a_concat_inside_another_gives_its_parts_to_the_outer_one(program: Program) -> None:
    left, parts = find_parts(program.graph, dict.fromkeys(NAMES, Needs()))
    assert left == {"e": Needs(channels=1)}
    starts = {"d": (0, 2), "c": (2, 7), "x": (7, 9), "b": (4, 7)}
    assert {name: parts[name] for name in starts} == {n: Part("e", slice(*s)) for n, s in starts.items()}
    assert parts["a"] in (Part("e", slice(2, 4)), Part("e", slice(9, 11)))  # it is there twice


def test_what_needs_more_is_gathered(program: Program) -> None:
    needs = {"a": Needs(histogram=True), "b": Needs(channels=2), "d": Needs(channels=-3), "e": Needs()}
    left, parts = find_parts(program.graph, needs)
    assert left == {"a": needs["a"], "b": needs["b"], "e": Needs(channels=1)}
    assert parts == {"d": Part("e", slice(0, 2))}


def test_powers_of_a_part_are_gathered_with_the_whole(program: Program) -> None:
    ctx = Context(data=open_data(feeds(2), input_specs(program.source)), threads=1)
    found = collect(program, ctx, {"d": Needs(channels=1, power=True), "e": Needs()}, "calibrating")
    channels = found["d"].channels
    assert channels is not None
    wanted = (np.maximum(feeds(2)["x"].astype(np.float32), 0.0) ** 2).mean(axis=(0, 2, 3), dtype=np.float64)
    np.testing.assert_allclose(channels.power, wanted, rtol=1e-6)  # of float32 squares, summed in float64


@pytest.mark.parametrize("needs", [Needs(channels=2), None])
def test_a_concat_of_other_channels_or_none_keeps_its_parts(program: Program, needs: Needs | None) -> None:
    asked = {"a": Needs(), "x": Needs()} | ({} if needs is None else {"e": needs})
    assert find_parts(program.graph, asked) == (asked, {})


def test_sizes_must_be_known_up_to_a_part(parse_program: ParseProgram) -> None:
    text = """g (float[N,2] x, float[N,M] z) => (float[N,K] y) {
        a = Relu(x) b = Relu(z) c = Sin(x) y = Concat<axis=1>(a, b, c) }"""
    program = parse_program(text, {}, 17)
    left, parts = find_parts(program.graph, dict.fromkeys(("a", "b", "c", "y"), Needs()))
    assert set(left) == {"b", "c", "y"}
    assert parts == {"a": Part("y", slice(0, 2))}


def test_statistics_are_those_of_the_tensors_themselves(program: Program) -> None:
    ctx = Context(data=open_data(feeds(1), input_specs(program.source)), threads=1)
    needs = {name: Needs(channels=1) for name in NAMES}
    found = collect(program, ctx, needs, "calibrating")
    assert list(found) == list(NAMES)
    session = make_session(program.source, threads=1, extra_outputs=["a", "b", "c", "d", "e"])
    given = {name: values.astype(np.float32) for name, values in feeds(1).items()}
    values = dict(zip(["a", "b", "c", "d", "e"], session.run(["a", "b", "c", "d", "e"], given), strict=True))
    for name, truth in (values | {"x": given["x"]}).items():
        channels = found[name].channels
        assert channels is not None
        assert (found[name].count, found[name].minimum) == (truth.size, truth.min())
        np.testing.assert_array_equal(channels.maximum, truth.max(axis=(0, 2, 3)))
        # 12 values in a row, summed in float64; onnxruntime runs all samples here and batches of 8 there
        np.testing.assert_allclose(channels.mean, truth.mean(axis=(0, 2, 3), dtype=np.float64), atol=1e-6)
