"""Sweeps that must not lose on held-back samples: checked at their end, undone if they do."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from onnxq.search.meter import Meter
from onnxq.search.state import State


def checked(meter: Meter, state: State, slack: float) -> State:
    """The state if the present sweep does not lose on held-back samples, or half of its way, or none of it."""
    base, limit = np.array(state.base_point), _limit(state, slack)
    if state.point == state.base_point:
        return state
    held = meter.validate(np.array(state.point))
    if held <= limit:
        return replace(state, held=held)
    half = base + 0.5 * (np.array(state.point) - base)
    loss = meter.evaluate(half)
    back = replace(_undone(state, meter.spent), rejected=state.rejected + 1, stopped="held-back")
    if not loss < state.base_loss or not (held := meter.validate(half)) <= limit:
        return back
    history = (*state.history, (meter.spent, loss))
    return replace(back, point=tuple(half.tolist()), loss=loss, held=held, history=history)


def settled(meter: Meter, state: State, slack: float) -> State:
    """The same for a sweep cut short, whose check the meter kept a reserve for: all of it or none."""
    if state.point == state.base_point:
        return state
    try:
        held = meter.validate(np.array(state.point), free=True)
    except KeyboardInterrupt:
        held = math.inf
    return replace(state, held=held) if held <= _limit(state, slack) else _undone(state, meter.spent)


def _limit(state: State, slack: float) -> float:
    """The held-back loss that the sweep may end with."""
    before = state.base_held
    return math.inf if before is None else before + slack * abs(before)


def _undone(state: State, spent: float) -> State:
    """The state with the point at which the present sweep began."""
    return replace(
        state,
        point=state.base_point,
        loss=state.base_loss,
        held=state.base_held,
        coarse=None,
        history=(*state.history, (spent, state.base_loss)),
    )
