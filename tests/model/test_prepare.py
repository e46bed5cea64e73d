"""What preparation changes, what it must leave alone, and that the model computes the same afterwards."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, checker, helper, numpy_helper, parser
from onnx.shape_inference import InferenceError
from onnx.version_converter import convert_version

from onnxq.errors import ModelError
from onnxq.model import opset
from onnxq.model.floats import half_types
from onnxq.model.prepare import prepare
from onnxq.model.tensors import all_graphs

RNG = np.random.default_rng(3)
Arrays = dict[str, NDArray[Any]]


def parsed(text: str, *, opset: int = 17, ir: int = 8, domains: str = "", functions: str = "") -> ModelProto:
    head = f'<ir_version: {ir}, opset_import: ["" : {opset}{domains}]>'
    model: ModelProto = parser.parse_model(f"{head} {text} {functions}")
    return model


def stored(name: str, values: NDArray[Any]) -> TensorProto:
    tensor: TensorProto = numpy_helper.from_array(values, name)
    return tensor


def run(model: ModelProto, feeds: Arrays) -> list[NDArray[Any]]:
    """Outputs in onnxruntime itself, without this project's sessions and without rewrites."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    found: list[NDArray[Any]] = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    ).run(None, {name: np.asarray(fed) for name, fed in feeds.items()})
    return found


def nodes(model: ModelProto) -> list[NodeProto]:
    return [node for graph in all_graphs(model.graph) for node in graph.node]


def operators(model: ModelProto) -> list[str]:
    return [node.op_type for node in nodes(model)]


def assert_same(model: ModelProto, feeds: Arrays, opset: int = 21, tolerance: float = 0.0) -> ModelProto:
    """The prepared model, which is valid, has the same interface, and gives the same outputs."""
    before = model.SerializeToString(deterministic=True)
    prepared, _ = prepare(model, opset)
    assert model.SerializeToString(deterministic=True) == before
    checker.check_model(prepared, full_check=True)
    again, notes = prepare(prepared, opset)
    assert again == prepared
    assert notes == ()
    expected, found = run(model, feeds), run(prepared, feeds)
    for e, f in zip(expected, found, strict=True):
        assert (e.dtype, e.shape) == (f.dtype, f.shape)
        np.testing.assert_allclose(f, e, rtol=0, atol=tolerance)
    return prepared


def test_initializers_leave_the_inputs() -> None:
    model = parsed("g (float[4] x, float[4] w) => (float[4] y) { y = Add(x, w) }", opset=8, ir=3)
    model.graph.initializer.append(stored("w", np.ones(4, np.float32)))
    prepared, notes = prepare(model, 13)
    assert [i.name for i in prepared.graph.input] == ["x"]
    assert prepared.ir_version >= 4
    assert any("initializers" in note for note in notes)
    model.ir_version = 4
    assert any("default values" in note for note in prepare(model, 13)[1])


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize(("shape", "axis", "count"), [("2,3,4", 1, 4), ("2,3,4", 2, 1), ("2,5,1,1", 1, 1)])
def test_operators_over_several_axes(op: str, shape: str, axis: int, count: int) -> None:
    model = parsed(
        f"g (float[{shape}] x) => (float[{shape}] y) {{ y = {op}<axis = {axis}>(x) }}", opset=9, ir=4
    )
    x = RNG.normal(size=[int(n) for n in shape.split(",")]).astype(np.float32)
    prepared = assert_same(model, {"x": x}, 13, tolerance=1e-6)  # one float32 rounding of values up to 4
    assert len(prepared.graph.node) == count
    assert prepared.opset_import[0].version == 13


@pytest.mark.parametrize(
    ("text", "opset"),
    [
        ('y = Upsample<mode = "nearest", scales = [1.0, 1.0, 2.0, 3.0]>(x)', 7),
        ('y = Upsample<mode = "linear", scales = [1.0, 1.0, 2.0, 2.0]>(x)', 7),
        ("y = Pad<pads = [0, 0, 1, 1, 0, 0, 2, 2]>(x)", 9),
        ("y = Slice<axes = [2], starts = [1], ends = [3]>(x)", 9),
        ("y = Clip<min = -0.5, max = 0.5>(x)", 9),
        ("y = ReduceSum<axes = [2], keepdims = 1>(x)", 11),
        ("y = ReduceMean<axes = [2, 3], keepdims = 1>(x)", 13),
        ("t = Squeeze<axes = [0]>(x)\n y = Unsqueeze<axes = [0]>(t)", 11),
        ("y, z = Split<axis = 2>(x)", 11),
        ("y = Dropout<ratio = 0.5>(x)", 9),
        ("y = Flatten(x)", 9),
        ("y, i = TopK<k = 2>(x)", 9),
    ],
)
def test_operators_that_changed(text: str, opset: int) -> None:
    model = parsed(f"g (float[1, 3, 4, 4] x) => (float[A, B, C, D] y) {{ {text} }}", opset=opset, ir=4)
    if text.startswith("y = Flatten"):
        del model.graph.output[0].type.tensor_type.shape.dim[2:]
    assert_same(model, {"x": RNG.normal(size=(1, 3, 4, 4)).astype(np.float32)}, tolerance=1e-6)


@pytest.mark.parametrize(("mode", "factor"), [("nearest", 2.0), ("nearest", 0.6), ("linear", 1.7)])
def test_samples_stay_where_they_were(mode: str, factor: float) -> None:
    model = parsed(
        f'g (float[1, 1, 5, 5] x) => (float[1, 1, H, W] y) {{ y = Resize<mode = "{mode}">(x, s) }}',
        opset=10,
        ir=5,
    )
    model.graph.initializer.append(stored("s", np.array([1, 1, factor, factor], np.float32)))
    assert_same(model, {"x": RNG.normal(size=(1, 1, 5, 5)).astype(np.float32)}, 13, tolerance=1e-6)


def test_bodies_are_raised_and_their_names_stay_apart() -> None:
    model = parsed(
        """g (float[2, 3, 4] x, bool c) => (float[2, 3, 4] y) {
          y = If (c) <then_branch = t () => (float[2, 3, 4] p) { p = Softmax<axis = 1>(x) },
                      else_branch = e () => (float[2, 3, 4] q) { q = Clip<min = 0.0, max = 6.0>(x) }> }""",
        opset=9,
        ir=4,
    )
    x = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    for c in (True, False):
        prepared = assert_same(model, {"x": x, "c": np.array(c)}, tolerance=1e-6)
    written = [name for node in nodes(prepared) for name in node.output]
    assert len(set(written)) == len(written)


def test_alike_nodes_are_converted_apart() -> None:
    model = parsed(
        "g (float[8] x) => (float[8] y) { a = Clip<min = 0.0>(x)\n y = Clip<min = 0.0>(a) }", opset=9, ir=4
    )
    prepared = assert_same(model, {"x": RNG.normal(size=8).astype(np.float32)})
    assert len({t.name for t in prepared.graph.initializer}) == len(prepared.graph.initializer) >= 2


def test_nodes_of_other_domains_stay() -> None:
    text = "g (float[2] x) => (float[2] y) { a = other.Secret<axis = 3>(x)\n y = Relu(a) }"
    prepared, _ = prepare(parsed(text, opset=9, ir=4, domains=', "other" : 1'), 21)
    assert prepared.graph.node[0].domain == "other"
    assert prepared.graph.node[0].attribute[0].i == 3
    assert {e.domain: e.version for e in prepared.opset_import} == {"": 21, "other": 1}


def test_a_model_without_the_default_domain_gets_it() -> None:
    model = parsed("g (float[2] x) => (float[2] y) { y = other.Secret(x) }", domains=', "other" : 1')
    del model.opset_import[0]
    assert {e.domain: e.version for e in prepare(model, 21)[0].opset_import} == {"": 21, "other": 1}


def test_what_cannot_be_raised_is_named() -> None:
    text = "g (float[1, 1, 4, 4] x, float[4] s) => (float[1, 1, H, W] y) { [up] y = Resize(x, s) }"
    with pytest.raises(ModelError, match=r"opset 10 to 13: Resize node 'up' has no conversion \(.*scales"):
        prepare(parsed(text, opset=10, ir=5), 13)
    with pytest.raises(ModelError, match="opset 99 is not known"):
        prepare(parsed(text, opset=10, ir=5), 99)


def test_a_newer_model_stays_at_its_opset() -> None:
    prepared, notes = prepare(parsed("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=22, ir=10), 13)
    assert prepared.opset_import[0].version == 22
    assert notes == ()


def test_both_spellings_of_the_default_domain_become_one() -> None:
    model = parsed("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    model.opset_import[0].domain = model.graph.node[0].domain = "ai.onnx"
    prepared, _ = prepare(model, 13)
    assert [e.domain for e in prepared.opset_import] == [""]
    assert prepared.graph.node[0].domain == ""


def test_constants_become_initializers() -> None:
    model = parsed(
        """g (float[2] x) => (float[2] y, float[1] z) {
          a = Constant<value = float[2] {1.0, 2.0}>()
          b = Constant<value_float = 3.0>()
          c = Constant<value_ints = [2]>()
          d = Constant<value_strings = ["s", "t"]>()
          e = Add(x, a)
          f = Mul(e, b)
          y = Reshape(f, c)
          z = Constant<value_floats = [7.0]>() }"""
    )
    prepared = assert_same(model, {"x": np.array([5, 6], np.float32)})
    assert operators(prepared) == ["Add", "Mul", "Reshape", "Constant"]  # an output needs a node
    values = {t.name: numpy_helper.to_array(t).tolist() for t in prepared.graph.initializer}
    assert values == {"a": [1.0, 2.0], "b": 3.0, "c": [2], "d": ["s", "t"]}


@pytest.mark.parametrize("coordinates", [False, True])
def test_sparse_constants_become_dense(coordinates: bool) -> None:
    model = parsed("g (float[2, 3] x) => (float[2, 3] y) { a = Add(x, w)\n y = Add(a, c) }")
    where = np.array([[0, 1], [1, 2]], np.int64) if coordinates else np.array([1, 5], np.int64)
    sparse = helper.make_sparse_tensor(stored("w", np.array([7, 8], np.float32)), stored("i", where), [2, 3])
    model.graph.sparse_initializer.append(sparse)
    constant = helper.make_node("Constant", [], ["c"], sparse_value=sparse)
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([constant, *rest])
    prepared, _ = prepare(model, 13)
    assert not prepared.graph.sparse_initializer
    y = run(prepared, {"x": np.zeros((2, 3), np.float32)})[0]
    np.testing.assert_array_equal(y, [[0, 14, 0], [0, 0, 16]])


def test_local_functions_are_inlined() -> None:
    model = parsed(
        "g (float[2] x) => (float[2] y) { a = other.twice(x)\n y = other.twice(a) }",
        domains=', "other" : 1',
        functions='<domain: "other", opset_import: ["" : 17]> twice (p) => (q) { q = Add(p, p) }',
    )
    prepared = assert_same(model, {"x": np.array([1, 2], np.float32)})
    assert operators(prepared) == ["Add", "Add"]
    assert not prepared.functions


def test_nodes_get_names_that_are_their_own() -> None:
    model = parsed(
        """g (float[2] x, bool c) => (float[2] y) {
          [same] a = Relu(x)
          [same] b = Relu(a)
          d = Relu(b)
          [Relu_2] e = Relu(d)
          y = If (c) <then_branch = t () => (float[2] p) { p = Neg(e) },
                      else_branch = f () => (float[2] q) { [same] q = Abs(e) }> }"""
    )
    prepared, _ = prepare(model, 13)
    assert [n.name for n in nodes(prepared)] == [
        "same",
        "Relu_1",
        "Relu_2_1",
        "Relu_2",
        "If_4",
        "Neg_5",
        "Abs_6",
    ]


def test_metadata_stays() -> None:
    model = parsed(
        "g (float[1, 1, 4, 4] x) => (float[1, 1, H, W] y) { [p] y = Pad<pads = [0, 0, 1, 1, 0, 0, 1, 1]>(x) }",
        opset=10,
    )
    model.producer_name, model.producer_version, model.domain = "maker", "1.2", "somewhere"
    model.doc_string, model.model_version, model.graph.doc_string = "about", 7, "graph"
    model.metadata_props.add(key="k", value="v")
    model.graph.node[0].metadata_props.add(key="layer", value="3")
    model.graph.node[0].doc_string = "node"
    annotation = model.graph.quantization_annotation.add(tensor_name="x")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    prepared, _ = prepare(model, 21)
    fields = ("producer_name", "producer_version", "domain", "doc_string", "model_version", "metadata_props")
    assert [getattr(prepared, f) for f in fields] == [getattr(model, f) for f in fields]
    assert prepared.graph.doc_string == "graph"
    assert prepared.graph.quantization_annotation == model.graph.quantization_annotation
    (pad,) = (n for n in prepared.graph.node if n.op_type == "Pad")
    assert (pad.name, pad.doc_string, pad.metadata_props[0].value) == ("p", "node", "3")


def test_types_are_inferred_and_declared_shapes_stay() -> None:
    model = parsed("g (float[N, 4] x) => (float[M, 4] y) { a = Relu(x)\n y = Relu(a) }")
    prepared, _ = prepare(model, 13)
    (info,) = prepared.graph.value_info
    assert (info.name, info.type.tensor_type.shape.dim[0].dim_param) == ("a", "N")
    assert prepared.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "M"


def test_types_that_contradict_are_noted_or_replaced() -> None:
    stale = parsed("g (float[2] x) => (float[2] y) <float[9] a> { a = Relu(x)\n y = Relu(a) }")
    prepared, notes = prepare(stale, 13)
    assert notes == ()
    assert prepared.graph.value_info[0].type.tensor_type.shape.dim[0].dim_value == 2
    mistyped = parsed("g (float[2] x) => (float[2] y) <int64[2] a> { a = Relu(x)\n y = Relu(a) }")
    assert prepare(mistyped, 13) == prepare(
        parsed("g (float[2] x) => (float[2] y) { a = Relu(x)\n y = Relu(a) }"), 13
    )
    wrong = parsed("g (float[2] x) => (float[9] y) { y = Relu(x) }")
    assert prepare(wrong, 13)[0].graph.output == wrong.graph.output


def test_long_vectors_cost_no_memory() -> None:
    """Following the values of x would take one symbol for each of 2^40 elements."""
    text = f"g (float[{2**40}] x) => (float[{2**40}] y) {{ a = Cast<to = 1>(x)\n y = Relu(a) }}"
    prepared, notes = prepare(parsed(text), 17)
    assert notes == ()
    assert prepared.graph.value_info[0].type.tensor_type.shape.dim[0].dim_value == 2**40


def test_values_of_shapes_are_followed() -> None:
    text = "g (float[N, 3, 4] x) => (float[A, B] y) { s = Shape(x)\n p = Slice(s, a, b)\n q = Concat<axis = 0>(p, m)"
    model = parsed(text + "\n r = Reshape(x, q)\n y = Relu(r) }")
    for name, number in (("a", 1), ("b", 2), ("m", -1)):
        model.graph.initializer.append(stored(name, np.array([number], np.int64)))
    (shape,) = (i.type.tensor_type.shape for i in prepare(model, 17)[0].graph.value_info if i.name == "r")
    assert shape.dim[0].dim_value == 3


def test_types_that_cannot_be_inferred_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise InferenceError("[ShapeInferenceError] something is wrong")

    monkeypatch.setattr("onnxq.model.prepare.infer_shapes", failing)
    model = parsed("g (float[2] x) => (float[2] y) { a = Relu(x)\n y = Relu(a) }")
    prepared, notes = prepare(model, 17)
    assert operators(prepared) == ["Relu", "Relu"]
    assert notes == ("types are not all known: something is wrong",)


HALVES = [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), HALVES)
@pytest.mark.parametrize("large", [False, True])
def test_half_precision_becomes_float32(name: str, dtype: Any, large: bool) -> None:
    """bfloat16 has few kernels: the expected values come from numpy."""
    size = 4096 if large else 4
    number = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = parsed(
        f"""g (float[{size}] x, bool c) => (float[{size}] y, {name}[{size}] h, {name}[3] k) {{
          a = Cast<to = {number}>(x)
          b = Mul(a, w)
          h = If (c) <then_branch = t () => ({name}[{size}] p) {{ p = Add(b, w) }},
                      else_branch = e () => ({name}[{size}] q) {{ q = Sub(b, w) }}>
          s = Constant<value = int64[1] {{3}}>()
          k = ConstantOfShape(s)
          y = Cast<to = 1>(h) }}"""
    )
    fill = stored("", np.ones(1, dtype) * dtype(2))
    model.graph.node[4].attribute.append(helper.make_attribute("value", fill))
    w = RNG.normal(size=size).astype(dtype)
    model.graph.initializer.append(stored("w", w))
    prepared, notes = prepare(model, 17)
    checker.check_model(prepared, full_check=True)
    assert notes == (f"{name} became float32 inside the model",)
    assert prepared.graph.output == model.graph.output
    inner = ModelProto.FromString(prepared.SerializeToString())
    for output in inner.graph.output[1:]:
        output.type.tensor_type.elem_type = TensorProto.FLOAT
    del inner.graph.node[-2:]  # the casts that write them
    assert half_types(inner) == ()
    x = RNG.normal(size=size).astype(np.float32)
    y = run(prepared, {"x": x, "c": np.array(True)}) if name == "float16" else None
    if y is not None:
        np.testing.assert_allclose(
            y[0], x * w.astype(np.float32) + w.astype(np.float32), rtol=1e-6, atol=1e-6
        )
        assert [v.dtype for v in y] == [np.float32, np.float16, np.float16]
        np.testing.assert_array_equal(y[2], np.array([2, 2, 2], np.float16))
    assert prepare(prepared, 17) == (prepared, ())


def test_half_precision_inputs_are_cast_once_for_all_readers() -> None:
    model = parsed(
        """g (float16[2] x, bool c) => (float16[2] y, float16[2] x, float16[2] w) {
          a = Add(x, x)
          y = If (c) <then_branch = t () => (float16[2] p) { p = Mul(a, x) },
                      else_branch = e () => (float16[2] q) { q = Sub(a, w) }> }"""
    )
    model.graph.initializer.append(stored("w", np.array([0.5, 0.25], np.float16)))
    for c in (True, False):
        prepared = assert_same(model, {"x": np.array([1, 2], np.float16), "c": np.array(c)}, 17)
    casts = [(n.input[0], n.output[0]) for n in nodes(prepared) if n.op_type == "Cast"]
    assert sorted(casts) == [("w_float32", "w"), ("x", "x_float32"), ("y_float32", "y")]


def test_loops_in_half_precision() -> None:
    model = parsed(
        """g (int64 n, float16[2] x) => (float16[2] last, float16[K, 2] all) {
          t = Constant<value = bool {1}>()
          last, all = Loop(n, t, x) <body = b (int64 i, bool g, float16[2] s) => (bool o, float16[2] r, float16[2] v) {
            o = Identity(g)
            r = Add(s, x)
            v = Identity(r) }> }"""
    )
    assert_same(model, {"n": np.array(3), "x": np.array([1, 2], np.float16)}, 17)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "g (seq(float16[2]) x) => (float16[2] y) { z = Constant<value = int64 {0}>()\n y = SequenceAt(x, z) }",
            "'x'",
        ),
        (
            "g (float16[2] x) => (uint16[2] y) { [bits] a = Add(x, x)\n [raw] y = BitCast<to = 4>(a) }",
            "'raw'",
        ),
    ],
)
def test_half_precision_that_must_stay(text: str, reason: str) -> None:
    model = parsed(text, opset=26, ir=13)
    prepared, notes = prepare(model, 21)
    assert len(notes) == 1
    assert notes[0].startswith("the model stays in float16: ")
    assert reason in notes[0]
    assert prepared.graph.input == model.graph.input
    assert half_types(prepared) == ("float16",)


def test_half_precision_that_a_foreign_operator_needs_stays() -> None:
    text = (
        "g (float16[2, 64] x, float16[64] s) => (float16[2, 64] y) { a = other.HalfOnly(x, s)\n y = Relu(a) }"
    )
    model = parsed(text, domains=', "other" : 1')
    prepared, _ = prepare(model, 17)
    checker.check_model(prepared)
    assert [(i.name, i.type) for i in prepared.graph.input] == [(i.name, i.type) for i in model.graph.input]


def test_half_precision_stays_when_the_result_would_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(model: ModelProto, **_: object) -> None:
        if any(node.op_type == "Cast" for node in model.graph.node):
            raise ModelError("no kernel")

    monkeypatch.setattr("onnxq.model.prepare.make_session", refusing)
    model = parsed("g (float16[2] x) => (float16[2] y) { y = Relu(x) }")
    prepared, notes = prepare(model, 17)
    assert operators(prepared) == ["Relu"]
    assert notes == ("the model stays in float16: no kernel",)


def test_casts_at_the_border_are_not_half_precision_arithmetic() -> None:
    model = parsed("g (float16[2] x) => (float[2] y) { a = Cast<to = 1>(x)\n y = Relu(a) }")
    prepared, notes = prepare(model, 17)
    assert notes == ()
    assert operators(prepared) == ["Cast", "Relu"]


def test_other_types_stay() -> None:
    model = parsed(
        """g (seq(float[2]) x, optional(float[2]) o, string[2] s) => (seq(float[2]) y, optional(float[2]) p, string[2] t) {
          y = Identity(x)
          p = Identity(o)
          t = Identity(s) }"""
    )
    prepared, notes = prepare(model, 21)
    assert prepared.graph.input == model.graph.input
    assert prepared.graph.output == model.graph.output
    assert notes == ("raised to opset 21",)


def test_a_declared_sequence_stays_as_it_is() -> None:
    model = parsed("g (float[2] x) => (seq(float[N]) y) { y = SequenceConstruct(x) }")
    model.graph.output[0].type.sequence_type.elem_type.tensor_type.ClearField("shape")
    assert prepare(model, 17)[0].graph.output == model.graph.output


def test_alike_elementwise_nodes_are_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their shapes and constants; with other element types or attributes they are not alike."""
    seen = []

    def convert(model: ModelProto, target: int) -> ModelProto:
        seen.append(model.graph.node[0].op_type)
        return convert_version(model, target)

    monkeypatch.setattr(opset, "convert_version", convert)
    text = """g (float[2, 3] x, float[3] u, int64[3] i) => (float[2, 3] y, int64[3] j, float[A] k) {
        a = Add(x, u) b = Add(a, w) c = Clip<min = 0.0>(b) d = Clip<min = 0.0>(u) e = Clip<min = 1.0>(c) f = Add(e, d)
        y = Add(f, v) j = Add(i, i) k = Cast<to = 1>(j)
    }"""
    model = parsed(text, opset=10, ir=5)
    model.graph.initializer.extend(
        [stored("w", np.ones(3, np.float32)), stored("v", np.ones((2, 1), np.float32))]
    )
    feeds: Arrays = {
        "x": RNG.normal(size=(2, 3)).astype(np.float32),
        "u": RNG.normal(size=3).astype(np.float32),
        "i": np.arange(3),
    }
    assert_same(model, feeds)
    assert sorted(seen) == ["Add", "Add", "Cast", "Clip", "Clip"]
