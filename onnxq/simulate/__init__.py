"""The loss of a plan before it is emitted: what a joint search over step sizes evaluates."""

from onnxq.simulate.evaluator import Evaluator, Rounding
from onnxq.simulate.gains import loss_gains
from onnxq.simulate.losses import LOSSES, Loss, find_loss
from onnxq.simulate.outputs import Matched, match_outputs, matched, matched_model, moved_biases
from onnxq.simulate.variables import Variable

__all__ = [
    "LOSSES",
    "Evaluator",
    "Loss",
    "Matched",
    "Rounding",
    "Variable",
    "find_loss",
    "loss_gains",
    "match_outputs",
    "matched",
    "matched_model",
    "moved_biases",
]
