"""The public names, and the ways to use them that the documentation shows."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnxruntime as ort
import pytest

import onnxq

MODELS = Path(__file__).parents[1] / "models"
CNN = MODELS / "digits_cnn.onnx"


def images(count: int) -> dict[str, np.ndarray]:
    with np.load(MODELS / "digits_calib.npz") as archive:
        return {"image": archive["image"][:count]}


def test_every_public_name_is_there() -> None:
    for name in onnxq.__all__:
        assert getattr(onnxq, name) is not None
    assert set(onnxq.__all__) <= set(dir(onnxq))
    assert issubclass(onnxq.UsageError, onnxq.OnnxqError)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'onnxq' has no attribute 'compile'"):
        onnxq.compile  # noqa: B018


def test_importing_is_cheap() -> None:
    code = (
        "import sys, onnxq; print([m for m in ('numpy', 'onnx', 'onnxruntime', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_compile_in_memory_and_save(tmp_path: Path) -> None:
    done = onnxq.compile_model(CNN, images(64), threads=1, speed=False)
    path = tmp_path / "q.onnx"
    done.save(path)
    assert path.stat().st_size < CNN.stat().st_size / 2
    feeds = images(1)
    float_logits = ort.InferenceSession(CNN, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    logits = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    assert logits.argmax() == float_logits.argmax()
    assert done.report.as_json()["quality"]["sqnr_db"] > 20  # 8 bits leave far more, garbage far less


@dataclass(frozen=True)
class KeepFirst(onnxq.Pass):
    """Leave the first convolution in float.

    Attributes:
        count: how many.
    """

    name: ClassVar[str] = "keep-first"
    count: int = 1

    def run(self, program: onnxq.Program, ctx: onnxq.Context) -> onnxq.PassResult:
        kept = [node.name for node in program.graph.nodes if node.op == "Conv"][: self.count]
        program.floats |= dict.fromkeys(kept, "it comes first")
        return onnxq.PassResult(len(kept), facts={"kept": kept})


def test_a_pass_of_ones_own_in_a_pipeline() -> None:
    rest = onnxq.Pipeline.parse("annotate calibrate choose-ranges quantize-weights emit-qdq")
    pipeline = onnxq.Pipeline((*onnxq.Pipeline.parse("fold-batchnorm").passes, KeepFirst(), *rest.passes))
    done = onnxq.compile_model(CNN, images(16), pipeline=pipeline, threads=1, speed=False)
    report = done.report.as_json()
    first = next(node for node in report["nodes"] if node["op"] == "Conv")
    assert (first["status"], first["reason"]) == ("float", "it comes first")
    assert next(p for p in report["passes"] if p["pass"] == "keep-first")["facts"] == {
        "kept": [first["name"]]
    }
    assert report["pipeline"].startswith("fold-batchnorm keep-first annotate")
