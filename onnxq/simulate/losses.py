"""Losses of a quantized network, each a sum over samples, so that shards of samples add up.

Cross-entropy with labels is the loss of the LAPQ paper (Nahshan et al., arXiv 1911.07190). A network knows its own training
images by heart; then the distance to the float outputs is the steadier loss: KL divergence of class scores, or squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.data import load_function
from onnxq.errors import DataError, OnnxqError, unknown
from onnxq.measure.axes import class_axis

Array = NDArray[Any]
Outputs = Mapping[str, Array]

KNOWN_BY_HEART = (
    0.05  # nats; below this cross-entropy of the float model its labels say nothing about quantization
)
TINY = float(np.finfo(np.float32).tiny)

# (outputs, outputs of the float model, labels or None) -> loss of each sample, (N,)
PerSample = Callable[[Outputs, Outputs, "Array | None"], NDArray[np.float64]]


@dataclass(frozen=True)
class Loss:
    """A loss with its name; calling it gives the sum over a batch.

    Attributes:
        name: as given to `--loss`; `auto` has become what it stands for.
        per_sample: the loss of each sample, (N,).
    """

    name: str
    per_sample: PerSample

    def __call__(self, outputs: Outputs, reference: Outputs, labels: Array | None) -> float:
        """The sum over the samples of a batch."""
        return float(np.sum(self.per_sample(outputs, reference, labels)))


def cross_entropy(outputs: Outputs, reference: Outputs, labels: Array | None) -> NDArray[np.float64]:
    """Negative log-likelihood of the label, in nats, by the first output."""
    scores = _first(outputs)
    if labels is None:
        raise DataError("loss 'cross-entropy' needs labels; the calibration data has no array 'label'")
    if not _is_scores(scores) or labels.shape != scores.shape[:1]:
        raise DataError(
            f"loss 'cross-entropy' needs one label for a row of scores; outputs are {scores.shape}, labels {labels.shape}"
        )
    logs = _logs(scores)
    found: NDArray[np.float64] = -np.take_along_axis(logs, labels.astype(np.int64)[:, None], axis=1)[:, 0]
    return found


def softened_kl(reference: Outputs) -> PerSample:
    """KL divergence from the float model's class distribution, in nats, summed over outputs and places.

    A network that knows its calibration images by heart is sure of nearly all of them, and its few doubts would decide
    everything. So both distributions are softened, as in distillation (Hinton et al., arXiv 1503.02531, section 2): scores are
    divided by the spread that those of the float model have over the classes, where it is above 1, and the divergence is
    multiplied by its square.

    Args:
        reference: outputs of the float model on the samples.
    """
    spreads = {name: _spread(values) for name, values in reference.items()}

    def kl(outputs: Outputs, wanted: Outputs, labels: Array | None) -> NDArray[np.float64]:
        return _summed(outputs, wanted, lambda name, q, p: _kl(q, p, spreads[name]))

    return kl


def mse(outputs: Outputs, reference: Outputs, labels: Array | None) -> NDArray[np.float64]:
    """Squared distance to the float outputs as a part of their mean square in the batch, summed over outputs."""
    return _summed(outputs, reference, lambda name, found, wanted: _relative(found, wanted))


def cosine(outputs: Outputs, reference: Outputs, labels: Array | None) -> NDArray[np.float64]:
    """1 - cosine of the angle to the float output, summed over outputs."""
    return _summed(outputs, reference, lambda name, found, wanted: _angle(found, wanted))


# made from outputs of the float model on the samples
LOSSES: dict[str, Callable[[Outputs], PerSample]] = {
    "cross-entropy": lambda reference: cross_entropy,
    "kl": softened_kl,
    "mse": lambda reference: mse,
    "cosine": lambda reference: cosine,
}


def find_loss(name: str, reference: Outputs, labels: Array | None) -> Loss:
    """The loss of that name.

    Args:
        name: one of `LOSSES`, FILE.py:FUNCTION with the arguments of a per-sample loss, or `auto`: cross-entropy where labels are
            no fewer than classes and say something that the float model does not know by heart, else KL for class scores and
            squared error for anything else.
        reference: outputs of the float model on some samples, by which `auto` decides.
        labels: of those samples, or None.

    Raises:
        UsageError: there is no such loss.
    """
    if name == "auto":
        name = _automatic(reference, labels)
    if name in LOSSES:
        return Loss(name, LOSSES[name](reference))
    if ":" not in name:
        raise unknown("loss", name, ["auto", *LOSSES, "FILE.py:FUNCTION"])
    return Loss(name, _checked(name, load_function(name, "loss")))


def _automatic(reference: Outputs, labels: Array | None) -> str:
    scores = _first(reference)
    if len(reference) != 1 or not _is_scores(scores):
        return "mse"
    if labels is None or labels.shape != scores.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        return "kl"
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= scores.shape[1]:
        return "kl"
    if len(labels) < scores.shape[1]:
        return "kl"
    return "cross-entropy" if cross_entropy(reference, reference, labels).mean() > KNOWN_BY_HEART else "kl"


def _checked(name: str, function: Callable[..., Any]) -> PerSample:
    def per_sample(outputs: Outputs, reference: Outputs, labels: Array | None) -> NDArray[np.float64]:
        try:
            found = np.asarray(function(dict(outputs), dict(reference), labels), np.float64)
        except Exception as error:  # a user's function may raise anything
            raise OnnxqError(f"loss {name!r} failed: {type(error).__name__}: {error}") from error
        if found.shape != (len(_first(outputs)),):
            raise OnnxqError(
                f"loss {name!r} returned the shape {found.shape}; it must be one number a sample"
            )
        return found

    return per_sample


def _first(outputs: Outputs) -> Array:
    return next(iter(outputs.values()))


def _is_scores(values: Array) -> bool:
    return values.ndim == 2 and values.shape[1] > 1 and np.issubdtype(values.dtype, np.floating)


def _summed(
    outputs: Outputs, reference: Outputs, one: Callable[[str, Array, Array], NDArray[np.float64]]
) -> NDArray[np.float64]:
    floats = {n: r for n, r in reference.items() if np.issubdtype(r.dtype, np.floating)}
    for name, wanted in floats.items():
        if outputs[name].shape != wanted.shape:
            raise DataError(
                f"the shape of output {name!r} follows from values, {wanted.shape} in float and {outputs[name].shape} here;"
                " give a loss of your own with FILE.py:FUNCTION"
            )
    parts = [one(n, outputs[n], r) for n, r in floats.items()]
    if not parts:
        raise DataError(
            "the model has no float output to compare; give a loss of your own with FILE.py:FUNCTION"
        )
    total: NDArray[np.float64] = np.sum(parts, axis=0)
    return total


def _rows(values: Array) -> NDArray[np.float64]:
    return values.reshape(len(values), -1).astype(np.float64)


def _logs(scores: Array) -> NDArray[np.float64]:
    """Log-probabilities over the classes; those that are probabilities are taken as such."""
    values, axis = scores.astype(np.float64), class_axis(scores.shape)
    if values.min(initial=0.0) >= 0.0 and np.allclose(values.sum(axis), 1.0, atol=1e-3):
        return np.log(np.maximum(values, TINY))
    import scipy

    logs: NDArray[np.float64] = scipy.special.log_softmax(values, axis)
    return logs


def _spread(scores: Array) -> float:
    """Standard deviation of the scores over the classes of a sample, 1 at least."""
    if scores.ndim < 2 or not np.issubdtype(scores.dtype, np.floating):
        return 1.0
    return max(1.0, float(np.sqrt(_logs(scores).var(class_axis(scores.shape)).mean())))


def _kl(found: Array, wanted: Array, spread: float) -> NDArray[np.float64]:
    import scipy

    if wanted.ndim < 2:
        return _relative(found, wanted)
    axis = class_axis(wanted.shape)
    p, q = (scipy.special.log_softmax(_logs(scores) / spread, axis) for scores in (wanted, found))
    return np.asarray(_rows(np.exp(p) * (p - q)).sum(axis=1)) * spread**2


def _relative(found: Array, wanted: Array) -> NDArray[np.float64]:
    error, power = (_rows(found) - _rows(wanted)) ** 2, _rows(wanted) ** 2
    return np.asarray(error.sum(axis=1) / max(float(power.sum(axis=1).mean()), TINY))


def _angle(found: Array, wanted: Array) -> NDArray[np.float64]:
    a, b = _rows(found), _rows(wanted)
    lengths = np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), TINY)
    return np.asarray(1.0 - np.vecdot(a, b) / lengths)
