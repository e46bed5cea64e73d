"""Percentiles against numpy.quantile on the samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from onnxq.calibration.statistics import Needs, TensorStatistics
from onnxq.quantizers.percentile import Percentile
from onnxq.scheme import QuantScheme

Gather = Callable[[NDArray[Any]], TensorStatistics]
Draw = Callable[[str], NDArray[np.float32]]

ASYMMETRIC, SYMMETRIC = QuantScheme.parse("uint8"), QuantScheme.parse("int8")


def quantiles(values: NDArray[Any], percentile: float, symmetric: bool) -> tuple[float, float]:
    q = percentile / 100.0
    if symmetric:
        return 0.0, float(np.quantile(np.abs(values.astype(np.float64)), q))
    low, high = np.quantile(values.astype(np.float64), [1.0 - q, q])
    return float(low), float(high)


@given(
    hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-4, 4, width=32) | st.just(0.0)),
    st.sampled_from([51.0, 75.0, 90.0, 99.0, 99.9, 100.0]),
    st.booleans(),
)
@example(np.array([1.0, -1.0], np.float32), 51.0, True)
@settings(deadline=None, max_examples=300)
def test_within_one_bin_of_numpy(values: NDArray[np.float32], percentile: float, symmetric: bool) -> None:
    statistics = TensorStatistics("x", Needs(histogram=True))
    statistics.update(values)
    assert statistics.histogram is not None
    expected = quantiles(values, percentile, symmetric)
    found = Percentile(percentile).tensor_range(statistics, SYMMETRIC if symmetric else ASYMMETRIC)
    if expected == (0.0, 0.0):
        expected = statistics.minimum, statistics.maximum
    # The order statistics are right to a bin; float64 rounding of the rank may shift them by 1e-12.
    width = statistics.histogram.width * 1.000001 + 1e-12
    assert found[0] == pytest.approx(expected[0], abs=width)
    assert found[1] == pytest.approx(expected[1], abs=width)


@pytest.mark.parametrize("kind", ["normal", "relu", "outlier", "skewed"])
@pytest.mark.parametrize("percentile", [99.0, 99.99])
def test_large_tensors(kind: str, percentile: float, gather: Gather, draw: Draw) -> None:
    statistics = gather(draw(kind))
    assert statistics.histogram is not None
    for scheme in (ASYMMETRIC, SYMMETRIC):
        found = Percentile(percentile).tensor_range(statistics, scheme)
        expected = quantiles(draw(kind), percentile, scheme.symmetric)
        np.testing.assert_allclose(found, expected, rtol=0.0, atol=statistics.histogram.width)


def test_mostly_zeros_keep_the_whole_range(gather: Gather) -> None:
    values = np.append(np.zeros(99_999, np.float32), np.float32(5.0))
    for scheme in (ASYMMETRIC, SYMMETRIC):
        assert float(Percentile(99.9)(gather(values), scheme).high) == pytest.approx(5.0, rel=1e-6)


def test_percentile_100_is_minmax(gather: Gather, draw: Draw) -> None:
    values = draw("skewed")
    assert Percentile(100.0).tensor_range(gather(values), ASYMMETRIC) == (values.min(), values.max())


def test_rows(draw: Draw) -> None:
    rows = draw("student").reshape(20, -1)
    for scheme in (ASYMMETRIC, SYMMETRIC):
        low, high = Percentile(99.0).row_ranges(rows, scheme)
        for i, row in enumerate(rows):
            # float32 interpolation between order statistics
            np.testing.assert_allclose((low[i], high[i]), quantiles(row, 99.0, scheme.symmetric), rtol=1e-6)
