"""Windows of convolutions and pools over any number of spatial axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Windows:
    """How windows lie over the spatial axes of an array (N, C, *spatial).

    Attributes:
        kernel, strides, dilations: one entry for each spatial axis.
        begins, ends: places padded before and after each axis; ends may be smaller than asked for where sizes round down.
        counts: windows along each axis.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def read(cls, attributes: Mapping[str, Any], shape: Sequence[int], kernel: Sequence[int]) -> Windows:
        """From the attributes of a Conv or pool.

        Args:
            shape: spatial sizes of the input.
            kernel: spatial sizes of the window.
        """
        dims = len(kernel)
        strides = tuple(attributes.get("strides") or (1,) * dims)
        dilations = tuple(attributes.get("dilations") or (1,) * dims)
        spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
        pads = _pads(attributes, shape, spans, strides)
        rounded = math.ceil if attributes.get("ceil_mode", 0) else math.floor
        counts = []
        for size, begin, end, span, stride in zip(
            shape, pads[:dims], pads[dims:], spans, strides, strict=True
        ):
            count = rounded((size + begin + end - span) / stride) + 1
            starts_in_padding = bool(attributes.get("ceil_mode", 0)) and (count - 1) * stride >= size + begin
            counts.append(count - starts_in_padding)
        ends = [
            (count - 1) * stride + span - size - begin
            for size, begin, span, stride, count in zip(
                shape, pads[:dims], spans, strides, counts, strict=True
            )
        ]
        return cls(tuple(kernel), strides, dilations, tuple(pads[:dims]), tuple(ends), tuple(counts))

    def over(self, x: Array, fill: Any) -> Array:
        """A view (N, C, *counts, *kernel) of the padded array (N, C, *spatial).

        Args:
            fill: value of the padding.
        """
        dims, axes = len(self.kernel), range(2, 2 + len(self.kernel))
        ends = tuple(max(end, 0) for end in self.ends)
        pads = [(0, 0), (0, 0), *zip(self.begins, ends, strict=True)]
        padded = np.pad(x, pads, constant_values=fill)
        spans = tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilations, strict=True))
        view = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=tuple(axes))
        steps = [slice(0, (c - 1) * s + 1, s) for c, s in zip(self.counts, self.strides, strict=True)]
        taps = [slice(None, None, d) for d in self.dilations]
        found: Array = view[(slice(None),) * 2 + tuple(steps) + tuple(taps)]
        assert found.ndim == 2 + 2 * dims
        return found


def _pads(
    attributes: Mapping[str, Any], shape: Sequence[int], spans: Sequence[int], strides: Sequence[int]
) -> tuple[int, ...]:
    """All begins, then all ends."""
    mode = attributes.get("auto_pad", "NOTSET")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    if mode in ("NOTSET", "VALID"):
        none = (0,) * (2 * len(spans))
        return none if mode == "VALID" else tuple(attributes.get("pads") or none)
    totals = [
        max((math.ceil(size / stride) - 1) * stride + span - size, 0)
        for size, span, stride in zip(shape, spans, strides, strict=True)
    ]
    small = [t // 2 for t in totals]
    large = [t - s for t, s in zip(totals, small, strict=True)]
    return tuple(small + large) if mode == "SAME_UPPER" else tuple(large + small)
