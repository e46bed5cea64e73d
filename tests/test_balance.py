"""The noise that equalizing minimises: its gradient, its optimum, and the gains of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq.balance import Site, balance, output_gains
from onnxq.channel_classes import Layer
from onnxq.channels import find_channels
from onnxq.program import Program

Array = NDArray[Any]


def site(seed: int, group: int, source: list[int], target: list[int]) -> Site:
    """A layer of random weights with three taps, whose channels span three decades."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(len(target), len(source) // group, 3)) * 10.0 ** rng.uniform(
        -1, 2, (len(target), 1, 1)
    )
    peak, gain = 10.0 ** rng.uniform(-1, 1, len(source)), rng.uniform(0.1, 10, len(target))
    layer = Layer(None, weight.astype(np.float32), group, np.array(source), np.array(target))
    return Site.of(layer, peak, peak**2 / 5, gain)


SITES = [
    site(0, 1, [0, 0, 0], [1, 2, 3, 4]),
    site(1, 2, [1, 2, 3, 4], [2, 5, 5, 6]),
    site(2, 1, [2, -1, 5, 6], [0, 7]),
]


@pytest.mark.parametrize("together", [True, False])
def test_the_gradient_is_that_of_differences(together: bool) -> None:
    logs = np.random.default_rng(3).normal(size=8)
    for one in SITES:
        slope = one.noise(logs, together)[1]
        for i in range(8):
            step = np.eye(8)[i] * 1e-5
            difference = (one.noise(logs + step, together)[0] - one.noise(logs - step, together)[0]) / 2e-5
            # Central differences err by the step squared, and by rounding over the step: 1e-10 and 1e-11 of the noise.
            assert slope[i] == pytest.approx(difference, abs=1e-7 * one.noise(logs, together)[0])


@pytest.mark.parametrize("together", [True, False])
def test_common_factors_change_nothing(together: bool) -> None:
    """One factor for a whole tensor is taken up by its scale."""
    logs, inner = np.zeros(8), np.array([0, 1, 1, 1, 1, 1, 1, 0]) * 1.7
    for one in SITES[:2]:
        assert one.noise(inner, together)[0] == pytest.approx(one.noise(logs, together)[0], rel=1e-12)


@pytest.mark.parametrize("together", [True, False])
def test_no_neighbour_of_the_optimum_is_better(together: bool) -> None:
    lower, upper = np.full(8, 0.0), np.full(8, np.inf)
    lower[0] = upper[0] = lower[4] = upper[4] = 1.0
    upper[3] = 1.5
    factors, part = balance(SITES, lower, upper, together, 500)
    assert factors[0] == factors[4] == 1.0
    assert factors[3] <= 1.5 + 1e-12
    assert part < 0.9

    def cost(values: Array) -> float:
        return sum(one.noise(np.log(values), together)[0] for one in SITES)

    assert part == pytest.approx(cost(factors) / cost(np.ones(8)), rel=1e-9)
    for i in (1, 2, 5, 6):  # 7 has a scale of its own where channels do
        for change in (0.9, 1.1):
            assert cost(factors * np.where(np.arange(8) == i, change, 1.0)) > cost(factors)


def test_gains_are_the_squared_slopes_of_a_linear_network(parse_program: Callable[..., Program]) -> None:
    """Against the product of matrices, along a residual path, a slice and a mean over places."""
    rng = np.random.default_rng(4)
    w, v, u = (rng.normal(size=s).astype(np.float32) for s in ((3, 2, 1, 1), (3, 3, 1, 1), (2, 2)))
    text = """g (float[1,2,3,3] x) => (float[1,2] y) {
        a = Conv(x, w) b = Conv(a, v) s = Slice(b, one, three, one) g = GlobalAveragePool(s)
        f = Flatten(g) y = Gemm<transB=1>(f, u) }"""
    weights = {"w": w, "v": v, "u": u, "one": np.array([1]), "three": np.array([3])}
    program = parse_program(text, weights)
    gains = output_gains(program.graph, find_channels(program.graph))
    nodes = {n.outputs[0].name: n.name for n in program.graph.nodes}
    squares = np.concatenate([[0.0], (u.astype(np.float64) ** 2).sum(axis=0)]) / 9
    np.testing.assert_allclose(gains[nodes["y"]], 1.0)
    np.testing.assert_allclose(gains[nodes["b"]], squares, atol=1e-99)
    np.testing.assert_allclose(
        gains[nodes["a"]], (v.astype(np.float64) ** 2)[:, :, 0, 0].T @ squares, rtol=1e-6
    )
