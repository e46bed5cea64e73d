"""Minimising along one direction from a few samples: three-point parabolas with a memory.

The loss of a quantized network along one step size, in log coordinates, is a bowl with ripples (values that cross
rounding boundaries). A line search to many digits would spend its evaluations on the ripples; a parabola through
points some width apart sees the bowl. The width that suits a direction is the one at which the bowl has risen by a
few percent of the loss: narrower ones measure ripples, wider ones leave the parabola. Curvature and width change
little between sweeps, so a later visit needs one sample for the slope and one at the vertex.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Curve = Callable[[float], float]
Sample = tuple[float, float]  # place along the direction (log step), loss


@dataclass(frozen=True)
class LineRules:
    """How lines are searched. Lengths are in natural log of the step size: 0.02 is 2 %.

    Attributes:
        width: first sampling distance in a direction without memory.
        narrowest, widest: what the remembered width is kept within.
        rise: share of the loss by which the bowl should have risen at the width.
        reach: the farthest move, in widths.
        tolerance: a vertex nearer than this to a sample is not worth an evaluation.
        least: nor is one where the parabola promises less than this share of the loss.
    """

    width: float = 0.2
    narrowest: float = 0.05
    widest: float = 0.4
    rise: float = 0.1
    reach: float = 3.0
    tolerance: float = 0.02
    least: float = 0.0005


@dataclass(frozen=True)
class Memory:
    """What is known of a direction from its last visit.

    Attributes:
        width: distance of the samples.
        curvature: second derivative, positive; None when it is not known.
        side: where the minimum lay, +1 or -1.
    """

    width: float
    curvature: float | None = None
    side: int = 1


@dataclass(frozen=True)
class Fit:
    """A parabola `loss + slope t + curvature t^2 / 2` about t = 0."""

    slope: float
    curvature: float

    def rise(self, t: float) -> float:
        """Loss at t over that at 0."""
        return (self.slope + 0.5 * self.curvature * t) * t

    @property
    def vertex(self) -> float | None:
        """The place of its minimum; None when it has none."""
        if not (self.curvature > 0 and math.isfinite(self.curvature) and math.isfinite(self.slope)):
            return None
        place = -self.slope / self.curvature
        return place if math.isfinite(place) else None


def through(start: float, first: Sample, second: Sample) -> Fit:
    """The parabola through (0, start) and two samples at other, distinct places."""
    (a, at_a), (b, at_b) = first, second
    slope_a, slope_b = (at_a - start) / a, (at_b - start) / b
    curvature = 2.0 * (slope_b - slope_a) / (b - a)
    return Fit(slope_a - 0.5 * curvature * a, curvature)


def sloped(start: float, sample: Sample, curvature: float) -> Fit:
    """The parabola of known curvature through (0, start) and one sample."""
    place, loss = sample
    return Fit((loss - start) / place - 0.5 * curvature * place, curvature)


@dataclass(frozen=True)
class Look:
    """Samples along a direction, start included, and the parabola they suggest."""

    samples: tuple[Sample, ...]
    fit: Fit

    def plus(self, sample: Sample) -> Look:
        """With one more sample."""
        return Look((*self.samples, sample), self.fit)

    @property
    def best(self) -> Sample:
        """The lowest; the start on a tie."""
        return min(self.samples, key=lambda sample: (sample[1], abs(sample[0])))


def look(curve: Curve, start: float, memory: Memory) -> Look:
    """One sample where the curvature is remembered, else two: onward if the first is lower, else on the other side."""
    ahead = memory.side * memory.width
    first = (ahead, curve(ahead))
    if memory.curvature is not None and math.isfinite(first[1]):
        return Look(((0.0, start), first), sloped(start, first, memory.curvature))
    other = 2.0 * ahead if first[1] < start else -ahead
    second = (other, curve(other))
    return Look(((0.0, start), first, second), through(start, first, second))


def target(found: Look, memory: Memory, rules: LineRules) -> float | None:
    """Where the next evaluation should go: the vertex within reach, or None when it would tell or bring nothing.

    On a hill that is as far as the reach on the side where the loss fell.
    """
    limit = rules.reach * memory.width
    lowest, best = found.best
    vertex = found.fit.vertex
    if vertex is None and (lowest == 0.0 or not math.isfinite(found.fit.curvature)):
        return None
    place = math.copysign(limit, lowest) if vertex is None else min(max(vertex, -limit), limit)
    if min(abs(place - t) for t, _ in found.samples) < rules.tolerance:
        return None
    start = found.samples[0][1]
    promised = start + found.fit.rise(place)
    return place if best - promised >= rules.least * abs(start) else None


def onward(found: Look, memory: Memory, rules: LineRules) -> float | None:
    """Twice as far as the last sample if that is the lowest and lies where the reach ended; else None."""
    place = found.samples[-1][0]
    at_the_end = abs(place) >= rules.reach * memory.width * (1.0 - 1e-9)
    return 2.0 * place if at_the_end and found.best[0] == place else None


def remember(found: Look, memory: Memory, rules: LineRules, moved: float) -> Memory:
    """The memory for the next visit.

    Three samples well apart renew the curvature. One that is not a bowl's is forgotten, and the next visit starts
    with half the width if there was no way down, with the same if there was.
    """
    start = found.samples[0][1]
    curvature = _curvature(found, memory, rules)
    side = memory.side if moved == 0.0 else (1 if moved > 0 else -1)
    if curvature is None:
        width = memory.width if moved else max(rules.narrowest, 0.5 * memory.width)
        return Memory(width, None, side)
    width = math.sqrt(2.0 * rules.rise * abs(start) / curvature)
    return Memory(min(max(width, rules.narrowest), rules.widest), curvature, side)


def _curvature(found: Look, memory: Memory, rules: LineRules) -> float | None:
    """That of the parabola nearest to all finite samples; the remembered one when they lie too close together."""
    samples = sorted(sample for sample in found.samples if math.isfinite(sample[1]))
    gaps = [b[0] - a[0] for a, b in pairwise(samples)]
    if len(samples) < 3 or max(gaps) > 8.0 * min(gaps):
        curvature = found.fit.curvature if len(found.samples) > 2 else memory.curvature
    else:
        places, losses = np.array(samples).T
        curvature = 2.0 * float(np.polyfit(places, losses, 2)[0])
    return curvature if curvature is not None and curvature > 0 and math.isfinite(curvature) else None
