"""Files and dicts of arrays: what they give, and every refusal."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxq.data import InputSpec, open_data
from onnxq.errors import DataError


def spec(name: str, *shape: int | str | None, dtype: Any = np.float32) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


X = np.random.default_rng(3).normal(size=(10, 4)).astype(np.float32)
IDS = np.arange(10)
ONE = (spec("x", "N", 4),)
TWO = (spec("x", "N", 4), spec("ids", "N", dtype=np.int64))


def refused(source: Any, inputs: tuple[InputSpec, ...]) -> str:
    with pytest.raises(DataError) as error:
        open_data(source, inputs)
    return str(error.value)


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("label", ["label", "labels"])
def test_npz_arrays_become_batches(tmp_path: Path, label: str) -> None:
    arrays: dict[str, Any] = {label: IDS * 2, "ids": IDS.astype(np.int32), "x": X.astype(np.float64)}
    path = save(tmp_path / "a.npz", **arrays)
    data = open_data(str(path), TWO)
    assert (data.source, data.has_labels, data.count()) == (str(path), True, 10)
    batches = list(data.batches(4))
    assert [batch.size for batch in batches] == [4, 4, 2]
    assert [list(batch.feeds) for batch in batches] == [["x", "ids"]] * 3
    np.testing.assert_array_equal(np.concatenate([batch.feeds["x"] for batch in batches]), X)
    np.testing.assert_array_equal(np.concatenate([batch.feeds["ids"] for batch in batches]), IDS)
    np.testing.assert_array_equal(
        np.concatenate([batch.labels for batch in batches if batch.labels is not None]), IDS * 2
    )
    assert batches[0].feeds["x"].dtype == np.float32
    assert batches[0].feeds["ids"].dtype == np.int64


def test_npy_and_dict_give_the_same(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", X)
    from_file, from_dict = open_data(tmp_path / "a.npy", ONE), open_data({"x": X}, ONE)
    assert not from_file.has_labels
    assert next(from_file.batches(4)).labels is None
    assert from_file.digest() == from_dict.digest()
    np.testing.assert_array_equal(next(from_dict.batches(20)).feeds["x"], X)


def test_batches_of_a_dict_are_copies() -> None:
    array = X.copy()
    next(open_data({"x": array}, ONE).batches(10)).feeds["x"][:] = 0
    np.testing.assert_array_equal(array, X)


def test_the_dict_may_be_an_open_npz(tmp_path: Path) -> None:
    with np.load(save(tmp_path / "a.npz", x=X)) as arrays:
        assert open_data(arrays, ONE).count() == 10


def test_names(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz", y=X)
    assert refused(path, ONE) == f"'{path}' has no array 'x'; it has: y"
    path = save(tmp_path / "a.npz", x=X, extra=X)
    assert refused(path, ONE) == (
        f"'{path}' has an array 'extra' that is no input of the model; "
        "the inputs are: x (labels are named 'label')"
    )
    assert refused({"ids": IDS}, TWO) == "the dict of arrays has no array 'x'; it has: ids"


def test_a_single_array_for_several_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", X)
    path = tmp_path / "a.npy"
    assert refused(path, TWO) == (f"'{path}' is for one input, but the model has 2: x, ids; use a .npz file")


def test_counts_must_agree() -> None:
    assert refused({"x": X, "label": IDS[:9]}, ONE) == (
        "the dict of arrays: arrays differ in samples: 'x' has 10, 'label' has 9"
    )
    assert refused({"x": X, "ids": IDS[:4]}, TWO) == (
        "the dict of arrays: arrays differ in samples: 'x' has 10, 'ids' has 4"
    )
    assert refused({"x": X, "label": np.array(1)}, ONE) == (
        "the dict of arrays: arrays differ in samples: 'x' has 10, 'label' has none"
    )


def test_a_number_is_no_array_of_samples() -> None:
    assert refused({"x": np.array(1.0)}, (spec("x"),)) == (
        "the dict of arrays: array 'x' is a single number; its leading axis must be the samples"
    )


def test_dtypes_and_shapes_are_checked_on_opening() -> None:
    assert refused({"x": X.astype(np.uint8)}, ONE).startswith(
        "the dict of arrays: array 'x' is uint8, but the model's input is float32; convert and scale it"
    )
    assert refused({"x": X[:, :3]}, ONE) == (
        "the dict of arrays: array 'x' has shape (10, 3), but the model's input takes (N, 4)"
    )
    assert refused({"x": X[:, 0]}, ONE) == (
        "the dict of arrays: array 'x' has shape (10), but the model's input takes (N, 4)"
    )
    assert refused({"x": X, "label": np.array(["a"] * 10)}, ONE) == (
        "the dict of arrays: the labels are <U1; give integers or floats"
    )


def test_no_samples() -> None:
    assert refused({"x": X[:0]}, ONE) == "the dict of arrays has no samples"


def test_values_are_checked_while_reading(tmp_path: Path) -> None:
    bad = X.copy()
    bad[7, 2] = np.nan
    path = save(tmp_path / "a.npz", x=bad)
    data = open_data(path, ONE)
    with pytest.raises(DataError) as error:
        list(data.batches(3))
    assert str(error.value) == f"'{path}': array 'x' has a NaN or an infinity in sample 7"
    labels = np.where(IDS == 3, np.inf, 0)
    with pytest.raises(DataError) as error:
        list(open_data({"x": X, "label": labels}, ONE).batches(2))
    assert str(error.value) == "the dict of arrays: the labels have a NaN or an infinity in sample 3"


def test_one_more_axis_is_a_whole_feed_per_sample() -> None:
    feeds, labels = X.reshape(5, 2, 4), np.arange(10).reshape(5, 2)
    batches = list(open_data({"x": feeds, "label": labels}, (spec("x", 2, 4),)).batches(32))
    assert [batch.size for batch in batches] == [1] * 5
    np.testing.assert_array_equal(np.stack([batch.feeds["x"] for batch in batches]), feeds)
    np.testing.assert_array_equal(
        np.stack([batch.labels for batch in batches if batch.labels is not None]), labels
    )
    single = next(open_data({"x": feeds, "label": np.arange(5)}, (spec("x", "N", 4),)).batches(1))
    assert single.labels is not None
    assert (single.feeds["x"].shape, single.labels.shape) == ((2, 4), (1,))


def test_a_scalar_input_gets_one_number_per_feed() -> None:
    inputs = (spec("x", "N", 4), spec("threshold"))
    batches = list(open_data({"x": X.reshape(5, 2, 4), "threshold": X[:5, 0]}, inputs).batches(8))
    assert [batch.feeds["threshold"].shape for batch in batches] == [()] * 5
    assert {type(batch.feeds["threshold"]) for batch in batches} == {
        np.ndarray
    }  # onnxruntime takes no numpy scalar
    assert refused({"x": X, "threshold": X[:, 0]}, inputs) == (
        "the dict of arrays: whole feeds (one more axis than the input) in 'threshold' but not in 'x'; "
        "give 'x' one more leading axis too, so that each entry is a whole feed"
    )
    assert refused({"x": X, "threshold": X}, inputs) == (
        "the dict of arrays: array 'threshold' has shape (10, 4), but the model's input takes (samples)"
    )


def test_an_input_of_unknown_rank_takes_any_samples() -> None:
    inputs = (InputSpec("x", np.dtype(np.float32), None),)
    assert next(open_data({"x": X.reshape(5, 2, 2, 2)}, inputs).batches(3)).feeds["x"].shape == (3, 2, 2, 2)
