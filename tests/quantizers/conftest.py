"""Samples of known shape, their statistics, and the error of a grid on the samples themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq.affine import QuantParams, dequantize, quantize
from onnxq.calibration.statistics import Needs, TensorStatistics

Gather = Callable[[NDArray[Any]], TensorStatistics]
Draw = Callable[[str], NDArray[np.float32]]
RawError = Callable[[NDArray[Any], QuantParams, float], float]

SIZE = 20_000


@pytest.fixture
def gather() -> Gather:
    def gathered(values: NDArray[Any]) -> TensorStatistics:
        statistics = TensorStatistics("x", Needs(histogram=True))
        statistics.update(values)
        return statistics

    return gathered


@pytest.fixture
def draw() -> Draw:
    return drawn


@cache
def drawn(kind: str) -> NDArray[np.float32]:
    rng = np.random.default_rng(7)
    normal = rng.normal(size=SIZE)
    values = {
        "normal": normal,
        "shifted": normal + 3.0,
        "laplace": rng.laplace(size=SIZE),
        "student": rng.standard_t(3, size=SIZE),
        "relu": np.maximum(normal, 0.0),
        "relu6": np.clip(5.0 * normal, 0.0, 6.0),
        "silu": 2.0 * normal / (1.0 + np.exp(-2.0 * normal)),
        "skewed": rng.exponential(size=SIZE) - 0.3,
        "bimodal": np.where(normal > 0.0, 5.0 + normal, 0.1 * normal - 5.0),
        "outlier": np.append(normal, 300.0),
    }
    return values[kind].astype(np.float32)


@pytest.fixture
def raw_error() -> RawError:
    def error(values: NDArray[Any], params: QuantParams, p: float = 2.0) -> float:
        """Mean of |Q(x) - x|^p over the samples, through quantize and dequantize."""
        restored = dequantize(quantize(values, params), params).astype(np.float64)
        return float(np.mean(np.abs(restored - values) ** p))

    return error
