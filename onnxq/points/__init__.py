"""Weights as sums of few-bit points, and the choice of the channels that get more than one; it knows nothing of networks."""

from onnxq.points.budget import Candidates, at_random, below_error, total_cost, total_error, within_budget
from onnxq.points.errors import apply_moment, output_errors
from onnxq.points.folded import Folded, Grid, fold_fixed, fold_free, join, split

__all__ = [
    "Candidates",
    "Folded",
    "Grid",
    "apply_moment",
    "at_random",
    "below_error",
    "fold_fixed",
    "fold_free",
    "join",
    "output_errors",
    "split",
    "total_cost",
    "total_error",
    "within_budget",
]
