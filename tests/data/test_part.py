"""The parts of a dataset: every sample of a pass in one of them, for all kinds of sources."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.data import Dataset, InputSpec, Part, open_data
from onnxq.errors import DataError


def inputs(*shape: int | str | None) -> tuple[InputSpec, ...]:
    return (InputSpec("x", np.dtype(np.float32), shape),)


def ramp(count: int) -> dict[str, Any]:
    """Samples whose values are their numbers."""
    return {"x": np.repeat(np.arange(count, dtype=np.float32)[:, None], 2, axis=1), "label": np.arange(count)}


def feeds(count: int, size: int) -> Any:
    """A function that yields whole feeds of several rows."""

    def source() -> Iterator[dict[str, Any]]:
        for i in range(count):
            yield {"x": np.full((size, 2), i, np.float32)}

    return source


def taken(data: Dataset, batch: int, limit: int | None = None) -> list[int]:
    return [int(n) for item in data.batches(batch, limit) for n in item.feeds["x"][:, 0]]


@given(
    count=st.integers(4, 60), samples=st.integers(4, 70), batch=st.integers(1, 20), every=st.integers(2, 5)
)
def test_each_sample_is_in_one_part(count: int, samples: int, batch: int, every: int) -> None:
    data = open_data(ramp(count), inputs("N", 2))
    whole = taken(data, 8, samples)
    parts = [Part(data, samples, every, held=held) for held in (True, False)]
    found = [taken(part, batch) for part in parts]
    assert found == [whole[::every], [n for i, n in enumerate(whole) if i % every]]
    assert [part.count() for part in parts] == [len(numbers) for numbers in found]
    assert all(item.size <= batch for part in parts for item in part.batches(batch))


def test_a_limit_takes_evenly_spaced_samples_with_their_labels() -> None:
    part = Part(open_data(ramp(40), inputs("N", 2)), 40, 4, held=False)
    assert part.has_labels
    every = taken(part, 8)
    for limit in (1, 7, 30, 99):
        used = min(limit, len(every))
        assert taken(part, 4, limit) == [every[i * len(every) // used] for i in range(used)]
    for item in part.batches(7):
        assert item.labels is not None
        np.testing.assert_array_equal(item.labels, item.feeds["x"][:, 0])


def test_a_fixed_leading_dimension_keeps_its_samples_together() -> None:
    data = open_data(ramp(22), inputs(4, 2))
    seen, held = (Part(data, 22, 2, held=held) for held in (False, True))
    assert taken(held, 1) == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]
    assert [item.size for item in seen.batches(8)] == [4, 4]
    assert (seen.count(), held.count()) == (8, 12)
    assert taken(held, 1, 5) == [0, 1, 2, 3]


def test_a_leading_dimension_of_one_takes_samples_one_by_one() -> None:
    part = Part(open_data(ramp(12), inputs(1, 2)), 12, 4, held=False)
    assert [item.size for item in part.batches(8)] == [1] * 9


def test_whole_feeds_stay_whole() -> None:
    data = open_data(feeds(7, 3), inputs("N", 2))
    held = Part(data, 100, 3, held=True)
    assert [item.feeds["x"].shape for item in held.batches(2)] == [(3, 2)] * 3
    assert taken(held, 2) == [0, 0, 0, 3, 3, 3, 6, 6, 6]
    assert held.whole == data.whole


def test_passes_start_over_and_digests_tell_parts_apart() -> None:
    data = open_data(ramp(20), inputs("N", 2))
    seen, held = (Part(data, 20, 4, held=held) for held in (False, True))
    assert taken(held, 3) == taken(held, 3)
    assert len({data.digest(20), seen.digest(20), held.digest(20)}) == 3
    assert held.digest(20) == open_data({k: v[::4] for k, v in ramp(20).items()}, inputs("N", 2)).digest()


def test_nothing_is_read_beyond_a_limit_of_unknown_length() -> None:
    read: list[int] = []

    def source() -> Iterator[dict[str, Any]]:
        for i in range(50):
            read.append(i)
            yield {"x": np.full((1, 2), i, np.float32)}

    data = open_data(source, inputs("N", 2))
    read.clear()
    held = Part(data, 40, 4, held=True)
    assert taken(held, 1, 3) == [0, 4, 8]
    assert max(read) < 20


@pytest.mark.parametrize("held", [True, False])
def test_a_part_without_samples_is_an_error_when_read(held: bool) -> None:
    part = Part(open_data(ramp(1), inputs("N", 2)), 1, 2, held=held)
    if held:
        assert taken(part, 1) == [0]
        return
    with pytest.raises(DataError, match="has no samples"):
        taken(part, 1)
