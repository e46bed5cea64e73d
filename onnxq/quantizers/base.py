"""What a range method is: statistics of one activation tensor, or the rows of a weight tensor, to a range."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from onnxq.affine import SMALLEST_SCALE, QuantParams, affine_params, symmetric_params
from onnxq.calibration.statistics import Needs, TensorStatistics
from onnxq.errors import DataError
from onnxq.scheme import QuantScheme

Rows = NDArray[np.float32]
Vector = NDArray[np.float64]


class Quantizer(Protocol):
    """Chooses the grid of one tensor from its statistics; `needs` says which ones to gather."""

    @property
    def needs(self) -> Needs:
        """The statistics that the call reads."""

    def __call__(self, statistics: TensorStatistics, scheme: QuantScheme) -> QuantParams:
        """Per-tensor parameters, scale and zero point of shape ()."""


class RangeMethod(ABC):
    """A quantizer that chooses a range; its dataclass fields are its options."""

    name: ClassVar[str]
    needs: ClassVar[Needs] = Needs(histogram=True)

    def __call__(self, statistics: TensorStatistics, scheme: QuantScheme) -> QuantParams:
        """Per-tensor parameters for an activation.

        Raises:
            DataError: the statistics are empty, or lack the histogram that the method needs.
        """
        if statistics.count == 0:
            raise DataError(f"tensor {statistics.name!r} has no calibration values")
        if self.needs.histogram and statistics.histogram is None:
            raise DataError(
                f"tensor {statistics.name!r} has no histogram; the method {self.name!r} needs one"
            )
        return affine_params(*self.tensor_range(statistics, scheme), scheme)

    @abstractmethod
    def tensor_range(self, statistics: TensorStatistics, scheme: QuantScheme) -> tuple[float, float]:
        """The range [low, high] for an activation; a symmetric scheme takes its larger magnitude."""

    @abstractmethod
    def row_ranges(self, rows: Rows, scheme: QuantScheme) -> tuple[Vector, Vector]:
        """The range of every row on its own, low and high (R,), from the values; rows are (R, n >= 1)."""

    def __str__(self) -> str:
        options = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]  # type: ignore[arg-type]
        changed = ":".join(f"{name}={value}" for name, value, default in options if value != default)
        return f"{self.name}:{changed}" if changed else self.name


def grid(low: Vector, high: Vector, scheme: QuantScheme) -> tuple[Vector, Vector]:
    """Scale and zero point of the ranges [low, high], elementwise; the rule of `affine.affine_params`.

    Args:
        low, high: any one shape; the ranges are widened to hold zero. An empty range gives scale 0.
    """
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    if scheme.symmetric:
        steps = (1 << (scheme.bits - 1)) - 1
        return np.maximum(-low, high) / steps, np.full(np.shape(low), float(scheme.midpoint))
    scale = (high - low) / (scheme.qmax - scheme.qmin)
    zero = np.rint(scheme.qmin - np.divide(low, scale, out=np.zeros_like(scale), where=scale > 0.0))
    return scale, np.clip(zero, scheme.qmin, scheme.qmax)


def channel_params(low: Vector, high: Vector, scheme: QuantScheme, axis: int | None) -> QuantParams:
    """Parameters of ranges (R,), as `affine.affine_params` would give each; shape () when axis is None."""
    if axis is None:
        return affine_params(float(low[0]), float(high[0]), scheme)
    if scheme.symmetric:
        return symmetric_params(np.maximum(-low, high), scheme, axis)
    scale = grid(low, high, scheme)[0]
    scale = np.where(scale > 0.0, np.maximum(scale, SMALLEST_SCALE), 1.0).astype(np.float32)
    zero = np.clip(np.rint(scheme.qmin - np.minimum(low, 0.0) / scale), scheme.qmin, scheme.qmax)
    return QuantParams(scheme, np.asarray(scale, np.float32), zero.astype(np.int32), axis)
