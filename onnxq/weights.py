"""Codes of weights: those that no kernel saturates, and those whose roundings cancel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.affine import SMALLEST_SCALE, QuantParams, quantize
from onnxq.errors import DataError
from onnxq.program import Program, QuantDecision, Unit
from onnxq.quantizers import weight_params
from onnxq.saturation import excess, pair_limit, peaks
from onnxq.scheme import QuantScheme
from onnxq.target import Target

Codes = NDArray[np.integer[Any]]

LARGEST_DB = 300.0
ENOUGH_DB = 25.0  # of signal to noise, for half of the channels of a weight
LARGEST_PAIR = 256  # two codes of int8: a limit from here on is none


def code_limit(program: Program, units: Iterable[Unit], target: Target) -> int:
    """Largest sum of two neighbouring weight codes of one sign that no kernel of these units saturates; 0 for none.

    Activations below 8 bits have smaller codes and leave more room: with 7 bits there is no limit any more.
    """
    if not target.pair_limit:
        return 0
    limit = pair_limit(max(program.plan[u.inputs[0]].scheme.qmax for u in units))
    return limit if limit < LARGEST_PAIR else 0


def step_params(
    method: str,
    values: NDArray[np.float32],
    axis: int,
    scheme: QuantScheme,
    factors: NDArray[np.float64] | None,
) -> QuantParams:
    """Scales of a weight: one, one for each channel, or one step in the pattern of a normalization that was folded.

    Quantizing the weights in front of a BatchNormalization with one step d is quantizing the folded ones with d |gamma_c| /
    sigma_c in channel c: the setting of Nahshan et al., arXiv 1911.07190.

    Args:
        method: a range method.
        values: weights, folded, in the operator's layout.
        axis: of the output channels.
        scheme: its granularity decides where there are no factors.
        factors: by which channels were multiplied, (C,); None for no pattern.

    Raises:
        DataError: a weight is NaN or infinite.
    """
    if factors is None:
        return revive(
            weight_params(method, values, axis if scheme.granularity == "channel" else None, scheme)
        )
    pattern = np.abs(factors)
    pattern = np.where(pattern > 0.0, pattern, 1.0)  # a channel that is switched off has zeros alone
    shape = [1] * values.ndim
    shape[axis] = -1
    step = weight_params(method, (values / pattern.reshape(shape)).astype(np.float32), None, scheme)
    scale = np.asarray(step.scale * pattern, np.float32)
    return replace(step, scale=scale, zero_point=np.zeros(len(scale), np.int32), axis=axis)


def revive(params: QuantParams) -> QuantParams:
    """Give channels of zeros, whose scale is arbitrary, the smallest other scale, so that their bias keeps its resolution."""
    if params.scale.ndim == 0:
        return params
    dead = params.scale == 1.0
    if not dead.any() or dead.all():
        return params
    return replace(params, scale=np.where(dead, params.scale[~dead].min(), params.scale))


def quantized_weight(
    values: NDArray[np.float32], kind: str, axis: int, scheme: QuantScheme, limit: int, method: str = "minmax"
) -> tuple[QuantParams, Codes, int]:
    """Scale and codes of a weight; see `safe_codes` for the arguments and the result.

    Raises:
        DataError: a weight is NaN or infinite.
    """
    params = weight_params(method, values, axis if scheme.granularity == "channel" else None, scheme)
    return safe_codes(values, params, kind, axis, limit)


def safe_codes(
    values: NDArray[np.float32], params: QuantParams, kind: str, axis: int, limit: int
) -> tuple[QuantParams, Codes, int]:
    """Codes whose neighbours keep the pair limit, with the parameters that they belong to.

    Args:
        values: weights in the operator's layout.
        params: their parameters, symmetric; channels over the limit get the least scale under it.
        kind: Conv, Depthwise, Gemm or MatMul; see `onnxq.saturation.kernel_kind`.
        axis: output-channel axis.
        limit: largest sum of two neighbouring codes of one sign (`onnxq.saturation.pair_limit`); 0 for none.

    Returns:
        Parameters, codes in the shape of the values, and the number of channels that the limit changed.
    """
    codes = quantize(values, params)
    over = excess(codes, kind, axis, limit) > 0 if limit else np.zeros(values.shape[axis], bool)
    if not over.any():
        return params, codes, 0
    least = peaks(values, kind, axis) / np.float32(limit - 1)
    wide = np.asarray(np.maximum(params.scale, least if params.scale.ndim else least.max()))
    safe = replace(params, scale=np.where(over, wide, params.scale) if wide.ndim else wide)
    return safe, quantize(values, safe), int(over.sum())


def is_coarse(values: NDArray[np.float32], decision: QuantDecision, axis: int) -> bool:
    """Whether half of the output channels keep less than ENOUGH_DB with the codes that they have."""
    return typical_sqnr_db(values, decision.values, axis) < ENOUGH_DB


def typical_sqnr_db(values: NDArray[np.float32], approximation: NDArray[np.float32], axis: int) -> float:
    """Signal to noise in dB that half of the output channels keep: the median over channels that are not all zero.

    The whole tensor's figure hides that small channels drown on a grid that the largest one asks for. A channel without noise
    counts as 300 dB.
    """
    w, e = (
        np.moveaxis(a, axis, 0).reshape(values.shape[axis], -1).astype(np.float64)
        for a in (values, values - approximation)
    )
    signal, noise = (w**2).sum(axis=1), (e**2).sum(axis=1)
    alive = signal > 0.0
    if not alive.any():
        return LARGEST_DB
    ratio = signal[alive] / np.maximum(noise[alive], signal[alive] * 10.0 ** (-LARGEST_DB / 10.0))
    ordered = np.sort(10.0 * np.log10(ratio))
    middle = ordered.size // 2  # np.median would load numpy.ma, a good part of a small compile
    return float((ordered[middle] + ordered[~middle]) / 2.0)


def peak_params(values: NDArray[np.float32], axis: int | None, scheme: QuantScheme) -> QuantParams:
    """A signed grid that is used whole: its smallest code, which has no positive twin, is the value of largest magnitude.

    The scale is negative where that value is positive, and what lies close to the peak on the other side saturates by up to one
    step. It serves where scales meet floats, and weights of few bits, of which a symmetric range would waste one code in 2^b.

    Args:
        axis: one scale for each of its places; None for one in all.

    Raises:
        DataError: a weight is NaN or infinite.
    """
    others = None if axis is None else tuple(i for i in range(values.ndim) if i != axis)
    low, high = values.min(axis=others), values.max(axis=others)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise DataError(f"weights of shape {values.shape} hold NaN or infinite values")
    scale = np.where(-low > high, low, high) / np.float32(scheme.qmin)
    scale = np.where(np.abs(scale) < SMALLEST_SCALE, np.float32(1), scale)
    return QuantParams(scheme, np.asarray(scale, np.float32), np.zeros(scale.shape, np.int32), axis)


def balanced_codes(values: NDArray[np.float32], params: QuantParams, along: tuple[int, ...]) -> Codes:
    """Codes whose rounding errors cancel along axes that a layer sums over, so that what it makes of a mean is kept.

    Each sum of errors is brought within half a step of 0 by rounding the values nearest to a tie the other way: of E, the sum,
    the round(|E|) largest errors of its sign. What saturates counts with its whole error, which the others make up for as far as
    they can. A code differs from the nearest by 1 at most and zeros stay zeros. This is one step of Guo et al., "SQuant:
    On-the-Fly Data-Free Quantization via Diagonal Hessian Approximation", arXiv 2202.07471.

    Args:
        values: weights, any shape.
        params: their parameters, symmetric, with a range that clips none of them or hardly any.
        along: axes of the sums; the kernel's for convolutions with one, the inputs' for matrix products.
    """
    last = tuple(range(-len(along), 0))
    scaled = np.moveaxis(values / params.broadcast(params.scale, values.ndim), along, last)
    rows = scaled.reshape(-1, int(np.prod([values.shape[a] for a in along])))  # (sums, terms)
    low, high = params.scheme.qmin, params.scheme.qmax
    codes = np.clip(np.rint(rows), low, high)
    error = codes - rows
    total = np.rint(error.sum(axis=1, dtype=np.float64))[:, None]
    move = np.sign(total)
    fixed = (rows == 0) | (codes - move < low) | (codes - move > high)
    order = np.argsort(np.where(fixed, np.inf, -move * error), axis=1, kind="stable")
    codes -= np.where(fixed, 0, move * (np.argsort(order, axis=1) < np.abs(total)))
    shaped = codes.astype(np.int8).reshape(scaled.shape)
    return np.ascontiguousarray(np.moveaxis(shaped, last, along))
