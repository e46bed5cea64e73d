"""Sums of products against numpy's integers, and their 16-bit saturation against a loop over scalars."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxq.reference.sums import lost, product

Codes = NDArray[np.integer]
ZERO = np.zeros((), np.int8)


def codes(seed: int, shape: tuple[int, ...], kind: str) -> Codes:
    info = np.iinfo(kind)
    return np.random.default_rng(seed).integers(info.min, info.max + 1, shape).astype(kind)


def by_scalars(a: Codes, b: Codes) -> NDArray[np.int64]:
    """Sums as `vpmaddubsw` and 32-bit additions make them, one scalar after the other."""
    sums = np.zeros((len(a), b.shape[1]), np.int64)
    for m in range(len(a)):
        for n in range(b.shape[1]):
            for k in range(0, a.shape[1], 2):
                pair = [int(a[m, i]) * int(b[i, n]) for i in (k, k + 1) if i < a.shape[1]]
                sums[m, n] += max(-32768, min(32767, sum(pair)))
    return sums


@pytest.mark.parametrize("kinds", [("uint8", "int8"), ("uint8", "uint8"), ("int8", "int8")])
def test_exact_sums(kinds: tuple[str, str]) -> None:
    a, b = codes(1, (5, 700), kinds[0]), codes(2, (700, 6), kinds[1])  # 700 products pass what float32 holds
    a_zero, b_zero = codes(3, (), kinds[0]), codes(4, (6,), kinds[1])
    expected = (a.astype(np.int64) - a_zero) @ (b.astype(np.int64) - b_zero)
    found = product(a, a_zero, b, b_zero, "exact")
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)


@given(st.integers(0, 10_000), st.integers(1, 9), st.sampled_from([32, 90, 127]))
def test_pairs_saturate_as_in_a_loop(seed: int, length: int, magnitude: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.choice(np.array([0, 100, 128, 129, 200, 255], np.uint8), (4, length))
    b = rng.integers(-magnitude - 1, magnitude + 1, (length, 3)).astype(np.int8)
    expected = by_scalars(a, b)
    np.testing.assert_array_equal(product(a, ZERO, b, ZERO, "avx2"), expected)
    np.testing.assert_array_equal(product(a, ZERO, b, ZERO, "exact") - lost(a, b), expected)


def test_the_edges_of_16_bits() -> None:
    """255 * (127 + 1) = 32640 and 255 * 128 = 32640 fit; 255 * 129 = 32895 does not; below, 255 * -129 does not."""
    a = np.full((1, 2), 255, np.uint8)
    for pair, taken in (
        ((127, 1), 0),
        ((127, 2), 32895 - 32767),
        ((-128, 0), 0),
        ((-128, -1), -32895 + 32768),
    ):
        b = np.array(pair, np.int8)[:, None]
        assert lost(a, b).item() == taken


def test_zero_points_do_not_save_from_saturation() -> None:
    """Kernels multiply the codes themselves and take zero points off the sums."""
    a, b = np.full((1, 2), 255, np.uint8), np.full((2, 1), 127, np.int8)
    centred = product(a, np.array(255, np.uint8), b, ZERO, "avx2").item()
    assert centred == 0 - (2 * 255 * 127 - 32767)
    assert product(a, np.array(255, np.uint8), b, ZERO, "exact").item() == 0


@pytest.mark.parametrize("kinds", [("uint8", "uint8"), ("int8", "int8")])
def test_other_types_do_not_saturate(kinds: tuple[str, str]) -> None:
    a, b = codes(1, (5, 30), kinds[0]), codes(2, (30, 6), kinds[1])
    a[0], b[:, 0] = np.iinfo(kinds[0]).min, np.iinfo(kinds[1]).min  # -128 * -128 * 2 passes 16 bits
    exact, pairs = (product(a, ZERO, b, ZERO, kind) for kind in ("exact", "avx2"))
    np.testing.assert_array_equal(exact, pairs)


def test_stacks_of_matrices_broadcast() -> None:
    a, b = codes(1, (3, 1, 4, 10), "uint8"), codes(2, (2, 10, 5), "int8")
    found = product(a, ZERO, b, ZERO, "avx2")
    assert found.shape == (3, 2, 4, 5)
    for i in range(3):
        for j in range(2):
            np.testing.assert_array_equal(found[i, j], by_scalars(a[i, 0], b[j]))


def test_sums_wrap_at_32_bits() -> None:
    a, b = np.full((1, 70_000), 255, np.uint8), np.full((70_000, 1), 127, np.int8)
    expected = np.array(70_000 * 255 * 127).astype(np.int32).item()
    assert product(a, ZERO, b, ZERO, "exact").item() == expected < 0
