"""What a loss looks like around a point: slopes, curvatures, interactions, and whether a joint search will pay.

Section 3 of Nahshan et al., arXiv 1911.07190: with mild quantization the Hessian over the steps is nearly diagonal and
each tensor can be treated on its own; with few bits it is neither diagonal nor flat. All derivatives are by
finite differences in log(step / start), with strides wide enough to see bowls rather than ripples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import DataError
from onnxq.search.objective import Vector

Loss = Callable[[Vector], float]
Matrix = NDArray[np.float64]

STRIDE = 0.1  # log step: 10 %
PROBES = 12
PAYS = 0.05  # expected gain, as a share of the loss
COUPLED = 0.1  # share of interactions


@dataclass(frozen=True)
class Sensitivities:
    """The loss along each coordinate.

    Attributes:
        loss: at the point.
        stride: distance of the samples, log step.
        below, above: (n,) losses at -stride and +stride.
    """

    loss: float
    stride: float
    below: Vector
    above: Vector

    @property
    def gradient(self) -> Vector:
        """(n,) central differences."""
        found: Vector = (self.above - self.below) / (2.0 * self.stride)
        return found

    @property
    def curvature(self) -> Vector:
        """(n,) second differences: the diagonal of the Hessian."""
        found: Vector = (self.above - 2.0 * self.loss + self.below) / self.stride**2
        return found

    @property
    def rise(self) -> Vector:
        """(n,) the larger change of the loss a stride away: how much the tensor's step matters."""
        found: Vector = np.maximum(np.abs(self.above - self.loss), np.abs(self.below - self.loss))
        return found

    @property
    def gain(self) -> Vector:
        """(n,) what the parabola of each coordinate alone promises, its vertex at most two strides away."""
        reach = 2.0 * self.stride
        curved = np.maximum(self.curvature, 1e-300)
        move = np.where(self.curvature > 0, np.minimum(np.abs(self.gradient) / curved, reach), self.stride)
        found: Vector = np.abs(self.gradient) * move - 0.5 * np.maximum(self.curvature, 0.0) * move**2
        return found


@dataclass(frozen=True)
class Separability:
    """Whether the loss is a sum over tensors, and what a joint search can be expected to bring.

    Attributes:
        share: of off-diagonal energy in the Hessian scaled to a unit diagonal, ||off||^2 / (||off||^2 + n): 0 is separable.
        gain: what coordinates promise together, as a share of the loss; at most 1.
        evaluations: that this took.
    """

    share: float
    gain: float
    evaluations: int

    @property
    def pays(self) -> bool:
        """Whether the expected gain is worth a search."""
        return self.gain >= PAYS

    @property
    def verdict(self) -> str:
        """One sentence."""
        kind = "coupled" if self.share >= COUPLED else "nearly separable"
        advice = "a joint search should pay" if self.pays else "a joint search will bring little"
        return f"the steps are {kind} (interactions {self.share:.0%}), single steps promise {self.gain:.1%} of the loss: {advice}"


def sensitivities(loss: Loss, point: Vector, stride: float = STRIDE) -> Sensitivities:
    """Losses a stride to either side of each coordinate, from 2 n + 1 evaluations.

    Raises:
        DataError: the loss at the point is not finite.
    """
    here = loss(point)
    if not math.isfinite(here):
        raise DataError(f"the loss at the analysed point is {here}; it must be finite")
    steps = stride * np.eye(len(point))
    sides = [np.array([loss(point + sign * step) for step in steps]) for sign in (-1.0, 1.0)]
    return Sensitivities(here, stride, *sides)


def hessian(loss: Loss, point: Vector, known: Sensitivities | None = None, stride: float = STRIDE) -> Matrix:
    """(n, n) second derivatives, from n (n - 1) evaluations beyond the sensitivities.

    Off the diagonal the central formula (f(++) + f(--) - f(+.) - f(-.) - f(.+) - f(.-) + 2 f) / (2 h^2), whose
    error is of the second order in the stride.
    """
    lines = known or sensitivities(loss, point, stride)
    h, n = lines.stride, len(point)
    sums = lines.above + lines.below
    found = np.diag(lines.curvature)
    for i in range(n):
        for j in range(i):
            step = np.zeros(n)
            step[[i, j]] = h
            both = loss(point + step) + loss(point - step)
            found[i, j] = found[j, i] = (both - sums[i] - sums[j] + 2.0 * lines.loss) / (2.0 * h * h)
    return found


def interaction_share(matrix: Matrix) -> float:
    """||off||^2 / (||off||^2 + n) of a Hessian scaled to a unit diagonal; rows without positive curvature do not count."""
    kept = np.diag(matrix) > 0
    if not kept.any():
        return 0.0
    inner = matrix[np.ix_(kept, kept)]
    scale = 1.0 / np.sqrt(np.diag(inner))
    scaled = inner * scale[:, None] * scale
    energy = float(np.sum(scaled**2)) - len(scaled)
    return energy / (energy + len(scaled))


def separability(
    loss: Loss, point: Vector, known: Sensitivities | None = None, probes: int = PROBES, seed: int = 0
) -> Separability:
    """An estimate without the n^2 / 2 pairs: 2 evaluations a probe beyond the sensitivities.

    For random signs z, z' S z of the scaled Hessian S has the mean trace(S) = n and the variance 2 ||off(S)||^2
    (Hutchinson, Commun. Stat. 19(2), 1990). Each probe moves all coordinates at once, each by the length at which it
    alone raises the loss by the same amount, together no more than the largest single stride does.
    """
    lines = known or sensitivities(loss, point)
    curved = lines.curvature > 0
    n = int(curved.sum())
    gain = min(1.0, float(lines.gain.sum()) / max(abs(lines.loss), 1e-300))
    taken = 0 if known else 2 * len(point) + 1
    if n < 2:
        return Separability(0.0, gain, taken)
    scale = np.zeros(len(point))
    scale[curved] = 1.0 / np.sqrt(lines.curvature[curved])
    length = lines.stride / float(np.median(scale[curved])) / math.sqrt(n)
    scale = np.minimum(scale, 4.0 * float(np.median(scale[curved])))  # a flat coordinate would run away
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(probes, len(point)))
    moves = length * scale * signs
    forms = np.array([loss(point + m) - 2.0 * lines.loss + loss(point - m) for m in moves]) / length**2
    trace = float(np.sum(lines.curvature[curved] * scale[curved] ** 2))
    finite = forms[np.isfinite(forms)]
    energy = 0.5 * float(np.mean((finite - trace) ** 2)) if len(finite) else 0.0
    return Separability(energy / (energy + trace), gain, taken + 2 * probes)


def gaussian_curvature(gradient: Vector, matrix: Matrix) -> float:
    """det(H) / (1 + |g|^2)^2, the paper's figure for a surface of loss over steps (Goldman 2005)."""
    return float(np.linalg.det(matrix)) / (1.0 + float(gradient @ gradient)) ** 2


def contour(
    loss: Loss, point: Vector, pair: tuple[int, int], first: Sequence[float], second: Sequence[float]
) -> Matrix:
    """(len(first), len(second)) losses with coordinates of a pair moved by these offsets (log step)."""
    grid = np.empty((len(first), len(second)))
    for row, a in enumerate(first):
        for column, b in enumerate(second):
            place = point.copy()
            place[pair[0]] += a
            place[pair[1]] += b
            grid[row, column] = loss(place)
    return grid
