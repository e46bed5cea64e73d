"""Least squared error: the p-norm with p = 2.

Kravchik et al., "Low-bit Quantization of Neural Networks for Efficient Inference" (OMSE), ICCVW 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.calibration.statistics import TensorStatistics
from onnxq.quantizers.base import RangeMethod, Rows, Vector
from onnxq.quantizers.lp import Lp
from onnxq.scheme import QuantScheme


@dataclass(frozen=True)
class Mse(RangeMethod):
    """The range of least squared error."""

    name: ClassVar[str] = "mse"

    def tensor_range(self, statistics: TensorStatistics, scheme: QuantScheme) -> tuple[float, float]:
        """The range of least expected squared error."""
        return Lp(2.0).tensor_range(statistics, scheme)

    def row_ranges(self, rows: Rows, scheme: QuantScheme) -> tuple[Vector, Vector]:
        """The range of least squared error of every row."""
        return Lp(2.0).row_ranges(rows, scheme)
