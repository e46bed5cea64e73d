"""Differences of two models' outputs, against numpy on all samples at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

from onnxq.data import input_specs, open_data
from onnxq.errors import ModelError
from onnxq.measure.compare import Difference, OutputDifference, compare_sessions, run
from onnxq.model.session import make_session

Array = NDArray[Any]
ParseModel = Callable[..., ModelProto]


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def difference(reference: Array, other: Array, *cuts: int) -> OutputDifference:
    """The difference over batches that end at the cuts."""
    found = OutputDifference()
    for a, b in zip(np.split(reference, cuts), np.split(other, cuts), strict=True):
        found.update(a, b)
    return found


@pytest.mark.parametrize("cuts", [(), (1,), (7, 8, 30)])
@pytest.mark.parametrize(
    ("shape", "classes"),
    [
        ((40, 10), 1),
        ((40, 5, 6, 7), 1),
        ((40, 7, 6, 5), 3),
        ((40, 6, 9), 2),
        ((40, 9, 1, 1), 1),
        ((40, 1, 9), 2),
    ],
)
def test_figures_of_batches_are_those_of_all(
    shape: tuple[int, ...], classes: int, cuts: tuple[int, ...]
) -> None:
    a = normal(1, *shape)
    b = a + normal(2, *shape) / 3
    found = difference(a, b, *cuts)
    wide, error = a.astype(np.float64), b.astype(np.float64) - a
    assert found.sqnr_db == pytest.approx(10 * np.log10((wide**2).sum() / (error**2).sum()), rel=1e-12)
    assert found.max_abs == np.abs(error).max()
    same = a.argmax(classes) == b.argmax(classes)
    assert found.agreement == same.mean()
    assert 0.3 < same.mean() < 1
    assert (found.rows, found.values) == (same.size, a.size)
    assert found.as_json() == {
        "sqnr_db": found.sqnr_db,
        "agreement": found.agreement,
        "max_abs": found.max_abs,
        "equal": False,
    }


def test_a_known_ratio() -> None:
    found = difference(np.array([[3.0, 4.0]]), np.array([[3.0, 3.5]]))
    assert found.sqnr_db == pytest.approx(20.0)  # 25 / 0.25
    assert (found.max_abs, found.agreement) == (0.5, 1.0)


def test_equal_outputs_have_no_ratio() -> None:
    found = difference(normal(1, 4, 5), normal(1, 4, 5))
    assert found.as_json() == {"sqnr_db": None, "agreement": 1.0, "max_abs": 0.0, "equal": True}


def test_a_reference_of_zeros_has_none_either() -> None:
    found = difference(np.zeros((3, 2)), np.full((3, 2), 0.5))
    assert found.sqnr_db is None
    assert not found.as_json()["equal"]
    assert found.max_abs == 0.5


@pytest.mark.parametrize(
    ("reference", "agreement"),
    [
        (np.zeros((4, 1), np.float32), None),  # one column is no choice
        (np.zeros(4, np.float32), None),
        (np.float32(3), None),
        (np.zeros((4, 3), np.int64), None),  # labels, not scores
        (np.zeros((0, 3), np.float32), None),
        (np.zeros((4, 3), np.float16), 1.0),
        (np.zeros((4, 3), np.float64), 1.0),
    ],
)
def test_only_scores_of_classes_can_agree(reference: Array, agreement: float | None) -> None:
    found = OutputDifference()
    found.update(reference, reference)
    assert found.agreement == agreement
    assert found.values == np.size(reference)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64])
def test_differences_of_other_types_do_not_wrap(dtype: type[np.generic]) -> None:
    found = OutputDifference()
    found.update(np.array([[0, 1, 1]], dtype), np.array([[1, 1, 0]], dtype))
    assert (found.max_abs, found.noise, found.signal) == (1.0, 2.0, 2.0)


SPECIAL = np.array([[1.0, np.nan, np.inf, -np.inf]], np.float32)


def test_equal_special_values_are_equal() -> None:
    found = difference(SPECIAL, SPECIAL.copy())
    assert found.as_json() == {"sqnr_db": None, "agreement": 1.0, "max_abs": 0.0, "equal": True}
    assert found.signal == 1.0


@pytest.mark.parametrize(
    ("place", "value"), [(0, np.nan), (0, np.inf), (1, 1.0), (2, 1.0), (2, np.nan), (2, -np.inf)]
)
def test_other_special_values_drown_everything(place: int, value: float) -> None:
    other = SPECIAL.copy()
    other[0, place] = value
    found = difference(SPECIAL, other)
    assert (found.sqnr_db, found.max_abs) == (-math.inf, math.inf)
    found.update(np.ones((9, 4)), np.ones((9, 4)))
    assert found.sqnr_db == -math.inf


def test_outputs_are_matched_by_name() -> None:
    found = Difference()
    a, b = normal(1, 4, 5), normal(2, 4, 5)
    found.update({"y": a, "z": b}, {"z": b, "y": a + 1, "more": a}, 4)
    found.update({"y": a, "z": b}, {"z": b, "y": a, "more": a}, 4)
    assert found.samples == 8
    assert list(found.outputs) == ["y", "z"]
    assert found.main is found.outputs["y"]
    assert found.outputs["y"].max_abs == pytest.approx(1, rel=1e-6)  # float32 sums
    assert found.outputs["z"].max_abs == 0
    assert Difference().main is None


def test_figures_of_a_network_are_not_those_of_indices() -> None:
    found, scores = Difference(), normal(1, 4, 5)
    found.update({"classes": np.arange(4)}, {"classes": np.arange(4)}, 4)
    assert found.main is found.outputs["classes"]
    found.update({"classes": np.arange(4), "y": scores}, {"classes": np.arange(4), "y": scores + 1}, 4)
    assert found.main is found.outputs["y"]


def test_figures_of_a_network_are_not_those_of_what_it_picks() -> None:
    found, y = Difference(), normal(1, 4, 5)
    found.update({"picked": y, "all": y}, {"picked": y, "all": y + 1}, 4)
    assert found.main is found.outputs["picked"]
    found.update({"picked": y, "all": y}, {"picked": y[:2], "all": y + 1}, 4)
    assert found.main is found.outputs["all"]


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        ({"z": np.zeros((4, 5))}, r"the second model has no output 'y'; it has: z"),
        (
            {"y": np.zeros((4, 5, 1))},
            r"output 'y' has different shapes in the two models: \(4, 5\) and \(4, 5, 1\)",
        ),
    ],
)
def test_outputs_that_do_not_match_are_an_error(other: dict[str, Array], complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        Difference().update({"y": np.zeros((4, 5))}, other, 4)


def test_samples_in_which_an_output_has_another_shape_are_left_out() -> None:
    found, y = Difference(), normal(1, 4, 5)
    found.update({"y": y, "z": y}, {"y": y + 1, "z": y[:2]}, 4)
    found.update({"y": y, "z": y}, {"y": y[:, :4], "z": y[:3]}, 4)
    assert found.apart == {"z": 8, "y": 4}
    assert found.outputs["y"].values == y.size
    assert list(found.outputs) == ["y"]
    assert [sentence.partition(",")[0] for sentence in found.remarks()] == [
        "the shape of output 'z' follows from values and differs in 8 of 8 samples",
        "the shape of output 'y' follows from values and differs in 4 of 8 samples",
    ]


def test_lengths_that_follow_from_values_are_compared_sample_by_sample(parse_model: ParseModel) -> None:
    """Values above a threshold, as of boxes that a detector finds; those of a batch end at its longest sample."""
    text = """g (float[N,3] x) => (float[N,M] y) {
        p = Greater(x, t) c = Cast<to=1>(p) m = ReduceMax<keepdims=0>(c, zero)
        i = NonZero(m) j = Squeeze(i, zero) y = Gather<axis=1>(x, j) }"""
    models = [parse_model(text, {"t": np.float32(t), "zero": np.array([0])}, 18) for t in (0.5, 1.5)]
    one, other = (make_session(model, threads=1) for model in models)
    x = np.array([[0, 0, 1], [2, 2, 0], [3, 0, 0]], np.float32)
    found = compare_sessions(one, other, open_data({"x": x}, input_specs(models[0])))
    assert (found.samples, found.apart) == (3, {"y": 1})
    assert (found.outputs["y"].values, found.outputs["y"].noise) == (3, 0.0)


def test_outputs_that_are_no_numbers_are_not_compared() -> None:
    found = Difference()
    texts: Array = np.array(["a", "b"])
    found.update({"t": texts, "m": [{1: 0.5}], "y": np.ones(2)}, {"y": np.ones(2)}, 2)  # type: ignore[dict-item]
    assert list(found.outputs) == ["y"]


@pytest.fixture
def session(parse_model: ParseModel) -> ort.InferenceSession:
    return make_session(
        parse_model(
            "g (float[N,3] x, float[3] k) => (float[N,3] y, float[N,3] z) { y = Add(x, k) z = Neg(y) }"
        ),
        threads=1,
    )


def test_a_run_names_its_outputs_and_takes_what_it_needs(session: ort.InferenceSession) -> None:
    x, k = normal(1, 4, 3), normal(2, 3)
    feeds: dict[str, Array] = {"x": x, "k": k, "label": np.zeros(4)}
    found = run(session, feeds)
    assert list(found) == ["y", "z"]
    np.testing.assert_array_equal(found["z"], -(x + k))
    assert list(run(session, feeds, ["z"])) == ["z"]
    assert run(session, feeds, []) == {}


@pytest.mark.parametrize(
    "feeds",
    [
        {"x": normal(1, 4, 3)},
        {"x": normal(1, 4, 3), "k": normal(2, 7)},
        {"x": normal(1, 4, 3), "k": normal(2, 3).astype(np.float64)},
        {"x": [[1, "a", 2]], "k": normal(2, 3)},
    ],
    ids=["missing", "shape", "dtype", "no array"],
)
def test_feeds_that_do_not_fit_are_the_models_error(
    feeds: dict[str, Any], session: ort.InferenceSession
) -> None:
    with pytest.raises(ModelError, match=r"^onnxruntime failed to run the model: \S"):
        run(session, feeds)


def test_two_sessions_over_samples(parse_model: ParseModel) -> None:
    text = "g (float[N,6] x) => (float[N,6] y) {{ y = {}(x, k) }}"
    k = np.full(6, 0.01, np.float32)
    first, second = (make_session(parse_model(text.format(op), {"k": k}), threads=1) for op in ("Add", "Sub"))
    x = normal(1, 20, 6)
    seen: list[int] = []
    model = parse_model(text.format("Add"), {"k": k})
    data = open_data({"x": x}, input_specs(model))
    found = compare_sessions(first, second, data, batch=8, progress=seen.append)
    assert seen == [8, 16, 20]
    assert found.samples == 20
    whole = difference(x + k, x - k)
    assert found.outputs["y"].sqnr_db == pytest.approx(whole.sqnr_db, rel=1e-12)
    assert compare_sessions(first, second, data, limit=5).samples == 5
    # evenly spaced samples, the same for both
    assert compare_sessions(first, first, data, limit=5).outputs["y"].as_json()["equal"]
