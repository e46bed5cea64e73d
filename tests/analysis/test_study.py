"""The analysis: figures agree with the evaluator, files are written, and the verdict tells wide from narrow."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

import onnxq
from onnxq.analysis.plots import check_plots, write_plots
from onnxq.cli import main
from onnxq.errors import UsageError

MODEL, CALIB = "digits_cnn.onnx", "digits_calib.npz"


@pytest.fixture(scope="module")
def narrow(models_dir: Path) -> onnxq.Analysis:
    return onnxq.analyze(
        models_dir / MODEL, models_dir / CALIB, bits="w2a2", samples=32, largest=3, threads=1
    )


def test_the_figures_belong_together(narrow: onnxq.Analysis) -> None:
    matrix = np.array(narrow.hessian)
    places = [list(narrow.names).index(name) for name in narrow.ranked]
    assert matrix.shape == (3, 3)
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_array_equal(np.diag(matrix), np.array(narrow.curvature)[places])
    assert list(np.array(narrow.rise)[places]) == sorted(narrow.rise, reverse=True)[:3]
    grid = np.array(narrow.contour)
    middle = len(narrow.offsets) // 2
    assert grid.shape == (5, 5)
    assert grid[middle, middle] == narrow.loss_start  # the same point, the same kernels
    assert grid.max() > narrow.loss_start  # steps half as large again
    assert set(narrow.pair) <= set(narrow.ranked)
    assert [p for p, _ in narrow.norms] == sorted(p for p, _ in narrow.norms)
    assert 0.0 <= narrow.interactions <= 1.0


def test_a_search_lowers_the_loss_where_it_is_said_to_pay(models_dir: Path, narrow: onnxq.Analysis) -> None:
    assert narrow.pays
    done = onnxq.compile_model(
        models_dir / MODEL,
        models_dir / CALIB,
        bits="w2a2",
        ranges="lapq",
        search_budget="60",
        samples=32,
        threads=1,
        speed=False,
    )
    found = done.report.as_json()["lapq"]
    assert found["loss_end"] < 0.95 * found["loss_before"]  # PAYS promises 5 %


def test_eight_bits_leave_nothing_to_win(models_dir: Path) -> None:
    wide = onnxq.analyze(
        models_dir / MODEL, models_dir / CALIB, bits="w8a8", samples=32, largest=2, threads=1
    )
    assert not wide.pays
    assert wide.norms == []
    assert wide.sqnr_db > 30.0
    assert "will bring little" in wide.verdict


def test_a_pair_of_ones_own(models_dir: Path, narrow: onnxq.Analysis) -> None:
    pair = (narrow.names[0], narrow.names[4])
    found = onnxq.analyze(models_dir / MODEL, models_dir / CALIB, samples=32, largest=1, pair=pair, threads=1)
    assert found.pair == pair
    with pytest.raises(UsageError, match="unknown tensor 'conv9'"):
        onnxq.analyze(models_dir / MODEL, models_dir / CALIB, samples=32, pair=("conv9", pair[1]), threads=1)


@pytest.mark.parametrize("form", ["svg", "png"])
def test_plots(narrow: onnxq.Analysis, tmp_path: Path, form: str) -> None:
    written = write_plots(narrow, tmp_path / "figures", form)
    assert [p.stem for p in written] == ["sensitivity", "norms", "contour", "hessian"]
    start = {"svg": b"<?xml", "png": b"\x89PNG"}[form]
    assert all(p.read_bytes().startswith(start) for p in written)


def test_what_plots_need(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="plots are written as svg, png, pdf, not 'gif'"):
        check_plots("gif")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'onnxq\[plots\]'"):
        check_plots("svg")


def test_the_command(models_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "analysis.json"
    words = ["analyze", str(models_dir / MODEL), "--calib", str(models_dir / CALIB), "--samples", "32"]
    with pytest.raises(SystemExit) as done:
        main([*words, "--largest", "1", "-o", str(output), "--threads", "1"])
    assert done.value.code == 0
    assert "joint search (--ranges lapq)" in " ".join(capsys.readouterr().out.split())
    assert json.loads(output.read_bytes())["loss"] == "kl"
    with pytest.raises(SystemExit) as refused:
        main([*words, "--pair", "conv9"])
    assert refused.value.code == 2
    assert "cannot read the pair 'conv9'" in capsys.readouterr().err
