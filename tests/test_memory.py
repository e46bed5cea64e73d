"""Giving memory back."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

from onnxq.memory import give_back, peak_rss_bytes


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
