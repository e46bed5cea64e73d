"""What is gathered, and when the samples have to run for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq.calibration.statistics import Needs
from onnxq.data import input_specs, open_data
from onnxq.errors import DataError
from onnxq.model.session import make_session
from onnxq.passes.calibrate import Calibrate, needs
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program

Array = NDArray[Any]
ParseProgram = Callable[..., Program]


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


TEXT = """g (float[N,3,9,8] x) => (float[N,5] y) {
    c = Conv(x, w, b) r = Relu(c) p = MaxPool<kernel_shape=[2,2]>(r) t = Tanh(p) f = Flatten(t) y = Gemm(f, v) }"""
WEIGHTS = {"w": normal(1, 6, 3, 3, 3), "b": normal(2, 6), "v": normal(3, 180, 5)}
X = {"x": normal(0, 50, 3, 9, 8)}


def annotated(parse_program: ParseProgram, text: str, weights: Mapping[str, Array]) -> Program:
    program = parse_program(text, weights, 17)
    Pipeline.parse("annotate:small=0").run(program, Context())
    return program


@pytest.fixture
def program(parse_program: ParseProgram) -> Program:
    return annotated(parse_program, TEXT, WEIGHTS)


def context(program: Program, feeds: Mapping[str, Array] = X) -> Context:
    return Context(data=open_data(feeds, input_specs(program.source)), threads=1)


def test_one_tensor_of_each_group_and_the_channel_means_of_layer_inputs(program: Program) -> None:
    assert program.plan["p"].group == "r"
    assert program.plan["f"].group == "t"
    assert needs(program, "minmax") == {
        "x": Needs(channels=1),
        "r": Needs(),
        "t": Needs(),
        "f": Needs(channels=-1),
    }
    assert needs(program, "mse")["r"] == Needs(histogram=True)
    assert needs(program, "mse")["f"] == Needs(channels=-1)  # for its means; the range is that of t


def test_the_statistics_are_those_of_a_run(program: Program) -> None:
    result = Calibrate("percentile").run(program, context(program))
    assert result.changed == 4
    session = make_session(program.source, threads=1, extra_outputs=["r", "t", "f"])
    values = dict(zip(["r", "t", "f"], session.run(["r", "t", "f"], X), strict=True)) | X
    for name, truth in values.items():
        found = program.statistics[name]
        assert found.count == truth.size
        # the Relu that is an output cannot fuse, which moves float32 roundings
        np.testing.assert_allclose(
            [found.minimum, found.maximum], [truth.min(), truth.max()], rtol=1e-5, atol=1e-6
        )
        if found.histogram is not None:  # the sums come with it
            np.testing.assert_allclose(found.mean, truth.mean(dtype=np.float64), rtol=1e-5, atol=1e-6)
    channels = program.statistics["x"].channels
    assert channels is not None
    np.testing.assert_allclose(channels.mean, X["x"].mean((0, 2, 3), np.float64), rtol=1e-6, atol=1e-7)
    assert [name for name, s in program.statistics.items() if s.histogram is None] == ["f"]


def test_a_complete_table_needs_no_run(program: Program) -> None:
    Calibrate("mse").run(program, context(program))
    gathered = dict(program.statistics)
    for ranges in ("mse", "minmax", "entropy"):  # histograms serve all of them
        assert Calibrate(ranges).run(program, Context(data=None)).changed == 0
    assert program.statistics == gathered


def test_a_table_that_lacks_something_is_an_error_without_data(program: Program) -> None:
    Calibrate("minmax").run(program, context(program))
    with pytest.raises(DataError, match=r"the calibration table lacks '\w'; it was saved with other options"):
        Calibrate("percentile").run(program, Context(data=None))  # no histograms
    del program.statistics["t"]
    with pytest.raises(DataError, match="the calibration table lacks 't'"):
        Calibrate().run(program, Context(data=None))
    program.statistics.clear()
    with pytest.raises(DataError, match="there is no calibration data"):
        Calibrate().run(program, Context(data=None))


def test_only_what_is_missing_is_gathered(program: Program) -> None:
    Calibrate().run(program, context(program))
    kept = program.statistics["x"]
    del program.statistics["t"]
    assert Calibrate().run(program, context(program)).changed == 1
    assert program.statistics["x"] is kept
    assert program.statistics["t"].count == 50 * 6 * 6 * 5


def test_a_plan_without_activations_needs_no_data(parse_program: ParseProgram) -> None:
    program = annotated(parse_program, "g (float[N] x) => (float[N] y) { y = Tanh(x) }", {})
    assert Calibrate().run(program, Context(data=None)).changed == 0


def test_of_a_table_only_what_is_looked_up_is_gathered(parse_program: ParseProgram) -> None:
    """Its initializer would be an output of every batch; for an embedding of 100 MB that is most of the time."""
    text = "g (int64[N,5] i) => (float[N,5,64] y) { e = Gather(table, i) l = Relu(e) y = MatMul(l, w) }"
    program = annotated(parse_program, text, {"table": normal(1, 100, 64), "w": normal(2, 64, 64)})
    assert program.plan["e"].group == "table"
    assert needs(program, "minmax") == {"e": Needs(histogram=True), "l": Needs(channels=-1)}
    Calibrate().run(program, context(program, {"i": np.array([[1, 1, 1, 2, 2]] * 7)}))
    assert program.statistics["e"].count == 7 * 5 * 64
    values = normal(1, 100, 64)[[1, 1, 1, 2, 2]]
    assert program.statistics["e"].total_absolute == pytest.approx(7 * np.abs(values).sum(dtype=float))


def test_a_table_alone_needs_no_samples(parse_program: ParseProgram) -> None:
    text = "g (int64[N,5] i) => (float[N,5,64] y) { y = Gather(table, i) }"
    program = annotated(parse_program, text, {"table": normal(1, 100, 64)})
    assert program.plan["y"].group == "table"
    assert needs(program, "auto") == {}


def test_layers_that_disagree_on_the_channel_axis_get_no_means(parse_program: ParseProgram) -> None:
    text = "g (float[N,12,20] x) => (float[N,8,18] y, float[N,12,24] z) { y = Conv(x, w) z = MatMul(x, v) }"
    program = annotated(parse_program, text, {"w": normal(1, 8, 12, 3), "v": normal(2, 20, 24)})
    assert list(program.units) == [n.name for n in program.graph.nodes]
    assert needs(program, "minmax")["x"] == Needs()
    assert Calibrate().run(program, context(program, {"x": normal(0, 9, 12, 20)})).changed == 2


def test_a_table_with_means_along_another_axis_lacks_those_wanted(program: Program) -> None:
    Calibrate().run(program, context(program))
    program.statistics["x"].needs = Needs(channels=-1)
    with pytest.raises(DataError, match="the calibration table lacks 'x'"):
        Calibrate().run(program, Context(data=None))
