"""Input specs of models against what the graph was made of."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxq.data import InputSpec, input_specs
from onnxq.data.inputs import fixed_batch
from onnxq.errors import DataError, ModelError


def model(
    inputs: list[onnx.ValueInfoProto], constants: list[onnx.TensorProto] | None = None
) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph([], "g", inputs, [], constants or []))


def spec(name: str, *shape: int | str | None) -> InputSpec:
    return InputSpec(name, np.dtype(np.float32), shape)


def test_names_dtypes_and_shapes_in_graph_order() -> None:
    value = helper.make_tensor_value_info
    unknown_rank = value("r", TensorProto.FLOAT16, None)
    inputs = [
        value("image", TensorProto.FLOAT, ["N", 3, None, 8]),
        value("ids", TensorProto.INT64, [2]),
        unknown_rank,
        value("scalar", TensorProto.BOOL, []),
    ]
    assert input_specs(model(inputs)) == (
        InputSpec("image", np.dtype(np.float32), ("N", 3, None, 8)),
        InputSpec("ids", np.dtype(np.int64), (2,)),
        InputSpec("r", np.dtype(np.float16), None),
        InputSpec("scalar", np.dtype(np.bool_), ()),
    )


def test_initializers_among_the_inputs_are_left_out() -> None:
    value = helper.make_tensor_value_info
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [0.5])
    old = model([value("x", TensorProto.FLOAT, [1]), value("w", TensorProto.FLOAT, [1])], [weight])
    assert [each.name for each in input_specs(old)] == ["x"]


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_below_one_are_dynamic(size: int) -> None:
    (found,) = input_specs(model([helper.make_tensor_value_info("x", TensorProto.FLOAT, [size, 3])]))
    assert found.shape == (None, 3)


def test_an_input_that_is_no_tensor_is_refused() -> None:
    sequence = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None)
    with pytest.raises(ModelError) as error:
        input_specs(model([sequence]))
    assert str(error.value) == "input 's' of the model is a sequence; only tensors can be fed"


def test_an_input_without_a_type_is_refused() -> None:
    with pytest.raises(ModelError, match="input 'x' of the model is untyped"):
        input_specs(model([onnx.ValueInfoProto(name="x")]))
    with pytest.raises(ModelError, match="input 'x' of the model has no element type"):
        input_specs(model([helper.make_tensor_value_info("x", TensorProto.UNDEFINED, [1])]))


def test_a_spec_prints_as_dtype_and_shape() -> None:
    assert str(spec("x", "N", 3, None)) == "float32 (N, 3, ?)"
    assert str(InputSpec("x", np.dtype(np.int64), None)) == "int64 of any rank"


def test_fixed_batch_is_the_leading_dimension_that_all_inputs_share() -> None:
    assert fixed_batch([spec("a", "N", 3), spec("b", None), spec("c")]) is None
    assert fixed_batch([spec("a", 4, 3), spec("b", "N", 9), spec("c", 4)]) == 4
    with pytest.raises(DataError) as error:
        fixed_batch([spec("a", 4, 3), spec("b", 2)])
    assert "fix different leading dimensions ('a' 4, 'b' 2)" in str(error.value)
    assert "each entry is then a whole feed" in str(error.value)
