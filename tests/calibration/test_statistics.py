"""Streaming statistics: exact where they say so, and the same for every order, split and merge."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from onnxq.calibration.statistics import BINS, MIN_EXPONENT, Histogram, Needs, TensorStatistics
from onnxq.errors import DataError

FULL = Needs(histogram=True, channels=-1, power=True)

# All finite float32, subnormals and exact zeros of both signs included, and often of like magnitude.
singles = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True),
    st.floats(-8, 8, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0 + 2.0**-23]),
)
vectors = hnp.arrays(np.float32, st.integers(1, 60), elements=singles)


PLAIN = Needs(histogram=True)


def gathered(values: NDArray[Any], needs: Needs = PLAIN) -> TensorStatistics:
    statistics = TensorStatistics("x", needs)
    statistics.update(values)
    return statistics


def same(a: TensorStatistics, b: TensorStatistics) -> None:
    """Exact equality of all but the sums, which are equal to rounding."""
    left, right = a.to_arrays(), b.to_arrays()
    assert left.keys() == right.keys()
    # 60 terms, each rounding by at most 2^-53 of the sum of magnitudes
    absolute, squares = float(left["sums"][3]), float(left["sums"][4])
    rounding = {
        "sums": 1e-13 * max(absolute, squares),
        "channel_total": 1e-13 * absolute,
        "channel_total_squares": 1e-13 * squares,
    }
    for key in left:
        atol = rounding.get(key, 0.0)
        np.testing.assert_allclose(left[key], right[key], rtol=0.0, atol=atol, err_msg=key)
    np.testing.assert_array_equal(left["sums"][:2], right["sums"][:2])


@given(vectors, st.data())
@settings(deadline=None, max_examples=200)
def test_order_and_split_do_not_matter(values: NDArray[np.float32], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(values.size)))
    cuts = sorted(data.draw(st.lists(st.integers(0, values.size), max_size=5)))
    streamed = TensorStatistics("x", Needs(histogram=True))
    for part in np.split(values[order], cuts):
        streamed.update(part)
    same(streamed, gathered(values))


@given(vectors, vectors, vectors)
@settings(deadline=None, max_examples=200)
def test_merging_is_one_pass_and_associative(
    a: NDArray[np.float32], b: NDArray[np.float32], c: NDArray[np.float32]
) -> None:
    x, y, z = gathered(a), gathered(b), gathered(c)
    whole = gathered(np.concatenate((a, b, c)))
    same(x.merge(y).merge(z), whole)
    same(x.merge(y.merge(z)), whole)
    same(z.merge(x).merge(y), whole)
    same(x, gathered(a))  # its arguments are left alone


@given(vectors)
@settings(deadline=None, max_examples=200)
def test_histogram_is_that_of_numpy_and_the_finest(values: NDArray[np.float32]) -> None:
    found = gathered(values)
    histogram = found.histogram
    assert histogram is not None
    wide = values.astype(np.float64)
    expected, _ = np.histogram(wide[wide != 0.0], histogram.edges)  # the edges are exact in float64
    np.testing.assert_array_equal(histogram.counts, expected)
    assert found.zeros == int((wide == 0.0).sum())
    assert histogram.counts.size <= BINS
    assert histogram.edges[0] <= wide.min() < histogram.edges[1]
    assert histogram.edges[-2] <= wide.max() < histogram.edges[-1]
    finer = [np.floor(np.ldexp(end, 1 - histogram.exponent)) for end in (wide.min(), wide.max())]
    too_many = finer[1] - finer[0] >= BINS
    too_fine = float(np.abs(wide).max()) >= math.ldexp(1.0, 23 + histogram.exponent)
    assert too_many or too_fine or histogram.exponent == MIN_EXPONENT


def test_many_chunks_with_a_growing_range() -> None:
    rng = np.random.default_rng(0)
    batches = [np.maximum(rng.normal(0.0, 3.0**i, (5, 30_011)), -1.0).astype(np.float32) for i in range(4)]
    streamed = TensorStatistics("x", Needs(histogram=True))
    for batch in batches:
        streamed.update(batch)
    wide = np.concatenate(batches, axis=None).astype(np.float64)
    assert streamed.histogram is not None
    expected, _ = np.histogram(wide, streamed.histogram.edges)
    np.testing.assert_array_equal(streamed.histogram.counts, expected)
    # 600,000 terms summed pairwise in chunks: far below 1e-13 of the sum of magnitudes
    magnitude = math.fsum(np.abs(wide))
    assert streamed.total == pytest.approx(math.fsum(wide), abs=1e-13 * magnitude)
    assert streamed.total_absolute == pytest.approx(magnitude, rel=1e-13)
    assert streamed.total_squares == pytest.approx(math.fsum(wide**2), rel=1e-13)
    assert streamed.mean == pytest.approx(wide.mean(), rel=1e-12)
    assert streamed.variance == pytest.approx(wide.var(), rel=1e-12)


def test_negative_values_that_underflow_stay_negative() -> None:
    values = np.array([-1e-45, 1e-45, 1e6], np.float32)
    histogram = gathered(values).histogram
    assert histogram is not None
    assert histogram.exponent > 0
    assert histogram.first == -1
    np.testing.assert_array_equal(histogram.counts[:2], [1, 1])


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_channels(axis: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 5, 7)).astype(np.float32)
    found = gathered(x, Needs(channels=axis, power=True))
    rows = np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1).astype(np.float64)
    assert found.histogram is None
    assert found.channels is not None
    np.testing.assert_array_equal(found.channels.minimum, rows.min(axis=1))
    np.testing.assert_array_equal(found.channels.maximum, rows.max(axis=1))
    # 35 values of magnitude below 4 in float32, each sum rounded by 2^-24 of what it has come to
    np.testing.assert_allclose(found.channels.mean, rows.mean(axis=1), atol=4 * 35 * 2.0**-24)
    np.testing.assert_allclose(found.channels.power, (rows**2).mean(axis=1), rtol=1e-13)
    assert (found.minimum, found.maximum) == (x.min(), x.max())


@pytest.mark.parametrize("inner", [1, 15, 16, 8192, 20_000])
def test_means_of_channels_of_any_length(inner: int) -> None:
    x = np.random.default_rng(inner).uniform(100.0, 101.0, (3, 2, inner)).astype(np.float32)
    channels = gathered(x, Needs(channels=1)).channels
    assert channels is not None
    # a random walk of 8192 roundings of at most 2^-24 comes to 5e-6; processors keep several sums side by side, which is less
    np.testing.assert_allclose(channels.mean, x.mean(axis=(0, 2), dtype=np.float64), rtol=2e-6)


def test_a_part_has_the_statistics_of_its_channels() -> None:
    x = np.random.default_rng(3).normal(size=(4, 7, 33)).astype(np.float32)
    whole = gathered(x, Needs(channels=1, power=True))
    for needs in (Needs(), Needs(channels=1, power=True)):
        part, alone = whole.part("t", needs, slice(2, 5)), gathered(x[:, 2:5], needs)
        assert part.needs == needs
        assert (part.count, part.minimum, part.maximum) == (alone.count, alone.minimum, alone.maximum)
        for name in ("minimum", "maximum", "total", "total_squares") if needs.channels else ():
            np.testing.assert_array_equal(getattr(part.channels, name), getattr(alone.channels, name))
        assert needs.channels is not None or part.channels is None
    assert TensorStatistics("t", Needs(channels=1)).part("u", Needs(), slice(0, 2)).count == 0


def test_no_power_unless_needed() -> None:
    x = np.random.default_rng(0).normal(size=(4, 9, 3)).astype(np.float32)
    found = gathered(x, Needs(channels=1))
    found.update(2 * x)
    assert found.channels is not None
    assert found.channels.total_squares is None
    np.testing.assert_allclose(found.channels.mean, 1.5 * x.mean(axis=(0, 2)), rtol=1e-5)
    again = TensorStatistics.from_arrays("x", found.to_arrays())
    assert again.needs == Needs(channels=1)


def test_channels_stream_and_merge() -> None:
    x = np.random.default_rng(0).normal(size=(4, 9, 3)).astype(np.float32)
    streamed = gathered(x[:, :2], FULL)
    streamed.update(x[:, 2:5])
    same(streamed.merge(gathered(x[:, 5:], FULL)), gathered(x, FULL))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([1.0, np.nan, np.nan], "tensor 'x' has 2 NaN and 0 infinite values among 3"),
        ([1.0, -np.inf, 2.0], "tensor 'x' has 0 NaN and 1 infinite values among 3"),
        (
            [1e39, 0.0, 0.0],
            "tensor 'x' has 0 NaN and 1 infinite values among 3",
        ),  # float64 that overflows float32
    ],
)
def test_values_that_are_not_finite(bad: list[float], message: str) -> None:
    found = gathered(np.ones(3), FULL)
    with pytest.raises(DataError, match=message):
        found.update(np.array(bad))
    same(found, gathered(np.ones(3), FULL))


def test_channels_must_fit() -> None:
    found = gathered(np.ones((2, 3)), FULL)
    with pytest.raises(DataError, match="tensor 'x' has 4 channels where it had 3 before"):
        found.update(np.ones((2, 4)))
    same(found, gathered(np.ones((2, 3)), FULL))
    with pytest.raises(DataError, match=r"tensor 'x' of shape \(\) has no channel axis -1"):
        found.update(np.array(1.0))


def test_empty_batches_and_scalars() -> None:
    found = gathered(np.zeros((0, 4)), FULL)
    assert (found.count, found.histogram, found.channels) == (0, None, None)
    assert math.isnan(found.mean)
    same(found.merge(gathered(np.ones(2), FULL)), gathered(np.ones(2), FULL))
    scalar = gathered(np.array(2.5))
    assert (scalar.count, scalar.minimum, scalar.maximum) == (1, 2.5, 2.5)


def test_half_precision_and_strides_are_read_as_they_are() -> None:
    x = np.arange(24, dtype=np.float16).reshape(4, 6)
    same(gathered(x.T[::2]), gathered(np.ascontiguousarray(x.T[::2]).astype(np.float32)))


@pytest.mark.parametrize("needs", [Needs(), Needs(histogram=True), FULL])
@pytest.mark.parametrize("values", [np.zeros((0, 2)), np.array([[0.0, -3.0], [1e30, 0.1]])])
def test_arrays_round_trip(needs: Needs, values: NDArray[np.float64]) -> None:
    found = gathered(values, needs)
    again = TensorStatistics.from_arrays("x", found.to_arrays())
    assert again.needs == needs
    assert again.to_arrays().keys() == found.to_arrays().keys()
    for key, array in found.to_arrays().items():
        np.testing.assert_array_equal(again.to_arrays()[key], array)


@pytest.mark.parametrize("key", ["counts", "sums", "grid", "bins", "channel_total", "channel_total_squares"])
def test_damaged_arrays(key: str) -> None:
    arrays = gathered(np.ones((2, 3)), FULL).to_arrays()
    del arrays[key]
    with pytest.raises(DataError, match=f"the saved statistics of tensor 'x' are damaged: '{key}'"):
        TensorStatistics.from_arrays("x", arrays)


def test_a_histogram_that_lost_values_is_damaged() -> None:
    arrays = gathered(np.ones((2, 3)), FULL).to_arrays()
    with pytest.raises(DataError, match="the histogram lacks values"):
        TensorStatistics.from_arrays("x", arrays | {"bins": arrays["bins"] - 1})


def test_needs() -> None:
    assert Needs(histogram=True) | Needs(channels=1) == Needs(histogram=True, channels=1)
    with pytest.raises(DataError, match="two channel axes, 1 and -1"):
        Needs(channels=1) | Needs(channels=-1)
    with pytest.raises(DataError, match="needs a channel axis"):
        Needs(power=True)
    with pytest.raises(DataError, match="cannot merge statistics of 'x'"):
        gathered(np.ones(2)).merge(gathered(np.ones(2), Needs()))


@given(vectors, vectors)
@settings(deadline=None, max_examples=50)
def test_pooled_values_of_several_tensors(a: NDArray[np.float32], b: NDArray[np.float32]) -> None:
    parts = gathered(a), gathered(b, FULL)
    pooled = TensorStatistics.pooled("y", parts)
    same(pooled, gathered(np.concatenate((a, b))))
    assert pooled.name == "y"
    same(parts[0], gathered(a))


def test_pooling_needs_histograms() -> None:
    parts = gathered(np.ones(3)), gathered(np.ones(3), Needs())
    with pytest.raises(DataError, match="tensor 'x' has no histogram to be pooled in 'y'"):
        TensorStatistics.pooled("y", parts)


def test_edges_of_a_histogram() -> None:
    histogram = Histogram(-2, -3, np.zeros(4, np.int64))
    assert histogram.width == 0.25
    np.testing.assert_array_equal(histogram.edges, [-0.75, -0.5, -0.25, 0.0, 0.25])
