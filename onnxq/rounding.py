"""Round weights to codes so that the columns not yet rounded make up for the error of those that are.

Frantar et al., GPTQ, arXiv 2210.17323, after optimal brain quantization. For one row w of weights, scale s and
inputs x with H = E[x x^T] + d I and H^-1 = U^T U, U upper triangular, the columns are rounded one after the other:

    q_j = round(w_j / s)        w_k -= (w_j - s q_j) U_jk / U_jj  for k > j

Columns of large H_jj come first: their errors cost most, and most columns are left to make up for them. A column
whose neighbour in the kernel's reduction is rounded already takes what that left of the pair limit
(`onnxq.saturation`); the rest is made up for too.

The first columns were rounded before the errors of the last ones were known. So codes then go through sweeps in which each is
set to the best whole number with all others held, coordinate descent of e H e^T, e = w - s q:

    q_j += round((e H)_j / (s H_jj))
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float64]
Floats = NDArray[np.floating]
Number = TypeVar("Number", bound=np.number[Any])

DAMP = 0.01  # d, as a part of the mean of the diagonal
BLOCK = 64  # columns whose updates of the other ones are put together
SWEEPS = 2  # later ones gain little


class Feedback:
    """Error feedback by one set of moments, for any scales.

    Attributes:
        damped: H, (groups, K, K).
        order: columns, largest moments first, (groups, K).
        lower: U^T of H in that order, (groups, K, K).
    """

    def __init__(self, moment: Floats) -> None:
        """E[x x^T] of each group, (groups, K, K)."""
        self.damped = _damped(moment)
        self.order = np.argsort(-np.einsum("gkk->gk", moment), axis=1, kind="stable")
        rows = np.take_along_axis(self.damped, self.order[:, :, None], 1)
        self.lower = _inverse_factor(np.take_along_axis(rows, self.order[:, None], 2))

    def round(
        self,
        rows: Rows,
        scale: Rows,
        partners: NDArray[np.intp],
        limit: int,
        ends: tuple[int | Rows, int | Rows],
    ) -> Rows:
        """Codes of rows of weights.

        Args:
            rows: (groups, rows, K), in the kernel's order.
            scale: (groups, rows).
            partners: neighbours of each place, (orders, K); K for none; see `onnxq.saturation.partners`.
            limit: largest sum of two neighbouring codes of one sign; 0 for none.
            ends: smallest and largest code, () or (groups, rows).

        Returns:
            Whole numbers, the shape of rows.
        """
        order, lower = self.order, self.lower
        groups, count, size = rows.shape
        work = (
            np.take_along_axis(rows, order[:, None], 2).transpose(0, 2, 1) / scale[:, None]
        )  # (groups, K, rows)
        codes = np.zeros((groups, size + 1, count))  # the last place is the neighbour of those that have none
        beside = _places(order, partners)
        group = np.arange(groups)
        low, high = least, most = ends
        is_bound = _binds(limit, partners, ends)
        for start in range(0, size, BLOCK):
            stop = min(start + BLOCK, size)
            errors = np.empty((groups, stop - start, count))
            for j in range(start, stop):
                done = j - start
                wanted = work[:, j] - (lower[:, j, None, start:j] @ errors[:, :done])[:, 0]
                if is_bound:
                    known = codes[group, beside[:, :, j]]  # (orders, groups, rows)
                    high = np.minimum(limit - known.max(axis=0).clip(min=0), most)
                    low = np.maximum(-limit - known.min(axis=0).clip(max=0), least)
                codes[:, j] = np.clip(np.rint(wanted), low, high)
                errors[:, done] = (wanted - codes[:, j]) / lower[:, j, j, None]
            work[:, stop:] -= lower[:, stop:, start:stop] @ errors
        found = np.empty_like(rows)
        np.put_along_axis(found, order[:, None], codes[:, :size].transpose(0, 2, 1), 2)
        return found

    def settle(
        self,
        rows: Rows,
        codes: Rows,
        scale: Rows,
        partners: NDArray[np.intp],
        limit: int,
        ends: tuple[int | Rows, int | Rows],
        sweeps: int = SWEEPS,
    ) -> Rows:
        """Codes of no larger damped error, each the best with all others held, sweep by sweep.

        Args:
            codes: to start from, within the ends and the limit, the shape of rows.
            sweeps: over all columns.
            rows, scale, partners, limit, ends: as for `round`.
        """
        groups, count, size = rows.shape
        low, high = least, most = ends
        is_bound = _binds(limit, partners, ends)
        found = np.zeros((groups, size + 1, count))  # the last place is the neighbour of those that have none
        found[:, :size] = codes.transpose(0, 2, 1)
        slope = self.damped @ (rows / scale[:, :, None] - codes).transpose(0, 2, 1)  # (groups, K, rows)
        for start in (*range(0, size, BLOCK),) * sweeps:
            stop = min(start + BLOCK, size)
            changes = np.empty((groups, stop - start, count))
            for j in range(start, stop):
                done = j - start
                own = slope[:, j] - (self.damped[:, j, None, start:j] @ changes[:, :done])[:, 0]
                if is_bound:
                    beside = found[:, partners[:, j]]  # (groups, orders, rows)
                    high = np.minimum(limit - beside.max(axis=1).clip(min=0), most)
                    low = np.maximum(-limit - beside.min(axis=1).clip(max=0), least)
                code = np.clip(np.rint(found[:, j] + own / self.damped[:, j, j, None]), low, high)
                changes[:, done] = code - found[:, j]
                found[:, j] = code
            slope -= self.damped[:, :, start:stop] @ changes
        return np.ascontiguousarray(found[:, :size].transpose(0, 2, 1))


def cut_pairs(codes: NDArray[Number], partners: NDArray[np.intp], limit: int) -> NDArray[Number]:
    """Codes whose neighbours of one sign add up to the limit at most: each of two gives half of what is too much.

    Args:
        codes: whole numbers within ±limit, (rows, K), of a type that holds their sums.
        partners: neighbours of each place, (orders, K); K for none.
        limit: as for `Feedback.round`; 0 for none.
    """
    if not limit:
        return codes
    for neighbours in partners:
        padded = np.pad(codes, ((0, 0), (0, 1)))
        beside = padded[:, neighbours]
        up = np.maximum(np.maximum(codes, 0) + np.maximum(beside, 0) - limit, 0)
        down = np.maximum(-limit - np.minimum(codes, 0) - np.minimum(beside, 0), 0)
        is_first = np.arange(codes.shape[1]) < neighbours  # gives the odd one
        codes = codes - (up + is_first) // 2 + (down + is_first) // 2
    return codes


def output_error(difference: Rows, moment: Floats) -> Rows:
    """E[(d x)^2] of each row d of (groups, rows, K), (groups, rows), for E[x x^T] of each group, (groups, K, K)."""
    error: Rows = np.einsum("gok,gok->go", difference @ moment, difference)
    return error


def _binds(limit: int, partners: NDArray[np.intp], ends: tuple[int | Rows, int | Rows]) -> bool:
    """Whether the limit can keep two neighbours from codes between the ends."""
    return bool(limit and len(partners) and 2 * max(np.max(ends[1]), -np.min(ends[0])) > limit)


def _damped(moment: Floats) -> Rows:
    """H = E[x x^T] + d I, (groups, K, K)."""
    size = moment.shape[1]
    damp = DAMP * np.einsum("gkk->g", moment) / size
    damped: Rows = moment + np.where(damp > 0, damp, 1.0)[:, None, None] * np.eye(size)
    return damped


def _inverse_factor(damped: Rows) -> Rows:
    """U^T of H^-1 = U^T U, (groups, K, K)."""
    return np.linalg.cholesky(np.linalg.inv(damped))


def _places(order: NDArray[np.intp], partners: NDArray[np.intp]) -> NDArray[np.intp]:
    """Where the neighbours of the j-th rounded column are in the order of rounding, (orders, groups, K)."""
    groups, size = order.shape
    place = np.full((groups, size + 1), size)
    np.put_along_axis(place, order, np.arange(size)[None], 1)
    found = np.empty((len(partners), groups, size), np.intp)
    for i, neighbours in enumerate(partners):
        found[i] = np.take_along_axis(place, neighbours[order], 1)
    return found
