"""Biases of quantized layers: their int32 codes, and what quantized weights shift the mean of an output by."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from onnxq.graph import float_values
from onnxq.program import Program, Unit

LARGEST_CODE = 2.0**30  # half of int32, which leaves room for the products


def bias_params(unit: Unit, program: Program) -> NDArray[np.float32]:
    """Scale of the int32 bias: input scale times weight scale, () or (C,)."""
    assert unit.weight is not None
    product = program.params(unit.inputs[0]).scale * program.params(unit.weight).scale
    return np.asarray(product, np.float32)


def bias_codes(bias: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.int32]:
    """The bias (C,) as int32 codes, saturated."""
    info = np.iinfo(np.int32)
    codes = np.rint(np.divide(bias.ravel(), scale, dtype=np.float64))
    return np.clip(codes, info.min, info.max).astype(np.int32)


def least_scales(program: Program, units: Iterable[Unit]) -> NDArray[np.float64]:
    """The smallest scales of weights at which each bias of the units that read them fits into int32, () or (C,)."""
    tensors, least = program.graph.tensors(), np.zeros(())
    for unit in units:
        bias = float_values(tensors[unit.bias]) if unit.bias is not None else None
        decision = program.plan.get(unit.inputs[0]) if unit.inputs else None
        if bias is not None and decision is not None and decision.params is not None:
            step = float(decision.params.scale) * LARGEST_CODE
            least = np.maximum(least, np.abs(bias.ravel()).astype(np.float64) / step)
    return least


def output_shift(
    error: NDArray[np.float32], means: NDArray[np.float64], unit: Unit, group: int
) -> NDArray[np.float64]:
    """Shift of each output channel's mean, (C_out,).

    Args:
        error: of the weights, in the operator's layout.
        means: of the input's channels, (C_in,).
        unit: the layer.
        group: of a convolution.
    """
    if unit.kind != "Conv":
        product: NDArray[np.float64] = error @ means if unit.channel_axis == 0 else means @ error
        return product
    taps = error.reshape(*error.shape[:2], -1).sum(axis=2, dtype=np.float64)  # (C_out, C_in / group)
    per_group = means.reshape(group, -1)[np.arange(len(taps)) * group // len(taps)]
    shift: NDArray[np.float64] = np.einsum("oc,oc->o", taps, per_group)
    return shift
