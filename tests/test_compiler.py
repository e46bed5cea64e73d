"""The whole road, on the models that ship: the output loads, agrees with float, runs in integers, and says how it was made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxq
from onnxq.affine import sqnr_db
from onnxq.data import input_specs, open_data
from onnxq.measure.metrics import evaluate_session
from onnxq.model.session import make_session

MODELS = ("digits_cnn", "digits_transformer")


def compiled(models_dir: Path, name: str, **options: object) -> onnxq.CompiledModel:
    """A model that ships, compiled with its calibration data."""
    calib = models_dir / "digits_calib.npz"
    return onnxq.compile_model(models_dir / f"{name}.onnx", calib, threads=1, speed=False, **options)  # type: ignore[arg-type]


def accuracy(models_dir: Path, model: onnx.ModelProto | Path) -> float:
    """Top-1 on the held-out digits."""
    session = make_session(model, threads=1)
    specs = input_specs(onnx.load(models_dir / "digits_cnn.onnx"))
    return evaluate_session(session, open_data(models_dir / "digits_test.npz", specs), "top1").value


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"weights": "int8:tensor"}, {"ranges": "mse"}, {"form": "integer"}])
def test_eight_bits_keep_the_accuracy(models_dir: Path, name: str, options: dict[str, str]) -> None:
    done = compiled(models_dir, name, **options)
    float_accuracy = accuracy(models_dir, models_dir / f"{name}.onnx")
    assert accuracy(models_dir, done.model) >= float_accuracy - 0.0051  # four of 797 digits
    coverage = done.report.coverage
    assert coverage is not None
    assert coverage.share is not None
    assert coverage.share > 0.95  # attention's products of two activations stay float: 3 % of the transformer
    assert done.report.quantized_bytes < done.report.float_bytes / 2.5


def test_a_quantized_model_is_said_to_be_one(models_dir: Path) -> None:
    once = compiled(models_dir, "digits_cnn")
    twice = onnxq.compile_model(once.model, models_dir / "digits_calib.npz", threads=1, speed=False)
    sentence = "the model is quantized already: compile the float model it was made from"
    assert sentence in twice.report.notes
    assert sentence not in once.report.notes


@pytest.mark.parametrize("name", MODELS)
def test_without_data_the_model_is_smaller_and_as_good(models_dir: Path, name: str) -> None:
    done = onnxq.compile_model(models_dir / f"{name}.onnx", threads=1, speed=False)
    assert accuracy(models_dir, done.model) >= accuracy(models_dir, models_dir / f"{name}.onnx") - 0.0051
    assert done.report.quantized_bytes < done.report.float_bytes / 2.5
    assert any("no calibration data" in sentence for sentence in done.report.warnings)


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ({}, 128),
        ({"bits": "w4a8"}, 512),
        ({"bits": "w8a4"}, 512),
        ({"override": ["Conv=w4a8"]}, 512),
        ({"samples": 40}, 40),
        ({"bits": "w4a8", "samples": 40}, 40),
    ],
)
def test_statistics_take_more_samples_below_8_bits(
    parse_model: Callable[..., onnx.ModelProto], tmp_path: Path, options: dict[str, object], used: int
) -> None:
    rng, table = np.random.default_rng(0), tmp_path / "table"
    images, weights = rng.random((600, 4, 8, 8), dtype=np.float32), rng.normal(size=(4, 4, 3, 3))
    text = "g (float[N,4,8,8] x) => (float[N,4,h,w] y) { c = Conv(x, w) r = Relu(c) y = Conv(r, w) }"
    model = parse_model(text, {"w": weights.astype(np.float32)})
    settings = {"threads": 1, "speed": False, **options}
    done = onnxq.compile_model(model, images, save_calibration=table, **settings)  # type: ignore[arg-type]
    assert done.table is not None
    assert done.table.samples == used
    assert done.table.tensors["x"].count == used * 4 * 8 * 8
    assert done.report.calibration is not None
    assert done.report.calibration["samples"] == used
    again = onnxq.compile_model(model, images, load_calibration=table, **settings)  # type: ignore[arg-type]
    assert again.model == done.model


def test_statistics_of_fewer_samples_serve_other_widths(models_dir: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((600, 1, 8, 8), dtype=np.float32)
    path, table = models_dir / "digits_cnn.onnx", tmp_path / "table"
    onnxq.compile_model(path, images, save_calibration=table, threads=1, speed=False)
    done = onnxq.compile_model(path, images, load_calibration=table, bits="w6a8", threads=1, speed=False)
    assert done.table is not None
    assert done.table.samples == 128
    with pytest.raises(onnxq.DataError, match="of other data"):
        onnxq.compile_model(path, images, load_calibration=table, samples=64, threads=1, speed=False)


def test_the_same_inputs_give_the_same_bytes(models_dir: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        compiled(models_dir, "digits_cnn", output=tmp_path / f"{name}.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_types_of_inner_tensors_are_those_that_the_model_states() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (float[N,4] y)
        <STATED> { a = Sin(x) b = Cos(a) y = Neg(b) }"""
    for stated in ("float[N,4] a", ""):
        model = onnx.parser.parse_model(text.replace("<STATED>", f"<{stated}>" if stated else ""))
        made = onnxq.compile_model(model, threads=1, speed=False).model
        assert [info.name for info in made.graph.value_info] == ([stated[-1]] if stated else [])


def test_interface_and_metadata_are_kept(models_dir: Path) -> None:
    source = onnx.load(models_dir / "digits_cnn.onnx")
    source.metadata_props.add(key="author", value="somebody")
    done = onnxq.compile_model(source, models_dir / "digits_calib.npz", threads=1, speed=False)
    assert [i.SerializeToString() for i in done.model.graph.input] == [
        i.SerializeToString() for i in source.graph.input
    ]
    assert [o.SerializeToString() for o in done.model.graph.output] == [
        o.SerializeToString() for o in source.graph.output
    ]
    metadata = {p.key: p.value for p in done.model.metadata_props}
    assert metadata["author"] == "somebody"
    assert metadata["onnxq.pipeline"] == done.report.pipeline
    assert metadata["onnxq.seed"] == "0"
    assert len(metadata["onnxq.calibration.digest"]) == 64


def test_the_pipeline_in_the_metadata_makes_the_model_again(models_dir: Path) -> None:
    done = compiled(models_dir, "digits_cnn", weights="int8:tensor", skip=("stem.*",))
    again = compiled(models_dir, "digits_cnn", pipeline=done.report.pipeline)
    assert again.model.SerializeToString(deterministic=True) == done.model.SerializeToString(
        deterministic=True
    )


def test_a_saved_table_replaces_the_data(models_dir: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.npz"
    first = compiled(models_dir, "digits_cnn", save_calibration=table)
    second = onnxq.compile_model(
        models_dir / "digits_cnn.onnx", load_calibration=table, threads=1, speed=False
    )
    assert [t.SerializeToString() for t in second.model.graph.initializer] == [
        t.SerializeToString() for t in first.model.graph.initializer
    ]
    with pytest.raises(onnxq.DataError, match="of other model"):
        onnxq.compile_model(models_dir / "digits_transformer.onnx", load_calibration=table, speed=False)


def test_a_skipped_layer_stays_float_and_exact(models_dir: Path) -> None:
    done = compiled(models_dir, "digits_cnn", skip=("stage2.unit1.conv",))
    row = next(r for r in done.report.nodes if r.name == "stage2.unit1.conv")
    assert (row.status, row.reason) == ("float", "skipped by pattern 'stage2.unit1.conv'")
    feeds = {"image": np.load(models_dir / "digits_test.npz")["image"][:64]}
    optimized, plain = (
        make_session(done.model, threads=1, optimize=o).run(None, feeds)[0] for o in (True, False)
    )
    # integer kernels round a requantized sum once where Q/DQ arithmetic in float rounds twice: a step or two of the logits
    assert sqnr_db(plain, optimized) > 40


def test_a_model_of_a_format_that_data_needs_is_refused_without(models_dir: Path) -> None:
    with pytest.raises(onnxq.UsageError, match="ranges can only be chosen with calibration data"):
        onnxq.compile_model(models_dir / "digits_cnn.onnx", ranges="mse")
    with pytest.raises(onnxq.UsageError, match="names its own emission pass"):
        onnxq.compile_model(models_dir / "digits_cnn.onnx", pipeline="fold-constants", form="qdq")
    with pytest.raises(onnxq.UsageError, match="not both"):
        onnxq.compile_model(models_dir / "digits_cnn.onnx", pipeline="fold-constants", preset="int8")
