"""Real models, when ONNXQ_DATA names the folder that holds them: accuracy, coverage and saturation of what is deployed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

import onnxq
from onnxq.choices import Choices
from onnxq.data import input_specs, open_data
from onnxq.measure.compare import Difference, compare_sessions
from onnxq.model.session import make_session
from onnxq.saturation import excess, kernel_kind, pair_limit

if not os.environ.get("ONNXQ_DATA"):
    pytest.skip("ONNXQ_DATA names no folder with real models", allow_module_level=True)


@pytest.fixture(scope="module")
def feeds(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared feeds of the smaller tasks."""
    folder = tmp_path_factory.mktemp("feeds")
    words = [sys.executable, str(data_dir / "prepare.py"), str(folder), "cifar10", "kws", "ncf", "mnist"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return folder


def compared(
    data_dir: Path, feeds: Path, model: str, task: str, **options: str | float
) -> tuple[onnxq.CompiledModel, Difference]:
    """A compiled model and its difference from float on test samples."""
    path = data_dir / "models" / f"{model}.onnx"
    done = onnxq.compile_model(path, feeds / f"{task}.calib.npz", speed=False, **options)  # type: ignore[arg-type]
    data = open_data(feeds / f"{task}.test.npz", input_specs(onnx.load(path)))
    return done, compare_sessions(make_session(path), make_session(done.model), data, limit=500, batch=50)


@pytest.mark.parametrize(
    ("model", "weights", "least_db"),
    [
        ("cifar10_resnet20", "int8:channel", 29.0),
        ("cifar10_resnet20", "int8:tensor", 24.5),
        ("cifar10_resnet20_bn", "int8:channel", 29.0),
        ("cifar10_resnet56", "int8:channel", 28.0),
    ],
)
def test_residual_networks_run_whole_in_integers(
    data_dir: Path, feeds: Path, model: str, weights: str, least_db: float
) -> None:
    done, difference = compared(data_dir, feeds, model, "cifar10", weights=weights)
    assert difference.main is not None
    assert difference.main.sqnr_db is not None
    assert difference.main.sqnr_db >= least_db
    assert all(row.status == "integer" for row in done.report.nodes if row.op in ("Conv", "Gemm", "Add"))


def test_further_points_take_off_noise(data_dir: Path, feeds: Path) -> None:
    """Of a twentieth more weights, chosen channels gain more than twice what random ones do; 2 bits, rounded to nearest."""
    preset = str(Choices(bits="w2a8", weights="int2:tensor", multipoint=0.05).resolve(True))
    nearest = preset.replace(" round-weights", "")
    texts = {
        "chosen": nearest,
        "random": nearest.replace("multipoint:", "multipoint:choose=random,"),
        "plain": nearest.replace(" multipoint:share=0.05", ""),
    }
    sqnr = {}
    for name, text in texts.items():
        done, difference = compared(
            data_dir, feeds, "cifar10_resnet20", "cifar10", pipeline=text, samples=128
        )
        assert difference.main is not None
        assert difference.main.sqnr_db is not None
        sqnr[name] = difference.main.sqnr_db
        assert all(row.status == "integer" for row in done.report.nodes if row.op in ("Conv", "Gemm", "Add"))
    assert sqnr["plain"] < sqnr["random"] < sqnr["chosen"]
    assert sqnr["chosen"] - sqnr["plain"] > 2.0 * (sqnr["random"] - sqnr["plain"])


@pytest.mark.parametrize(("model", "task"), [("kws_dscnn", "kws"), ("mnist_cntk", "mnist")])
def test_small_classifiers_agree_with_float(data_dir: Path, feeds: Path, model: str, task: str) -> None:
    _, difference = compared(data_dir, feeds, model, task)
    assert difference.main is not None
    assert difference.main.agreement is not None
    assert (
        difference.main.agreement >= 0.97
    )  # a point of accuracy lost would need more than a point of disagreement


def test_tables_are_looked_up_as_codes(data_dir: Path, feeds: Path) -> None:
    done, _ = compared(data_dir, feeds, "ncf_ml1m_mlp", "ncf")
    assert all(row.status == "integer" for row in done.report.nodes if row.op == "Gather")
    assert done.report.quantized_bytes < done.report.float_bytes / 3.5


def test_no_channel_can_saturate(data_dir: Path, feeds: Path) -> None:
    done, _ = compared(data_dir, feeds, "kws_dscnn", "kws")
    program = onnxq.Program.from_model(onnx.shape_inference.infer_shapes(done.model))
    checked = 0
    for node in program.graph.nodes:
        if node.op not in ("Conv", "Gemm") or not node.inputs[1].inputs:
            continue
        codes = node.inputs[1].inputs[0].inputs[0].values
        axis = 0 if node.op == "Conv" or node.attrs.get("transB", 0) else 1
        assert not excess(codes, kernel_kind(node), axis, pair_limit()).any(), node.name
        checked += 1
    assert checked >= 5
