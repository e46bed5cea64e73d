"""Weights as sums of few-bit points, and the choice of the channels that get more than one; it knows nothing of networks."""

from onnxq.points.errors import apply_moment, output_errors
from onnxq.points.folded import Folded, Grid, fold_fixed, fold_free, join, split

__all__ = ["Folded", "Grid", "apply_moment", "fold_fixed", "fold_free", "join", "output_errors", "split"]
