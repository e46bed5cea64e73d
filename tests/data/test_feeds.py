"""Feeds from Python functions and lists."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxq.data import Dataset, InputSpec, open_data
from onnxq.errors import DataError, UsageError


def spec(name: str, *shape: int | str | None, dtype: Any = np.float32) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


ONE = (spec("x", "N", 2),)
X = np.random.default_rng(6).normal(size=(9, 2)).astype(np.float32)
SIZES = (4, 1, 3)  # rows of the feeds


def feeds() -> Iterator[dict[str, Any]]:
    for stop, size in zip(np.cumsum(SIZES), SIZES, strict=True):
        yield {"x": X[stop - size : stop], "label": np.arange(stop - size, stop)}


def sizes(data: Dataset, limit: int | None = None) -> list[int]:
    return [batch.size for batch in data.batches(32, limit)]


def refused(source: Any, inputs: tuple[InputSpec, ...] = ONE) -> str:
    with pytest.raises(DataError) as error:
        list(open_data(source, inputs).batches(1))
    return str(error.value)


def test_each_dict_is_a_batch() -> None:
    data = open_data(feeds, ONE)
    assert (data.source, data.count(), data.has_labels) == ("feeds", None, True)
    for _ in range(2):
        batches = list(data.batches(2))
        assert [batch.size for batch in batches] == list(SIZES)
        np.testing.assert_array_equal(np.concatenate([batch.feeds["x"] for batch in batches]), X[:8])
    labels = [batch.labels for batch in batches if batch.labels is not None]
    np.testing.assert_array_equal(np.concatenate(labels), np.arange(8))


def test_a_function_that_requires_a_parameter_gets_the_specs() -> None:
    def made(inputs: tuple[InputSpec, ...], rows: int = 3) -> list[dict[str, Any]]:
        return [{each.name: np.ones((rows, 2), np.float32) for each in inputs}]

    assert sizes(open_data(made, ONE)) == [3]
    assert sizes(open_data(lambda rows=5: [{"x": X[:rows]}], ONE)) == [5]
    assert sizes(open_data(lambda *args: [{"x": X[: 1 + len(args)]}], ONE)) == [1]


def test_a_function_that_requires_more_is_refused() -> None:
    def two(a: Any, b: Any) -> None: ...

    def keyword(*, a: Any) -> None: ...

    for function, names in ((two, "a, b"), (keyword, "a")):
        with pytest.raises(UsageError) as error:
            open_data(function, ONE)
        assert f"requires arguments ({names}); it must take none, or one: the input specs" in str(error.value)


def test_tuples_carry_labels() -> None:
    data = open_data(lambda: [({"x": X}, list(range(9)))], ONE)
    assert data.has_labels
    (batch,) = data.batches(1)
    assert batch.labels is not None
    np.testing.assert_array_equal(batch.labels, np.arange(9))
    single = next(open_data([({"x": X[:1]}, 7)], ONE).batches(1))
    assert single.labels is not None
    assert single.labels.tolist() == [7]


def test_the_limit_takes_the_first_samples() -> None:
    data = open_data(feeds, ONE)
    assert sizes(data, 6) == [4, 1, 1]
    assert sizes(data, 5) == [4, 1]
    assert sizes(data, 3) == [3]
    assert sizes(data, 99) == [4, 1, 3]
    last = list(data.batches(1, 6))[-1]
    assert last.labels is not None
    assert last.labels.tolist() == [5]


def test_the_limit_does_not_read_on() -> None:
    def endless() -> Iterator[dict[str, Any]]:
        while True:
            yield {"x": X[:3]}

    assert sizes(open_data(endless, ONE), 6) == [3, 3]


def test_feeds_of_fixed_size_are_not_cut() -> None:
    data = open_data([{"x": X[:4]}, {"x": X[4:8]}], (spec("x", 4, 2),))
    assert sizes(data, 6) == [4]
    assert sizes(data, 2) == [4]
    recurrent = (spec("x", "N", 2), spec("state", 3, "N"))
    data = open_data([{"x": X[:4], "state": np.ones((3, 4), np.float32)}] * 2, recurrent)
    assert sizes(data, 6) == [4]


def test_digest_equals_for_equal_passes_and_depends_on_feeds() -> None:
    assert open_data(feeds, ONE).digest() == open_data(list(feeds()), ONE).digest()
    assert open_data(feeds, ONE).digest() != open_data(feeds, ONE).digest(7)
    tall, wide = X[:6].reshape(2, 6), X[:6].reshape(6, 2)
    free = (spec("x", None, None),)
    assert open_data([{"x": X[:2]}, {"x": X[2:6]}], ONE).digest() != open_data([{"x": X[:6]}], ONE).digest()
    assert open_data([{"x": tall}], free).digest() != open_data([{"x": wide}], free).digest()


def test_lists_are_data_and_generators_are_not() -> None:
    assert sizes(open_data(list(feeds()), ONE)) == [4, 1, 3]
    with pytest.raises(DataError) as error:
        open_data(feeds(), ONE)
    assert str(error.value) == (
        "a generator can be read only once; pass the function that makes it, or a list"
    )
    with pytest.raises(DataError) as error:
        open_data(3, ONE)  # type: ignore[arg-type]
    assert str(error.value).startswith("a int is no data source; give a dict of arrays")


def test_yields_of_the_wrong_type() -> None:
    assert refused(lambda: [X]) == (
        "function 'test_yields_of_the_wrong_type.<locals>.<lambda>', feed 0 is a ndarray; "
        "yield a dict of input name -> array, or a tuple (dict, labels)"
    )
    assert "feed 1 is a NoneType; yield a dict" in refused([{"x": X}, None])
    assert refused(lambda: {"x": X}).endswith("gave a dict; it must yield dicts of input name -> array")
    assert refused(lambda: None).endswith("gave a NoneType; it must yield dicts of input name -> array")


def test_feeds_that_do_not_fit() -> None:
    where = "the list of feeds, feed 0"
    assert refused([{"y": X}]) == f"{where} has no array 'x'; it has: y"
    assert refused([{"x": X, "z": X}]).startswith(f"{where} has an array 'z' that is no input of the model")
    assert refused([{"x": X[0]}]) == f"{where}: array 'x' has shape (2), but the model's input takes (N, 2)"
    assert (
        refused([{"x": X[:, :1]}])
        == f"{where}: array 'x' has shape (9, 1), but the model's input takes (N, 2)"
    )
    assert refused([{"x": X[:0]}]) == f"{where}: array 'x' of shape (0, 2) is empty"
    assert refused([{"x": [[1, 2]]}]).startswith(
        f"{where}: array 'x' is int64, but the model's input is float32"
    )
    assert refused([({"x": X}, [1, 2])]) == f"{where} has 2 labels for 9 samples"
    assert refused([({"x": X[:1]}, ["a"])]) == f"{where}: the labels are <U1; give integers or floats"
    assert (
        refused([({"x": X[:2]}, [0, np.nan])]) == f"{where}: the labels have a NaN or an infinity in sample 1"
    )
    assert refused([({"x": X[:1], "label": [1]}, [1])]) == (
        f"{where} has labels twice: in the tuple and in its array 'label'"
    )
    two = (spec("x", "N", 2), spec("y", "N"))
    assert (
        refused([{"x": X, "y": X[:4, 0]}], two) == f"{where}: arrays differ in samples: 'x' has 9, 'y' has 4"
    )


@pytest.mark.parametrize(
    ("first", "second", "size"), [(None, None, 1), ("N", "M", 1), ("N", 2, 4), (4, "M", 2), (4, 2, 1)]
)
def test_a_feed_without_a_common_leading_axis_is_one_sample(
    first: int | str | None, second: int | str | None, size: int
) -> None:
    inputs = (spec("x", first, 2), spec("y", second))
    (batch,) = open_data([{"x": X[:4], "y": X[:2, 0]}], inputs).batches(1)
    assert batch.size == size


def test_graphs_are_as_many_samples_as_feeds() -> None:
    inputs = (spec("nodes", "N", 2), spec("edges", "E", 2))
    data = open_data([{"nodes": X[:n], "edges": X[: n + 2]} for n in (4, 6, 5, 7)], inputs)
    assert [len(batch.feeds["nodes"]) for batch in data.batches(32, 3)] == [4, 6, 5]


def test_nan_names_the_sample_of_the_source() -> None:
    bad = X[:3].copy()
    bad[1, 0] = np.nan
    assert refused([{"x": X[:4]}, {"x": bad}]) == (
        "the list of feeds, feed 1: array 'x' has a NaN or an infinity in sample 5"
    )


def test_labels_in_some_feeds_only() -> None:
    message = refused([{"x": X, "label": range(9)}, {"x": X}])
    assert message == "the list of feeds, feed 1 has no labels, unlike the feeds before it"
    assert refused([{"x": X}, {"x": X, "label": range(9)}]).endswith(
        "feed 1 has labels, unlike the feeds before it"
    )


def test_no_feeds() -> None:
    assert refused([]) == "the list of feeds has no samples"
    assert not open_data([], ONE).has_labels


def test_what_the_function_raises_is_told_and_kept() -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield {"x": X}
        raise KeyError("pixel")

    with pytest.raises(DataError) as error:
        list(open_data(broken, ONE).batches(1))
    assert str(error.value).endswith("broken' failed at feed 1 with KeyError: 'pixel'")
    assert isinstance(error.value.__cause__, KeyError)

    def raises() -> None:
        raise DataError("my own sentence")

    assert refused(raises) == "my own sentence"


def test_the_callers_errors_are_not_taken_for_the_functions() -> None:
    def consume() -> None:
        for _ in open_data(feeds, ONE).batches(1):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()


def test_functions_in_files(tmp_path: Path) -> None:
    path = tmp_path / "calib.py"
    path.write_text(
        "import numpy as np\ndef feeds():\n    yield {'x': np.ones((2, 2), np.float32)}, [0, 1]\n"
    )
    source = f"{path}:feeds"
    data = open_data(source, ONE)
    assert (data.source, data.has_labels, sizes(data)) == (source, True, [2])
    assert data.warnings() == (f"'{source}': every value of input 'x' is 1 in all 2 samples",)
