"""Giving memory back."""

from __future__ import annotations

import gc
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from onnxq import attempt, compile_model
from onnxq.memory import give_back, peak_rss_bytes
from onnxq.pipeline import Context, Pass, PassResult, Pipeline
from onnxq.presets import preset_pipeline
from onnxq.program import Program
from onnxq.verify import Verification, verify

MODELS = Path(__file__).parents[1] / "models"


class Circle:
    """Refers to itself, as nodes and tensors of a graph do to each other, and holds weights."""

    def __init__(self, size: int) -> None:
        self.itself, self.weights = self, np.ones(size, np.uint8)


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def test_what_only_circles_hold_goes_at_once() -> None:
    gc.disable()
    try:
        circle = Circle(1)
        seen = weakref.ref(circle)
        del circle
        assert seen() is not None
        give_back()
        assert seen() is None
    finally:
        gc.enable()


@dataclass(frozen=True)
class Litter(Pass):
    """Leaves a circle behind, as passes that take graphs apart do."""

    name: ClassVar[str] = "litter"
    left: ClassVar[list[weakref.ref[Circle]]] = []

    def run(self, program: Program, ctx: Context) -> PassResult:
        self.left.append(weakref.ref(Circle(1)))
        return PassResult()


@pytest.mark.parametrize("large", [True, False])
def test_garbage_of_large_models_goes_before_they_are_verified(
    monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    kept = []

    def verified(*args: Any, **options: Any) -> Verification:
        kept.append(Litter.left[-1]() is not None)
        return verify(*args, **options)

    monkeypatch.setattr(attempt, "verify", verified)
    monkeypatch.setattr(attempt, "LARGE", 0 if large else 1 << 30)
    gc.disable()
    try:
        steps = Pipeline((Litter(), *Pipeline.parse(preset_pipeline("int8")).passes))
        compile_model(MODELS / "digits_cnn.onnx", MODELS / "digits_calib.npz", pipeline=steps, samples=8)
    finally:
        gc.enable()
    assert kept == [not large]


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_what_the_allocator_keeps_goes_to_the_system() -> None:
    """Small blocks below one that stays are not returned by themselves."""
    blocks = [np.ones(65_536, np.uint8) for _ in range(1024)]  # 64 MB
    last = np.ones(65_536, np.uint8)
    full = resident()
    del blocks
    kept = resident()
    if kept < full - (48 << 20):
        pytest.skip("this allocator returns memory by itself")
    give_back()
    assert resident() < full - (48 << 20)
    assert last.sum() == 65_536


def test_the_peak_is_that_of_the_process() -> None:
    before = peak_rss_bytes()
    held = np.ones(200 << 20, np.uint8)
    assert peak_rss_bytes() >= max(before, held.nbytes)
