"""Rounding with error feedback, against the least-squares problem that it solves step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq.rounding import DAMP, Feedback, cut_pairs, output_error
from onnxq.saturation import as_rows, excess, from_rows, partners

Array = NDArray[Any]
NONE = np.zeros((0, 1), np.intp)


def feed_back(rows: Array, scale: Array, moment: Array, *kept: Any) -> Array:
    return Feedback(moment).round(rows, scale, *kept)


def correlated(seed: int, groups: int, size: int, samples: int = 400) -> Array:
    """Samples of neighbours that are much alike, (groups, samples, size), as of images."""
    rng = np.random.default_rng(seed)
    mixing = 0.9 ** np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    found: Array = np.abs(rng.normal(size=(groups, samples, size)) @ mixing) * rng.uniform(0.3, 3, size)
    return found


def moments(samples: Array) -> Array:
    found: Array = samples.transpose(0, 2, 1) @ samples / samples.shape[1]
    return found


def stepwise(row: Array, moment: Array, beside: Array, limit: int, largest: int) -> Array:
    """The same for one row of scale 1, solving for all later columns anew after each."""
    size = len(row)
    damped = moment + DAMP * np.trace(moment) / size * np.eye(size)
    order = list(np.argsort(-np.diag(moment), kind="stable"))
    codes = np.zeros(size + 1)
    for step, j in enumerate(order):
        done, rest = order[:step], order[step:]
        # Least error with the first columns held: H_rr d_r = H_rd (w - q)_d.
        moved = row[rest] + np.linalg.solve(
            damped[np.ix_(rest, rest)], damped[np.ix_(rest, done)] @ (row - codes[:-1])[done]
        )
        others = [codes[p[j]] for p in beside]
        high = min([largest, *(limit - max(c, 0) for c in others)])
        low = max([-largest, *(-limit - min(c, 0) for c in others)])
        codes[j] = np.clip(np.rint(moved[0]), low, high)
    return codes[:-1]


@pytest.mark.parametrize(
    ("shape", "kind", "spread"),
    [
        ((3, 150), "Gemm", 30.0),
        ((3, 3, 5, 5), "Conv", 60.0),
        ((3, 1, 3, 3), "Depthwise", 60.0),
        ((2, 7), "Gemm", 90.0),
    ],
)
def test_each_column_is_made_up_for_by_the_later_ones(
    shape: tuple[int, ...], kind: str, spread: float
) -> None:
    size = int(np.prod(shape[1:]))
    rows = np.random.default_rng(0).normal(size=(1, shape[0], size)) * spread
    moment, beside = moments(correlated(1, 1, size)), partners(shape, kind, 0)
    found = feed_back(rows, np.ones((1, shape[0])), moment, beside, 128, (-127, 127))
    for row, codes in zip(rows[0], found[0], strict=True):
        np.testing.assert_array_equal(codes, stepwise(row, moment[0], beside, 128, 127))


def test_independent_inputs_leave_the_nearest_codes() -> None:
    rows = np.random.default_rng(0).normal(size=(2, 4, 70)) * 30
    found = feed_back(rows, np.ones((2, 4)), np.stack([np.eye(70)] * 2), NONE, 0, (-127, 127))
    np.testing.assert_array_equal(found, np.rint(rows))


def test_scales_and_groups_do_not_mix() -> None:
    rows, scale = np.random.default_rng(0).normal(size=(3, 4, 20)), np.geomspace(0.01, 0.1, 12).reshape(3, 4)
    moment = moments(correlated(2, 3, 20))
    together = feed_back(rows, scale, moment, NONE, 0, (-127, 127))
    for g in range(3):
        for r in range(4):
            one = feed_back(
                rows[g : g + 1, r : r + 1] / scale[g, r],
                np.ones((1, 1)),
                moment[g : g + 1],
                NONE,
                0,
                (-127, 127),
            )
            np.testing.assert_array_equal(together[g, r], one[0, 0])


def test_the_error_at_the_output_falls_and_pairs_stay_safe() -> None:
    rows = np.random.default_rng(0).normal(size=(1, 16, 96)) * 25
    rows[0, :, :4] = np.abs(rows[0, :, :4]) + 90  # neighbours that together pass the limit
    moment, beside = moments(correlated(1, 1, 96)), partners((16, 96), "Gemm", 0)
    found = feed_back(rows, np.ones((1, 16)), moment, beside, 128, (-127, 127))
    assert not excess(found[0].astype(np.int64), "Gemm", 0, 128).any()
    assert excess(np.rint(rows[0]).astype(np.int64), "Gemm", 0, 128).all()
    free = feed_back(rows, np.ones((1, 16)), moment, NONE, 0, (-127, 127))
    nearest, kept = (
        output_error(np.clip(np.rint(rows), -127, 127) - rows, moment),
        output_error(free - rows, moment),
    )
    assert kept.sum() < nearest.sum() / 4  # inputs so much alike leave a fraction of the error


def damped(moment: Array) -> Array:
    size = moment.shape[1]
    found: Array = moment + DAMP * np.trace(moment, axis1=1, axis2=2)[:, None, None] / size * np.eye(size)
    return found


@pytest.mark.parametrize("limit", [0, 9])
def test_settled_codes_are_each_the_best_with_all_others_held(limit: int) -> None:
    size, scale = 90, np.linspace(0.5, 2, 5)[None]
    rows, beside = np.random.default_rng(0).normal(size=(2, 5, size)) * 4, partners((10, size), "Gemm", 0)
    scale = np.concatenate([scale, scale[:, ::-1]])
    moment = moments(correlated(3, 2, size))
    start = cut_pairs(np.clip(np.rint(rows / scale[:, :, None]), -8, 7).reshape(10, size), beside, limit)
    start = start.reshape(rows.shape)
    feedback = Feedback(moment)
    found = feedback.settle(rows, start, scale, beside, limit, (-8, 7), sweeps=50)

    def error(codes: Array) -> Array:
        return output_error(rows - codes * scale[:, :, None], damped(moment))

    least = error(found)
    assert np.all(least < error(start))
    assert found.min() >= -8
    assert found.max() <= 7
    for j in range(size):
        for step in (-1, 1):
            moved = found.copy()
            moved[:, :, j] += step
            allowed = (moved[:, :, j] >= -8) & (moved[:, :, j] <= 7)
            if limit:
                flat = moved.reshape(10, size)
                allowed &= (cut_pairs(flat, beside, limit) == flat).all(axis=1).reshape(allowed.shape)
            assert np.all(error(moved)[allowed] >= least[allowed] * (1 - 1e-9))


def test_dead_inputs_are_rounded_to_nearest() -> None:
    rows = np.random.default_rng(0).normal(size=(1, 3, 8)) * 30
    np.testing.assert_array_equal(
        feed_back(rows, np.ones((1, 3)), np.zeros((1, 8, 8)), NONE, 0, (-127, 127)), np.rint(rows)
    )


def test_the_output_error_is_the_mean_over_samples() -> None:
    samples, rows = correlated(5, 2, 6), np.random.default_rng(1).normal(size=(2, 3, 6))
    expected = np.mean((samples @ rows.transpose(0, 2, 1)) ** 2, axis=1)
    np.testing.assert_allclose(output_error(rows, moments(samples)), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((40, 150), "Gemm"), ((40, 7), "Gemm"), ((40, 3, 3, 3), "Conv"), ((40, 1, 3, 3), "Depthwise")],
)
def test_cut_pairs_are_safe(shape: tuple[int, ...], kind: str) -> None:
    codes = np.random.default_rng(0).integers(-127, 128, shape)
    cut = from_rows(cut_pairs(as_rows(codes, kind, 0), partners(shape, kind, 0), 128), shape, kind, 0)
    assert bool(excess(codes, kind, 0, 128).any()) == (kind != "Depthwise")
    assert not excess(cut, kind, 0, 128).any()
    np.testing.assert_array_equal(cut_pairs(codes, partners(shape, kind, 0), 0), codes)


def test_pairs_are_cut_as_little_as_can_be() -> None:
    every = np.arange(-127, 128, 2)
    pairs = np.stack(np.meshgrid(every, every, indexing="ij"), axis=-1).reshape(-1, 2)
    cut = cut_pairs(pairs, np.array([[1, 0]]), 128)
    a, b = pairs.T
    first = np.arange(-127, 128)[:, None]  # all first codes, each with the nearest second that is allowed
    second = np.clip(b, -128 - np.minimum(first, 0), 128 - np.maximum(first, 0))
    least = ((first - a) ** 2 + (second - b) ** 2).min(axis=0)
    np.testing.assert_array_equal(((cut - pairs) ** 2).sum(axis=1), least)
