"""Names, dtypes, shapes and values of arrays against the model's inputs."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxq.data.checks import as_array, as_input, as_labels, check_dtype, check_shape, label_name
from onnxq.data.inputs import InputSpec
from onnxq.errors import DataError


def spec(
    name: str = "x", dtype: Any = np.float32, shape: tuple[int | str | None, ...] | None = ("N", 2)
) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


def message(function: Any, *args: Any) -> str:
    with pytest.raises(DataError) as error:
        function(*args)
    return str(error.value)


def test_labels_are_the_array_beside_the_inputs() -> None:
    inputs = [spec("a"), spec("b")]
    assert label_name("F", ["b", "a"], inputs) is None
    assert label_name("F", ["label", "b", "a"], inputs) == "label"
    assert label_name("F", ["b", "a", "labels"], inputs) == "labels"
    assert (
        label_name("F", ["label", "labels"], [spec("label")]) == "labels"
    )  # `label` is an input of this model


def test_missing_and_unexpected_names() -> None:
    inputs = [spec("input"), spec("mask")]
    assert message(label_name, "F", ["inptu", "mask", "label"], inputs) == (
        "F has no array 'input'; did you mean its array 'inptu'? It has: inptu, mask, label"
    )
    assert message(label_name, "F", ["q"], inputs) == "F has no array 'input'; it has: q"
    assert message(label_name, "F", [], inputs) == "F has no array 'input'; it has: nothing"
    assert message(label_name, "F", ["input", "mask", "q"], inputs) == (
        "F has an array 'q' that is no input of the model; "
        "the inputs are: input, mask (labels are named 'label')"
    )
    assert message(label_name, "F", ["input", "mask", "lable"], inputs) == (
        "F has an array 'lable' that is no input of the model; did you mean 'label'? "
        "The inputs are: input, mask (labels are named 'label')"
    )
    assert message(label_name, "F", ["input", "mask", "label", "labels"], inputs) == (
        "F has both 'label' and 'labels'; keep one of them"
    )


@pytest.mark.parametrize(
    ("have", "want"),
    [
        (np.float32, np.float32),
        (np.float64, np.float32),
        (np.float16, np.float32),
        (np.float32, np.float16),
        (np.float32, ml_dtypes.bfloat16),
        (np.int32, np.int64),
        (np.int64, np.uint8),
        (np.bool_, np.bool_),
    ],
)
def test_dtypes_of_a_kind_are_converted(have: Any, want: Any) -> None:
    check_dtype("F", np.dtype(have), spec(dtype=want))
    values = np.array([[0, 1], [1, 0]], have)
    cast = as_input("F", values, spec(dtype=want), np.arange(2))
    assert cast.dtype == want
    np.testing.assert_array_equal(cast.astype(np.float64), values.astype(np.float64))


@pytest.mark.parametrize(
    ("have", "want"), [("bool", "int64"), ("float32", "int64"), ("<U3", "float32"), ("int64", "bool")]
)
def test_dtypes_of_another_kind_are_refused(have: str, want: str) -> None:
    assert message(check_dtype, "F", np.dtype(have), spec(dtype=want)) == (
        f"F: array 'x' is {have}, but the model's input is {want}; "
        f"convert it with array.astype('{want}') if its values mean the same"
    )


def test_pixels_are_not_taken_for_floats() -> None:
    assert message(check_dtype, "F", np.dtype(np.uint8), spec()) == (
        "F: array 'x' is uint8, but the model's input is float32; "
        "convert and scale it as in training, for example array.astype('float32') / 255"
    )


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_name_the_first_sample(bad: float, dtype: Any) -> None:
    values = np.ones((4, 2, 3), dtype)
    values[2:, 1, 0] = bad
    rows = np.array([0, 5, 10, 15])
    assert (
        message(as_input, "F", values, spec(), rows) == "F: array 'x' has a NaN or an infinity in sample 10"
    )
    assert (
        message(as_labels, "F", values[:, 1, 0], rows)
        == "F: the labels have a NaN or an infinity in sample 10"
    )


def test_values_beyond_the_dtype_name_the_first_sample() -> None:
    large = np.array([1.0, 1e30, 1e300])
    assert message(as_input, "F", large, spec(), np.arange(3)) == (
        "F: array 'x' has a value too large for float32 in sample 2"
    )
    counts = np.array([0, 255, 256, -1])
    assert message(as_input, "F", counts, spec(dtype=np.uint8), np.arange(7, 11)) == (
        "F: array 'x' is int64 and has a value that the model's uint8 cannot hold in sample 9"
    )
    negative = np.array([0, -1], np.int8)
    assert "cannot hold in sample 1" in message(as_input, "F", negative, spec(dtype=np.uint64), np.arange(2))


def test_shapes() -> None:
    check_shape("F", (5, 3, 9), spec(), ("N", 3, None))
    assert message(check_shape, "F", (5, 4), spec(), ("N", 3)) == (
        "F: array 'x' has shape (5, 4), but the model's input takes (N, 3)"
    )
    assert message(check_shape, "F", (5, 3), spec(), ("N", 3, None)) == (
        "F: array 'x' has shape (5, 3), but the model's input takes (N, 3, ?)"
    )


def test_channels_on_the_other_side_are_hinted_at() -> None:
    hint = message(check_shape, "F", (5, 32, 30, 3), spec(), ("N", 3, 32, 30))
    assert hint.endswith("takes (N, 3, 32, 30); its channels come last: use array.transpose(0, 3, 1, 2)")
    assert np.zeros((5, 32, 30, 3)).transpose(0, 3, 1, 2).shape == (5, 3, 32, 30)
    hint = message(check_shape, "F", (5, 3, 32, 30), spec(), ("N", 32, 30, 3))
    assert hint.endswith("; its channels come first: use array.transpose(0, 2, 3, 1)")
    assert "channels" not in message(check_shape, "F", (5, 32, 31, 3), spec(), ("N", 3, 32, 30))


def test_values_that_are_no_arrays() -> None:
    assert message(as_array, "F", "x", [[1], [1, 2]]).startswith(
        "F: array 'x' is a list that cannot be read: "
    )
    assert message(as_array, "F", "x", [None]) == "F: array 'x' is a list of Python objects; give numbers"
