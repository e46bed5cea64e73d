"""A configuration file sets any option of compile, the command line counts before it, and mistakes in it are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from onnxq.cli import main

Run = Callable[..., tuple[int, str, str]]
MODELS = Path(__file__).parents[1] / "models"
COMPLETE = f"""
model = "{MODELS / "digits_cnn.onnx"}"
calib = "{MODELS / "digits_calib.npz"}"
output = "q.onnx"
bits = "w4a8"
samples = 32
test = "test.npz"
metric = "top5"
seed = 1
threads = 1
json = true
override = ["Gemm=w8a8"]
"""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line: exit code, standard output, standard error on one line."""

    def go(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        printed = capsys.readouterr()
        return int(left.value.code or 0), printed.out, " ".join(printed.err.split())

    return go


def written(folder: Path, text: str) -> str:
    path = folder / "onnxq.toml"
    path.write_text(text, "utf-8")
    return str(path)


def test_every_option_can_come_from_the_file_and_paths_start_there(run: Run, tmp_path: Path) -> None:
    shutil.copy(MODELS / "digits_test.npz", tmp_path / "test.npz")
    code, out, _ = run("compile", "--config", written(tmp_path, COMPLETE))
    report = json.loads(out)
    assert code == 0
    assert (tmp_path / "q.onnx").exists()
    assert report["quality"]["metric"]["metric"] == "top5"
    assert report["calibration"]["samples"] == 32
    assert "weights=int4:channel" in report["pipeline"]
    assert "override=Gemm=w8a8" in report["pipeline"]


def test_the_command_line_counts_before_the_file(run: Run, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    shutil.copy(MODELS / "digits_test.npz", tmp_path / "test.npz")
    code, out, _ = run(
        "compile",
        "-o",
        str(other),
        "--bits",
        "w8a8",
        "--config",
        written(tmp_path, COMPLETE),
        "--samples",
        "16",
    )
    report = json.loads(out)
    assert code == 0
    assert other.exists()
    assert not (tmp_path / "q.onnx").exists()
    assert report["calibration"]["samples"] == 16
    assert "int4" not in report["pipeline"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('bist = "w4a4"', "unknown option 'bist' in {file}; did you mean 'bits'? The choices are: "),
        ('override = "head=w8a8"', "option 'override' in {file} is 'head=w8a8'; it must be a list of texts"),
        ('json = "yes"', "option 'json' in {file} is 'yes'; it must be true or false"),
        ('bits = ["w4a4"]', "option 'bits' in {file} is ['w4a4']; it must be one text or number"),
        ("bits = true", "option 'bits' in {file} is True; it must be one text or number"),
        ("bits = ", "cannot read the configuration {file}: Invalid value (at end of document)"),
        ('model = "m"\noutput = "q"\nsamples = "few"', "invalid value for '--samples'"),
        ('bits = "w4a4"', "missing argument 'MODEL'"),
    ],
)
def test_mistakes_are_named(run: Run, tmp_path: Path, text: str, said: str) -> None:
    file = written(tmp_path, text)
    code, out, err = run("compile", "--config", file)
    assert code in (1, 2)
    assert out == ""
    assert err.removeprefix("onnxq: error: ").startswith(said.format(file=file))


def test_a_file_that_is_not_there(run: Run, tmp_path: Path) -> None:
    code, _, err = run("compile", "--config", str(tmp_path / "no.toml"))
    assert code == 1
    assert "no.toml: no such file or directory" in err
