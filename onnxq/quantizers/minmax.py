"""Min-max: the range is the smallest and the largest value, nothing saturates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.calibration.statistics import Needs, TensorStatistics
from onnxq.quantizers.base import RangeMethod, Rows, Vector
from onnxq.scheme import QuantScheme


@dataclass(frozen=True)
class MinMax(RangeMethod):
    """The whole range."""

    name: ClassVar[str] = "minmax"
    needs: ClassVar[Needs] = Needs()

    def tensor_range(self, statistics: TensorStatistics, scheme: QuantScheme) -> tuple[float, float]:
        """Minimum and maximum."""
        return statistics.minimum, statistics.maximum

    def row_ranges(self, rows: Rows, scheme: QuantScheme) -> tuple[Vector, Vector]:
        """Minimum and maximum of every row."""
        return rows.min(axis=1).astype(np.float64), rows.max(axis=1).astype(np.float64)
