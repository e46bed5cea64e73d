"""The textbook search, for comparison: scipy's Powell with its default line searches."""

from __future__ import annotations

from scipy import optimize

from onnxq.search.objective import Objective, Vector


def scipy_powell(objective: Objective, variables: int, iterations: int = 1) -> tuple[Vector, float, int]:
    """Point (variables,), loss and evaluations of `scipy.optimize.minimize(method="Powell")` from the point 0."""

    def loss(point: Vector) -> float:
        return objective.evaluate(point)

    start = [0.0] * variables
    found = optimize.minimize(loss, start, method="Powell", options={"maxiter": iterations})
    return found.x, float(found.fun), int(found.nfev)
