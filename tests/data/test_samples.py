"""Which samples are taken and how they are batched: the same rules for every source of rows."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.data import Dataset, InputSpec, open_data
from onnxq.errors import DataError, UsageError


def inputs(*shape: int | str | None) -> tuple[InputSpec, ...]:
    return (InputSpec("x", np.dtype(np.float32), shape),)


def ramp(count: int) -> dict[str, Any]:
    """Samples whose values are their numbers."""
    return {"x": np.repeat(np.arange(count, dtype=np.float32)[:, None], 2, axis=1), "label": np.arange(count)}


def taken(data: Dataset, batch: int, limit: int | None = None) -> list[int]:
    """Numbers of the samples, which feeds and labels must agree on."""
    numbers: list[int] = []
    for item in data.batches(batch, limit):
        assert item.labels is not None
        assert item.size == len(item.labels) == len(item.feeds["x"])
        np.testing.assert_array_equal(item.feeds["x"][:, 0], item.labels)
        numbers += item.labels.tolist()
    return numbers


@settings(max_examples=80, deadline=None)
@given(count=st.integers(1, 60), limit=st.integers(1, 70), batch=st.integers(1, 20))
def test_limit_takes_evenly_spaced_samples(count: int, limit: int, batch: int) -> None:
    used = min(limit, count)
    expected = [i * count // used for i in range(used)]
    assert taken(open_data(ramp(count), inputs("N", 2)), batch, limit) == expected


def test_each_pass_starts_over_and_passes_may_overlap(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", **ramp(10))
    data = open_data(tmp_path / "a.npz", inputs("N", 2))
    first, second = data.batches(3), data.batches(3)
    next(first)
    next(first)
    assert next(second).feeds["x"][0, 0] == 0
    assert next(first).feeds["x"][0, 0] == 6
    assert taken(data, 4) == taken(data, 4) == list(range(10))


def test_a_fixed_leading_dimension_sets_the_batch() -> None:
    data = open_data(ramp(10), inputs(4, 2))
    assert [item.size for item in data.batches(3)] == [4, 4]
    assert data.warnings() == (
        "the dict of arrays: the last 2 of 10 samples are left out, as the model takes batches of exactly 4",
    )
    assert taken(data, 1) == list(range(8))
    assert taken(data, 1, limit=5) == [0, 2, 4, 6]
    list(open_data(ramp(8), inputs(4, 2)).batches(1))
    assert taken(open_data(ramp(3), inputs(1, 2)), 64) == [0, 1, 2]


def test_too_few_samples_for_a_fixed_batch() -> None:
    with pytest.raises(DataError) as error:
        list(open_data(ramp(3), inputs(4, 2)).batches(1))
    assert str(error.value) == "the dict of arrays gives 3 samples, but the model takes batches of exactly 4"
    with pytest.raises(DataError, match="gives 2 samples"):
        list(open_data(ramp(8), inputs(4, 2)).batches(1, limit=2))


@pytest.mark.parametrize(("batch", "limit", "name"), [(0, None, "batch"), (1, 0, "limit"), (-3, 1, "batch")])
def test_sizes_below_one_are_refused_at_once(batch: int, limit: int | None, name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} must be at least 1 sample, not"):
        open_data(ramp(3), inputs("N", 2)).batches(batch, limit)


def test_digest_depends_on_samples_and_not_on_batches() -> None:
    data = open_data(ramp(10), inputs("N", 2))
    for limit in (None, 7):
        for batch in (1, 3, 7, 100):
            other = open_data(ramp(10), inputs("N", 2))
            list(other.batches(batch, limit, digested=True))
            assert other.digest(limit) == data.digest(limit)
    assert data.digest(10) == data.digest(99) == data.digest()
    assert data.digest(9) != data.digest()


def test_samples_are_read_once_when_their_digest_is_found_on_the_way() -> None:
    passes = []

    def feeds() -> Iterator[dict[str, np.ndarray]]:
        passes.append("started")
        yield from ({"x": row[None]} for row in ramp(10)["x"])

    data = open_data(feeds, inputs("N", 2))
    passes.clear()
    list(data.batches(1, 7, digested=True))
    found = data.digest(7)
    assert len(passes) == 1
    assert found == open_data(feeds, inputs("N", 2)).digest(7) != data.digest()


def test_a_pass_that_is_broken_off_gives_no_digest() -> None:
    data = open_data(ramp(10), inputs("N", 2))
    next(data.batches(4, digested=True))
    assert data.digest() == open_data(ramp(10), inputs("N", 2)).digest()


def test_a_shorter_pass_does_not_take_the_warnings_of_a_longer_one() -> None:
    data = open_data({"x": np.ones((7, 2), np.float32)}, inputs(2, 2))
    list(data.batches(2))
    found = data.warnings()
    assert len(found) == 2
    assert "in all 6 samples" in found[0]
    assert "the last 1 of 7 samples are left out" in found[1]
    list(data.batches(2, 4))
    assert data.warnings() == found


def test_digest_sees_names_dtypes_shapes_values_and_labels() -> None:
    x = np.arange(8, dtype=np.float32).reshape(4, 2)
    variants = [
        open_data({"x": x}, inputs("N", 2)),
        open_data({"x": x[::-1]}, inputs("N", 2)),
        open_data({"x": x.reshape(4, 1, 2)}, inputs("N", 1, 2)),
        open_data({"x": x.reshape(2, 4)}, inputs("N", 4)),
        open_data({"x": x, "label": np.arange(4)}, inputs("N", 2)),
        open_data({"x": x, "label": np.arange(4, dtype=np.int32)}, inputs("N", 2)),
        open_data({"y": x}, (InputSpec("y", np.dtype(np.float32), ("N", 2)),)),
        open_data({"x": x.view(np.int32)}, (InputSpec("x", np.dtype(np.int32), ("N", 2)),)),
        open_data({"x": x.reshape(1, 4, 2)}, inputs("N", 2)),
    ]
    assert len({data.digest() for data in variants}) == len(variants)


def test_digest_sees_where_shapes_change(tmp_path: Path) -> None:
    flat = np.arange(6, dtype=np.float32)
    digests = set()
    for number, cuts in enumerate(([2], [4], [2, 4])):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, part in zip("abc", np.split(flat, cuts), strict=False):
            np.save(folder / f"{name}.npy", part[None])
        digests.add(open_data(folder, inputs("N", "L")).digest())
    assert len(digests) == 3


def peak(path: Path, limit: int | None) -> int:
    """Bytes at the most while a file is read in batches of 16."""
    tracemalloc.start()
    try:
        for item in open_data(path, inputs("N", 1024)).batches(16, limit):
            assert item.size == 16 or limit is None
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compressed", [False, True])
def test_memory_does_not_grow_with_the_samples(tmp_path: Path, compressed: bool) -> None:
    save = np.savez_compressed if compressed else np.savez
    rng = np.random.default_rng(4)
    peaks = {}
    for count in (64, 500, 2000):  # 256 KiB, 2 MB, 8 MB
        path = tmp_path / f"{count}.npz"
        save(path, x=rng.normal(size=(count, 1024)).astype(np.float32), label=np.zeros(count))
        peak(path, None)  # imports and caches
        peaks[count] = peak(path, None), peak(path, 64)
    assert max(peaks[64]) < 1 << 20  # a few batches of 64 KiB, and chunks that are not full
    assert max(peaks[2000]) < 2 << 20  # a few full chunks of 256 KiB; the samples are 8 MB
    growth = np.subtract(peaks[2000], peaks[500])
    assert (
        growth.max() < 256 << 10
    )  # a chunk, which skipped rows fill to a different degree; samples grow by 6 MB


def test_constant_inputs_are_warned_of_after_a_pass() -> None:
    data = open_data({"x": np.zeros((3, 2), np.float32)}, inputs("N", 2))
    assert data.warnings() == ()
    list(data.batches(2))
    assert data.warnings() == ("the dict of arrays: every value of input 'x' is 0 in all 3 samples",)
    fine = open_data(ramp(3), inputs("N", 2))
    list(fine.batches(2))
    assert fine.warnings() == ()


def test_batches_may_be_changed_by_the_caller() -> None:
    data = open_data(ramp(2), inputs("N", 2))
    for number, item in enumerate(data.batches(1)):
        item.feeds["x"][:] = number + 1  # what the next sample holds
    assert data.warnings() == ()
