"""`onnxq compare --exact`: files that saturate and files that do not, on the command line and as data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxq.cli import main
from onnxq.commands.exactness import compare_exactly
from onnxq.compiler import compile_model
from onnxq.errors import ModelError
from onnxq.presets import preset_pipeline
from onnxq.reference.run import Reference

MODELS = Path(__file__).parents[2] / "models"
CNN = MODELS / "digits_cnn.onnx"
TEST = str(MODELS / "digits_test.npz")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The CNN as the preset makes it, and with weights over the full range."""
    folder = tmp_path_factory.mktemp("files")
    text = preset_pipeline("int8").replace(" round-weights", "")
    made = []
    for name, pipeline in (
        ("safe", text),
        ("full", text.replace("quantize-weights", "quantize-weights:saturation=ignore")),
    ):
        made.append(folder / f"{name}.onnx")
        calib = MODELS / "digits_calib.npz"
        compile_model(CNN, calib, pipeline=pipeline, output=made[-1], samples=32, threads=1, speed=False)
    return made[0], made[1]


def test_what_differs_is_named(files: tuple[Path, Path]) -> None:
    safe, full = files
    found = compare_exactly([safe, full], TEST, samples=20, threads=1)
    assert found["samples"] == 20
    first, second = found["models"]
    assert (first["model"], first["same_everywhere"], first["saturating"]) == (str(safe), True, [])
    assert (first["avx2"]["tensors"], first["avx2"]["first"], first["runtime"]["same"]) == (0, None, True)
    assert (second["model"], second["same_everywhere"], second["runtime"]["same"]) == (str(full), False, True)
    with np.load(TEST) as file:
        images = file["image"]
    feeds = {"image": images[np.linspace(0, len(images), 20, endpoint=False).astype(int)]}
    exact = Reference(full)
    sums, pairs = (r.codes(feeds) for r in (exact, exact.using("avx2")))
    counts = {name: int((sums[name] != pairs[name]).sum()) for name in sums}
    listed = {name: d["differing"] for name, d in second["avx2"]["differences"].items()}
    assert set(listed) == {name for name, count in counts.items() if count}
    assert second["avx2"]["first"] == next(name for name, count in counts.items() if count)
    assert second["codes"] == sum(x.size for x in sums.values())
    assert second["avx2"]["outputs"]["logits"]["max_abs"] > 0.1
    json.dumps(found)


def test_float_files_are_left_out(files: tuple[Path, Path]) -> None:
    notes: list[str] = []
    found = compare_exactly([CNN, files[0]], TEST, samples=5, threads=1, warn=notes.append)
    assert [row["model"] for row in found["models"]] == [str(files[0])]
    assert notes == [f"{CNN} computes no 8-bit codes and is left out"]
    with pytest.raises(
        ModelError, match=r"there are no 8-bit codes in .*digits_cnn\.onnx, so there is nothing"
    ):
        compare_exactly([CNN], TEST)


def test_files_must_take_the_same_inputs(files: tuple[Path, Path], tmp_path: Path) -> None:
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [None, 2])],
        [
            helper.make_tensor("s", TensorProto.FLOAT, [], [1.0]),
            helper.make_tensor("z", TensorProto.UINT8, [], [0]),
        ],
    )
    other = tmp_path / "other.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), other)
    with pytest.raises(ModelError, match="only the first model has an input 'image'"):
        compare_exactly([files[0], other], TEST)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(list(words))
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def test_the_command_line(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("--data", TEST, "--samples", "5", "--threads", "1", "--exact")
    code, out, err = run(capsys, "compare", str(files[1]), *settings)
    assert (code, err) == (0, "")
    assert "tensors differ, first in stage2.relu1" in " ".join(out.split())
    assert out.rstrip().endswith("5 samples")
    code, out, _ = run(capsys, "compare", str(CNN), str(files[0]), *settings, "--json")
    result: dict[str, Any] = json.loads(out)
    assert (code, result["models"][0]["same_everywhere"]) == (0, True)


def test_one_model_needs_exact(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "compare", str(CNN), "--data", TEST)
    assert (code, out) == (2, "")
    assert "compare takes two models, A and B; only with --exact may B be left out" in " ".join(err.split())
