"""Powell's direction set for step sizes: a joint minimum from few evaluations of the loss.

M. J. D. Powell, "An efficient method for finding the minimum of a function of several variables without
calculating derivatives", Comput. J. 7(2), 1964; the third stage of LAPQ, Nahshan et al., arXiv 1911.07190. With
f0 and fN the losses before and after a sweep over all directions, D the total displacement, f2 = f(x + D) and d the
largest decrease along one direction, D takes that one's place if f2 < f0 and

    2 (f0 - 2 fN + f2) (f0 - fN - d)^2 < d (f0 - f2)^2.

What differs from the textbook: lines are searched with parabolas that remember their curvature (`line`), in
coordinates log(step / start); the three losses known along D give its parabola without more evaluations; a subset
of the samples may bracket while all of them decide; and a step is accepted only if it loses neither on the
search samples nor on held-back ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from onnxq.errors import DataError
from onnxq.search.budget import Budget
from onnxq.search.held import checked, settled
from onnxq.search.line import Curve, Look, Memory, Sample, look, onward, remember, target, through
from onnxq.search.meter import Along, ExhaustedError, Meter
from onnxq.search.objective import Objective
from onnxq.search.rules import Progress, Result, Rules, estimate
from onnxq.search.state import Checkpoint, State


def minimize(
    objective: Objective,
    variables: int,
    rules: Rules | None = None,
    budget: Budget | None = None,
    *,
    checkpoint: Checkpoint | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """Lower the loss from the start, the point 0 (variables,); never worse than it.

    Ctrl-C inside an evaluation ends the search with the best point so far. With a checkpoint the state is saved after
    each line, and a state found there is gone on from: the points are those of a search that was never stopped.

    Raises:
        DataError: the loss at the start is not finite, or the checkpoint is another search's.
    """
    rules = rules or Rules()
    state = checkpoint.load() if checkpoint else None
    if checkpoint and state and len(state.point) != variables:
        raise DataError(
            f"the checkpoint {checkpoint.path} is of another search: "
            f"it has {len(state.point)} variables, here there are {variables}"
        )
    meter = Meter(objective, budget or Budget(), state)
    meter.reserve = objective.costs["held"] if rules.hold == "sweep" else 0.0
    search = _Search(meter, rules, checkpoint)
    search.state = state or search.begin(variables)
    if progress:
        meter.watch = _reporter(search, progress)
    return search.run()


@dataclass
class _Search:
    """A search under way. The state is replaced as a whole, so Ctrl-C finds a whole one."""

    meter: Meter
    rules: Rules
    checkpoint: Checkpoint | None
    state: State = field(init=False)

    def begin(self, variables: int) -> State:
        """The state at the start, whose losses are evaluated whatever the budget."""
        point = np.zeros(variables)
        loss = self.meter.evaluate(point, free=True)
        held = self.meter.validate(point, free=True) if self.rules.hold != "none" else None
        if not math.isfinite(loss) or (held is not None and not math.isfinite(held)):
            raise DataError(
                f"the loss at the start of the search is {loss}, on held-back samples {held}; it must be finite"
            )
        order = range(variables) if self.rules.order == "forward" else reversed(range(variables))
        memory = Memory(self.rules.line.width)
        return State(
            point=tuple(point.tolist()),
            loss=loss,
            held=held,
            start_loss=loss,
            start_held=held,
            directions=tuple(order),
            memories=(memory,) * variables,
            base_point=tuple(point.tolist()),
            base_loss=loss,
            base_held=held,
            history=((self.meter.spent, loss),),
        )

    def run(self) -> Result:
        """Lines and sweeps until something ends it."""
        try:
            while not self.state.stopped:
                last = self.state.position == len(self.state.directions)
                self.state = self.meter.stamp(self._end_of_sweep() if last else self._line())
                if self.checkpoint:
                    self.checkpoint.save(self.state)
            reason = self.state.stopped
        except ExhaustedError as limit:
            reason = str(limit)
        except KeyboardInterrupt:
            reason = "interrupted"
        if self.rules.hold == "sweep":
            self.state = settled(self.meter, self.state, self.rules.slack)
        return self._result(reason)

    def _line(self) -> State:
        """The state after one line search."""
        state = self.state
        name, memory = state.directions[state.position], state.memories[state.position]
        line = Along(self.meter, np.array(state.point), state.direction(state.position), name)
        if state.sweep < self.rules.coarse_sweeps:
            found, moved = self._bracketed(state, line, memory)
        else:
            found = self._sampled(line.search, state.loss, memory)
            moved = self._chosen(state, line, found)
        memories = list(state.memories)
        memories[state.position] = remember(found, memory, self.rules.line, line.moved(moved))
        drop = state.loss - moved.loss
        return replace(
            moved,
            memories=tuple(memories),
            position=state.position + 1,
            drop=max(drop, state.drop),
            dropped=state.position if drop > state.drop else state.dropped,
        )

    def _sampled(self, curve: Curve, start: float, memory: Memory) -> Look:
        """Samples along a direction: what `look` takes, the vertex, and twice as far if the loss still falls at the limit."""
        found = look(curve, start, memory)
        place = target(found, memory, self.rules.line)
        if place is None:
            return found
        found = found.plus((place, curve(place)))
        farther = onward(found, memory, self.rules.line)
        return found if farther is None else found.plus((farther, curve(farther)))

    def _bracketed(self, state: State, line: Along, memory: Memory) -> tuple[Look, State]:
        """Samples of the coarse subset, and the state after all samples decided on the best place they show."""
        coarse = state.coarse
        if coarse is None:
            coarse = line.coarse(0.0)
            state = replace(state, coarse=coarse)
        found = look(line.coarse, coarse, memory)
        place = target(found, memory, self.rules.line) or found.best[0]
        if place == 0.0:
            return found, state
        moved = self._accepted(state, line, (place, line.search(place)))
        if moved.point == state.point:
            return found, moved
        known = dict(found.samples)
        return found, replace(moved, coarse=known[place] if place in known else line.coarse(place))

    def _chosen(self, state: State, line: Along, found: Look) -> State:
        """The state at the lowest sample that is accepted, of the two lowest."""
        lower = sorted((s for s in found.samples if s[1] < state.loss), key=lambda sample: sample[1])
        for sample in lower[:2]:
            moved = self._accepted(state, line, sample)
            if moved.point != state.point:
                return moved
            state = moved
        return state

    def _accepted(self, state: State, line: Along, sample: Sample) -> State:
        """The state there if it loses nowhere, else this one."""
        place, loss = sample
        if not loss < state.loss:
            return state
        point, held = line.at(place), state.held
        if self.rules.hold == "step" and held is not None:
            found = self.meter.validate(point)
            if not found <= held + self.rules.slack * abs(held):
                return replace(state, rejected=state.rejected + 1)
            held = found
        return replace(
            state,
            point=tuple(point.tolist()),
            loss=loss,
            held=held,
            coarse=None,
            history=(*state.history, (self.meter.spent, loss)),
        )

    def _end_of_sweep(self) -> State:
        """The state after the displacement of a sweep was followed, checked, and weighed as a direction."""
        state = self._displaced(self.state)
        if self.rules.hold == "sweep":
            state = checked(self.meter, state, self.rules.slack)
        gain = state.base_loss - state.loss
        sweep = state.sweep + 1
        stopped = state.stopped
        if gain <= self.rules.tolerance * abs(state.base_loss):
            stopped = stopped or "converged"
        elif sweep >= self.rules.sweeps:
            stopped = stopped or "sweeps"
        return replace(
            state,
            sweep=sweep,
            position=0,
            drop=0.0,
            dropped=0,
            gains=(*state.gains, gain),
            base_point=state.point,
            base_loss=state.loss,
            base_held=state.held,
            stopped=stopped,
        )

    def _displaced(self, state: State) -> State:
        """The state after a line search along the total displacement, which may join the directions."""
        point = np.array(state.point)
        displacement = point - np.array(state.base_point)
        length = float(np.linalg.norm(displacement))
        if length == 0.0 or len(point) == 1:
            return state
        line = Along(self.meter, point, displacement / length, None)
        beyond = line.search(length)
        fit = through(state.loss, (-length, state.base_loss), (length, beyond))
        found = Look(((0.0, state.loss), (-length, state.base_loss), (length, beyond)), fit)
        memory = Memory(length)
        place = target(found, memory, self.rules.line)
        if place is not None:
            found = found.plus((place, line.search(place)))
        moved = self._chosen(state, line, found)
        if not _worth_adding(state, beyond):
            return moved
        kept = remember(found, memory, self.rules.line, line.moved(moved))
        return moved.with_direction(tuple(line.direction.tolist()), kept)

    def _result(self, reason: str) -> Result:
        state = self.meter.stamp(self.state)
        return Result(
            point=np.array(state.point),
            loss_start=state.start_loss,
            loss_end=state.loss,
            held_start=state.start_held,
            held_end=state.held,
            evaluations=state.spent,
            calls=state.calls,
            seconds=state.seconds,
            history=state.history,
            gains=state.gains,
            rejected=state.rejected,
            stopped=reason,
        )


def _worth_adding(state: State, beyond: float) -> bool:
    """Powell's rule: does the displacement make a better set than the direction of the largest decrease?"""
    before, after, drop = state.base_loss, state.loss, state.drop
    if not beyond < before:
        return False
    return (
        2.0 * (before - 2.0 * after + beyond) * (before - after - drop) ** 2 < drop * (before - beyond) ** 2
    )


def _reporter(search: _Search, progress: Callable[[Progress], None]) -> Callable[[], None]:
    """What tells `progress` where the search stands."""

    def report() -> None:
        state, meter = search.state, search.meter
        expected = estimate(meter.objective, len(state.point), search.rules, max(2, state.sweep + 1))
        limit = meter.budget.evaluations
        expected = max(meter.spent, expected if limit is None else min(limit, expected))
        progress(Progress(meter.spent, expected, state.loss, state.sweep, meter.left(expected)))

    return report
