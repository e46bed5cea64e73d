"""mse and lp against brute force over fine grids, on the samples themselves."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxq.affine import QuantParams, affine_params, symmetric_params
from onnxq.calibration.statistics import Needs, TensorStatistics
from onnxq.quantizers import expected_error, parse_quantizer, weight_params
from onnxq.quantizers.density import Density
from onnxq.quantizers.lp import density_error
from onnxq.scheme import QuantScheme

Gather = Callable[[NDArray[Any]], TensorStatistics]
Draw = Callable[[str], NDArray[np.float32]]
RawError = Callable[..., float]

KINDS = ("normal", "shifted", "laplace", "student", "relu", "relu6", "silu", "skewed", "bimodal", "outlier")


def brute_force(values: NDArray[np.float32], scheme: QuantScheme, error: RawError, p: float) -> float:
    """The least error over all clips of a fine grid: 2 % apart in one dimension, 7 % in two."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    fine, coarse = 2.0 ** -np.arange(0.0, 8.0, 0.03), 2.0 ** -np.arange(0.0, 8.0, 0.1)
    grids: list[QuantParams] = []
    if scheme.symmetric:
        grids = [symmetric_params(max(-low, high) * share, scheme) for share in fine]
    elif low == 0.0:
        grids = [affine_params(0.0, high * share, scheme) for share in fine]
    else:
        grids = [affine_params(low * a, high * b, scheme) for a in (*coarse, 0.0) for b in coarse]
    thinned = values[::20] if len(grids) > len(fine) else values
    screened = np.argsort([error(thinned, grid, p) for grid in grids])[:40]
    return min(error(values, grids[i], p) for i in screened)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["uint8", "uint4", "uint2", "int8", "int4", "int3"])
def test_mse_is_within_2_percent_of_brute_force(
    kind: str, scheme: str, gather: Gather, draw: Draw, raw_error: RawError
) -> None:
    values, grid = draw(kind), QuantScheme.parse(scheme)
    params = parse_quantizer("mse")(gather(values), grid)
    assert raw_error(values, params, 2.0) <= 1.02 * brute_force(values, grid, raw_error, 2.0)


@pytest.mark.parametrize("kind", ["normal", "silu", "skewed", "bimodal"])
@pytest.mark.parametrize("scheme", ["uint8", "uint4", "uint2"])
def test_mse_is_within_2_percent_of_all_zero_points(
    kind: str, scheme: str, gather: Gather, draw: Draw
) -> None:
    """Every zero point with 150 scales: what a search over both ends can miss."""
    statistics, grid = gather(draw(kind)), QuantScheme.parse(scheme)
    density = Density.of(statistics)
    error = density_error(density, grid, 2.0)
    largest = (density.high - density.low) / grid.qmax
    scales = largest * np.geomspace(0.3, 1.1, 150)[None, :]
    best = min(error(scales, np.full(scales.shape, float(z))).min() for z in range(grid.qmax + 1))
    params = parse_quantizer("mse")(statistics, grid)
    found = expected_error(statistics, params) * statistics.count / 4.0**density.exponent
    assert found <= 1.02 * best


@pytest.mark.parametrize("kind", ["normal", "relu", "skewed"])
@pytest.mark.parametrize("scheme", ["uint4", "int4"])
@pytest.mark.parametrize("p", [1.0, 2.4, 3.0, 4.0])
def test_lp_is_within_2_percent_of_brute_force(
    kind: str, scheme: str, p: float, gather: Gather, draw: Draw, raw_error: RawError
) -> None:
    values, grid = draw(kind), QuantScheme.parse(scheme)
    params = parse_quantizer(f"lp={p}")(gather(values), grid)
    assert raw_error(values, params, p) <= 1.02 * brute_force(values, grid, raw_error, p)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["uint8", "int4", "uint2"])
@pytest.mark.parametrize("p", [1.0, 2.0, 2.7, 3.0])
def test_expected_error_is_that_of_the_samples(
    kind: str, scheme: str, p: float, gather: Gather, draw: Draw, raw_error: RawError
) -> None:
    values, grid = draw(kind), QuantScheme.parse(scheme)
    limit = float(np.abs(values).max())
    for share in (1.0, 0.5, 0.2):
        params = affine_params(share * float(values.min()), share * limit, grid)
        # Uniform within a bin; with the outlier a bin is 1/16 of the others' deviation; chance adds its own.
        assert expected_error(gather(values), params, p) == pytest.approx(
            raw_error(values, params, p), rel=0.03
        )


def test_expected_error_of_one_uniform_bin_in_closed_form(gather: Gather) -> None:
    # 3 steps of rounding cost s^2/12 each; what lies above the clip costs its squared distance.
    values = np.linspace(0.0, 6.0, 600_001)[1:]
    params = affine_params(0.0, 3.0, QuantScheme.parse("uint2"))
    inside, rounding, saturation = 3.0, 1.0 / 12.0, 3.0**3 / 3.0
    exact = (inside * rounding + saturation) / 6.0
    assert expected_error(gather(values), params) == pytest.approx(exact, rel=1e-4)  # half a sample apart


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["uint{}", "int{}"])
def test_more_bits_never_a_larger_error(
    kind: str, family: str, gather: Gather, draw: Draw, raw_error: RawError
) -> None:
    values = draw(kind)
    schemes = [QuantScheme.parse(family.format(bits)) for bits in range(2, 9)]
    errors = [raw_error(values, parse_quantizer("mse")(gather(values), scheme), 2.0) for scheme in schemes]
    assert all(more <= less for less, more in pairwise(errors))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["uint8", "uint3", "int4"])
def test_mse_is_never_worse_than_the_others(kind: str, scheme: str, gather: Gather, draw: Draw) -> None:
    statistics, grid = gather(draw(kind)), QuantScheme.parse(scheme)
    best = expected_error(statistics, parse_quantizer("mse")(statistics, grid))
    for other in ("minmax", "percentile", "percentile=99", "entropy", "aciq", "lp=3"):
        # 1 %: ripples of the error between neighbouring candidates
        assert best <= 1.01 * expected_error(statistics, parse_quantizer(other)(statistics, grid)), other


def test_zeros_do_not_move_the_range(gather: Gather, draw: Draw) -> None:
    values, scheme = draw("laplace"), QuantScheme.parse("uint4")
    sparse = np.concatenate((values, np.zeros(10 * values.size, np.float32)))
    for method in ("mse", "entropy", "aciq"):
        alone, among = (parse_quantizer(method)(gather(x), scheme) for x in (values, sparse))
        assert alone.scale == among.scale
        assert alone.zero_point == among.zero_point


def test_a_larger_p_clips_less(gather: Gather, draw: Draw) -> None:
    statistics, scheme = gather(draw("laplace")), QuantScheme.parse("int4")
    scales = [float(parse_quantizer(f"lp={p}")(statistics, scheme).scale) for p in (1, 1.5, 2, 3, 4, 8)]
    assert scales == sorted(scales)
    assert scales[0] < scales[-1]


@given(st.integers(-60, 60), st.sampled_from(["uint8", "int4", "uint2"]))
@settings(deadline=None, max_examples=30)
def test_powers_of_two_scale_exactly(k: int, scheme: str) -> None:
    values = np.random.default_rng(3).standard_t(4, size=3000).astype(np.float32)
    for method in ("minmax", "percentile", "mse", "lp=2.5", "entropy", "aciq"):
        params = []
        for x in (values, np.ldexp(values, k)):
            statistics = TensorStatistics("x", Needs(histogram=True))
            statistics.update(x)
            params.append(parse_quantizer(method)(statistics, QuantScheme.parse(scheme)))
            params.append(weight_params(method, x.reshape(3, -1), 0, QuantScheme.parse(scheme)))
        for plain, scaled in ((params[0], params[2]), (params[1], params[3])):
            np.testing.assert_array_equal(np.ldexp(plain.scale, k), scaled.scale, err_msg=method)
            np.testing.assert_array_equal(plain.zero_point, scaled.zero_point, err_msg=method)
