"""How a weight of several points is stored: rows of few-bit codes, whose sums are the codes that an 8-bit kernel reads.

    codes[c] = sum_i factors[c, i] rows[places[c, i]]

Multipoint quantization (Liu et al., "Post-training Quantization with Multiple Points", arXiv 2002.09049) gives the channels that
hurt most more than one row. Where factors are whole, the sum is one code per weight and costs the kernel nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxq.digits import split

Codes = NDArray[np.integer[Any]]

Form = Literal["fold", "rows"]

LARGEST_CODE = 127  # of a kernel
LARGEST_LOOKED_UP = 255  # of a table


@dataclass(frozen=True, eq=False)
class PointRows:
    """Rows of codes and which of them make up each channel.

    Attributes:
        rows: int8, or uint8 of a table, (channels + further points, ...): the weight's shape with the channel axis first; the
            coarsest point of each channel, then the others.
        places: intp, (channels, points); a channel with fewer points names its first row again, at factor 0.
        factors: (channels, points), uint8, or int8 where one is negative.
        axis: channel axis of the weight.
        form: `fold` sums the rows up when the model is loaded, `rows` lets the layer compute each and sums up its outputs.
    """

    rows: NDArray[np.int8 | np.uint8]
    places: NDArray[np.intp]
    factors: NDArray[np.uint8 | np.int8]
    axis: int
    form: Form = "fold"

    @property
    def extra(self) -> int:
        """Number of further points."""
        return len(self.rows) - len(self.places)

    def codes(self) -> NDArray[np.int8 | np.uint8]:
        """The sums in the weight's own layout, of the type of the rows."""
        shape = (-1, *[1] * (self.rows.ndim - 1))
        terms = zip(self.places.T, self.factors.T.astype(np.int16), strict=True)
        sums = sum(factor.reshape(shape) * self.rows[place] for place, factor in terms)
        return np.ascontiguousarray(np.moveaxis(sums, 0, self.axis), self.rows.dtype)

    def reach(self, ends: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Smallest and largest code of each channel, (channels,), where a row has these ends; within what a kernel takes."""
        sums = np.sort(self.factors.astype(np.int64)[:, :, None] * np.array(ends), axis=2).sum(axis=1)
        least, most = (-LARGEST_CODE, LARGEST_CODE) if self.rows.dtype == np.int8 else (0, LARGEST_LOOKED_UP)
        return np.maximum(sums[:, 0], least), np.minimum(sums[:, 1], most)

    @property
    def finest(self) -> NDArray[np.int64]:
        """What the codes of each channel are multiples of, (channels,)."""
        last = np.count_nonzero(self.factors, axis=1) - 1
        found: NDArray[np.int64] = np.take_along_axis(self.factors, last[:, None], 1)[:, 0].astype(np.int64)
        return found

    def with_codes(self, codes: Codes, ends: tuple[int, int]) -> PointRows:
        """The same rows of the same channels at the same factors, for other codes.

        Args:
            codes: in the weight's own layout, within `reach`, multiples of `finest`.
            ends: smallest and largest code of a row.

        Raises:
            ValueError: a code is out of reach.
        """
        finest = self.finest
        wanted = np.moveaxis(codes, self.axis, 0).reshape(len(self.places), -1) // finest[:, None]
        rows = np.empty((len(self.rows), wanted.shape[1]), self.rows.dtype)
        counts = np.count_nonzero(self.factors, axis=1)
        for count in np.unique(counts).tolist():
            channels = np.flatnonzero(counts == count)
            ratio = self.factors[channels, max(count - 2, 0)].astype(np.int64) // finest[channels]
            points = split(wanted[channels], ratio, count, ends)
            rows[self.places[channels, :count].T] = points
        return replace(self, rows=rows.reshape(self.rows.shape))


def point_rows(
    codes: Codes, axis: int, further: Sequence[tuple[Codes, Codes, Codes]], form: Form = "fold"
) -> PointRows:
    """Storage of a weight of which some channels have further points.

    Args:
        codes: the only point of all other channels, in the weight's layout.
        axis: its channel axis.
        further: channels (R,), their points (n, R, ...) with the coarsest first, and the ratio of neighbouring points (R,);
            a channel occurs once.
        form: how the rows are summed up.

    Raises:
        ValueError: a factor does not fit into 8 bits.
    """
    rows = np.moveaxis(codes, axis, 0).astype(np.int8)
    most = max((len(points) for _, points, _ in further), default=1)
    places = np.repeat(np.arange(len(rows))[:, None], most, axis=1)
    factors = np.zeros(places.shape, np.int64)
    factors[:, 0] = 1
    stored, count = [rows], len(rows)
    for channels, points, ratio in further:
        each = len(points)
        rows[channels] = points[0]
        stored.append(points[1:].reshape(-1, *rows.shape[1:]).astype(np.int8))
        added = np.arange((each - 1) * len(channels)).reshape(each - 1, -1).T
        places[channels, 1:each] = count + added
        factors[channels, :each] = ratio[:, None] ** np.arange(each - 1, -1, -1)
        count += added.size
    return PointRows(np.concatenate(stored), places, _in_a_byte(factors), axis, form)


def _in_a_byte(factors: NDArray[np.int64]) -> NDArray[np.uint8 | np.int8]:
    kind: type[np.uint8 | np.int8] = np.int8 if factors.min(initial=0) < 0 else np.uint8
    least, most = np.iinfo(kind).min, np.iinfo(kind).max
    if factors.size and not (least <= factors.min() and factors.max() <= most):
        raise ValueError(f"factors from {factors.min()} to {factors.max()} do not fit into 8 bits")
    return factors.astype(kind)
