"""Range methods: each looks at one tensor and chooses its grid.

>>> parse_quantizer("percentile=99.9")
Percentile(percentile=99.9)
>>> str(parse_quantizer("lp:p=2.5"))
'lp:p=2.5'
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.affine import QuantParams
from onnxq.errors import DataError, UsageError, unknown
from onnxq.quantizers.aciq import Aciq
from onnxq.quantizers.base import Quantizer, RangeMethod, channel_params
from onnxq.quantizers.entropy import Entropy
from onnxq.quantizers.lp import Lp, expected_error
from onnxq.quantizers.minmax import MinMax
from onnxq.quantizers.mse import Mse
from onnxq.quantizers.percentile import Percentile
from onnxq.scheme import QuantScheme

ALIASES = {"mmse": "mse", "omse": "mse", "kld": "entropy"}  # names in the literature
METHODS: tuple[type[RangeMethod], ...] = (MinMax, Percentile, Mse, Lp, Entropy, Aciq)

__all__ = [
    "METHODS",
    "Mse",
    "Quantizer",
    "RangeMethod",
    "expected_error",
    "method_for",
    "parse_quantizer",
    "weight_params",
]


def parse_quantizer(text: str) -> RangeMethod:
    """Read a range method: a name, `name=value` for its only option, or `name:option=value`.

    MMSE and OMSE are `mse`, KLD is `entropy`.

    Raises:
        UsageError: the name or an option is unknown, or a value cannot be read or is out of range.
    """
    head, _, tail = text.strip().partition(":")
    name, equals, value = head.partition("=")
    name = ALIASES.get(name, name)
    methods = {method.name: method for method in METHODS}
    if name not in methods:
        raise unknown("range method", name, methods)
    defaults = {f.name: f.default for f in fields(methods[name])}  # type: ignore[arg-type]
    options: dict[str, type[Any]] = {option: type(default) for option, default in defaults.items()}
    given = tail.split(":") if tail else []
    if equals:
        given.insert(0, f"{next(iter(options), '')}={value}")
    values: dict[str, Any] = {}
    for item in given:
        option, equals, value = item.partition("=")
        if option not in options:
            raise unknown("option", option, options, where=f" of the range method {name!r}")
        try:
            values[option] = options[option](value)
        except ValueError as error:
            raise UsageError(
                f"cannot read {item!r} in the range method {text!r}; {option} is a number"
            ) from error
    return methods[name](**values)


def method_for(text: str, scheme: QuantScheme) -> str:
    """The range method itself, or what `auto` stands for on this grid: with few levels, clipping pays.

    >>> method_for("auto", QuantScheme(8)), method_for("auto", QuantScheme(4)), method_for("aciq", QuantScheme(4))
    ('minmax', 'mse', 'aciq')
    """
    if text != "auto":
        return text
    return "minmax" if scheme.bits >= 8 else "mse"


def weight_params(
    method: str, weights: NDArray[np.floating], axis: int | None, scheme: QuantScheme
) -> QuantParams:
    """Parameters of a weight tensor from its values themselves.

    Args:
        method: a range method, as `parse_quantizer` reads it.
        weights: any shape.
        axis: channel axis, may be negative: one scale a channel, (C,); None for one scale, shape ().
        scheme: the integer grid; blocks are not known here, reshape them into channels.

    Raises:
        UsageError: the method is unknown or the scheme is in blocks.
        DataError: a weight is NaN or infinite.
    """
    quantizer = parse_quantizer(method)
    if scheme.granularity == "block":
        raise UsageError(
            f"a range method takes a tensor or its channels, not the blocks of the scheme {scheme}"
        )
    weights = np.asarray(weights, np.float32)
    if axis is None:
        rows = weights.reshape(1, -1)
    else:
        axis %= weights.ndim
        rows = np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1)
    if rows.size == 0:
        nothing = np.zeros(len(rows))
        return channel_params(nothing, nothing, scheme, axis)
    if not np.isfinite(rows.min()) or not np.isfinite(rows.max()):
        raise DataError(f"weights of shape {weights.shape} hold NaN or infinite values")
    low, high = quantizer.row_ranges(np.ascontiguousarray(rows), scheme)
    return channel_params(low, high, scheme, axis)
