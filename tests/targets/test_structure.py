"""What stands in the files of each target: the rules that the runtimes document, and golden graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, numpy_helper

import onnxq
from onnxq.choices import Choices
from onnxq.model.session import make_session
from onnxq.pipeline import Context
from onnxq.program import Program
from onnxq.target import TARGETS, find_target

Residual = Callable[..., tuple[Program, ModelProto]]
CODES = (np.dtype(np.int8), np.dtype(np.uint8))
LAYERS = ("Conv", "Gemm", "MatMul")
FOREIGN = [name for name, target in TARGETS.items() if not target.local]


class View:
    """A model's nodes by what they write and read, and its initializers."""

    def __init__(self, model: ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.outputs = {o.name for o in model.graph.output}

    def ops(self) -> set[str]:
        return {node.op_type for node in self.nodes}

    def maker(self, tensor: str) -> str:
        """The op that writes a tensor, empty for inputs and initializers."""
        return self.makers[tensor].op_type if tensor in self.makers else ""

    def readers(self, tensor: str) -> list[NodeProto]:
        return [node for node in self.nodes if tensor in node.input]

    def quantized_layers(self) -> list[NodeProto]:
        return [n for n in self.nodes if n.op_type in LAYERS and self.maker(n.input[1]) == "DequantizeLinear"]


def axis(node: NodeProto) -> int | None:
    return next((a.i for a in node.attribute if a.name == "axis"), None)


def assert_explicit(model: ModelProto) -> None:
    """NVIDIA's rules for networks that TensorRT quantizes explicitly, as far as a file shows them."""
    view = View(model)
    assert all(node.domain == "" for node in view.nodes)
    assert not {op for op in view.ops() if op.startswith("QLinear") or op.endswith("Integer")}
    for node in view.nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            # no operator but these reads or writes codes: TensorRT has neither Cast nor Clip of INT8
            assert not any(view.maker(name) == "QuantizeLinear" for name in node.input), node
            assert not any(
                c.dtype in CODES for c in (view.constants.get(n) for n in node.input) if c is not None
            )
            continue
        scale, zero = (view.constants[name] for name in node.input[1:3])
        assert zero.dtype == np.int8
        assert not zero.any()  # symmetric
        assert scale.shape == zero.shape
        data = view.constants.get(node.input[0])
        if data is None:
            assert scale.ndim == 0  # activations have one scale
            assert view.maker(node.input[0]) == "QuantizeLinear" or node.op_type == "QuantizeLinear"
            # a pair right behind another one would keep the layers around it apart
            assert node.op_type == "DequantizeLinear" or view.maker(node.input[0]) != "DequantizeLinear"
        else:
            assert node.op_type == "DequantizeLinear"
            assert data.dtype == np.int8  # never int32: a bias stays float
            assert np.abs(data.astype(int)).max() <= 127
            assert len(scale) == data.shape[axis(node) or 0]
    layers = view.quantized_layers()
    assert layers
    for node in layers:
        assert view.maker(node.input[0]) == "DequantizeLinear"  # all inputs of a weighted layer are quantized
        weights = view.makers[node.input[1]]
        transposed = node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute)
        assert axis(weights) == (0 if transposed else 1)  # the output channels
        assert all(view.constants[name].dtype == np.float32 for name in node.input[2:])


def assert_branches(model: ModelProto, adds: int) -> None:
    """An Add behind a convolution adds to what that has not rounded; the other branch comes in as codes."""
    view, found = View(model), 0
    for node in view.nodes:
        if node.op_type == "Add" and (kinds := sorted(view.maker(name) for name in node.input))[0] == "Conv":
            assert kinds[1] == "DequantizeLinear"
            found += 1
    assert found == adds


@pytest.mark.parametrize("name", FOREIGN)
def test_one_branch_is_added_unrounded(name: str, residual: Residual) -> None:
    program, model = residual(name)
    assert_branches(model, adds=2)
    view = View(model)
    identity, shortcut = (next(n for n in view.nodes if n.name == name) for name in ("identity", "shortcut"))
    assert {view.maker(t) for t in identity.input} == {"Conv", "DequantizeLinear"}
    main = next(view.makers[t] for t in shortcut.input if view.maker(t) == "Conv")
    assert view.constants[view.makers[main.input[1]].input[0]].shape == (
        8,
        8,
        3,
        3,
    )  # c4, the longer way, and not c5
    assert program.params("c5").scale > 0
    assert not {"c2", "c4"} & program.plan.keys()


def test_onnxruntime_takes_both_branches_as_codes(residual: Residual) -> None:
    program, model = residual("ort-cpu")
    assert_branches(model, adds=0)
    assert {"c2", "c4", "c5"} <= program.plan.keys()


@pytest.mark.parametrize("form", ["qdq", "integer"])
@pytest.mark.parametrize("weights", range(2, 9))
@pytest.mark.parametrize("activations", [2, 5, 8])
def test_portable_files_hold_standard_operators_alone(
    form: str, weights: int, activations: int, residual: Residual
) -> None:
    _, model = residual("onnx", f"w{weights}a{activations}", form)
    assert {entry.domain for entry in model.opset_import} == {""}
    assert all(node.domain == "" for node in model.graph.node)
    expected = {"QLinearConv"} if form == "integer" else set()
    assert {op for op in View(model).ops() if op.startswith("QLinear")} == expected
    assert model.opset_import[0].version == (
        21 if weights <= 4 else 19
    )  # the oldest with INT4, and with this Q/DQ


@pytest.mark.parametrize("form", ["qdq", "integer"])
@pytest.mark.parametrize(("name", "bits"), [("digits_cnn", "w8a8"), ("digits_transformer", "w4a4")])
def test_portable_models_hold_standard_operators_alone(
    name: str, bits: str, form: str, models_dir: Path
) -> None:
    data = models_dir / "digits_calib.npz"
    model = onnxq.compile_model(
        models_dir / f"{name}.onnx", data, target="onnx", bits=bits, form=form, samples=64
    ).model
    assert all(node.domain == "" for node in model.graph.node)
    assert {entry.domain for entry in model.opset_import} <= {"", "ai.onnx.ml"}


@pytest.mark.parametrize(
    "options", [{"preset": "int8-dynamic"}, *({"bits": f"w{bits}"} for bits in range(2, 9))]
)
def test_portable_models_without_data_hold_standard_operators_alone(
    options: dict[str, str], models_dir: Path
) -> None:
    path = models_dir / "digits_transformer.onnx"
    model = onnxq.compile_model(path, target="onnx", **options).model  # type: ignore[arg-type]
    assert all(node.domain == "" for node in model.graph.node)


def test_tensorrt_rules_hold_on_a_residual_network(residual: Residual) -> None:
    _, model = residual("tensorrt")
    assert_explicit(model)
    view = View(model)
    assert len(view.quantized_layers()) == 7
    # TensorRT itself moves a QuantizeLinear through what only moves values, so none stands there twice
    assert view.maker(next(n for n in view.nodes if n.op_type == "MaxPool").input[0]) == "Relu"
    # and no layer is quantized behind itself where nothing quantized reads it
    assert all(n.output[0] not in view.outputs for n in view.nodes if n.op_type == "DequantizeLinear")


@pytest.mark.parametrize(("name", "adds"), [("digits_cnn", 5), ("digits_transformer", 0)])
def test_tensorrt_rules_hold_on_models(name: str, adds: int, models_dir: Path) -> None:
    data = models_dir / "digits_calib.npz"
    done = onnxq.compile_model(models_dir / f"{name}.onnx", data, target="tensorrt", samples=64)
    assert_explicit(done.model)
    assert_branches(done.model, adds)
    assert all(row.status == "integer" for row in done.report.nodes if row.op in ("Conv", "Relu"))


def test_openvino_takes_float_biases_and_symmetric_weights(residual: Residual) -> None:
    _, model = residual("openvino", "w4a4")
    view = View(model)
    layers = view.quantized_layers()
    assert len(layers) == 7
    for node in layers:
        assert all(view.constants[name].dtype == np.float32 for name in node.input[2:])
        assert not view.constants[view.makers[node.input[1]].input[2]].any()


GOLDENS = [
    ("onnx", "w8a8", "qdq"),
    ("onnx", "w4a4", "qdq"),
    ("onnx", "w8a8", "integer"),
    ("openvino", "w3a8", "qdq"),
    ("tensorrt", None, "qdq"),
]


@pytest.mark.parametrize(("name", "bits", "form"), GOLDENS)
def test_golden(
    name: str, bits: str | None, form: str, residual: Residual, golden: Callable[[str, ModelProto], None]
) -> None:
    golden("_".join(["target", name, *([bits] if bits else []), form]), residual(name, bits, form)[1])


# ---- what one network does not show


def planned(
    parse_program: Callable[..., Program], name: str, body: str, outputs: str, annotate: str = "small=0"
) -> Program:
    weights = {"w": np.ones((4, 4, 1, 1), np.float32), "v": np.full((4, 4, 1, 1), 2, np.float32)}
    used = {key: value for key, value in weights.items() if f", {key})" in body}
    program = parse_program(f"g (float[n,4,5,5] x) => ({outputs}) {{ {body} }}", used)
    steps = Choices(pipeline=f"annotate:{annotate}", target=name).resolve(has_data=True)
    steps.run(program, Context(target=find_target(name)))
    return program


def adders(program: Program) -> dict[str, tuple[str, ...]]:
    """Units that have an Add of another activation, with what they read."""
    return {name: unit.inputs for name, unit in program.units.items() if unit.inputs != unit.multiplied}


MAP = "float[n,4,5,5]"


@pytest.mark.parametrize(
    ("body", "outputs", "expected"),
    [
        # the convolution's own output leaves the graph, or is read again: it needs a value of its own
        ("[a] c = Conv(x, w) y = Add(c, x)", f"{MAP} y, {MAP} c", {}),
        ("[a] c = Conv(x, w) d = Conv(c, v) e = Tanh(d) y = Add(c, e)", f"{MAP} y", {}),
        # two convolutions of one depth, one of them with the weights of the other: the first has the Add
        ("[a] c = Conv(x, w) [b] d = Conv(x, w) y = Add(c, d)", f"{MAP} y", {"a": ("x", "d")}),
        # the deeper one has it, past its activation too, whichever comes first
        (
            "[a] c = Conv(x, w) [b] d = Conv(x, v) [e] f = Conv(d, w) g = Relu(f) y = Add(c, g)",
            f"{MAP} y",
            {"e": ("d", "c")},
        ),
        # a convolution adds to itself what it read
        ("[a] c = Conv(x, w) y = Add(x, c)", f"{MAP} y", {"a": ("x", "x")}),
        # one Add each, in a chain
        (
            "[a] c = Conv(x, w) s = Add(c, x) [b] d = Conv(s, v) y = Add(d, s)",
            f"{MAP} y",
            {"a": ("x", "x"), "b": ("s", "s")},
        ),
    ],
)
@pytest.mark.parametrize("name", FOREIGN)
def test_which_convolution_has_an_add(
    name: str,
    body: str,
    outputs: str,
    expected: dict[str, tuple[str, ...]],
    parse_program: Callable[..., Program],
) -> None:
    assert adders(planned(parse_program, name, body, outputs)) == expected


@pytest.mark.parametrize("skip", ["Add", "Relu"])
def test_what_the_user_skips_is_not_absorbed(skip: str, parse_program: Callable[..., Program]) -> None:
    body = "[a] c = Conv(x, w) r = Relu(c) y = Add(r, x)"
    program = planned(parse_program, "onnx", body, f"{MAP} y", f"skip={skip}")
    assert not adders(program)


def test_units_stand_behind_what_they_add(parse_program: Callable[..., Program]) -> None:
    body = "[e] d = Conv(x, w) [f] f = Conv(d, v) [s] c = Conv(x, w) y = Add(f, c)"
    assert list(planned(parse_program, "onnx", body, f"{MAP} y").units) == ["e", "s", "f"]


@pytest.mark.parametrize("name", ["ort-cpu", "onnx"])
def test_a_layer_that_stays_float_is_not_quantized_by_onnxruntime(
    name: str, parse_model: Callable[..., ModelProto]
) -> None:
    rng = np.random.default_rng(3)
    shapes = {"w": (4, 4, 3, 3), "v": (4, 4, 3, 3)}
    weights = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    text = """g (float[n,4,8,8] x) => (float[n,4,2,2] y) {
        c = Conv(x, w) [kept] d = Conv(c, v) r = Relu(d) y = Conv(r, w)
    }"""
    data = {"x": rng.normal(size=(8, 4, 8, 8)).astype(np.float32)}
    done = onnxq.compile_model(parse_model(text, weights, 17), data, target=name, skip=("kept",), speed=False)
    fused, plain = (make_session(done.model, optimize=o).run(None, data)[0] for o in (True, False))
    # an int8 layer in the middle would be a hundredth off; what is left are rare roundings of the last code
    assert np.mean(np.abs(fused - plain)) < 1e-4 * np.abs(plain).max()
