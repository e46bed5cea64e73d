"""The output keeps the SQNR asked for, measured here by hand, and no layer has more bits than that takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

import onnxq
from onnxq import mixed_precision
from onnxq.errors import ModelError, UsageError
from onnxq.mixed_precision import Floor

MODELS = Path(__file__).parents[1] / "models"
CNN, CALIB = MODELS / "digits_cnn.onnx", MODELS / "digits_calib.npz"
Array = NDArray[np.float32]
ParseModel = Callable[..., ModelProto]

CHAIN = """g (float[N,8,6,6] x) => (float[N,8] y) {
    [one] a = Conv<pads=[1,1,1,1]>(x, w1)
    ra = Relu(a)
    [two] b = Conv<pads=[1,1,1,1]>(ra, w2)
    rb = Relu(b)
    [three] c = Conv<pads=[1,1,1,1]>(rb, w3)
    rc = Relu(c)
    [four] d = Conv<pads=[1,1,1,1]>(rc, w4)
    [pool] m = GlobalAveragePool(d)
    y = Flatten(m)
}"""
CLOSE = 0.1  # dB: batches that the runtime fuses otherwise round a few codes to their neighbours
PLAIN = "annotate:{} calibrate choose-ranges quantize-weights correct-bias emit-qdq"


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def chain(parse: ParseModel, **others: Array) -> ModelProto:
    return parse(CHAIN, {f"w{i}": normal(8, 8, 3, 3, seed=i) for i in range(1, 5)} | others)


def compiled(model: ModelProto | Path, data: Any, **options: Any) -> onnxq.CompiledModel:
    return onnxq.compile_model(model, data, speed=False, threads=1, samples=64, **options)


def floor(done: onnxq.CompiledModel) -> Floor:
    assert done.report.floor is not None
    return done.report.floor


def sqnr(model: ModelProto, done: onnxq.CompiledModel, feeds: dict[str, Array]) -> float:
    """Of the first output, from both models as onnxruntime runs them."""
    sessions = [ort.InferenceSession(m.SerializeToString()) for m in (model, done.model)]
    wanted, found = (np.asarray(s.run(None, feeds)[0], np.float64) for s in sessions)
    return float(10 * np.log10((wanted**2).sum() / ((wanted - found) ** 2).sum()))


def widths(done: onnxq.CompiledModel) -> dict[str, str]:
    return {name: text.split()[0] for name, text in done.report.bits.items()}


def test_the_output_keeps_the_floor_in_fewer_bytes_than_8_bits_take() -> None:
    model, images = onnx.load(CNN), {"image": np.load(CALIB)["image"][:64]}
    narrow, kept, wide = (
        compiled(CNN, images, **o) for o in ({"bits": "w2a8"}, {"bits": "w2a8", "min_sqnr": 30.0}, {})
    )
    assert sqnr(model, narrow, images) < 27.0
    assert sqnr(model, kept, images) > 30.0 - CLOSE  # of the same 64 images
    sizes = [done.report.quantized_bytes for done in (narrow, kept, wide)]
    assert sizes == sorted(sizes)
    assert sizes[1] < 0.8 * sizes[2]
    found = floor(kept)
    assert [t.bytes for t in found.tries] == sorted(t.bytes for t in found.tries)
    assert found.tries[0].bytes == pytest.approx(sizes[0], rel=0.02)  # but for its first and last layers
    assert 1 < len(found.tries) < 6


def test_a_floor_that_is_kept_anyway_changes_nothing() -> None:
    plain, kept = (compiled(CNN, CALIB, first_last="8", **o) for o in ({}, {"min_sqnr": 20.0}))
    assert kept.model.SerializeToString() == plain.model.SerializeToString()
    assert len(floor(kept).tries) == 1
    assert not floor(kept).raised


def test_the_pipeline_of_the_file_makes_it_again(parse_model: ParseModel) -> None:
    model, x = chain(parse_model), normal(64, 8, 6, 6)
    model.graph.node[2].name = "odd=name,with|all [of]*them"
    kept = compiled(model, x, bits="w3a8", first_last="same", min_sqnr=25.0)
    assert floor(kept).raised
    (pipeline,) = [p.value for p in kept.model.metadata_props if p.key == "onnxq.pipeline"]
    again = compiled(model, x, pipeline=pipeline)
    assert again.model.SerializeToString() == kept.model.SerializeToString()


def test_only_the_layer_that_8_bits_do_not_suit_is_float(parse_model: ParseModel) -> None:
    """One scale for a weight with a channel a thousand times as large leaves the others few codes."""
    uneven = normal(8, 8, 3, 3, seed=3) * np.array([1e3] + [1.0] * 7, np.float32).reshape(8, 1, 1, 1)
    even = normal(8, 8, 3, 3, seed=4) * np.array([1e-3] + [1.0] * 7, np.float32).reshape(1, 8, 1, 1)
    model, x = chain(parse_model, w3=uneven, w4=even), normal(64, 8, 6, 6)
    pipeline = PLAIN.format("weights=int8:tensor")
    assert sqnr(model, compiled(model, x, pipeline=pipeline), {"x": x}) < 25.0
    kept = compiled(model, x, pipeline=pipeline, min_sqnr=28.0)
    assert sqnr(model, kept, {"x": x}) > 28.0 - CLOSE
    assert "three" in floor(kept).raised
    assert set(floor(kept).raised) <= {"three", "four"}
    assert set(floor(kept).raised.values()) == {None}
    (row,) = [row for row in kept.report.nodes if row.name == "three"]
    assert (row.status, row.reason) == ("float", "it is float so that the output keeps its SQNR")


def test_narrow_activations_grow_with_the_layers_that_read_them(parse_model: ParseModel) -> None:
    model, x = chain(parse_model), normal(64, 8, 6, 6)
    pipeline = PLAIN.format("activations=uint2,first_last=same")
    kept = compiled(model, x, pipeline=pipeline, min_sqnr=24.0)
    assert sqnr(model, kept, {"x": x}) > 24.0 - CLOSE
    found = widths(kept)
    assert found["one"].startswith("w8a")
    assert min(int(text[-1]) for text in found.values()) > 2
    assert None not in floor(kept).raised.values()


def test_narrow_activations_that_no_layer_multiplies_are_float(parse_model: ParseModel) -> None:
    """Nothing could be asked to widen them."""
    model, x = chain(parse_model), normal(64, 8, 6, 6)
    pipeline = PLAIN.format("activations=uint2,elementwise=same,first_last=same")
    kept = compiled(model, x, pipeline=pipeline, min_sqnr=20.0)
    assert sqnr(model, kept, {"x": x}) > 20.0 - CLOSE
    assert floor(kept).raised["pool"] is None


def test_raised_widths_bring_the_operator_set_that_stores_them(parse_model: ParseModel) -> None:
    weights = {f"w{i}": normal(8, 8, 3, 3, seed=i) for i in range(1, 5)}
    done = compiled(
        parse_model(CHAIN, weights, 17), normal(64, 8, 6, 6), pipeline=PLAIN.format("raised=two=w4a8")
    )
    assert widths(done)["two"] == "w4a8"
    assert done.model.opset_import[0].version >= 21  # INT4


def test_what_an_override_says_stays(parse_model: ParseModel) -> None:
    model, x = chain(parse_model), normal(64, 8, 6, 6)
    assert "one" in floor(compiled(model, x, bits="w3a8", min_sqnr=20.0)).raised
    kept = compiled(model, x, bits="w3a8", min_sqnr=20.0, override=["one=w3a8"])
    assert widths(kept)["one"] == "w3a8"
    assert "one" not in floor(kept).raised


def test_activations_that_an_override_narrows_stay(parse_model: ParseModel) -> None:
    """Layers that read them widen them in other cases."""
    model, x = chain(parse_model), normal(64, 8, 6, 6)
    kept = compiled(model, x, bits="w8a2", override=["two=w8a2"], min_sqnr=16.0)
    assert floor(kept).raised
    assert "two" not in floor(kept).raised
    assert widths(kept)["two"] == "w8a2"


@pytest.mark.parametrize("count", [1, 5])
def test_few_samples_are_not_held_back(parse_model: ParseModel, count: int) -> None:
    def source() -> Iterator[dict[str, Any]]:
        for i in range(count):
            yield {"x": normal(1, 8, 6, 6, seed=i)}

    kept = compiled(chain(parse_model), source, min_sqnr=20.0)
    (attempt,), difference = floor(kept).tries, kept.report.difference
    assert difference is not None
    assert difference.main is not None
    assert attempt.sqnr_db == difference.main.sqnr_db


def test_a_floor_out_of_reach_is_an_error_and_leaves_the_file(
    parse_model: ParseModel, tmp_path: Path
) -> None:
    out = tmp_path / "out.onnx"
    out.write_bytes(b"before")
    model, x = chain(parse_model), normal(64, 8, 6, 6)
    said = r"the output keeps \d+\.\d dB with every layer that no override fixes in float that adds noise, less than min-sqnr=40"
    with pytest.raises(ModelError, match=said):
        compiled(model, x, bits="w3a8", override=["two=w2a8"], min_sqnr=40.0, output=out)
    assert out.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [out]


def test_a_table_of_statistics_does_not_replace_samples(tmp_path: Path) -> None:
    table = tmp_path / "table.npz"
    compiled(CNN, CALIB, save_calibration=table)
    with pytest.raises(UsageError, match="holds samples back, which a table of statistics has seen"):
        compiled(CNN, None, load_calibration=table, min_sqnr=20.0)


def test_a_result_that_falls_short_of_its_attempt_is_raised_further(
    parse_model: ParseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt keeps the floor on samples held back, and what all samples make of it does not."""
    measured = iter([21.0, 19.0, 22.0, 20.5])
    monkeypatch.setattr(mixed_precision, "_sqnr_db", lambda made: next(measured))
    model, x = chain(parse_model), normal(64, 8, 6, 6)
    kept = compiled(model, x, bits="w3a8", min_sqnr=20.0)
    assert [t.sqnr_db for t in floor(kept).tries] == [21.0, 22.0]
    assert floor(kept).raised


def test_attempts_are_judged_by_samples_that_they_do_not_see(parse_model: ParseModel) -> None:
    """Every fourth sample is held back. Where these do not fit into ranges of the others, attempts are worse than the result."""
    x = normal(64, 8, 6, 6)
    x[::4] *= 2.0
    kept = compiled(chain(parse_model), x, min_sqnr=5.0)
    (attempt,), difference = floor(kept).tries, kept.report.difference
    assert difference is not None
    assert difference.main is not None
    assert attempt.sqnr_db is not None
    assert difference.main.sqnr_db is not None
    assert attempt.sqnr_db < difference.main.sqnr_db - 5.0


def test_progress_says_which_attempt_it_is_of(parse_model: ParseModel) -> None:
    labels: list[str] = []
    model, x = chain(parse_model), normal(64, 8, 6, 6)
    progress = lambda label, done, total: labels.append(label)  # noqa: E731
    compiled(model, x, bits="w3a8", first_last="same", min_sqnr=25.0, progress=progress)
    assert "calibrate" in labels
    assert "attempt 2: calibrate" in labels
