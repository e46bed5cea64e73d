"""Folders of .npz and .npy files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxq.data import InputSpec, open_data
from onnxq.errors import DataError


def inputs(*shape: int | str | None) -> tuple[InputSpec, ...]:
    return (InputSpec("x", np.dtype(np.float32), shape),)


X = np.random.default_rng(5).normal(size=(11, 3)).astype(np.float32)
PARTS = ((0, 4), (4, 5), (5, 5), (5, 11))  # the rows of each file; one is empty


def npz_folder(folder: Path, labels: bool = True) -> Path:
    for number, (start, stop) in enumerate(PARTS):
        arrays: dict[str, Any] = {"x": X[start:stop]} | ({"label": np.arange(start, stop)} if labels else {})
        np.savez(folder / f"{number}.npz", **arrays)
    return folder


def refused(source: Path, *shape: int | str | None) -> str:
    with pytest.raises(DataError) as error:
        list(open_data(source, inputs(*shape)).batches(4))
    return str(error.value)


@pytest.mark.parametrize("limit", [None, 5, 11])
def test_shards_read_as_one_file(tmp_path: Path, limit: int | None) -> None:
    sharded = open_data(npz_folder(tmp_path), inputs("N", 3))
    joined = open_data({"x": X, "label": np.arange(11)}, inputs("N", 3))
    assert (sharded.count(), sharded.has_labels, sharded.source) == (11, True, str(tmp_path))
    for batch in (1, 3, 20):
        pairs = zip(sharded.batches(batch, limit), joined.batches(batch, limit), strict=True)
        for have, want in pairs:
            assert have.size == want.size
            np.testing.assert_array_equal(have.feeds["x"], want.feeds["x"])
            assert have.labels is not None
            assert want.labels is not None
            np.testing.assert_array_equal(have.labels, want.labels)
    assert sharded.digest(limit) == joined.digest(limit)


def test_a_file_per_sample_sorted_by_name(tmp_path: Path) -> None:
    for number in range(11):
        np.save(tmp_path / f"{number:02}.npy", X[number])
    data = open_data(tmp_path, inputs("N", 3))
    assert [batch.size for batch in data.batches(4)] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate([batch.feeds["x"] for batch in data.batches(4)]), X)
    assert [batch.size for batch in open_data(tmp_path, inputs(5, 3)).batches(1)] == [5, 5]


def test_npy_shards_and_single_samples_mix(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", X[:10])
    np.save(tmp_path / "b.npy", X[10])
    (batch,) = open_data(tmp_path, inputs("N", 3)).batches(32)
    np.testing.assert_array_equal(batch.feeds["x"], X)


def test_samples_of_other_shapes_start_a_new_batch(tmp_path: Path) -> None:
    for name, array in (("a", X[:2]), ("b", X[2:4]), ("c", X[4:8, :2])):
        np.save(tmp_path / f"{name}.npy", array)
    shapes = [batch.feeds["x"].shape for batch in open_data(tmp_path, inputs("N", "L")).batches(32)]
    assert shapes == [(4, 3), (4, 2)]
    assert [batch.size for batch in open_data(tmp_path, inputs(4, "L")).batches(1)] == [4, 4]
    assert refused(tmp_path, 8, "L") == (
        f"'{tmp_path}': samples 0 to 7 have different shapes, but the model takes batches of exactly 8"
    )


def test_errors_name_the_file_and_its_sample(tmp_path: Path) -> None:
    npz_folder(tmp_path)
    bad = X[5:].copy()
    bad[2] = np.nan
    path = tmp_path / "3.npz"
    np.savez(path, x=bad, label=np.arange(6))
    assert refused(tmp_path, "N", 3) == f"'{path}': array 'x' has a NaN or an infinity in sample 2"
    np.savez(path, y=bad)
    assert refused(tmp_path, "N", 3) == f"'{path}' has no array 'x'; it has: y"
    np.savez(path, x=X[5:])
    assert refused(tmp_path, "N", 3) == f"'{path}' has no array 'label', but other files of its folder have"


def test_shards_of_samples_and_of_whole_feeds(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X)
    np.savez(tmp_path / "b.npz", x=X[None])
    assert refused(tmp_path, "N", 3) == (
        f"'{tmp_path / 'b.npz'}' and '{tmp_path / 'a.npz'}' differ in rank; one of them holds whole feeds"
    )


def test_a_shard_that_changes_is_noticed(tmp_path: Path) -> None:
    data = open_data(npz_folder(tmp_path), inputs("N", 3))
    np.savez(tmp_path / "3.npz", x=X, label=np.arange(11))
    with pytest.raises(DataError) as error:
        list(data.batches(4))
    assert str(error.value) == f"'{tmp_path / '3.npz'}' changed while it was read"


def test_no_samples_in_any_shard(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X[:0])
    assert refused(tmp_path, "N", 3) == f"'{tmp_path}' has no samples"
