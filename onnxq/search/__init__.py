"""The numerical search for step sizes: it minimises a loss over positive numbers and knows nothing of networks."""

from onnxq.search.budget import Budget
from onnxq.search.line import LineRules
from onnxq.search.objective import Objective, Part, StepLoss
from onnxq.search.powell import minimize
from onnxq.search.quadratic import Chosen, quadratic_minimum, search_p
from onnxq.search.rules import Progress, Result, Rules, estimate
from onnxq.search.state import Checkpoint

__all__ = [
    "Budget",
    "Checkpoint",
    "Chosen",
    "LineRules",
    "Objective",
    "Part",
    "Progress",
    "Result",
    "Rules",
    "StepLoss",
    "estimate",
    "minimize",
    "quadratic_minimum",
    "search_p",
]
