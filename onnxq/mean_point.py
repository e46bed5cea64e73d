"""The mean of each channel of weights, kept exactly by one further point of ones that all channels of a layer share.

Quantization shifts the mean of a channel, b_c = mean(w_hat_c) - mean(w_c) (Banner et al., "Post Training 4-bit Quantization of
Convolutional Networks for Rapid-Deployment", arXiv 1810.05723, section 3). The shift is not on the grid of the codes, but at a
whole ratio r it is on a finer one, and folds into the codes of an 8-bit kernel:

    w_hat_c - b_c  ~  (s_c / r) (r q_c - m_c 1),     m_c = round(r b_c / s_c)

The file grows by one row of ones and two bytes a channel.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from onnxq.point_rows import PointRows
from onnxq.program import QuantDecision
from onnxq.saturation import excess

LARGEST = 127
LARGEST_RATIO = 15


def with_means(
    decision: QuantDecision, weights: NDArray[np.float32], kind: str, limit: int
) -> QuantDecision | str:
    """A weight whose channels keep their means to 1 / 2r of a step, or why there is no room for it in 8 bits.

    Args:
        decision: with codes of few bits.
        weights: before quantization, in the operator's layout.
        kind: as for `onnxq.saturation.as_rows`.
        limit: largest sum of two neighbouring codes of one sign; 0 for none.
    """
    codes, params, axis = decision.codes, decision.params, decision.axis
    assert codes is not None
    assert params is not None
    assert axis is not None
    if decision.points is not None:
        return "its channels have further points already"
    rows = np.moveaxis(codes, axis, 0).astype(np.int64)
    scale = np.broadcast_to(params.scale, len(rows)).astype(np.float64)
    others = tuple(range(1, rows.ndim))
    shift = rows.mean(axis=others) - np.moveaxis(weights, axis, 0).mean(axis=others) / scale  # steps, (C,)
    for ratio in range(LARGEST_RATIO, 1, -1):
        means = np.rint(ratio * shift).astype(np.int64)
        folded = np.moveaxis(ratio * rows - means.reshape(-1, *[1] * len(others)), 0, axis)
        if np.abs(folded).max() <= LARGEST and not (limit and excess(folded, kind, axis, limit).any()):
            break
    else:
        return "its codes leave no room for a finer grid in 8 bits"
    finer = replace(
        params,
        scale=(scale / ratio).astype(np.float32),
        zero_point=np.zeros(len(rows), np.int32),
        axis=axis,
    )
    points = PointRows(
        np.concatenate([rows, np.ones((1, *rows.shape[1:]), np.int64)]).astype(np.int8),
        np.stack([np.arange(len(rows)), np.full(len(rows), len(rows))], axis=1),
        np.stack([np.full(len(rows), ratio), -means], axis=1).astype(np.int8),
        axis,
    )
    return replace(decision, params=finer, codes=folded.astype(np.int8), points=points)


def with_spread(decision: QuantDecision, weights: NDArray[np.float32]) -> QuantDecision:
    """A weight with the scale of each channel times ||w - mean|| / ||w_hat - mean||, so that channels keep their spread (Banner).

    Args:
        decision: with codes.
        weights: before quantization, in the operator's layout.
    """
    codes, params, axis = decision.codes, decision.params, decision.axis
    assert codes is not None
    assert params is not None
    assert axis is not None
    before, after = (np.moveaxis(w, axis, 0).reshape(w.shape[axis], -1) for w in (weights, codes))
    scale = np.broadcast_to(params.scale, len(before)).astype(np.float64)
    own, coded = before.std(axis=1, dtype=np.float64), scale * after.std(axis=1, dtype=np.float64)
    factor = np.divide(own, coded, out=np.ones_like(own), where=(own > 0) & (coded > 0))
    wider = replace(
        params,
        scale=(scale * factor).astype(np.float32),
        zero_point=np.broadcast_to(params.zero_point, len(before)).astype(np.int32),
        axis=axis,
    )
    return replace(decision, params=wider)
