"""Codes in blocks against a loop over blocks that follows the formulas one by one."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq import blocks
from onnxq.affine import sqnr_db
from onnxq.blocks import quantize_blocks
from onnxq.errors import DataError

Floats = NDArray[np.float32]
BITS = range(2, 9)


def normal(*shape: int) -> Floats:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


def plain(x: Floats, bits: int, symmetric: bool) -> tuple[NDArray[np.int64], np.float32, int]:
    """Codes (n,), scale and zero point of one block."""
    half = 1 << (bits - 1)
    if symmetric:
        peak = x[np.argmax(np.abs(x))]
        scale = peak / np.float32(-half) if peak else np.float32(1)
        return np.clip(np.rint(x * (np.float32(1) / scale)), -half, half - 1).astype(np.int64), scale, 0
    low, high, steps = min(x.min(), np.float32(0)), max(x.max(), np.float32(0)), np.float32(2 * half - 1)
    scale = (high - low) / steps if high > low else np.float32(1)
    zero = int(np.rint(-low / scale))
    codes = np.clip(np.rint(x * (np.float32(1) / scale)) + zero, 0, steps)
    return codes.astype(np.int64), scale, zero


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("shape", "axis", "block"),
    [
        ((64, 5), 0, 32),
        ((70, 5), 0, 32),
        ((5, 64), 1, 32),
        ((5, 70), 1, 16),
        ((7, 20), 1, 32),
        ((3, 50, 4), 1, 16),
        ((9,), 0, 4),
    ],
)
def test_each_block_is_quantized_on_its_own(
    shape: tuple[int, ...], axis: int, block: int, symmetric: bool, bits: int
) -> None:
    x = normal(*shape)
    found = quantize_blocks(x, axis, bits, block, symmetric=symmetric, search=False)
    rows, codes = np.moveaxis(x, axis, -1), np.moveaxis(found.codes, axis, -1)
    scales, values = np.moveaxis(found.scale, axis, -1), np.moveaxis(found.values(), axis, -1)
    assert scales.shape == (*rows.shape[:-1], -(-rows.shape[-1] // block))
    assert found.codes.dtype == (np.int8 if symmetric else np.uint8)
    assert (found.zero_point is None) == symmetric
    for place in np.ndindex(scales.shape):
        part = (*place[:-1], slice(place[-1] * block, (place[-1] + 1) * block))
        wanted, scale, zero = plain(rows[part], bits, symmetric)
        assert np.array_equal(codes[part], wanted)
        assert scales[place] == scale
        if found.zero_point is not None:
            assert np.moveaxis(found.zero_point, axis, -1)[place] == zero
        assert np.array_equal(values[part], ((wanted - zero).astype(np.float32) * scale))


@pytest.mark.parametrize("axis", [0, 1])
def test_large_arrays_are_cut_without_a_trace(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(203, 301)
    whole = quantize_blocks(x, axis, 4, 32)
    monkeypatch.setattr(blocks, "CHUNK", 1024)
    cut = quantize_blocks(x, axis, 4, 32)
    assert np.array_equal(cut.codes, whole.codes)
    assert np.array_equal(cut.scale, whole.scale)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_value_gets_the_code_without_a_twin(sign: int) -> None:
    x = np.array([0.1, -0.25, 0.5, 0.75], np.float32) * sign
    found = quantize_blocks(x, 0, 4, 4, search=False)
    assert found.codes[3] == -8
    assert found.values()[3] == x[3]
    assert np.sign(found.scale[0]) == -sign


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros(symmetric: bool) -> None:
    x = np.zeros((64, 3), np.float32)
    x[:32, 1] = 1e-42  # too small for a scale of its own
    found = quantize_blocks(x, 0, 4, 32, symmetric=symmetric)
    assert not found.values().any()
    assert (found.scale == 1).all()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_without_a_code_are_refused(wrong: float, axis: int, symmetric: bool) -> None:
    x = normal(64, 40)
    x[50, 39] = wrong
    with pytest.raises(DataError, match="NaN or infinite"):
        quantize_blocks(x, axis, 4, 32, symmetric=symmetric)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [32, 256])
def test_a_search_loses_on_no_block_and_its_scale_is_that_of_least_squares(
    bits: int, symmetric: bool, block: int
) -> None:
    x = normal(256, 50)
    plain, searched = (
        quantize_blocks(x, 0, bits, block, symmetric=symmetric, search=s) for s in (False, True)
    )
    errors = [
        ((x - q.values()).astype(np.float64) ** 2).reshape(-1, block, 50).sum(1) for q in (plain, searched)
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-4)).all()  # float32 sums choose between close ones
    assert errors[1].sum() < 0.999 * errors[0].sum()
    zero = 0 if searched.zero_point is None else np.repeat(searched.zero_point.astype(np.float64), block, 0)
    codes = (searched.codes.astype(np.float64) - zero).reshape(-1, block, 50)
    best = (x.reshape(codes.shape) * codes).sum(1) / (codes**2).sum(1)
    np.testing.assert_allclose(searched.scale, best, rtol=1e-5)  # sums of at most 256 float32 products


def test_a_whole_grid_is_worth_a_decibel() -> None:
    """Of normal values in blocks of 32: 1.06 dB at 4 bits, 5.2 dB at 2; a search adds 0.3 and 0.7 dB."""
    x = normal(32, 20000)
    for bits, gain, more in ((4, 1.0, 0.25), (2, 5.0, 0.6)):
        steps = (1 << (bits - 1)) - 1
        scale = np.abs(x).max(0) / steps
        usual = sqnr_db(x, np.clip(np.rint(x / scale), -steps, steps) * scale)
        whole = sqnr_db(x, quantize_blocks(x, 0, bits, 32, search=False).values())
        assert whole > usual + gain
        assert sqnr_db(x, quantize_blocks(x, 0, bits, 32).values()) > whole + more


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shape", "axis"), [((300, 70), 0), ((70, 300), 1), ((3, 70, 50), 1)])
def test_codes_do_not_depend_on_threads(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], axis: int, symmetric: bool
) -> None:
    monkeypatch.setattr(blocks, "CHUNK", 1024)  # some pieces for each thread
    one, many = (
        quantize_blocks(normal(*shape), axis, 4, 32, symmetric=symmetric, threads=threads)
        for threads in (1, 4)
    )
    np.testing.assert_array_equal(one.codes, many.codes)
    np.testing.assert_array_equal(one.scale, many.scale)
    if one.zero_point is not None and many.zero_point is not None:
        np.testing.assert_array_equal(one.zero_point, many.zero_point)
