"""Ctrl-C ends a joint search with the best steps so far: the model is written, and its checkpoint goes on exactly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import pytest


def start(models_dir: Path, out: Path, checkpoint: Path, *options: str) -> subprocess.Popen[str]:
    """A compile in a process group of its own, as a terminal makes one."""
    command = [sys.executable, "-m", "onnxq", "compile", str(models_dir / "digits_cnn.onnx"), "-o", str(out)]
    command += ["--calib", str(models_dir / "digits_calib.npz"), "--bits", "w4a4", "--ranges", "lapq"]
    command += [
        "--checkpoint",
        str(checkpoint),
        "--search-budget",
        "40",
        "--threads",
        "1",
        "--json",
        *options,
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What the search reports."""
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out)["lapq"]
    return found


@pytest.fixture(scope="module")
def whole(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes]:
    """What a search that nobody stops reports, and its model."""
    folder = tmp_path_factory.mktemp("whole")
    found = finished(start(models_dir, folder / "whole.onnx", folder / "search.json"))
    return found, (folder / "whole.onnx").read_bytes()


@pytest.mark.parametrize("cluster", [(), ("--cluster", "local:1")], ids=["here", "cluster"])
def test_ctrl_c_writes_the_best_so_far_and_the_checkpoint_goes_on(
    models_dir: Path, tmp_path: Path, cluster: tuple[str, ...], whole: tuple[dict[str, Any], bytes]
) -> None:
    checkpoint = tmp_path / "search.json"
    process = start(models_dir, tmp_path / "first.onnx", checkpoint, *cluster)
    try:
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGINT)  # workers get it too
        first = finished(process)
    finally:
        process.kill()
    assert first["stopped"] == "interrupted"
    assert first["loss_end"] <= first["loss_start"]
    onnx.checker.check_model(tmp_path / "first.onnx")
    second = finished(start(models_dir, tmp_path / "second.onnx", checkpoint))
    expected, model = whole
    assert second["stopped"] == expected["stopped"] == "evaluations"
    assert second["history"] == expected["history"]
    assert second["evaluations"] > first["evaluations"]
    # whether 40 evaluations find better steps depends on the machine's float kernels
    assert second["loss_end"] <= first["loss_end"]
    assert (tmp_path / "second.onnx").read_bytes() == model
