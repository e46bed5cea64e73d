"""ACIQ against numerical integration of the expected error of the quantizer, and the paper's multipliers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import integrate, optimize, stats

from onnxq.calibration.statistics import TensorStatistics
from onnxq.quantizers import expected_error, parse_quantizer
from onnxq.quantizers.aciq import Aciq, multiplier
from onnxq.scheme import QuantScheme

Gather = Callable[[NDArray[Any]], TensorStatistics]
Draw = Callable[[str], NDArray[np.float32]]

DENSITIES = {"gauss": stats.norm(), "laplace": stats.laplace()}  # both of unit s or b


@pytest.mark.parametrize(
    ("family", "paper"),
    [
        ("gauss", {2: 1.71, 3: 2.15, 4: 2.55, 8: 3.92}),
        ("laplace", {2: 2.83, 3: 3.89, 4: 5.03, 8: 9.89}),
    ],
)
def test_multipliers_of_the_paper(family: str, paper: dict[int, float]) -> None:
    for bits, value in paper.items():
        assert multiplier(family, bits) == pytest.approx(value, abs=0.01)  # printed with two decimals


@pytest.mark.parametrize("family", ["gauss", "laplace"])
@pytest.mark.parametrize("bits", range(2, 10))
def test_multipliers_minimise_the_integrated_error(family: str, bits: int) -> None:
    density = DENSITIES[family]

    def error(clip: float) -> float:
        saturation = integrate.quad(lambda x: (x - clip) ** 2 * density.pdf(x), clip, np.inf)[0]
        return float(2.0 * saturation + (2.0 * clip / 2**bits) ** 2 / 12.0)

    best = optimize.minimize_scalar(error, bounds=(0.5, 14.0), method="bounded", options={"xatol": 1e-6})
    # The minimum is flat: the clip is good to the root of the integral's relative error, 1e-8.
    assert multiplier(family, bits) == pytest.approx(best.x, abs=1e-3)
    assert error(multiplier(family, bits)) <= best.fun * (1.0 + 1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("family", ["gauss", "laplace"])
def test_ranges_of_both_signs(bits: int, family: str, gather: Gather) -> None:
    # quantiles of the density at equal shares: samples without chance
    shares = (np.arange(200_000) + 0.5) / 200_000
    values = 3.0 * DENSITIES[family].ppf(shares)
    statistics, scheme = gather(values + 1.0), QuantScheme.parse(f"uint{bits}")
    low, high = Aciq().tensor_range(statistics, scheme)
    k = 3.0 * multiplier(family, bits)
    assert low == pytest.approx(max(1.0 - k, float(values.min()) + 1.0), rel=1e-3, abs=0.01)
    assert high == pytest.approx(min(1.0 + k, float(values.max()) + 1.0), rel=1e-3)
    symmetric = QuantScheme.parse(f"int{bits}")
    _, limit = Aciq().tensor_range(gather(values), symmetric)
    assert limit == pytest.approx(min(k, float(values.max())), rel=1e-3)


@pytest.mark.parametrize("family", ["gauss", "laplace"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_after_relu_the_clip_is_the_best_one(family: str, bits: int, gather: Gather) -> None:
    shares = (np.arange(200_000) + 0.5) / 200_000
    values = np.maximum(DENSITIES[family].ppf(shares), 0.0)
    statistics, scheme = gather(values), QuantScheme.parse(f"uint{bits}")
    low, high = Aciq().tensor_range(statistics, scheme)
    assert low == 0.0
    assert high == pytest.approx(multiplier(family, bits + 1), rel=1e-3)
    ours, best = (expected_error(statistics, parse_quantizer(m)(statistics, scheme)) for m in ("aciq", "mse"))
    # ACIQ counts 2^M steps where the grid has 2^M - 1, which costs most at 2 bits
    assert ours <= 1.1 * best


def test_family_by_likelihood(gather: Gather, draw: Draw) -> None:
    scheme = QuantScheme.parse("int4")
    for kind, family in (("normal", "gauss"), ("laplace", "laplace")):
        values = draw(kind)
        magnitude = np.abs(values.astype(np.float64))
        widths = {"gauss": math.sqrt(float(np.mean(magnitude**2))), "laplace": float(magnitude.mean())}
        likelihoods = {
            "gauss": stats.norm(scale=widths["gauss"]).logpdf(values).sum(),
            "laplace": stats.laplace(scale=widths["laplace"]).logpdf(values).sum(),
        }
        assert max(likelihoods, key=lambda name: likelihoods[name]) == family
        statistics = gather(values)
        assert Aciq().tensor_range(statistics, scheme) == Aciq(family).tensor_range(statistics, scheme)  # type: ignore[arg-type]
        other = "laplace" if family == "gauss" else "gauss"
        assert Aciq().tensor_range(statistics, scheme) != Aciq(other).tensor_range(statistics, scheme)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["normal", "shifted", "laplace", "relu", "skewed"])
@pytest.mark.parametrize("scheme", ["uint4", "int4"])
def test_rows_agree_with_the_histogram(kind: str, scheme: str, gather: Gather, draw: Draw) -> None:
    values, grid = draw(kind), QuantScheme.parse(scheme)
    low, high = Aciq().row_ranges(values[None, :], grid)
    # moments from the middles of bins, each within half of 1/2048 of the range
    np.testing.assert_allclose(
        (low[0], high[0]), Aciq().tensor_range(gather(values), grid), rtol=1e-3, atol=1e-3
    )


def test_zeros_of_a_row_do_not_count(draw: Draw) -> None:
    values = draw("shifted")
    sparse = np.append(values, np.zeros(values.size, np.float32))
    for scheme in (QuantScheme.parse("uint4"), QuantScheme.parse("int4")):
        alone = Aciq().row_ranges(np.minimum(values, 5.0)[None, :], scheme)
        among = Aciq().row_ranges(np.minimum(sparse, 5.0)[None, :], scheme)
        np.testing.assert_allclose(among, alone, rtol=1e-12)  # float64 sums in another order
