"""ONNX's test_data_set_* folders."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxq.data import InputSpec, open_data
from onnxq.errors import DataError

TWO = (
    InputSpec("x", np.dtype(np.float32), ("N", 2)),
    InputSpec("ids", np.dtype(np.int64), ("N",)),
)


def write(folder: Path, *arrays: Any) -> Path:
    folder.mkdir(parents=True)
    for number, array in enumerate(arrays):
        onnx.save_tensor(onnx.numpy_helper.from_array(np.asarray(array)), folder / f"input_{number}.pb")
    onnx.save_tensor(onnx.numpy_helper.from_array(np.zeros(3)), folder / "output_0.pb")
    return folder


def feed(value: float, rows: int = 1) -> tuple[Any, Any]:
    return np.full((rows, 2), value, np.float32), np.arange(rows)


def refused(path: Path) -> str:
    with pytest.raises(DataError) as error:
        list(open_data(path, TWO).batches(1))
    return str(error.value)


def test_each_set_is_a_feed_in_the_order_of_the_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 0):
        write(tmp_path / f"test_data_set_{number}", *feed(number, rows=number + 1))
    (tmp_path / "model.onnx").touch()
    data = open_data(tmp_path, TWO)
    assert (data.has_labels, data.count()) == (False, None)
    batches = list(data.batches(4))
    assert [batch.feeds["x"][0, 0] for batch in batches] == [0, 2, 10]
    assert [batch.size for batch in batches] == [1, 3, 11]
    assert all(batch.labels is None for batch in batches)
    np.testing.assert_array_equal(batches[1].feeds["ids"], [0, 1, 2])


def test_one_set_by_itself(tmp_path: Path) -> None:
    (batch,) = open_data(write(tmp_path / "set", *feed(3.0)), TWO).batches(1)
    np.testing.assert_array_equal(batch.feeds["x"], [[3, 3]])


def test_the_limit_takes_sets_evenly_spaced(tmp_path: Path) -> None:
    for number in range(6):
        write(tmp_path / f"test_data_set_{number}", *feed(number, rows=4))
    data = open_data(tmp_path, TWO)
    taken = {limit: [batch.feeds["x"][0, 0] for batch in data.batches(1, limit)] for limit in (1, 4, 13, 99)}
    assert [batch.size for batch in data.batches(1, 1)] == [4]  # a set is never cut
    assert taken == {1: [0], 4: [0], 13: [0, 2, 4], 99: [0, 1, 2, 3, 4, 5]}


def test_files_that_do_not_match_the_inputs(tmp_path: Path) -> None:
    path = write(tmp_path / "a", feed(1)[0])
    assert refused(path) == f"'{path}' has no file input_1.pb for the model's input 'ids'"
    path = write(tmp_path / "b", *feed(1), np.zeros(1))
    assert refused(path) == f"'{path}' holds 3 inputs, but the model has 2: x, ids"
    path = write(tmp_path / "c", np.zeros((1, 3), np.float32), np.zeros(1, np.int64))
    assert refused(path) == f"'{path}': array 'x' has shape (1, 3), but the model's input takes (N, 2)"
    path = write(tmp_path / "d", np.full((2, 2), np.nan, np.float32), np.zeros(2, np.int64))
    assert refused(path) == f"'{path}': array 'x' has a NaN or an infinity in sample 0"
    path = write(tmp_path / "e", np.zeros((2, 2), np.float32), np.zeros(3, np.int64))
    assert refused(path) == f"'{path}': arrays differ in samples: 'x' has 2, 'ids' has 3"


@pytest.mark.parametrize("content", [b"", b"text that is no protobuf", b"\x08\x02\x10\x01\x4a\x01\x00"])
def test_unreadable_tensors(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "a", *feed(1))
    (path / "input_0.pb").write_bytes(content)
    assert refused(path).startswith(f"'{path / 'input_0.pb'}' is no readable ONNX tensor: ")
