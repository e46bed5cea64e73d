"""A second attempt where 8 bits leave the output of a network noisy.

At 8 bits ranges are those of the data, and biases make up for rounded weights alone: quick, and enough for most networks. Some,
such as those of hard swishes and depthwise convolutions, lose nearly everything. There a second attempt does what is done below
8 bits, ranges of least squared error and matched outputs, and the result is the attempt with less noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from onnxq.pipeline import Context, Pipeline
from onnxq.scheme import BYTE

if TYPE_CHECKING:
    from onnxq.attempt import Attempt

NOISY_DB = 16.0  # below it the error is more than a sixth of the signal
THOROUGH = {"ranges": "mse", "correction": "better"}
AUTO = "auto"


def thorough(steps: Pipeline) -> Pipeline | None:
    """The pipeline with the costly choices that its passes leave open, None where there are none; fewer bits have them anyway."""
    left_open = _left_open(steps)
    if not left_open or steps.fewest_bits < BYTE:
        return None
    for option in left_open:
        steps = steps.with_option(option, THOROUGH[option])
    return steps


def better_attempt(
    make: Callable[[Pipeline, Context], Attempt],
    steps: Pipeline,
    ctx: Context,
    enough_db: float | None = None,
) -> tuple[Attempt, str | None]:
    """What the pipeline makes, or a thorough one where that is noisy and the other less so.

    Args:
        make: runs a pipeline in a context.
        steps: the pipeline as it was asked for.
        ctx: of both.
        enough_db: SQNR of the network's main output with which the first one stays; None for NOISY_DB.

    Returns:
        The attempt, and a sentence for the user where there were two.
    """
    first, more = make(steps, ctx), thorough(steps)
    before = _sqnr_db(first)
    if more is None or before >= (NOISY_DB if enough_db is None else enough_db):
        return first, None
    second = make(more, ctx.named("second attempt"))
    after = _sqnr_db(second)
    chosen = ", ".join(f"{option}={THOROUGH[option]}" for option in _left_open(steps))
    tried = f"an SQNR of {before:.1f} dB is low, so that there was a second attempt with {chosen}"
    open_end = enough_db is None and max(before, after) < NOISY_DB
    advice = "; --min-sqnr keeps as many dB as it is given" if open_end else ""
    if after > before:
        return second, f"{tried}: {after:.1f} dB{advice}"
    return first, f"{tried}, which brought nothing: {after:.1f} dB{advice}"


def _left_open(steps: Pipeline) -> list[str]:
    """Options that all passes leave open."""
    return [option for option in THOROUGH if set(steps.values(option)) == {AUTO}]


def _sqnr_db(made: Attempt) -> float:
    """Of the network's main output; infinite without noise, or where nothing was compared."""
    difference = made.verification.difference
    found = None if difference is None or difference.main is None else difference.main.sqnr_db
    return math.inf if found is None else found
