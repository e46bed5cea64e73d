"""Noisy networks at 8 bits get a second attempt, and of both the one with less noise is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

import onnxq
from onnxq import second_attempt
from onnxq.pipeline import Context, Pipeline
from onnxq.presets import preset_pipeline
from onnxq.second_attempt import thorough

MODELS = Path(__file__).parents[1] / "models"
CNN, CALIB = MODELS / "digits_cnn.onnx", MODELS / "digits_calib.npz"
FULL = {"ranges": "mse", "bias_correction": "better"}
PRESET = Pipeline.parse(preset_pipeline("int8"))
NOISY = """g (float[N,8,6,6] x) => (float[N,M] y) {
    a = Conv(x, same)
    s = Sigmoid(a)
    b = Conv(s, w)
    y = Flatten(b)
}"""
Feeds = NDArray[np.float32]


def compiled(model: Any = CNN, data: Any = CALIB, **options: Any) -> onnxq.CompiledModel:
    return onnxq.compile_model(model, data, speed=False, threads=1, samples=64, **options)


def notes(done: onnxq.CompiledModel) -> list[str]:
    """What the report says of a second attempt."""
    return [note for note in done.report.notes if "second attempt" in note]


@pytest.fixture(scope="module")
def noisy(parse_model: Callable[..., ModelProto]) -> tuple[ModelProto, Feeds]:
    """A network that tells small values apart and sees a few large ones, and its samples."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(8, 8, 3, 3))
    weights -= weights.mean(axis=(1, 2, 3), keepdims=True)
    same = np.eye(8, dtype=np.float32).reshape(8, 8, 1, 1)
    model = parse_model(NOISY, {"same": same, "w": weights.astype(np.float32)})
    return model, rng.standard_t(2.0, size=(64, 8, 6, 6)).astype(np.float32)


def sqnr_db(model: ModelProto, done: onnxq.CompiledModel, x: Feeds) -> float:
    """Of the output on the samples, as onnxruntime gives it."""
    want, got = (
        ort.InferenceSession(m.SerializeToString()).run(None, {"x": x})[0] for m in (model, done.model)
    )
    return float(10.0 * np.log10(np.square(want).sum() / np.square(want - got).sum()))


@pytest.mark.parametrize("form", ["qdq", "integer"])
def test_noisy_network_is_compiled_as_below_8_bits(noisy: tuple[ModelProto, Feeds], form: str) -> None:
    model, x = noisy
    done = compiled(model, x, form=form)
    first = compiled(model, x, form=form, ranges="minmax", bias_correction="output")
    wanted = compiled(model, x, form=form, **FULL)
    assert sqnr_db(model, first, x) < second_attempt.NOISY_DB
    assert sqnr_db(model, first, x) < sqnr_db(model, wanted, x)
    assert done.model == wanted.model
    assert len(notes(done)) == 1
    assert ("--min-sqnr" in notes(done)[0]) == (sqnr_db(model, wanted, x) < second_attempt.NOISY_DB)
    assert done.report.pipeline == wanted.report.pipeline


def test_the_note_names_only_what_was_left_open(noisy: tuple[ModelProto, Feeds]) -> None:
    (note,) = notes(compiled(*noisy, ranges="minmax"))
    assert "correction=better" in note
    assert "ranges" not in note


def test_network_that_keeps_enough_is_compiled_once() -> None:
    done = compiled()
    assert not notes(done)
    assert done.report.pipeline == str(PRESET)


def test_attempt_that_brings_nothing_is_left(
    noisy: tuple[ModelProto, Feeds], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiled(*noisy, ranges="minmax", bias_correction="output")
    monkeypatch.setattr(second_attempt, "THOROUGH", {"ranges": "percentile=60", "correction": "none"})
    done = compiled(*noisy)
    assert done.model.graph == first.model.graph  # metadata hold the pipeline
    assert "brought nothing" in notes(done)[0]
    assert notes(done)[0].endswith("; --min-sqnr keeps as many dB as it is given")
    assert done.report.pipeline == str(PRESET)


@pytest.mark.parametrize(
    "given",
    [
        {"bits": "w4a8"},
        {"bits": "w8"},
        {"ranges": "minmax", "bias_correction": "output"},
        {"override": ["Conv=w4a8"]},
        {"pipeline": preset_pipeline("int8")},
    ],
)
def test_what_was_asked_for_is_made_as_it_is(noisy: tuple[ModelProto, Feeds], given: dict[str, Any]) -> None:
    assert not notes(compiled(*noisy, **given))


def test_floor_is_kept_by_a_second_attempt_before_layers_get_more_bits(
    noisy: tuple[ModelProto, Feeds],
) -> None:
    model, x = noisy
    plain = sqnr_db(model, compiled(model, x, ranges="minmax", bias_correction="output"), x)
    done = compiled(model, x, min_sqnr=plain + 1.0, first_last="8")
    assert done.report.floor is not None
    assert done.report.floor.raised
    steps = Pipeline.parse(done.report.pipeline)
    assert set(steps.values("ranges")) == {FULL["ranges"]}
    assert steps.values("correction") == [FULL["bias_correction"]]


@pytest.mark.parametrize(("enough", "tries"), [(None, 1), (29.0, 1), (33.0, 2)])
def test_the_first_attempt_stays_where_it_keeps_enough(enough: float | None, tries: int) -> None:
    made: list[Any] = []

    def make(steps: Pipeline, ctx: Context) -> Any:
        main = SimpleNamespace(sqnr_db=30.0 + len(made))
        made.append(SimpleNamespace(verification=SimpleNamespace(difference=SimpleNamespace(main=main))))
        return made[-1]

    found, note = second_attempt.better_attempt(make, PRESET, Context(), enough)
    assert found is made[-1]
    assert (len(made), note is None) == (tries, tries == 1)


def test_thorough_pipeline_leaves_what_was_chosen() -> None:
    assert thorough(PRESET) == PRESET.with_option("ranges", "mse").with_option("correction", "better")
    chosen = PRESET.with_option("ranges", "entropy")
    assert thorough(chosen) == chosen.with_option("correction", "better")
    assert thorough(chosen.with_option("correction", "none")) is None
    assert thorough(Pipeline.parse(preset_pipeline("weight-only"))) is None
