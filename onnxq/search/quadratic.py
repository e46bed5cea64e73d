"""The norm in which layer-wise ranges serve the network best: a parabola through its loss against p.

The second stage of LAPQ (Nahshan et al., arXiv 1911.07190): Delta_p minimises each tensor's error in the p-norm, and
near the joint optimum the loss is quadratic in the steps, so along the curve p -> Delta_p it is nearly a parabola. What
can go wrong is guarded: a fit that opens downward, a vertex outside the samples or worse than the best of them, a
best sample at an end of the range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxq.errors import DataError, UsageError

PS = tuple(float(p) for p in np.linspace(1.0, 4.0, 10))
LIMITS = 0.5, 16.0  # what the p-norm quantizer takes
NEAR = 5  # samples of the local parabola
APART = 0.02  # vertices nearer than this to a sample are not evaluated


@dataclass(frozen=True)
class Minimum:
    """Where a parabola through samples has its minimum, or why the best sample stands in.

    Attributes:
        p: the vertex, or the best sample's p.
        fallback: empty for a vertex; else why there is none.
    """

    p: float
    fallback: str = ""


@dataclass(frozen=True)
class Chosen:
    """The chosen p.

    Attributes:
        p, loss: of the best evaluation; the lowest of all samples.
        samples: (p, loss) of all evaluations, by p.
        vertices: those of `samples` that a parabola proposed.
        interrupted: Ctrl-C ended it with the samples so far.
    """

    p: float
    loss: float
    samples: tuple[tuple[float, float], ...]
    vertices: tuple[float, ...] = ()
    interrupted: bool = False


def quadratic_minimum(ps: Sequence[float], losses: Sequence[float]) -> Minimum:
    """The vertex of the least-squares parabola through finite losses; the best sample if it opens downward or leaves the range.

    >>> quadratic_minimum([1, 2, 3, 4], [4, 1, 0, 1]).p
    3.0

    Raises:
        DataError: no loss is finite.
    """
    samples = sorted((p, loss) for p, loss in zip(ps, losses, strict=True) if math.isfinite(loss))
    if not samples:
        raise DataError("the loss is not finite at any p")
    best = min(samples, key=lambda sample: sample[1])[0]
    low, high = samples[0][0], samples[-1][0]
    if len({p for p, _ in samples}) < 3:
        return Minimum(best, "fewer than three samples")
    places, values = np.array(samples).T
    second, first, _ = np.polyfit(places - best, values, 2)
    spread, size = float(np.ptp(values)), float(np.abs(values).max())
    if spread <= 1e-12 * size or second * (high - low) ** 2 <= 1e-9 * spread:  # flat to rounding
        return Minimum(best, "the parabola opens downward or is flat")
    vertex = round(best - float(first / (2.0 * second)), 9)
    if not low <= vertex <= high:
        return Minimum(best, f"the vertex {vertex:.3g} is outside {low:g} to {high:g}")
    return Minimum(vertex)


def search_p(
    evaluate: Callable[[float], float],
    ps: Sequence[float] = PS,
    *,
    limits: tuple[float, float] = LIMITS,
    widenings: int = 4,
) -> Chosen:
    """The p of least loss: samples, more of them beyond an end that is the best, then the vertices of two parabolas.

    One goes through all samples, as in the paper, one through the best and its neighbours. Either is taken only
    where the loss is lower than at the best sample. Costs len(ps) to len(ps) + widenings + 2 evaluations.

    Raises:
        UsageError: fewer than two values of p, or some outside the limits.
        DataError: no loss is finite.
    """
    if len(set(ps)) < 2 or not all(limits[0] <= p <= limits[1] for p in ps):
        raise UsageError(f"values of p are {list(ps)}; give two or more from {limits[0]:g} to {limits[1]:g}")
    samples: dict[float, float] = {}
    vertices: list[float] = []
    interrupted = False

    def sample(p: float) -> None:
        samples[p] = float(evaluate(p))

    try:
        for p in sorted(set(map(float, ps))):
            sample(p)
        for _ in range(widenings):
            if (beyond := _beyond(samples, limits)) is None:
                break
            sample(beyond)
        for p in _vertices(samples):
            sample(p)
            vertices.append(p)
    except KeyboardInterrupt:
        if not any(map(math.isfinite, samples.values())):
            raise
        interrupted = True
    best = _best(samples)
    return Chosen(best, samples[best], tuple(sorted(samples.items())), tuple(vertices), interrupted)


def _best(samples: dict[float, float]) -> float:
    """The p of the lowest finite loss.

    Raises:
        DataError: there is none.
    """
    finite = {p: loss for p, loss in samples.items() if math.isfinite(loss)}
    if not finite:
        raise DataError("the loss is not finite at any p")
    return min(finite, key=lambda p: (finite[p], p))


def _beyond(samples: dict[float, float], limits: tuple[float, float]) -> float | None:
    """The next p past the end at which the best sample lies, a third of it farther; None inside or at a limit."""
    ps, best = sorted(samples), _best(samples)
    if best == ps[0]:
        farther = max(limits[0], best / 1.3)
    elif best == ps[-1]:
        farther = min(limits[1], best * 1.3)
    else:
        return None
    return None if farther in samples else farther


def _vertices(samples: dict[float, float]) -> list[float]:
    """Vertices worth an evaluation: of all samples, and of those around the best."""
    best = _best(samples)
    near = sorted(samples, key=lambda p: (abs(p - best), p))[:NEAR]
    found: list[float] = []
    for ps in (list(samples), near):
        minimum = quadratic_minimum(ps, [samples[p] for p in ps])
        known = [*samples, *found]
        if not minimum.fallback and min(abs(minimum.p - p) for p in known) >= APART:
            found.append(minimum.p)
    return found
