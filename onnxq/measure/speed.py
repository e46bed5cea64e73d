"""Run times of two models side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort


@dataclass(frozen=True)
class Speed:
    """Medians of interleaved runs.

    Attributes:
        ms_a, ms_b: milliseconds of one run of each model.
        speedup: ms_a / ms_b.
        runs: runs of each model.
    """

    ms_a: float
    ms_b: float
    runs: int

    @property
    def speedup(self) -> float:
        """How many times faster the second model is."""
        return self.ms_a / self.ms_b

    def as_json(self) -> dict[str, float | int]:
        """The figures."""
        return {"ms_a": self.ms_a, "ms_b": self.ms_b, "speedup": self.speedup, "runs": self.runs}


def race(
    a: ort.InferenceSession,
    b: ort.InferenceSession,
    feeds: Mapping[str, Any],
    *,
    seconds: float = 2.0,
    least: int = 5,
    most: int = 200,
) -> Speed:
    """Run two sessions in turn on the same feeds until the time is up, and take medians.

    Taking turns lets both see the same machine; the order alternates so that neither always runs on a warm cache.
    """
    times: tuple[list[float], list[float]] = ([], [])
    pair = (a, b)
    for session in pair:
        session.run(None, feeds)
    end = time.perf_counter() + seconds
    while len(times[0]) < least or (time.perf_counter() < end and len(times[0]) < most):
        for which in (0, 1) if len(times[0]) % 2 else (1, 0):
            start = time.perf_counter()
            pair[which].run(None, feeds)
            times[which].append(time.perf_counter() - start)
    ms_a, ms_b = (float(np.median(t)) * 1e3 for t in times)
    return Speed(ms_a, ms_b, len(times[0]))
