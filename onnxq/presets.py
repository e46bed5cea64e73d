"""Presets: names for pipeline text."""

from __future__ import annotations

from onnxq.errors import UsageError, unknown

GRAPH = "fold-constants fold-batchnorm fold-pad"
READY = f"{GRAPH} fold-activations flatten-matmul keep-stem"

PRESETS = {
    "int8": (
        f"{READY} equalize quantize-recurrent annotate calibrate choose-ranges quantize-weights round-weights correct-bias"
        " pad-channels emit-qdq"
    ),
    "int8-accurate": (
        f"{READY} equalize:when=always quantize-recurrent annotate calibrate:ranges=lp=3 choose-ranges:ranges=lp=3"
        " quantize-weights round-weights:when=always correct-bias:correction=better pad-channels emit-qdq"
    ),
    "int8-dynamic": f"{GRAPH} quantize-recurrent quantize-dynamic store-weights",
    "weight-only": f"{GRAPH} quantize-recurrent:inputs=float store-weights",
}
WITHOUT_DATA = {"int8": "int8-dynamic", "int8-accurate": "int8-dynamic"}
WEIGHT_ONLY = "weight-only"
BIAS, JOINT, POINTS = "correct-bias", "search-norm search-steps", "multipoint"
EMITTERS = {"qdq": "emit-qdq", "integer": "emit-integer"}


def preset_pipeline(
    name: str, form: str | None = None, *, data: bool = True, joint: bool = False, points: bool = False
) -> str:
    """Pipeline text of a preset.

    Args:
        form: `qdq` or `integer`; None for the preset's own.
        data: whether there are calibration samples; without them the preset's counterpart that needs none is taken.
        joint: whether all steps are searched together by the network's loss (LAPQ), which needs histograms.
        points: whether some channels get further points. The joint search comes behind them: it sees the weights that remain.

    Raises:
        UsageError: there is no preset or form of that name, or the preset has one form only.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    if form is not None and form not in EMITTERS:
        raise unknown("format", form, EMITTERS)
    chosen = name if data else WITHOUT_DATA.get(name, name)
    text = PRESETS[chosen]
    if joint and BIAS not in text:
        raise UsageError(f"preset {chosen!r} has no steps of activations to search (ranges=lapq)")
    if points and BIAS not in text:
        raise UsageError(f"preset {chosen!r} has no integer layers whose channels could have further points")
    if points:
        text = text.replace(f" {BIAS}", f" {POINTS} {BIAS}")
    if joint:
        words = text.replace(f" {BIAS}", f" {JOINT} {BIAS}").split()
        text = " ".join("calibrate:ranges=mse" if word == "calibrate" else word for word in words)
    if form is None:
        return text
    if "emit-" not in text:
        raise UsageError(
            f"preset {chosen!r} has one format only; leave --format out or give calibration data"
        )
    return text.replace("emit-qdq", EMITTERS[form])
