"""The models and data that the benchmarks measure on; all come from the directory in ONNXQ_DATA."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Task:
    """One model with its data.

    Attributes:
        model: file name without ending in ONNXQ_DATA/models.
        feeds: name of its feeds, as ONNXQ_DATA/prepare.py makes them.
        metric: as for `onnxq evaluate`.
        batch: batch size of evaluation.
    """

    model: str
    feeds: str
    metric: str = "top1"
    batch: int = 50

    @property
    def path(self) -> Path:
        """The float model."""
        return root() / "models" / f"{self.model}.onnx"

    @property
    def calib(self) -> Path:
        """Calibration feeds."""
        return feeds() / f"{self.feeds}.calib.npz"

    @property
    def test(self) -> Path:
        """Test feeds."""
        return feeds() / f"{self.feeds}.test.npz"


TASKS = (
    Task("cifar10_resnet20", "cifar10"),
    Task("cifar10_resnet56", "cifar10"),
    Task("cifar10_resnet8_mlperftiny", "cifar10_tiny"),
    Task("imagenet_mobilenetv1_025", "imagenet_mobilenet"),
    Task("imagenet_squeezenet1_1", "imagenet_squeezenet"),
    Task("kws_dscnn", "kws"),
    Task("mnist_cntk", "mnist", batch=1),
    Task("ncf_ml1m_mlp", "ncf", "metrics.py:hit_rate_at_10", 5000),
    Task("ncf_ml1m_gmf", "ncf", "metrics.py:hit_rate_at_10", 5000),
    Task("minilm_l6_v2", "stsb", "metrics.py:sts_spearman"),
)


def root() -> Path:
    """The directory in ONNXQ_DATA."""
    if not os.environ.get("ONNXQ_DATA"):
        sys.exit("set ONNXQ_DATA to the directory with models/ and datasets/")
    return Path(os.environ["ONNXQ_DATA"])


@cache
def feeds() -> Path:
    """Where the prepared feeds are; made once, outside the repository."""
    where = Path(os.environ.get("ONNXQ_FEEDS", Path(tempfile.gettempdir()) / "onnxq-feeds"))
    subprocess.run([sys.executable, root() / "prepare.py", where], check=True, stdout=subprocess.DEVNULL)
    return where


def metric_name(task: Task) -> str:
    """The metric with the path of its file."""
    return str(root() / task.metric) if ":" in task.metric else task.metric


def batch_one(path: Path) -> dict[str, np.ndarray]:
    """The first sample of an .npz, without labels."""
    with np.load(path) as arrays:
        return {name: arrays[name][:1] for name in arrays.files if name != "label"}
