"""ACIQ: the clip that is best for a Gaussian or a Laplace density of the same width.

Banner et al., "Post training 4-bit quantization of convolutional networks for rapid-deployment",
arXiv 1810.05723. With M bits on [-a, a] the step is 2a / 2^M, so rounding costs a^2 / (3 4^M), and saturation

    Laplace, b = E|x - m|:   2 b^2 exp(-a/b)
    Gauss, s^2 = E(x - m)^2: (a^2 + s^2) erfc(a / (s sqrt 2)) - sqrt(2/pi) a s exp(-a^2 / (2 s^2)).

The best a = k b or k s solves dE/da = 0 for every M. A one-sided tensor (after ReLU) is half of a density
about zero: with its moments about zero, [0, a] in M bits rounds like [-a, a] in M + 1 bits. Exact zeros are
left out, they cost nothing. The family is the one of larger likelihood: Laplace when b / s < sqrt(pi / (2e)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import numpy as np

from onnxq.calibration.statistics import TensorStatistics
from onnxq.errors import unknown
from onnxq.quantizers.base import RangeMethod, Rows, Vector
from onnxq.quantizers.density import Density
from onnxq.scheme import QuantScheme

FAMILIES = ("auto", "gauss", "laplace")


@dataclass(frozen=True)
class Aciq(RangeMethod):
    """The analytic clip.

    Attributes:
        family: `gauss`, `laplace`, or `auto` for the one that fits the tensor better.
    """

    name: ClassVar[str] = "aciq"
    family: Literal["auto", "gauss", "laplace"] = "auto"

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise unknown("family", self.family, FAMILIES, where=" of the method 'aciq'")

    def tensor_range(self, statistics: TensorStatistics, scheme: QuantScheme) -> tuple[float, float]:
        """Mean plus and minus the clip, about zero when symmetric or one-sided; never outside of the data."""
        density = Density.of(statistics)
        low, high = np.array([density.low]), np.array([density.high])
        centre = np.zeros(1) if scheme.symmetric else _centre(low, high, np.array([density.mean()]))
        absolute, square = density.moments(float(centre[0]))
        ends = self._clip(low, high, centre, np.array([absolute]), np.array([square]), scheme)
        return density.real(float(ends[0][0])), density.real(float(ends[1][0]))

    def row_ranges(self, rows: Rows, scheme: QuantScheme) -> tuple[Vector, Vector]:
        """The same for every row, from the moments of its values."""
        low, high = rows.min(axis=1).astype(np.float64), rows.max(axis=1).astype(np.float64)
        count = np.maximum(np.count_nonzero(rows, axis=1), 1)
        mean = rows.sum(axis=1, dtype=np.float64) / count
        centre = np.zeros_like(mean) if scheme.symmetric else _centre(low, high, mean)
        distance = np.abs(np.subtract(rows, centre[:, None], dtype=np.float64))
        distance[rows == 0.0] = 0.0
        absolute, square = distance.sum(axis=1) / count, np.vecdot(distance, distance) / count
        return self._clip(low, high, centre, absolute, square, scheme)

    def _clip(
        self, low: Vector, high: Vector, centre: Vector, absolute: Vector, square: Vector, scheme: QuantScheme
    ) -> tuple[Vector, Vector]:
        """Ranges from the smallest and largest value, E|x - centre| and E(x - centre)^2, all (R,)."""
        deviation = np.sqrt(square)
        one_sided = (low >= 0.0) | (high <= 0.0)
        halved = one_sided & (not scheme.symmetric)
        gauss, laplace = (
            np.where(halved, multiplier(family, scheme.bits + 1), multiplier(family, scheme.bits)) * width
            for family, width in (("gauss", deviation), ("laplace", absolute))
        )
        peaked = absolute < math.sqrt(math.pi / (2.0 * math.e)) * deviation
        use_laplace = peaked if self.family == "auto" else np.full(peaked.shape, self.family == "laplace")
        clip = np.where(use_laplace, laplace, gauss)
        return np.maximum(low, centre - clip), np.minimum(high, centre + clip)


@cache
def multiplier(family: str, bits: int) -> float:
    """The best clip of a two-sided density in units of s (`gauss`) or b (`laplace`).

    >>> [round(multiplier("gauss", bits), 2) for bits in (2, 3, 4, 8)]
    [1.71, 2.15, 2.56, 3.92]
    >>> [round(multiplier("laplace", bits), 2) for bits in (2, 3, 4, 8)]
    [2.83, 3.9, 5.03, 9.9]
    """
    import scipy

    rounding = 3.0 * 4.0**bits
    if family == "laplace":
        return float(scipy.special.lambertw(rounding).real)  # a / rounding = exp(-a)

    def slope(a: float) -> float:
        saturation = a * math.erfc(a / math.sqrt(2.0)) - math.sqrt(2.0 / math.pi) * math.exp(-a * a / 2.0)
        return saturation + a / rounding

    return float(scipy.optimize.brentq(slope, 0.1, 10.0, xtol=1e-12))


def _centre(low: Vector, high: Vector, mean: Vector) -> Vector:
    """The centre of the density: the mean, or zero for values of one sign."""
    return np.where((low >= 0.0) | (high <= 0.0), 0.0, mean)
