"""Pools on codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.reference.arithmetic import Floats, dequantize_linear, requantize, saturate
from onnxq.reference.sums import Arithmetic
from onnxq.reference.windows import Windows

Array = NDArray[Any]
Attributes = Mapping[str, Any]
Inputs = Sequence[Any]
Outputs = tuple[Array, ...]


def max_pool(attributes: Attributes, inputs: Inputs, arithmetic: Arithmetic) -> Outputs:
    """Largest code of each window; padding never wins."""
    x = inputs[0]
    windows = Windows.read(attributes, x.shape[2:], attributes["kernel_shape"])
    view = windows.over(x, np.iinfo(x.dtype).min)
    return (view.max(axis=tuple(range(-len(windows.kernel), 0))),)


def global_average(attributes: Attributes, inputs: Inputs, arithmetic: Arithmetic) -> Outputs:
    """Means over all spatial axes from int32 sums, with the factor x_scale / (y_scale * size)."""
    x, x_scale, x_zero, y_scale, y_zero = inputs
    axes, size = tuple(range(2, x.ndim)), np.prod(x.shape[2:], dtype=np.int64)
    sums = x.sum(axis=axes, keepdims=True, dtype=np.int64) - int(x_zero.item()) * size
    factor = x_scale.reshape(()) / (y_scale.reshape(()) * np.float32(size))
    return (requantize(sums.astype(np.int32), factor, y_zero),)


def average(attributes: Attributes, inputs: Inputs, arithmetic: Arithmetic) -> Outputs:
    """Means of float32 values added in the order of the window; one window over all is a global average."""
    x, x_scale, x_zero, y_scale, y_zero = inputs
    kernel = tuple(attributes["kernel_shape"])
    windows = Windows.read(attributes, x.shape[2:], kernel)
    if kernel == x.shape[2:] and not any((*windows.begins, *windows.ends)):
        return global_average(attributes, inputs, arithmetic)
    values = dequantize_linear(x, x_scale.reshape(()), x_zero.reshape(()))
    view = windows.over(values, np.float32(0))
    total = np.zeros(view.shape[: x.ndim], np.float32)
    for tap in np.ndindex(*kernel):
        total += view[(..., *tap)]
    means = total / _counted(attributes, windows, x.shape)
    steps = means / y_scale.reshape(()) + y_zero.reshape(()).astype(np.float32)
    return (saturate(steps, np.float32(0), y_zero.dtype),)


def _counted(attributes: Attributes, windows: Windows, shape: Sequence[int]) -> Floats:
    """By how many places each window divides: all of them, or those inside the input."""
    if attributes.get("count_include_pad", 0):
        return np.asarray(np.prod(windows.kernel), np.float32)
    inside = windows.over(np.ones((1, 1, *shape[2:]), np.float32), np.float32(0))
    counts: Floats = inside.sum(axis=tuple(range(-len(windows.kernel), 0)), dtype=np.float32)
    return counts
