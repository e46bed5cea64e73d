"""Biases of quantized layers: their int32 codes, and what quantized weights shift the mean of an output by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.errors import DataError, UsageError
from onnxq.graph import Names, constant, float_values, set_input
from onnxq.pipeline import Context
from onnxq.program import Program, Unit
from onnxq.scheme import BYTE

BiasCorrection = Literal["auto", "none", "output", "exact", "deployed", "better"]

LARGEST_CODE = 2.0**30  # half of int32, which leaves room for the products


def matches_outputs(program: Program, ctx: Context, correction: BiasCorrection) -> bool:
    """Whether a bias correction matches outputs: `deployed` and `better` do, and `auto` where something has fewer than 8 bits.

    Raises:
        DataError: `deployed` or `better` without samples.
        UsageError: `deployed` or `better` where one side alone is quantized.
    """
    asked = correction in ("deployed", "better")
    if asked:
        _check(program, ctx, correction)
    narrow = any(decision.scheme.bits < BYTE for decision in program.plan.values())
    can = program.sides == "both" and ctx.data is not None
    return asked or (correction == "auto" and narrow and can)


def _check(program: Program, ctx: Context, correction: BiasCorrection) -> None:
    if ctx.data is None:
        raise DataError(
            f"correction={correction} runs the network on calibration samples; give some with --calib"
        )
    if program.sides != "both":
        raise UsageError(
            f"correction={correction} runs integer layers, and {program.sides} alone are quantized; take output"
        )


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


def uncorrectable(unit: Unit, program: Program) -> str | None:
    """Why the bias of a unit with a weight cannot take what the weight's quantization shifts; None where it can."""
    if program.sides == "activations":
        return "its weights stay float"
    statistics = program.statistics.get(unit.inputs[0])
    if statistics is None or statistics.channels is None:
        return "no channel means of its input were gathered"
    decision = program.plan[unit.weight or ""]
    if decision.codes is None or decision.params is None:
        return "its weights have no codes yet"
    return "it has no bias to correct" if unit.kind == "MatMul" and unit.bias is None else None


def corrected_bias(
    program: Program, unit: Unit, bias: NDArray[np.float32], weights: NDArray[np.float32], group: int
) -> NDArray[np.float32]:
    """A bias (C,) less what the quantization of the weights shifts the means of the outputs by.

    Args:
        program: with the codes of the weights and the channel means of the unit's input.
        unit: one for which `uncorrectable` knows no reason.
        bias: before.
        weights: before quantization, in the operator's layout.
        group: of a convolution.
    """
    decision, statistics = program.plan[unit.weight or ""], program.statistics[unit.inputs[0]]
    assert statistics.channels is not None
    error = decision.values - weights
    shifted: NDArray[np.float32] = (bias - output_shift(error, statistics.channels.mean, unit, group)).astype(
        np.float32
    )
    return shifted


def float_bias(unit: Unit, tensors: Mapping[str, gs.Tensor]) -> NDArray[np.float32] | None:
    """The bias (C,) that a unit has before quantization, None when it has none."""
    values = None if unit.bias is None else float_values(tensors[unit.bias])
    return None if values is None else values.ravel()


def set_bias(
    program: Program, names: Names, nodes: Mapping[str, gs.Node], unit: Unit, bias: NDArray[np.float32]
) -> None:
    """Give a unit an initializer of its own as bias (C,)."""
    program.biases[unit.name] = bias
    new = constant(names, f"{unit.name}_bias", bias)
    holder = nodes[unit.nodes[1]] if unit.kind == "MatMul" else nodes[unit.name]
    if unit.bias is None:
        set_input(holder, 2, new)
    else:
        place = next(i for i, t in enumerate(holder.inputs) if t.name == unit.bias)
        holder.inputs[place] = new
    program.units[unit.name] = replace(unit, bias=new.name)
