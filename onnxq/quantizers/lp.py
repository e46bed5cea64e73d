"""The grid of least quantization error in the p-norm, argmin ||Q(x) - x||_p over scale and zero point.

It is the layer-wise stage of LAPQ: Nahshan et al., "Loss Aware Post-training Quantization", arXiv 1911.07190.
A larger p punishes saturation more. With p = 2 it is the least squared error (`mse`).

For an activation the expected error of a grid is integrated over the histogram in closed form. In steps,
u = x / s and k = clip(round(u), k_min, k_max), the primitive of |u - k|^p that vanishes at 0 is

    F(u) = (2^-p k + sign(u - k) |u - k|^(p+1)) / (p + 1),

rounding and saturation in one, and a bin [a, b] of n values adds n s^p (F(b/s) - F(a/s)) s / (b - a). Zeros
add nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from onnxq.affine import QuantParams
from onnxq.calibration.statistics import TensorStatistics
from onnxq.errors import UsageError
from onnxq.quantizers.base import RangeMethod, Rows, Vector
from onnxq.quantizers.density import Density
from onnxq.quantizers.search import Error, best_ranges
from onnxq.scheme import QuantScheme

TENSOR_CANDIDATES = 8  # an octave
ROW_CANDIDATES = 16, 256  # least and most: the error of a short row has ripples
ROW_EVALUATIONS = 4096  # an octave, in the rows where that lies between the two
ROW_CHUNK = 1 << 16  # weights: two work arrays in float32 stay in the second-level cache
COLUMN_CHUNK = 8192  # weights summed in float32, by one thread
WORK = 1 << 15


@dataclass(frozen=True)
class Lp(RangeMethod):
    """The range of least error in the p-norm.

    Attributes:
        p: the norm, at least 0.5 and at most 16.
    """

    name: ClassVar[str] = "lp"
    p: float = 2.0

    def __post_init__(self) -> None:
        if not 0.5 <= self.p <= 16.0:
            raise UsageError(f"p is {self.p}; it must be from 0.5 to 16")

    def tensor_range(self, statistics: TensorStatistics, scheme: QuantScheme) -> tuple[float, float]:
        """The range of least expected error."""
        density = Density.of(statistics)
        if density.nonzero == 0:
            return 0.0, 0.0
        ends = np.array([density.low]), np.array([density.high])
        low, high = best_ranges(density_error(density, scheme, self.p), *ends, scheme, TENSOR_CANDIDATES)
        return density.real(float(low[0])), density.real(float(high[0]))

    def row_ranges(self, rows: Rows, scheme: QuantScheme) -> tuple[Vector, Vector]:
        """The range of least error of every row."""
        low, high = rows.min(axis=1).astype(np.float64), rows.max(axis=1).astype(np.float64)
        # Powers of two bring the rows near 1: exact, and no power of a value overflows.
        shift = np.maximum(np.frexp(np.maximum(-low, high))[1], -126)
        low, high = np.ldexp(low, -shift), np.ldexp(high, -shift)
        per_octave = int(np.clip(ROW_EVALUATIONS // rows.shape[1], *ROW_CANDIDATES))
        error = row_error(rows, np.ldexp(1.0, -shift), scheme, self.p)
        low, high = best_ranges(error, low, high, scheme, per_octave)
        return np.ldexp(low, shift), np.ldexp(high, shift)


def expected_error(statistics: TensorStatistics, params: QuantParams, p: float = 2.0) -> float:
    """Mean of |Q(x) - x|^p over all values of a tensor, from its histogram; per-tensor parameters.

    Raises:
        DataError: the statistics have no histogram.
    """
    density = Density.of(statistics)
    if density.nonzero == 0:
        return 0.0
    scale = math.ldexp(float(params.scale), -density.exponent)
    error = density_error(density, params.scheme, p)
    total = error(np.array([[scale]]), np.array([[float(params.zero_point)]]))
    with np.errstate(over="ignore"):
        return max(float(total[0, 0]), 0.0) / statistics.count * float(np.exp2(density.exponent * p))


def density_error(density: Density, scheme: QuantScheme, p: float) -> Error:
    """The summed error of the values of a density, in units^p, as a function of candidates (1, N)."""
    edges = density.edges()
    heights = density.counts / np.diff(edges)
    weights = -np.diff(heights, prepend=0.0, append=0.0)  # sum of h_i (F_(i+1) - F_i), by edges
    odd = _odd_power(p + 1.0)
    batch = max(1, WORK // edges.size)

    def error(scale: Vector, zero: Vector) -> Vector:
        errors = np.empty(scale.size)
        for start in range(0, scale.size, batch):
            s, z = (a[0, start : start + batch, None] for a in (scale, zero))
            u = edges / s
            k = np.clip(np.rint(u), scheme.qmin - z, scheme.qmax - z)
            u -= k
            k *= 2.0**-p
            k += odd(u)
            errors[start : start + batch] = (k @ weights) * s[:, 0] ** (p + 1.0) / (p + 1.0)
        return errors[None, :]

    return error


def row_error(rows: Rows, factor: Vector, scheme: QuantScheme, p: float) -> Error:
    """The summed error |Q(x) - x|^p of each row of rows * factor[:, None], by candidates (R, N)."""
    columns = min(rows.shape[1], ROW_CHUNK)
    height = max(1, ROW_CHUNK // columns)
    total = _power_sum(p)

    @np.errstate(
        over="ignore", under="ignore"
    )  # an infinite error of a hopeless candidate is never the least
    def error(scale: Vector, zero: Vector) -> Vector:
        errors = np.zeros(scale.shape)
        inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0.0).astype(np.float32)
        least, most = ((end - zero).astype(np.float32) for end in (scheme.qmin, scheme.qmax))
        for top in range(0, rows.shape[0], height):
            part = slice(top, top + height)
            for left in range(0, rows.shape[1], columns):
                x = rows[part, left : left + columns] * factor[part, None].astype(np.float32)
                u, k = np.empty_like(x), np.empty_like(x)
                for n in range(scale.shape[1]):
                    np.multiply(x, inverse[part, n, None], out=u)
                    np.rint(u, out=k)
                    np.clip(k, least[part, n, None], most[part, n, None], out=k)
                    np.subtract(u, k, out=u)
                    for start in range(0, u.shape[1], COLUMN_CHUNK):
                        errors[part, n] += total(u[:, start : start + COLUMN_CHUNK])
        return errors * scale**p

    return error


def _odd_power(q: float) -> Callable[[Vector], Vector]:
    """sign(u) |u|^q, without the slow general power where q is 2, 3 or 4."""
    products: dict[float, Callable[[Vector], Vector]] = {
        2.0: lambda u: u * np.abs(u),
        3.0: lambda u: u * u * u,
        4.0: lambda u: u * u * u * np.abs(u),
    }
    return products.get(q, lambda u: np.copysign(np.abs(u) ** q, u))


def _power_sum(p: float) -> Callable[[NDArray[np.float32]], NDArray[Any]]:
    """Sums of |u|^p over the last axis, without the slow general power where p is 1, 2, 3 or 4."""
    products: dict[float, Callable[[NDArray[np.float32]], NDArray[Any]]] = {
        1.0: lambda u: np.abs(u).sum(axis=1),
        2.0: lambda u: np.vecdot(u, u),
        3.0: lambda u: np.vecdot(u * u, np.abs(u)),
        4.0: lambda u: np.vecdot(u * u, u * u),
    }
    return products.get(p, lambda u: (np.abs(u) ** np.float32(p)).sum(axis=1))
