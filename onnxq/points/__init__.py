"""Weights as sums of few-bit points, and the choice of the channels that get more than one; it knows nothing of networks."""

from onnxq.points.budget import (
    Candidates,
    at_random,
    below_error,
    budget_curve,
    even_error,
    total_cost,
    total_error,
    within_budget,
)
from onnxq.points.decompose import Points, decompose, decompose_until
from onnxq.points.errors import apply_moment, output_errors
from onnxq.points.folded import Folded, Grid, fold_fixed, fold_free
from onnxq.points.scalar import best_point

__all__ = [
    "Candidates",
    "Folded",
    "Grid",
    "Points",
    "apply_moment",
    "at_random",
    "below_error",
    "best_point",
    "budget_curve",
    "decompose",
    "decompose_until",
    "even_error",
    "fold_fixed",
    "fold_free",
    "output_errors",
    "total_cost",
    "total_error",
    "within_budget",
]
