"""Nothing is lost between models and graphsurgeon graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, checker, helper, numpy_helper, parser

from onnxq.errors import ModelError
from onnxq.model.disk import Spool, file_of
from onnxq.model.surgeon import constant_values, packed_constant, shelve, to_graph, to_model
from onnxq.model.tensors import all_graphs

RNG = np.random.default_rng(4)


def parsed(text: str, *, opset: int = 21, ir: int = 10) -> ModelProto:
    model: ModelProto = parser.parse_model(
        f'<ir_version: {ir}, opset_import: ["" : {opset}, "other" : 2]> {text}'
    )
    return model


def sorted_parts(model: ModelProto) -> ModelProto:
    """The model with its initializers, declarations and attributes in the order of their names."""
    model = ModelProto.FromString(model.SerializeToString())
    for graph in all_graphs(model.graph):
        for field in ("initializer", "value_info"):
            items = sorted(getattr(graph, field), key=lambda item: item.name)
            graph.ClearField(field)
            getattr(graph, field).extend(items)
        for node in graph.node:
            attributes = sorted(node.attribute, key=lambda a: a.name)
            node.ClearField("attribute")
            node.attribute.extend(attributes)
    return model


def assert_round_trip(model: ModelProto) -> gs.Graph:
    before = model.SerializeToString(deterministic=True)
    graph = to_graph(model)
    assert sorted_parts(to_model(graph, model)) == sorted_parts(model)
    assert model.SerializeToString(deterministic=True) == before
    return graph


def stored(name: str, values: NDArray[Any]) -> TensorProto:
    tensor: TensorProto = numpy_helper.from_array(values, name)
    return tensor


def test_metadata_survives() -> None:
    model = parsed(
        "g (float[N, 4] x) => (float[N, 4] y) <float[N, 4] a> { [first] a = Relu(x)\n [second] y = Relu(a) }"
    )
    model.producer_name, model.domain, model.doc_string, model.model_version = "maker", "d", "about", 3
    model.metadata_props.add(key="k", value="v")
    model.graph.doc_string = "graph"
    model.graph.metadata_props.add(key="g", value="1")
    model.graph.node[0].metadata_props.add(key="n", value="2")
    model.graph.node[0].doc_string = "node"
    model.graph.value_info[0].doc_string = "tensor"
    model.graph.input[0].metadata_props.add(key="i", value="4")
    annotation = model.graph.quantization_annotation.add(tensor_name="a")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    graph = assert_round_trip(model)
    graph.nodes[0].op = "Neg"  # another operator has none of the old one's notes
    assert not to_model(graph, model).graph.node[0].metadata_props


def test_types_that_graphsurgeon_has_no_name_for() -> None:
    assert_round_trip(
        parsed(
            """g (seq(float[2]) x, optional(seq(int64[N])) o, float z) => (seq(float[2]) y, optional(seq(int64[N])) p)
            <seq(float[2]) a> {
              [f] a = Identity(x)
              [h] y = Identity(a)
              [i] p = Identity(o) }"""
        )
    )


def test_attributes_that_graphsurgeon_has_no_reader_for() -> None:
    model = parsed("g (float[2] x) => (float[2] y) { [n] y = other.Odd(x) }")
    tensor_type = helper.make_tensor_type_proto(TensorProto.FLOAT, [2])
    sparse = helper.make_sparse_tensor(
        stored("v", np.array([1], np.float32)), stored("i", np.array([1], np.int64)), [3]
    )
    node = model.graph.node[0]
    for name, value in {
        "type": tensor_type,
        "types": [tensor_type, tensor_type],
        "sparse": sparse,
        "tensors": [stored("t", np.array([1, 2], np.int8))],
        "binary": b"\xff\xfe",
        "binaries": [b"\xff", b"a"],
        "text": "ü",
        "one": 1.0,
        "whole": [1.0, 2.0],
    }.items():
        node.attribute.append(helper.make_attribute(name, value))
    for kind in (AttributeProto.FLOATS, AttributeProto.INTS, AttributeProto.STRINGS):
        node.attribute.add(name=f"empty{kind}", type=kind)
    assert_round_trip(model)


def test_a_list_of_bodies_is_refused() -> None:
    model = parsed("g (float[2] x) => (float[2] y) { [odd] y = other.Odd(x) }")
    model.graph.node[0].attribute.append(helper.make_attribute("bodies", [GraphProto(name="b")]))
    with pytest.raises(ModelError, match="'odd'"):
        to_graph(model)


@pytest.mark.parametrize("size", [5, 20000])  # a small one, and one that is shared with the model
@pytest.mark.parametrize(
    "dtype",
    [
        ml_dtypes.int4,
        ml_dtypes.uint4,
        ml_dtypes.int2,
        ml_dtypes.uint2,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fnuz,
        np.float16,
        np.int8,
        np.bool_,
        np.complex64,
    ],
)
def test_values_keep_their_type_when_they_were_read(dtype: Any, size: int) -> None:
    model = parsed("g (float[2] x) => (float[2] y) { [n] y = other.Odd(x, w) }")
    values = RNG.integers(0, 2, size).astype(dtype)
    model.graph.initializer.append(stored("w", values))
    graph = assert_round_trip(model)
    read = graph.nodes[0].inputs[1].values
    assert read.tobytes() == values.tobytes()
    assert to_model(graph, model).graph.initializer[0] == model.graph.initializer[0]


def test_constants_that_bodies_capture_are_written_once() -> None:
    model = parsed(
        """g (float[2] x, bool c) => (float[2] y, float[2] z) {
          [i] y = If (c) <then_branch = t () => (float[2] p) { [a] p = Add(x, w) },
                          else_branch = e () => (float[2] q) <float[2] v = {3, 4}> { [b] q = Mul(w, v) }>
          [d] z = If (c) <then_branch = t2 () => (float[2] r) { [f] r = Add(x, u) },
                          else_branch = e2 () => (float[2] s) { [h] s = Mul(u, w) }> }"""
    )
    model.graph.initializer.append(stored("w", np.ones(9000, np.float32)[:2]))
    model.graph.initializer.append(stored("u", np.array([1, 2], np.float32)))
    assert_round_trip(model)


def test_a_large_captured_constant_is_shared() -> None:
    model = parsed(
        """g (float[9000] x, bool c) => (float[9000] y) {
          [i] y = If (c) <then_branch = t () => (float[9000] p) { [a] p = Add(x, w) },
                          else_branch = e () => (float[9000] q) { [b] q = Mul(x, w) }> }"""
    )
    model.graph.initializer.append(stored("w", np.ones(9000, np.float32)))
    graph = assert_round_trip(model)
    branches = [body.nodes[0].inputs[1] for body in graph.nodes[0].subgraphs()]
    assert branches[0] is branches[1]
    branches[0].values = np.zeros(9000, np.float32)
    (weight,) = to_model(graph, model).graph.initializer
    assert not numpy_helper.to_array(weight).any()


def test_outputs_that_are_constants_or_inputs() -> None:
    model = parsed("g (float[2] x) => (float[2] y, float[2] w, float[2] x) { [n] y = Relu(x) }")
    model.graph.initializer.append(stored("w", np.array([1, 2], np.float32)))
    assert_round_trip(model)


def test_sparse_initializers_survive() -> None:
    model = parsed("g (float[3] x) => (float[3] y) { [n] y = Add(x, w) }")
    sparse = helper.make_sparse_tensor(
        stored("w", np.array([1], np.float32)), stored("i", np.array([1], np.int64)), [3]
    )
    model.graph.sparse_initializer.append(sparse)
    assert_round_trip(model)


def test_a_pass_can_raise_the_opset_and_add_domains() -> None:
    model = parsed("g (float[2] x) => (float[2] y) { [n] y = Relu(x) }", opset=17, ir=8)
    graph = to_graph(model)
    graph.opset = 21
    out = gs.Variable("z", np.float32, [2])
    graph.nodes.append(
        gs.Node("Gelu", "gelu", inputs=[graph.outputs[0]], outputs=[out], domain="com.microsoft")
    )
    graph.outputs = [out]
    after = to_model(graph, model)
    assert {e.domain: e.version for e in after.opset_import} == {"": 21, "other": 2, "com.microsoft": 1}
    assert after.ir_version == 10
    assert model.opset_import[0].version == 17
    checker.check_model(after)


def test_attributes_take_the_type_that_the_operator_declares() -> None:
    model = parsed("g (float[2] x) => (float[2] y) { [n] y = Relu(x) }")
    graph = to_graph(model)
    graph.nodes[0].op = "LeakyRelu"
    graph.nodes[0].attrs["alpha"] = 1
    (attribute,) = to_model(graph, model).graph.node[0].attribute
    assert (attribute.type, attribute.f) == (AttributeProto.FLOAT, 1.0)


def test_renaming_a_constant_leaves_the_source_alone() -> None:
    model = parsed("g (float[9000] x) => (float[9000] y) { [n] y = Add(x, w) }")
    model.graph.initializer.append(stored("w", np.ones(9000, np.float32)))
    graph = to_graph(model)
    graph.nodes[0].inputs[1].name = "renamed"
    assert to_model(graph, model).graph.initializer[0].name == "renamed"
    assert model.graph.initializer[0].name == "w"


def test_two_constants_of_one_name_are_refused() -> None:
    model = parsed("g (float[2] x) => (float[2] y) { [n] y = Add(x, w) }")
    model.graph.initializer.append(stored("w", np.array([1, 2], np.float32)))
    graph = to_graph(model)
    graph.nodes[0].inputs[0] = gs.Constant("w", np.zeros(2, np.float32))
    with pytest.raises(ModelError, match="two constants are named 'w'"):
        to_model(graph, model)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_packed_constants_hold_every_code_low_bits_first(bits: int, dtype: Any) -> None:
    low = -(1 << (bits - 1)) if dtype == np.int8 else 0
    codes = np.arange(low, low + (1 << bits)).astype(dtype)
    odd = np.append(codes, codes[:1]).reshape(1, -1)  # the last byte is not full
    model = parsed("g (float[2] x) => (float[2] y) { [n] y = other.Odd(x) }")
    graph = to_graph(model)
    graph.nodes[0].inputs.append(packed_constant("q", odd, bits))
    (tensor,) = to_model(graph, model).graph.initializer
    assert TensorProto.DataType.Name(tensor.data_type) == f"{'U' if dtype == np.uint8 else ''}INT{bits}"
    assert list(tensor.dims) == list(odd.shape)
    unpacked = [
        (byte >> shift) & ((1 << bits) - 1) for byte in tensor.raw_data for shift in range(0, 8, bits)
    ]
    assert unpacked[: odd.size] == [int(code) & ((1 << bits) - 1) for code in odd.ravel()]
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(dtype), odd)


def test_codes_that_do_not_fit_are_refused() -> None:
    for codes, bits in (
        (np.array([8], np.int8), 4),
        (np.array([-9], np.int8), 4),
        (np.array([16], np.uint8), 4),
        (np.array([2], np.int8), 2),
    ):
        with pytest.raises(ValueError, match="'q' lie outside"):
            packed_constant("q", codes, bits)
    with pytest.raises(ValueError, match="no packed type"):
        packed_constant("q", np.array([1], np.int8), 3)


def test_values_on_disk_are_mapped_and_not_kept(tmp_path: Path) -> None:
    model = parsed("g (float[30000] x) => (float[30000] y) { [n] y = Add(x, w) }")
    values, spool = np.arange(30000, dtype=np.float32), Spool(tmp_path)
    model.graph.initializer.append(stored("w", values))
    graph = to_graph(model)
    (weight,) = (t for t in graph.nodes[0].inputs if isinstance(t, gs.Constant))
    shelve(weight, spool)
    assert (weight.dtype, tuple(weight.shape)) == (np.float32, (30000,))
    np.testing.assert_array_equal(constant_values(weight), values)
    assert constant_values(weight) is not constant_values(weight)
    written = to_model(graph, model)
    assert file_of(written.graph.initializer[0]) is spool
    assert_round_trip(written)
    np.testing.assert_array_equal(weight.values, values)  # graphsurgeon's own way still works


@pytest.mark.parametrize("bits", [2, 4])
def test_shelving_packed_codes_keeps_them_packed(tmp_path: Path, bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, 2**19, np.uint8)
    packed, spool = packed_constant("q", codes, bits), Spool(tmp_path)
    shelve(packed, spool)
    np.testing.assert_array_equal(constant_values(packed).astype(np.uint8), codes)
    assert next(tmp_path.iterdir()).stat().st_size == codes.size * bits // 8


def test_shelving_leaves_small_values_and_happens_once(tmp_path: Path) -> None:
    small, large = gs.Constant("s", np.ones(10, np.float32)), gs.Constant("l", np.ones(30000, np.float32))
    spool = Spool(tmp_path)
    for _ in range(2):
        shelve(small, spool)
        shelve(large, spool)
    assert isinstance(small._values, np.ndarray)
    assert next(tmp_path.iterdir()).stat().st_size == 120_000
