"""Statistics of inner tensors over samples, a bounded batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq.calibration import collect as module
from onnxq.calibration.collect import activations, at_once, collect
from onnxq.calibration.statistics import Needs
from onnxq.data import Source, input_specs, open_data
from onnxq.errors import DataError, ModelError
from onnxq.pipeline import Context
from onnxq.program import Program

Array = NDArray[Any]
ParseProgram = Callable[..., Program]

TEXT = "g (float[N,3,4] x) => (float[N,3,4] y) { a = Relu(x) b = Mul(a, k) y = Exp(b) }"
K = np.array([1, -2, 3, 0.5], np.float32)
X = np.random.default_rng(1).standard_normal((37, 3, 4)).astype(np.float32)
TRUTH = {"x": X, "a": np.maximum(X, 0), "b": np.maximum(X, 0) * K, "y": np.exp(np.maximum(X, 0) * K)}


@pytest.fixture
def program(parse_program: ParseProgram) -> Program:
    return parse_program(TEXT, {"k": K})


def context(program: Program, source: Source, **options: Any) -> Context:
    return Context(data=open_data(source, input_specs(program.source)), threads=1, **options)


def feeds_of(*sizes: int) -> Callable[[], Iterator[Mapping[str, Array]]]:
    """A function that yields the samples in batches of these sizes."""

    def feeds() -> Iterator[Mapping[str, Array]]:
        start = 0
        for size in sizes:
            yield {"x": X[start : start + size]}
            start += size

    return feeds


@pytest.mark.parametrize(
    "source",
    [{"x": X}, [{"x": X}], feeds_of(1, 20, 16), feeds_of(30, 7), feeds_of(*[1] * 37)],
    ids=["rows", "one feed", "growing feeds", "shrinking feeds", "single samples"],
)
def test_statistics_are_those_of_all_samples(source: Source, program: Program) -> None:
    needs = {name: Needs(histogram=True, channels=1) for name in TRUTH}
    found = collect(program, context(program, source), needs, "calibrating")
    assert set(found) == set(TRUTH)
    for name, values in TRUTH.items():
        statistics = found[name]
        assert (statistics.name, statistics.needs) == (name, needs[name])
        assert statistics.count == values.size
        rtol = 1e-6  # Exp of onnxruntime and numpy differ in the last bit of float32
        np.testing.assert_allclose(
            [statistics.minimum, statistics.maximum], [values.min(), values.max()], rtol
        )
        wide = values.astype(np.float64)
        np.testing.assert_allclose(statistics.mean, wide.mean(), rtol=1e-6)
        assert statistics.channels is not None
        np.testing.assert_allclose(statistics.channels.mean, wide.mean((0, 2)), rtol=1e-6)
        assert statistics.histogram is not None
        assert statistics.histogram.counts.sum() == np.count_nonzero(values)


def test_rows_are_taken_evenly_and_functions_from_the_start(program: Program) -> None:
    rows = collect(
        program, context(program, {"x": X}, samples=4), {"x": Needs(histogram=True)}, "calibrating"
    )["x"]
    taken = [int(np.flatnonzero(X.sum((1, 2)) == s)[0]) for s in X.sum((1, 2))]
    assert taken == list(range(37))  # sums tell the samples apart
    assert rows.count == 4 * 12
    assert rows.total != pytest.approx(X[:4].sum(dtype=np.float64))
    first = collect(
        program, context(program, feeds_of(3, 20, 14), samples=5), {"x": Needs(histogram=True)}, "calibrating"
    )["x"]
    assert first.count == 5 * 12
    assert first.total == pytest.approx(X[:5].sum(dtype=np.float64))


def test_the_digest_of_the_samples_is_found_on_the_way(program: Program) -> None:
    started = []

    def feeds() -> Iterator[Mapping[str, Array]]:
        started.append(True)
        yield {"x": X}

    ctx = context(program, feeds, samples=20)
    assert ctx.data is not None
    collect(program, ctx, {"a": Needs()}, "calibrating")
    passes = len(started)
    assert ctx.data.digest(20) == open_data(feeds_of(37), input_specs(program.source)).digest(20)
    assert len(started) == passes


def batches(program: Program, ctx: Context, names: list[str], samples: int = 512) -> list[int]:
    return [batch.size for batch, _ in activations(program, ctx, names, samples, "calibrating")]


def test_batches_hold_no_more_than_the_bound(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ACTIVATION_BYTES", 300)
    sample = 3 * 4 * 4  # bytes of one tensor of one sample
    ctx = context(program, {"x": X})
    assert batches(program, ctx, ["x"]) == [8, 8, 8, 8, 5]  # the input is held anyway
    assert batches(program, ctx, ["a"]) == [300 // sample] * 6 + [1]
    assert batches(program, ctx, ["a", "b", "y"])[:-1] == [300 // (3 * sample)] * 18
    for _, values in activations(program, ctx, ["a", "b", "y"], 512, "calibrating"):
        assert sum(values[name].nbytes for name in ("a", "b", "y")) <= 300


def test_a_sample_beyond_the_bound_goes_alone(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ACTIVATION_BYTES", 47)
    assert batches(program, context(program, {"x": X[:3]}), ["a"]) == [1, 1, 1]


@pytest.mark.parametrize(("bound", "size"), [(1 << 20, 8), (300, 3), (47, 1)])
def test_runs_for_outputs_alone_hold_no_more_either(
    bound: int, size: int, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RUN_BYTES", bound)
    ctx = context(program, {"x": X})
    assert at_once(program, ctx) == 8  # nothing is known yet
    program.statistics |= collect(program, ctx, {"a": Needs(), "b": Needs()}, "calibrating")
    assert at_once(program, ctx) == size  # 300 // (2 tensors of 48 bytes)


def test_values_come_by_name_with_the_batch_they_belong_to(program: Program) -> None:
    ctx, start = context(program, {"x": X}), 0
    for batch, values in activations(program, ctx, ["x", "b", "y"], 512, "calibrating"):
        assert set(values) == {"x", "b", "y"}
        assert values["x"] is batch.feeds["x"]
        for name in values:
            part = TRUTH[name][start : start + batch.size]
            np.testing.assert_allclose(values[name], part, rtol=1e-6)  # Exp, as above
        start += batch.size
    assert start == 37


def test_progress_counts_samples_up_to_those_used(program: Program) -> None:
    seen: list[tuple[str, int, int | None]] = []

    def listen(label: str, done: int, total: int | None) -> None:
        seen.append((label, done, total))

    collect(program, context(program, {"x": X}, progress=listen), {"a": Needs()}, "looking")
    collect(program, context(program, {"x": X}, progress=listen, samples=7), {"a": Needs()}, "looking")
    collect(program, context(program, feeds_of(5, 7), progress=listen), {"a": Needs()}, "looking")
    expected: list[tuple[str, int, int | None]] = [("looking", n, 37) for n in (8, 16, 24, 32, 37)]
    assert seen == [*expected, ("looking", 7, 7), ("looking", 5, None), ("looking", 12, None)]


def test_without_data_there_are_no_statistics(program: Program) -> None:
    with pytest.raises(DataError, match="there is no calibration data; give some with --calib"):
        collect(program, Context(), {"a": Needs()}, "calibrating")
    with pytest.raises(DataError, match="has no samples"):
        collect(program, context(program, []), {"a": Needs()}, "calibrating")


def test_a_tensor_that_overflows_is_named(parse_program: ParseProgram) -> None:
    program = parse_program("g (float[N] x) => (float[N] y) { a = Exp(x) b = Sub(a, a) y = Relu(b) }")
    ctx = context(program, {"x": np.array([1, 100], np.float32)})
    with pytest.raises(DataError, match="tensor 'b' has 1 NaN and 0 infinite values among 2"):
        collect(program, ctx, {"b": Needs()}, "calibrating")


def test_a_tensor_that_is_not_there_and_samples_that_do_not_run(program: Program) -> None:
    with pytest.raises(ModelError, match="no tensor 'c'"):
        collect(program, context(program, {"x": X}), {"c": Needs()}, "calibrating")


def test_samples_that_the_model_cannot_run_are_its_error(parse_program: ParseProgram) -> None:
    program = parse_program(
        "g (float[N,K] x) => (float[N,3] y) { a = Relu(x) y = MatMul(a, w) }", {"w": K.reshape(4, 1)}
    )
    with pytest.raises(ModelError, match=r"onnxruntime failed to run the model: .*MatMul"):
        collect(program, context(program, {"x": X[:, 0, :3]}), {"a": Needs()}, "calibrating")
