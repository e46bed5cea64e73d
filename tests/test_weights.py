"""Weight codes under the pair limit."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq.affine import dequantize, quantize, sqnr_db
from onnxq.errors import DataError
from onnxq.quantizers import weight_params
from onnxq.scheme import QuantScheme
from onnxq.weights import (
    balanced_codes,
    peak_params,
    quantized_weight,
    safe_codes,
    step_params,
    typical_sqnr_db,
)

LIMIT = 128  # 32767 // 255
CASES = [((32, 16, 3, 3), "Conv", 0), ((65, 24), "MatMul", 1), ((24, 65), "Gemm", 0)]


def worst_pair(codes: NDArray[Any], kind: str, axis: int) -> int:
    """Largest sum of two neighbours of one sign along the kernel's reduction."""
    rows = np.moveaxis(codes, 1, -1) if kind == "Conv" else np.moveaxis(codes, axis, 0)
    rows = rows.reshape(len(rows), -1).astype(int)
    rows = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2))).reshape(len(rows), -1, 2)
    return int(max(np.maximum(rows, 0).sum(2).max(), np.maximum(-rows, 0).sum(2).max()))


@pytest.mark.parametrize("channels", [1, 4, 7])
def test_the_typical_noise_is_the_median_of_the_channels_that_live(channels: int) -> None:
    rng = np.random.default_rng(channels)
    values = rng.normal(size=(channels + 1, 9)).astype(np.float32)
    values[-1] = 0.0
    noisy = values + rng.uniform(0.01, 0.3, (channels + 1, 1)).astype(np.float32)
    each = [sqnr_db(a, b) for a, b in zip(values[:-1], noisy[:-1], strict=True)]
    assert typical_sqnr_db(values, noisy, 0) == pytest.approx(
        np.median(each), rel=1e-6
    )  # float32 differences


@pytest.mark.parametrize(("shape", "kind", "axis"), CASES)
@pytest.mark.parametrize("text", ["int8:channel", "int8:tensor"])
def test_codes_keep_the_limit_at_little_cost(shape: tuple[int, ...], kind: str, axis: int, text: str) -> None:
    values = np.random.default_rng(3).uniform(-1, 1, shape).astype(np.float32)
    scheme = QuantScheme.parse(text)
    free, free_codes, none = quantized_weight(values, kind, axis, scheme, 0)
    params, codes, changed = quantized_weight(values, kind, axis, scheme, LIMIT)
    assert none == 0
    assert worst_pair(free_codes, kind, axis) > LIMIT
    assert worst_pair(codes, kind, axis) <= LIMIT
    assert changed == shape[axis]
    assert codes.dtype == np.int8
    assert params.scale.shape == free.scale.shape
    lost = sqnr_db(values, dequantize(free_codes, free)) - sqnr_db(values, dequantize(codes, params))
    assert 0.0 < lost < 6.03  # at worst one bit: all codes within ±64


@pytest.mark.parametrize(("shape", "kind", "axis"), CASES)
def test_channels_that_keep_the_limit_are_not_touched(shape: tuple[int, ...], kind: str, axis: int) -> None:
    values = np.random.default_rng(4).uniform(0.5, 1, shape).astype(np.float32)
    calm = [slice(None)] * len(shape)
    calm[axis] = slice(4, None)
    values[tuple(calm)] *= np.where(np.arange(shape[1 - axis]) % 2, -1, 1).reshape(
        [-1 if i == 1 - axis else 1 for i in range(len(shape))]
    )  # neighbours of opposite signs cannot pass the limit
    params = weight_params("minmax", values, axis, QuantScheme.parse("int8:channel"))
    safe, codes, changed = safe_codes(values, params, kind, axis, LIMIT)
    assert changed == 4
    assert np.array_equal(safe.scale[4:], params.scale[4:])
    assert np.array_equal(codes[tuple(calm)], quantize(values, params)[tuple(calm)])


def test_depthwise_kernels_have_no_pairs() -> None:
    values = np.random.default_rng(5).uniform(-1, 1, (8, 1, 3, 3)).astype(np.float32)
    _, codes, changed = quantized_weight(values, "Depthwise", 0, QuantScheme.parse("int8:channel"), LIMIT)
    assert changed == 0
    assert np.abs(codes).max() == 127


@pytest.mark.parametrize(
    ("shape", "axis", "along"),
    [
        ((16, 8, 3, 3), 0, (2, 3)),
        ((16, 40, 1, 1), 0, (1,)),
        ((50, 24), 1, (0,)),
        ((24, 50), 0, (1,)),
        ((2, 30, 12), 2, (1,)),
    ],
)
@pytest.mark.parametrize("text", ["int8:channel", "int8:tensor"])
def test_balanced_roundings_cancel(
    shape: tuple[int, ...], axis: int, along: tuple[int, ...], text: str
) -> None:
    values = np.random.default_rng(6).standard_normal(shape).astype(np.float32)
    values[values > 1] = 0.0
    scheme = QuantScheme.parse(text)
    params = weight_params("minmax", values, axis if scheme.granularity == "channel" else None, scheme)
    codes = balanced_codes(values, params, along)
    steps = values.astype(np.float64) / params.broadcast(params.scale, values.ndim)
    nearest = quantize(values, params)
    assert codes.dtype == np.int8
    assert codes.shape == shape
    assert np.abs((nearest - steps).sum(axis=along)).max() > 1.0
    assert np.abs((codes - steps).sum(axis=along)).max() <= 0.5 + 1e-4  # float32 quotients, up to 50 of them
    assert np.abs(codes.astype(int) - nearest).max() == 1
    assert np.abs(codes - steps).max() < 1.0
    assert not codes[values == 0].any()


def test_balancing_takes_the_cheapest_roundings() -> None:
    values = np.array(
        [[0.4, 0.1, 0.3, 0.2, 127.0]], np.float32
    )  # the errors sum to -1: one value goes up, the first
    params = weight_params("minmax", values, None, QuantScheme.parse("int8"))
    assert balanced_codes(values, params, (1,)).tolist() == [[1, 0, 0, 0, 127]]


def test_what_saturates_is_made_up_for() -> None:
    values = np.array([[-8.0, 7.6, 3.4, 0.4, 0.2, 0.0]], np.float32)
    params = peak_params(values, None, QuantScheme.parse("int4"))
    assert params.scale == 1.0
    assert quantize(values, params).tolist() == [
        [-8, 7, 3, 0, 0, 0]
    ]  # 1.6 short: two go up, not the saturated one
    assert balanced_codes(values, params, (1,)).tolist() == [[-8, 7, 4, 1, 0, 0]]
    low = np.array(
        [[-9.4, 6.6, 0.4, 0.0]], np.float32
    )  # -8, 7 and 0 are 1.4 too much: one goes down, not the lowest code
    assert balanced_codes(low, params, (1,)).tolist() == [[-8, 6, 0, 0]]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_grid_that_ends_at_the_peak_is_used_whole(bits: int, sign: int) -> None:
    values = np.random.default_rng(2).standard_normal((5, 30)).astype(np.float32) * sign
    values[2] = 0.0
    params = peak_params(values, 0, QuantScheme(bits, signed=True, symmetric=True, granularity="channel"))
    codes = quantize(values, params)
    peaks = np.take_along_axis(values, np.abs(values).argmax(1)[:, None], 1)[:, 0]
    assert (codes.min(1)[[0, 1, 3, 4]] == -(1 << (bits - 1))).all()
    assert np.allclose(params.scale[[0, 1, 3, 4]] * -(1 << (bits - 1)), peaks[[0, 1, 3, 4]], rtol=1e-6)
    assert params.scale[2] == 1.0
    with pytest.raises(DataError, match="NaN or infinite"):
        peak_params(np.array([[1.0, np.nan]], np.float32), 0, params.scheme)


@pytest.mark.parametrize("axis", [0, 1])
def test_one_step_in_the_pattern_of_a_normalization(axis: int) -> None:
    """Folded weights on the pattern have the codes that the weights in front of the normalization have on one step."""
    rng = np.random.default_rng(8)
    before = rng.normal(size=(6, 20) if axis == 0 else (20, 6)).astype(np.float32)
    factors = np.array([0.25, -2.0, 1.0, 0.5, -0.125, 4.0])  # powers of two, so that nothing is rounded
    shape = (-1, 1) if axis == 0 else (1, -1)
    folded = (before * factors.reshape(shape)).astype(np.float32)
    turned = (before * np.sign(factors).reshape(shape)).astype(np.float32)  # a grid has one sign more
    step = weight_params("mse", turned, None, QuantScheme.parse("int4:tensor"))
    params = step_params("mse", folded, axis, QuantScheme.parse("int4:channel"), factors)
    np.testing.assert_array_equal(params.scale, step.scale * np.abs(factors).astype(np.float32))
    np.testing.assert_array_equal(quantize(folded, params), quantize(turned, step))
