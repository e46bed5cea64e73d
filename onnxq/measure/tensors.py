"""What a plan does to each tensor on its own: the distribution, the range that codes represent, and the rounding noise.

These are noises of single tensors, not the noise that layers hand on; nothing is run to get them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.affine import QuantParams, dequantize, quantize, sqnr_db
from onnxq.calibration.statistics import TensorStatistics
from onnxq.graph import Uses, float_values
from onnxq.hard_sigmoid import useful_range
from onnxq.program import Program, QuantDecision

BINS = 64
SHOWN_VALUES = 1 << 18  # values in a histogram of weights: beyond these its shape no longer changes

Values = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class TensorRow:
    """One quantized tensor.

    Attributes:
        tensor: its name.
        layer: the node that writes it where the plan holds one, else the first that reads it.
        kind: `weight`, `output` of a quantized layer, or `input`: an activation that no quantized layer writes.
        scheme: its grid as text.
        clip: smallest and largest value that codes represent, over all channels.
        scales: smallest and largest scale.
        data: smallest and largest float value, as seen in calibration for activations.
        codes: different codes that weights use; codes that there are for activations.
        sqnr_db: signal to rounding and clipping noise of this tensor alone, in dB; None where there is no histogram or no noise.
        histogram: counts in 64 bins of equal width between the ends of `data`; empty where none was gathered. Of weights beyond
            2^18, evenly spaced ones are counted.
    """

    tensor: str
    layer: str
    kind: str
    scheme: str
    clip: tuple[float, float]
    scales: tuple[float, float]
    data: tuple[float, float]
    codes: int
    sqnr_db: float | None
    histogram: tuple[int, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The row."""
        pairs = {key: list(getattr(self, key)) for key in ("clip", "scales", "data", "histogram")}
        return {**vars(self), **pairs}


def tensor_rows(program: Program) -> list[dict[str, Any]]:
    """Rows of all tensors of the plan, JSON-ready, in the order of the plan.

    Args:
        program: with scales and codes chosen and its graph still float.
    """
    tensors = program.graph.tensors()
    uses, writers, readers = Uses(program.graph), _writers(program), _readers(program)
    rows: list[TensorRow] = []
    for name, decision in program.plan.items():
        if decision.params is None:
            continue
        layer = writers.get(name, readers.get(name, ""))
        if not decision.is_weight:
            kind = "output" if name in writers else "input"
            statistics = program.statistics.get(name) or program.statistics.get(decision.group)
            if statistics is not None and statistics.count:
                seen = useful_range(uses, tensors[name])
                rows.append(_activation(name, layer, kind, decision, decision.params, statistics, seen))
            continue
        values = float_values(tensors[name])
        if values is not None and values.size and decision.codes is not None:
            rows.append(_weight(name, layer, decision, decision.params, values))
    return [row.as_json() for row in rows]


def _writers(program: Program) -> dict[str, str]:
    """The unit that writes each activation."""
    return {tensor: unit.name for unit in program.units.values() for tensor in unit.outputs}


def _readers(program: Program) -> dict[str, str]:
    """The first unit that reads each tensor."""
    found: dict[str, str] = {}
    for unit in program.units.values():
        for tensor in (*unit.inputs, *filter(None, (unit.weight,))):
            found.setdefault(tensor, unit.name)
    return found


def _weight(
    name: str, layer: str, decision: QuantDecision, params: QuantParams, values: NDArray[np.float32]
) -> TensorRow:
    assert decision.codes is not None
    flat = values.reshape(-1)
    data = float(flat.min()), float(flat.max())
    ratio = sqnr_db(values, dequantize(decision.codes, params))
    shown = flat[:: -(-flat.size // SHOWN_VALUES)]
    return TensorRow(
        name,
        layer,
        "weight",
        str(params.scheme),
        _reach(decision, params),
        _scales(params),
        data,
        int(np.count_nonzero(np.bincount(decision.codes.reshape(-1).view(np.uint8), minlength=256))),
        ratio if np.isfinite(ratio) else None,
        _binned(shown, np.ones(shown.size), data),
    )


def _activation(
    name: str,
    layer: str,
    kind: str,
    decision: QuantDecision,
    params: QuantParams,
    statistics: TensorStatistics,
    seen: tuple[float, float],
) -> TensorRow:
    """Of an activation whose readers tell apart only the values that they see."""
    data = statistics.minimum, statistics.maximum
    scheme = params.scheme
    ratio: float | None = None
    counts: tuple[int, ...] = ()
    if statistics.histogram is not None:
        edges = statistics.histogram.edges
        middles = np.clip((edges[:-1] + edges[1:]) / 2, *data)  # the end bins hold the ends of the data
        centres, weights = np.append(middles, 0.0), np.append(statistics.histogram.counts, statistics.zeros)
        told = np.clip(centres, *seen)
        error = told - np.clip(dequantize(quantize(centres, params), params), *seen)
        signal, noise = float(weights @ told**2), float(weights @ error**2)
        ratio = 10.0 * float(np.log10(signal / noise)) if signal > 0.0 < noise else None
        counts = _binned(centres, weights, data)
    return TensorRow(
        name,
        layer,
        kind,
        str(scheme),
        _reach(decision, params),
        _scales(params),
        data,
        scheme.qmax - scheme.qmin + 1,
        ratio,
        counts,
    )


def _reach(decision: QuantDecision, params: QuantParams) -> tuple[float, float]:
    """Smallest and largest value of a code; of channels with several points, of a sum of codes."""
    if decision.points is None:
        return float(params.low.min()), float(params.high.max())
    low, high = decision.points.reach((decision.scheme.qmin, decision.scheme.qmax))
    zero = params.zero_point
    return float(((low - zero) * params.scale).min()), float(((high - zero) * params.scale).max())


def _scales(params: QuantParams) -> tuple[float, float]:
    """Smallest and largest."""
    return float(params.scale.min()), float(params.scale.max())


def _binned(values: Values, weights: NDArray[Any], ends: tuple[float, float]) -> tuple[int, ...]:
    """Counts of values in `BINS` bins between the ends; none for a constant."""
    if not ends[0] < ends[1]:
        return ()
    counts, _ = np.histogram(values, BINS, ends, weights=weights)
    return tuple(counts.astype(np.int64).tolist())
