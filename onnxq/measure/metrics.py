"""Metrics of a model on labelled data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto

from onnxq.data import Dataset, load_function
from onnxq.errors import DataError, OnnxqError, unknown
from onnxq.measure.axes import class_axis, sample_axes
from onnxq.measure.compare import run
from onnxq.model.session import CPU, make_session
from onnxq.pipeline import Progress, counter, no_progress

Array = NDArray[Any]
Metric = Callable[[dict[str, Array], Array | None], float]


@dataclass(frozen=True)
class Evaluation:
    """A metric's value and the number of samples behind it."""

    metric: str
    value: float
    samples: int


@dataclass(frozen=True)
class Accuracy:
    """A metric of the float model and of the deployed one.

    Attributes:
        metric: its name.
        before, after: in float and deployed.
        samples: behind each of them.
        source: of the samples.
    """

    metric: str
    before: float
    after: float
    samples: int
    source: str

    @classmethod
    def of(cls, before: Evaluation | None, after: Evaluation | None, data: Dataset | None) -> Accuracy | None:
        """Two evaluations on the same samples; None where there were none."""
        if before is None or after is None or data is None:
            return None
        return cls(after.metric, before.value, after.value, after.samples, data.source)

    def as_json(self) -> dict[str, Any]:
        """The figures."""
        found = {"metric": self.metric, "float": self.before, "quantized": self.after}
        return {**found, "samples": self.samples, "source": self.source}


def _scores(outputs: dict[str, Array], labels: Array | None, metric: str) -> tuple[Array, Array]:
    """Scores with their classes in the last axis, and labels of the other axes."""
    scores = next(iter(outputs.values()))
    if labels is None:
        raise DataError(f"metric {metric!r} needs labels; the data has no array 'label'")
    axis = next((axis for axis in _axes(scores) if labels.shape == _without(scores.shape, axis)), None)
    if axis is None:
        raise DataError(
            f"metric {metric!r} needs a class label for each sample, or each place in it;"
            f" outputs are {scores.shape}, labels {labels.shape}"
        )
    classes, count = labels.astype(np.int64), scores.shape[axis]
    if classes.size and (classes.min() < 0 or classes.max() >= count or np.any(classes != labels)):
        raise DataError(
            f"metric {metric!r} needs labels that are whole numbers from 0 to {count - 1};"
            f" they range from {labels.min()} to {labels.max()}"
        )
    return np.moveaxis(scores, axis, -1), classes


def _axes(scores: Array) -> tuple[int, ...]:
    """Those that may hold classes, the likeliest first: two can fit where a sequence is as long as there are classes."""
    return () if scores.ndim < 2 else (class_axis(scores.shape), 1, scores.ndim - 1)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def top1(outputs: dict[str, Array], labels: Array | None) -> float:
    """Share of samples, or of places in them, whose largest score of the first output is the label's."""
    scores, classes = _scores(outputs, labels, "top1")
    return float((scores.argmax(-1) == classes).mean())


def top5(outputs: dict[str, Array], labels: Array | None) -> float:
    """Share of samples whose label is among the five largest scores."""
    scores, classes = _scores(outputs, labels, "top5")
    count = min(5, scores.shape[-1])
    best = np.argpartition(-scores.astype(np.float64), count - 1)[..., :count]
    return float((best == classes[..., None]).any(-1).mean())


def cross_entropy(outputs: dict[str, Array], labels: Array | None) -> float:
    """Mean negative log-likelihood of the label, in nats; rows that are probabilities are taken as such, others as logits."""
    import scipy

    scores, classes = _scores(outputs, labels, "cross-entropy")
    values = scores.astype(np.float64)
    sums = values.sum(-1)
    if values.min() >= 0.0 and np.allclose(sums, 1.0, atol=1e-3):
        logs = np.log(np.maximum(values, np.finfo(np.float32).tiny))
    else:
        logs = scipy.special.log_softmax(values, -1)
    return float(-np.take_along_axis(logs, classes[..., None], -1).mean())


def mse(outputs: dict[str, Array], labels: Array | None) -> float:
    """Mean squared difference of the first output and the labels."""
    values = next(iter(outputs.values()))
    if labels is None or labels.size != values.size:
        found = "none" if labels is None else str(labels.shape)
        raise DataError(
            f"metric 'mse' needs labels in the shape of the output {values.shape}; there are {found}"
        )
    return float(np.mean((values.astype(np.float64) - labels.reshape(values.shape)) ** 2))


METRICS: dict[str, Metric] = {"top1": top1, "top5": top5, "cross-entropy": cross_entropy, "mse": mse}


def find_metric(name: str) -> Metric:
    """A built-in metric, or the function that FILE.py:FUNCTION or package.module:FUNCTION names.

    Raises:
        UsageError: there is no such metric.
    """
    if name in METRICS:
        return METRICS[name]
    if ":" not in name:
        raise unknown("metric", name, [*METRICS, "FILE.py:FUNCTION"])
    return load_function(name, "metric")


def _samples_first(value: Any, axis: int) -> Any:
    """The output with its samples along axis 0; what is no array stays."""
    return np.moveaxis(value, axis, 0) if axis else value


def _joined(name: str, values: list[Array]) -> Array:
    """One output of all batches."""
    if not np.ndim(values[0]):
        return np.stack(values)
    shapes = {np.shape(v)[1:] for v in values}
    if len(shapes) > 1:
        first, second = sorted(shapes)[:2]
        raise DataError(
            f"a metric needs outputs of one shape; those of {name!r} have samples of {first} and of {second}"
        )
    return np.concatenate(values)


def evaluate_model(
    model: ModelProto,
    data: Dataset,
    metric: str,
    *,
    limit: int | None = None,
    batch: int = 32,
    threads: int = 0,
    provider: str = CPU,
    progress: Progress = no_progress,
) -> Evaluation:
    """As `evaluate_session`, with a session of its own.

    Raises:
        UsageError: there is no such metric or provider.
        OnnxqError: the model, the data or the metric's function failed.
    """
    session = make_session(model, threads=threads, provider=provider)
    show = counter("evaluating", progress, data, limit)
    return evaluate_session(session, data, metric, limit=limit, batch=batch, progress=show)


def evaluate_session(
    session: ort.InferenceSession,
    data: Dataset,
    metric: str,
    *,
    limit: int | None = None,
    batch: int = 32,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Run the model over the data and measure it. Outputs of all samples are kept, samples along axis 0; inputs are not.

    Labels that do not fit are found on the first batch.

    Raises:
        UsageError: there is no such metric.
        ModelError: the model cannot be run.
        DataError: the data does not fit the model or the metric.
        OnnxqError: a user's metric function failed or returned no number.
    """
    measure = find_metric(metric)
    parts: dict[str, list[Array]] = {}
    labels: list[Array] = []
    samples, axes = 0, sample_axes(session)
    for part in data.batches(batch, limit):
        found = {n: _samples_first(value, axes[n]) for n, value in run(session, part.feeds).items()}
        if metric in METRICS and not samples:
            measure(found, part.labels)
        for name, value in found.items():
            parts.setdefault(name, []).append(value)
        if part.labels is not None:
            labels.append(part.labels)
        samples += part.size
        progress(samples)
    outputs = {name: _joined(name, values) for name, values in parts.items()}
    everything = np.concatenate(labels) if labels else None
    if metric in METRICS:
        return Evaluation(metric, measure(outputs, everything), samples)
    try:
        return Evaluation(metric, float(measure(outputs, everything)), samples)
    except Exception as error:  # a user's function may raise anything
        raise OnnxqError(f"metric {metric!r} failed: {type(error).__name__}: {error}") from error
