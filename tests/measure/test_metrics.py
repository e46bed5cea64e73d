"""Metrics against their formulas, and the running of models for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

from onnxq.data import Dataset, input_specs, open_data
from onnxq.errors import DataError, OnnxqError, UsageError
from onnxq.measure.metrics import METRICS, cross_entropy, evaluate_session, find_metric, mse, top1, top5
from onnxq.model.session import make_session

Array = NDArray[Any]
ParseModel = Callable[..., ModelProto]

RNG = np.random.default_rng(3)
SHAPES = {  # of scores, and the axis of the classes
    "rows": ((50, 8), 1),
    "segmentation": ((6, 8, 4, 5), 1),
    "segmentation, channels last": ((6, 12, 10, 8), 3),
    "sequences": ((6, 40, 8), 2),
    "places behind the classes": ((6, 8, 30), 1),
}
SHAPED = pytest.mark.parametrize(("shape", "axis"), list(SHAPES.values()), ids=list(SHAPES))


def samples(shape: tuple[int, ...], axis: int) -> tuple[Array, Array]:
    """Scores and labels of all their places."""
    rng = np.random.default_rng(len(shape))
    places = shape[:axis] + shape[axis + 1 :]
    return rng.standard_normal(shape).astype(np.float32), rng.integers(0, shape[axis], places)


def rows(scores: Array, axis: int) -> NDArray[np.float64]:
    """Scores with the classes last and everything else flattened, (rows, classes)."""
    return np.moveaxis(scores, axis, -1).reshape(-1, scores.shape[axis]).astype(np.float64)


@SHAPED
@pytest.mark.parametrize(("metric", "best"), [(top1, 1), (top5, 5)])
def test_shares_of_labels_among_the_best(
    metric: Callable[..., float], best: int, shape: tuple[int, ...], axis: int
) -> None:
    scores, labels = samples(shape, axis)
    own = rows(scores, axis)[np.arange(labels.size), labels.ravel()]
    rank = (rows(scores, axis) > own[:, None]).sum(axis=1)
    assert metric({"y": scores, "other": labels}, labels) == np.mean(rank < best)
    assert 0.05 < np.mean(rank < best) < 0.95


def test_less_than_five_classes_are_all_among_the_best() -> None:
    scores, labels = samples((9, 3), 1)
    assert top5({"y": scores}, labels) == 1.0


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16])
def test_scores_of_other_types(dtype: type[np.generic]) -> None:
    scores = np.array([[0, 1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4, 0]]).astype(dtype)
    assert top5({"y": scores}, np.array([0, 6])) == 0.0
    assert top5({"y": scores}, np.array([2, 4])) == 1.0
    assert top1({"y": scores}, np.array([6, 1])) == 0.5


@SHAPED
def test_cross_entropy_of_logits(shape: tuple[int, ...], axis: int) -> None:
    scores, labels = samples(shape, axis)
    odds = np.exp(rows(scores, axis))
    expected = -np.log(odds[np.arange(labels.size), labels.ravel()] / odds.sum(axis=1)).mean()
    assert cross_entropy({"y": scores}, labels) == pytest.approx(expected, rel=1e-12)
    assert cross_entropy({"y": scores + 7}, labels) == pytest.approx(expected, rel=1e-5)  # float32 sum


@SHAPED
def test_cross_entropy_of_probabilities(shape: tuple[int, ...], axis: int) -> None:
    scores, labels = samples(shape, axis)
    shares = np.exp(scores) / np.exp(scores).sum(axis, keepdims=True)
    expected = -np.log(rows(shares, axis)[np.arange(labels.size), labels.ravel()]).mean()
    assert cross_entropy({"y": shares}, labels) == pytest.approx(expected, rel=1e-12)
    assert cross_entropy({"y": shares}, labels) == pytest.approx(
        cross_entropy({"y": scores}, labels), rel=1e-5
    )


def test_an_impossible_label_costs_much_but_not_everything() -> None:
    found = cross_entropy({"y": np.array([[1.0, 0.0]])}, np.array([1]))
    assert 80 < found < 100  # -log of the smallest normal float32


def test_logits_that_happen_to_look_like_probabilities_are_logits() -> None:
    assert cross_entropy({"y": np.array([[2.0, -1.0]])}, np.array([0])) == pytest.approx(
        np.log(1 + np.exp(-3))
    )
    assert cross_entropy({"y": np.array([[2.0, 2.0], [0.5, 0.5]])}, np.array([0, 1])) == pytest.approx(
        np.log(2)
    )


def test_mean_squared_difference() -> None:
    values, labels = RNG.standard_normal((20, 1)).astype(np.float32), RNG.standard_normal(20)
    assert mse({"y": values, "z": labels}, labels) == pytest.approx(
        np.mean((values[:, 0] - labels) ** 2), rel=1e-12
    )
    assert mse({"y": np.array([[3.0, 1.0]])}, np.array([[1, 1]])) == 2.0


@pytest.mark.parametrize(
    ("metric", "shape", "labels", "complaint"),
    [
        ("top1", (4, 3), None, "metric 'top1' needs labels; the data has no array 'label'"),
        (
            "top5",
            (4, 3),
            np.zeros(5, int),
            r"a class label for each sample, or each place in it; outputs are \(4, 3\), labels \(5,\)",
        ),
        ("top1", (4,), np.zeros(4, int), "a class label for each sample"),
        ("cross-entropy", (4, 3, 2), np.zeros(4, int), "a class label for each sample"),
        (
            "cross-entropy",
            (4, 3),
            np.array([0, 1, 2, 3]),
            "whole numbers from 0 to 2; they range from 0 to 3",
        ),
        ("top1", (4, 3), np.array([0, 1, -1, 2]), "whole numbers from 0 to 2; they range from -1 to 2"),
        ("top1", (4, 3), np.array([0, 0.5, 1, 2]), "whole numbers"),
        ("mse", (4, 3), np.zeros(4), r"labels in the shape of the output \(4, 3\); there are \(4,\)"),
        ("mse", (4, 3), None, "there are none"),
    ],
)
def test_labels_that_do_not_fit_are_an_error(
    metric: str, shape: tuple[int, ...], labels: Array | None, complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        METRICS[metric]({"y": np.zeros(shape, np.float32)}, labels)


def test_metrics_by_name(tmp_path: Path) -> None:
    assert find_metric("top5") is top5
    with pytest.raises(UsageError, match=r"unknown metric 'top2'; did you mean 'top[15]'"):
        find_metric("top2")
    path = tmp_path / "mine.py"
    path.write_text("def half(outputs, labels):\n    return 0.5\n", "utf-8")
    assert find_metric(f"{path}:half")({}, None) == 0.5
    with pytest.raises(UsageError, match="unknown metric function 'whole'"):
        find_metric(f"{path}:whole")


# ---- running models


@pytest.fixture
def session(parse_model: ParseModel) -> ort.InferenceSession:
    return make_session(classifier(parse_model), threads=1)


def classifier(parse_model: ParseModel) -> ModelProto:
    return parse_model(
        "g (float[N,3] x) => (float[N,3] y, float s) { y = Neg(x) s = ReduceSum<keepdims=0>(x) }"
    )


X = np.random.default_rng(5).standard_normal((23, 3)).astype(np.float32)
LABELS = np.random.default_rng(6).integers(0, 3, 23)


@pytest.fixture
def data(parse_model: ParseModel) -> Dataset:
    return open_data({"x": X, "label": LABELS}, input_specs(classifier(parse_model)))


@pytest.mark.parametrize("batch", [1, 10, 32])
def test_a_model_is_measured_on_all_samples(batch: int, session: ort.InferenceSession, data: Dataset) -> None:
    seen: list[int] = []
    found = evaluate_session(session, data, "top1", batch=batch, progress=seen.append)
    assert (found.metric, found.samples) == ("top1", 23)
    assert found.value == np.mean(X.argmin(axis=1) == LABELS)
    assert seen[-1] == 23
    assert len(seen) == -(-23 // batch)
    assert evaluate_session(session, data, "top1", limit=7).samples == 7


@pytest.mark.parametrize("batch", [4, 23])
def test_samples_behind_time_are_turned_to_the_front(parse_model: ParseModel, batch: int) -> None:
    model = parse_model("g (float[N,3,5] x) => (float[5,N,3] y) { y = Transpose<perm=[2,0,1]>(x) }")
    x = np.random.default_rng(7).standard_normal((23, 3, 5)).astype(np.float32)
    labels = np.random.default_rng(8).integers(0, 3, (23, 5))
    data = open_data({"x": x, "label": labels}, input_specs(model))
    found = evaluate_session(make_session(model, threads=1), data, "top1", batch=batch)
    assert found.value == np.mean(x.argmax(1) == labels)


def test_a_function_of_ones_own_sees_all_outputs(
    session: ort.InferenceSession, data: Dataset, tmp_path: Path
) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "def shapes(outputs, labels):\n    return 100 * len(outputs['y']) + len(outputs['s']) + len(labels) / 100\n"
        "def text(outputs, labels):\n    return 'good'\n"
        "def broken(outputs, labels):\n    return outputs['missing']\n",
        "utf-8",
    )
    found = evaluate_session(session, data, f"{path}:shapes", batch=10)
    assert found.value == 2303.23  # 23 rows, a scalar of each of 3 batches, 23 labels
    for name in ("text", "broken"):
        with pytest.raises(OnnxqError, match=f"metric '{path}:{name}' failed: "):
            evaluate_session(session, data, f"{path}:{name}")


def test_labels_that_do_not_fit_are_found_on_the_first_batch(parse_model: ParseModel) -> None:
    model = parse_model("g (float[N,S] x) => (float[N,S] y) { y = Neg(x) }")
    read = []

    def feeds() -> Iterator[dict[str, Array]]:
        for _ in range(9):
            read.append(len(X))
            yield {"x": X}

    data = open_data(feeds, input_specs(model))
    with pytest.raises(DataError, match="'top1' needs labels"):
        evaluate_session(make_session(model, threads=1), data, "top1", batch=len(X))
    assert len(read) < 4


def test_outputs_of_different_shapes_cannot_be_measured(parse_model: ParseModel) -> None:
    model = parse_model("g (float[N,S] x) => (float[N,S] y) { y = Neg(x) }")

    def feeds() -> Iterator[dict[str, Array]]:
        labels = np.zeros(len(X), np.int64)
        yield {"x": X[:, :2], "label": labels}
        yield {"x": X, "label": labels}

    data = open_data(feeds, input_specs(model))
    with pytest.raises(DataError, match=r"those of 'y' have samples of \(2,\) and of \(3,\)"):
        evaluate_session(make_session(model, threads=1), data, "top1")
