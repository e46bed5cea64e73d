"""Weights: every channel on its own values, against brute force."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq.affine import QuantParams, affine_params, dequantize, quantize, symmetric_params
from onnxq.errors import DataError, UsageError
from onnxq.quantizers import weight_params
from onnxq.scheme import QuantScheme

METHODS = ("minmax", "percentile", "mse", "lp=1", "lp=2.5", "entropy", "aciq")
INT8, INT4, INT2 = (QuantScheme.parse(f"int{bits}:channel") for bits in (8, 4, 2))


def weights(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(5).standard_t(6, size=shape).astype(np.float32)


def errors(values: NDArray[np.float32], params: QuantParams, p: float = 2.0) -> NDArray[np.float64]:
    """The summed error of every row (R, n) or of each channel of axis 0."""
    restored = dequantize(quantize(values, params), params).astype(np.float64)
    return np.asarray((np.abs(restored - values) ** p).reshape(len(values), -1).sum(axis=1))


def brute_force(values: NDArray[np.float32], scheme: QuantScheme, p: float = 2.0) -> NDArray[np.float64]:
    """The least error of every row over 1,500 clips up to its largest magnitude."""
    limit = np.abs(values).reshape(len(values), -1).max(axis=1)
    shares = np.linspace(1.0 / 1500, 1.0, 1500)
    found = [errors(values, symmetric_params(limit * a, scheme, 0), p) for a in shares]
    return np.asarray(np.min(found, axis=0), np.float64)


@pytest.mark.parametrize("scheme", [INT8, INT4, INT2])
@pytest.mark.parametrize("shape", [(8, 64, 3, 3), (4, 3000), (3, 20_000)])
def test_mse_is_within_2_percent_of_brute_force(scheme: QuantScheme, shape: tuple[int, ...]) -> None:
    values = weights(*shape)
    found = errors(values, weight_params("mse", values, 0, scheme))
    assert np.all(found <= 1.02 * brute_force(values, scheme))


@pytest.mark.parametrize("scheme", [INT8, INT4, INT2])
@pytest.mark.parametrize("shape", [(64, 1, 3, 3), (64, 27)])
def test_short_rows(scheme: QuantScheme, shape: tuple[int, ...]) -> None:
    # The error of a few values has many narrow dips, so both searches miss some; on the average neither wins.
    values = weights(*shape)
    ratio = errors(values, weight_params("mse", values, 0, scheme)) / brute_force(values, scheme)
    assert ratio.mean() <= 1.02
    assert ratio.max() <= 1.1


@pytest.mark.parametrize("p", [1.0, 2.5, 3.0, 4.0])
def test_lp(p: float) -> None:
    values = weights(6, 2000)
    found = errors(values, weight_params(f"lp={p}", values, 0, INT4), p)
    assert np.all(found <= 1.02 * brute_force(values, INT4, p))


@pytest.mark.parametrize("scheme", ["uint8:channel", "uint4:channel", "int4:channel:asymmetric"])
def test_asymmetric_rows(scheme: str) -> None:
    grid = QuantScheme.parse(scheme)
    values = np.concatenate((weights(4, 1000) + 1.0, np.abs(weights(4, 1000)), -np.abs(weights(1, 1000))))
    params = weight_params("mse", values, 0, grid)
    np.testing.assert_array_equal(params.zero_point[4:8], grid.qmin)
    assert params.zero_point[8] == grid.qmax
    for row, found in zip(values, errors(values, params), strict=True):
        ends = float(row.min()), float(row.max())
        steps = 2.0 ** -np.arange(0.0, 4.0, 0.1)
        grids = [affine_params(ends[0] * a, ends[1] * b, grid) for a in steps for b in steps]
        best = min(float(errors(row[None], g)[0]) for g in grids)
        assert found <= 1.02 * best


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", ["int8", "int4", "uint8", "uint8:symmetric", "int8:asymmetric"])
def test_axis_and_shape(method: str, scheme: str) -> None:
    grid = QuantScheme.parse(scheme)
    values = weights(5, 6, 7)
    tensor = weight_params(method, values, None, grid)
    assert (tensor.scale.shape, tensor.zero_point.shape, tensor.axis) == ((), (), None)
    for axis in (0, 1, 2, -1):
        params = weight_params(method, values, axis, grid)
        size = values.shape[axis]
        assert (params.scale.shape, params.zero_point.shape, params.axis) == ((size,), (size,), axis % 3)
        moved = weight_params(method, np.moveaxis(values, axis, 0), 0, grid)
        np.testing.assert_array_equal(params.scale, moved.scale)
        np.testing.assert_array_equal(params.zero_point, moved.zero_point)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "entropy"])
@pytest.mark.parametrize("scheme", ["int4", "uint4", "int8:asymmetric"])
def test_a_channel_does_not_see_the_others(method: str, scheme: str) -> None:
    grid = QuantScheme.parse(scheme)
    values = weights(9, 300) * np.float32(10.0) ** np.arange(-4, 5, dtype=np.float32)[:, None]
    together = weight_params(method, values, 0, grid)
    for i, row in enumerate(values):
        alone = weight_params(method, row, None, grid)
        # A row of the others may keep the search going for an octave, which can only find more.
        assert together.scale[i] == pytest.approx(float(alone.scale), rel=1e-6 if "=" not in method else 0.1)
        if method in ("minmax", "percentile", "aciq"):
            assert together.zero_point[i] == alone.zero_point


def test_more_bits_never_a_larger_error() -> None:
    values = weights(16, 500)
    found = [
        errors(values, weight_params("mse", values, 0, QuantScheme.parse(f"int{bits}:channel")))
        for bits in range(2, 9)
    ]
    assert all(np.all(more < less) for less, more in pairwise(found))


def test_zero_and_empty_channels() -> None:
    values = weights(3, 50)
    values[1] = 0.0
    for method in METHODS:
        params = weight_params(method, values, 0, INT8)
        assert params.scale[1] == 1.0
        np.testing.assert_array_equal(quantize(values, params)[1], 0)
        assert np.all(params.scale[[0, 2]] < 0.1)
    np.testing.assert_array_equal(weight_params("mse", np.zeros((3, 0)), 0, INT8).scale, [1.0, 1.0, 1.0])


def test_errors() -> None:
    with pytest.raises(UsageError, match="unknown range method 'mes'; did you mean 'mse'"):
        weight_params("mes", weights(2, 2), 0, INT8)
    with pytest.raises(UsageError, match="not the blocks of the scheme int4:block=32"):
        weight_params("mse", weights(2, 64), 0, QuantScheme.parse("int4:block=32"))
    with pytest.raises(DataError, match=r"weights of shape \(2, 1\) hold NaN or infinite values"):
        weight_params("mse", np.array([[1.0], [np.nan]]), 0, INT8)
