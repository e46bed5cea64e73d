"""The QDQ form: what becomes one kernel and what stays float, against onnxruntime bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, helper

from onnxq.model.session import optimized_model
from onnxq.reference.kernels import Step
from onnxq.reference.run import Reference

Array = NDArray[Any]
Build = Callable[..., ModelProto]
Check = Callable[..., dict[str, Array]]


class QDQ:
    """A graph in the QDQ form in the making; values are named as they are given, codes `NAME_q`."""

    def __init__(self, dtype: str = "uint8") -> None:
        self.rng, self.dtype = np.random.default_rng(5), dtype
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Any] = {}

    def node(self, op: str, inputs: str, output: str, **given: Any) -> str:
        names = [] if not inputs else inputs.split(" ")
        self.nodes.append(helper.make_node(op, names, output.split(" "), **given))
        return output

    def grid(self, name: str, scale: float, zero: int) -> str:
        self.constants |= {f"{name}_s": np.float32(scale), f"{name}_z": np.array(zero, self.dtype)}
        return f"{name}_s {name}_z"

    def quantize(self, name: str, scale: float, zero: int = 0, top: int | None = None) -> str:
        """Codes of a tensor, bounded by a largest one; returns the name of their values."""
        ends = self.grid(name, scale, zero)
        codes = self.node("QuantizeLinear", f"{name} {ends}", f"{name}_q")
        if top is not None:
            self.constants |= {
                f"{name}_low": np.array(0, self.dtype),
                f"{name}_top": np.array(top, self.dtype),
            }
            codes = self.node("Clip", f"{codes} {name}_low {name}_top", f"{name}_c")
        return self.node("DequantizeLinear", f"{codes} {ends}", f"{name}_d")

    def weight(self, name: str, *shape: int, axis: int = 0) -> str:
        scale = self.rng.uniform(0.005, 0.02, shape[axis]).astype(np.float32)
        self.constants |= {
            f"{name}_q": self.rng.integers(-128, 128, shape).astype(np.int8),
            f"{name}_s": scale,
            f"{name}_z": np.zeros(shape[axis], np.int8),
        }
        return self.node("DequantizeLinear", f"{name}_q {name}_s {name}_z", name, axis=axis)

    def bias(self, name: str, data: str, weight: str) -> str:
        """A bias at input scale times weight scale, for the values of a tensor and a weight."""
        grid = next(n for n in self.nodes if n.output[0] == data).input
        scale = self.constants[grid[1]] * self.constants[f"{weight}_s"]
        codes = self.rng.integers(-5000, 5000, scale.shape).astype(np.int32)
        self.constants |= {f"{name}_q": codes, f"{name}_s": scale}
        return self.node("DequantizeLinear", f"{name}_q {name}_s", name, axis=0)


def ops(model: ModelProto) -> list[str]:
    """Integer operators that the reference runs, without the conversions."""
    work = [item.op for item in Reference(model).lowered.work if isinstance(item, Step)]
    return [op for op in work if op not in ("QuantizeLinear", "DequantizeLinear")]


def floats(model: ModelProto) -> list[str]:
    return [item.op_type for item in Reference(model).lowered.work if not isinstance(item, Step)]


def images(seed: int = 1) -> dict[str, Array]:
    return {"x": np.random.default_rng(seed).normal(size=(4, 8, 9, 9)).astype(np.float32)}


def conv(
    graph: QDQ,
    data: str,
    name: str,
    scale: float,
    *,
    channels: int = 8,
    relu: bool = False,
    grid: str | None = None,
    **end: Any,
) -> str:
    """A quantized 3 by 3 convolution of 8 channels; returns its dequantized output."""
    weight = graph.weight(f"{name}_w", channels, 8, 3, 3)
    bias = graph.bias(f"{name}_b", data if grid is None else grid, weight)
    graph.node("Conv", f"{data} {weight} {bias}", f"{name}_r" if relu else name, pads=[1, 1, 1, 1])
    if relu:
        graph.node("Relu", f"{name}_r", name)
    return graph.quantize(name, scale, **end)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_network_of_few_bits(bits: int, build_model: Build, assert_exact: Check) -> None:
    """Codes clipped below 8 bits: convolutions, a residual addition, pools, a concatenation, a gemm."""
    graph, top = QDQ(), None if bits == 8 else 2**bits - 1
    data = graph.quantize("x", 4 / 2**bits, 2 ** (bits - 1), top)
    left = conv(graph, data, "l", 60 / 2**bits, relu=True, top=top)
    right = conv(graph, left, "r", 400 / 2**bits, zero=2 ** (bits - 1), top=top)
    graph.node("Add", f"{left} {right}", "a_r")
    graph.node("Relu", "a_r", "a")
    total = graph.quantize("a", 300 / 2**bits, 0, top)
    graph.node("Mul", f"{total} {left}", "m")
    scaled = graph.quantize("m", 1000 / 2**bits, 0, top)
    graph.node("Concat", f"{total} {scaled}", "c", axis=1)
    joined = graph.quantize("c", 700 / 2**bits, 0, top)
    graph.node("AveragePool", joined, "p", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    pooled = graph.quantize("p", 500 / 2**bits, 0, top)
    graph.node("MaxPool", "p_c" if top else "p_q", "h_q", kernel_shape=[3, 3])
    graph.node("DequantizeLinear", "h_q p_s p_z", "h")
    graph.node("GlobalAveragePool", "h", "g")
    mean = graph.quantize("g", 400 / 2**bits, 0, top)
    graph.node("Flatten", "g_c" if top else "g_q", "f_q")
    graph.node("DequantizeLinear", "f_q g_s g_z", "f")
    weight = graph.weight("o_w", 5, 16)
    bias = graph.bias("o_b", mean, weight)
    graph.node("Gemm", f"f {weight} {bias}", "y", transB=1)
    model = build_model(graph.nodes, images(), graph.constants, ("y", pooled))
    found = assert_exact(model, images())
    assert ops(model).count("QLinearConv") == 2
    assert {"QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearAveragePool", "QGemm"} <= set(ops(model))
    assert not floats(model)
    assert top is None or max(found[f"{n}_c"].max() for n in "xlramcp") == top


@pytest.mark.parametrize(
    ("op", "scale", "low"), [("LeakyRelu", 0.02, 100), ("Sigmoid", 1 / 256, 0), ("Softmax", 1 / 256, 0)]
)
def test_curves(op: str, scale: float, low: int, build_model: Build, assert_exact: Check) -> None:
    graph = QDQ()
    data = graph.quantize("x", 0.03, 120)
    graph.node(op, data, "y")
    out = graph.quantize("y", scale, low)
    model = build_model(graph.nodes, images(), graph.constants, (out,))
    assert_exact(model, images())
    assert ops(model) == [f"QLinear{op}"]


@pytest.mark.parametrize(
    ("zero", "activation", "bounds", "is_fused"),
    [
        (0, "Relu", None, True),
        (3, "Relu", None, False),
        (0, "Clip", (0.0, 255 * 0.37), True),
        (0, "Clip", (0.0, 254.4 * 0.37), False),
        (0, "Clip", (0.0, None), True),
        (5, "Clip", (None, 300 * 0.37), True),
        (5, "Clip", (0.0, 300 * 0.37), False),
    ],
)
def test_an_activation_vanishes_where_the_grid_implies_it(
    zero: int,
    activation: str,
    bounds: tuple[float | None, float | None] | None,
    is_fused: bool,
    build_model: Build,
    assert_exact: Check,
) -> None:
    graph = QDQ()
    data = graph.quantize("x", 0.03, 120)
    weight = graph.weight("w", 8, 8, 3, 3)
    bias = graph.bias("b", data, weight)
    graph.node("Conv", f"{data} {weight} {bias}", "r")
    names = ["r"]
    for end, bound in zip(("low", "high"), bounds or (), strict=False):
        names.append("" if bound is None else end)
        if bound is not None:
            graph.constants[end] = np.float32(bound)
    graph.nodes.append(helper.make_node(activation, names, ["y"]))
    out = graph.quantize("y", 0.37, zero)
    model = build_model(graph.nodes, images(), graph.constants, (out,))
    assert (ops(model) == ["QLinearConv"]) == is_fused
    kernels = [n.op_type for n in optimized_model(model, threads=1).graph.node]
    assert ("QLinearConv" in kernels) == is_fused  # as the runtime does
    if is_fused:
        assert_exact(model, images())


@pytest.mark.parametrize("sign", [1, -1])
def test_how_far_the_scale_of_a_bias_may_be_off(sign: int, build_model: Build, assert_exact: Check) -> None:
    for is_fused, times in ((True, 0.999), (False, 1.001)):
        graph = QDQ()
        data = graph.quantize("x", 0.03, 120)
        weight = graph.weight("w", 8, 8, 3, 3)
        bias = graph.bias("b", data, weight)
        scale = graph.constants["b_s"].copy()
        scale[3] += times * (0.01 * scale[3] + 1e-6) * sign
        graph.constants["b_s"] = scale
        graph.node("Conv", f"{data} {weight} {bias}", "y")
        out = graph.quantize("y", 0.37, 99)
        model = build_model(graph.nodes, images(), graph.constants, (out,))
        assert (ops(model) == ["QLinearConv"]) == is_fused
        assert_exact(model, images())


def test_what_the_graph_prevents(build_model: Build, assert_exact: Check) -> None:
    """A float bias, one of another scale, a second reader, an output, a missing quantization: the convolution stays float."""
    for case in ("float bias", "other bias", "reader", "output", "no end"):
        graph = QDQ()
        data = graph.quantize("x", 0.03, 120)
        weight = graph.weight("w", 8, 8, 3, 3)
        bias = graph.bias("b", data, weight)
        if case == "other bias":
            graph.constants["b_s"] = graph.constants["b_s"] * np.float32(1.1)
        if case == "float bias":
            graph.constants["float"] = np.ones(8, np.float32)
            bias = "float"
        graph.node("Conv", f"{data} {weight} {bias}", "y")
        outputs = ["y"] if case in ("output", "no end") else []
        if case == "reader":
            outputs.append(graph.node("Neg", "y", "n"))
        if case != "no end":
            outputs.append(graph.quantize("y", 0.37, 99))
        model = build_model(graph.nodes, images(), graph.constants, tuple(outputs))
        assert ops(model) == []
        assert "Conv" in floats(model)
        if case != "float bias":  # the runtime quantizes the bias, and the weights, by itself
            assert_exact(model, images())


@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 32), (2, 3, 32)])
def test_matrix_products(
    shape: tuple[int, ...], bias: bool, coded: bool, build_model: Build, assert_exact: Check
) -> None:
    """A bias joins the product of matrices; of more axes only where all sizes are declared."""
    feeds = {"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)}
    for declared in (False, True):
        graph = QDQ()
        data = graph.quantize("x", 0.03, 120)
        weight = graph.weight("w", 32, 7, axis=1)
        graph.node("MatMul", f"{data} {weight}", "m" if bias else "y")
        if bias:
            graph.node("Add", f"{graph.bias('b', data, weight)} m", "y")
        out = graph.quantize("y", 0.05, 99) if coded else "y"
        model = build_model(graph.nodes, feeds, graph.constants, (out,))
        if declared:
            for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, shape, strict=True):
                dim.dim_value = size
        model = onnx.shape_inference.infer_shapes(model)
        assert_exact(model, feeds)
        joins = bias and (len(shape) == 2 or declared)
        plain = "QLinearMatMul" if coded and not bias else "MatMulIntegerToFloat"
        assert ops(model) == ["QGemm" if joins else plain]


def test_products_of_two_activations(build_model: Build, assert_exact: Check) -> None:
    rng = np.random.default_rng(1)
    feeds = {n: rng.normal(size=s).astype(np.float32) for n, s in (("a", (2, 5, 8)), ("b", (2, 8, 4)))}
    graph = QDQ()
    left, right = graph.quantize("a", 0.03, 120), graph.quantize("b", 0.02, 140)
    graph.node("MatMul", f"{left} {right}", "y")
    graph.node("MatMul", f"{left} {right}", "z")
    out = graph.quantize("z", 0.1, 100)
    model = build_model(graph.nodes, feeds, graph.constants, ("y", out))
    assert_exact(model, feeds)
    assert ops(model) == ["MatMulIntegerToFloat", "QLinearMatMul"]


MOVED: dict[str, tuple[str, dict[str, Array], dict[str, Any], bool]] = {
    "MaxPool": ("", {}, {"kernel_shape": [2, 2]}, True),
    "Reshape": (" i", {"i": np.array([0, 0, -1, 3])}, {}, True),
    "Transpose": ("", {}, {"perm": [0, 1, 3, 2]}, True),
    "Slice": (" i j", {"i": np.array([0]), "j": np.array([3])}, {}, True),
    "Identity": ("", {}, {}, True),
    "Tile": (" i", {"i": np.array([1, 1, 2, 1])}, {}, False),
    "Gather": (" i", {"i": np.array([3, 1, 0])}, {}, False),
    "Resize": ("  i", {"i": np.array([1, 1, 2, 2], np.float32)}, {"mode": "nearest"}, False),
}


@pytest.mark.parametrize("op", MOVED)
def test_values_keep_their_grid_where_the_runtime_looks_through_a_move(
    op: str, build_model: Build, assert_exact: Check
) -> None:
    inputs, constants, given, is_seen_through = MOVED[op]
    graph = QDQ()
    graph.constants |= constants
    data = graph.quantize("x", 0.03, 120)
    graph.nodes.append(helper.make_node(op, f"{data}{inputs}".split(" "), ["t"], **given))
    out = conv(graph, "t", "y", 0.37, grid=data, zero=99)
    model = build_model(graph.nodes, images(), graph.constants, (out,))
    assert_exact(model, images())
    assert ops(model) == ([op, "QLinearConv"] if is_seen_through else [])
    assert Reference(model).code_names == ["x_q", "y_q"]
    kernels = [n.op_type for n in optimized_model(model, threads=1).graph.node]
    assert ("QLinearConv" in kernels) == is_seen_through


@pytest.mark.parametrize("readers", [1, 2])
def test_int8_activations(readers: int, build_model: Build, assert_exact: Check) -> None:
    """The runtime moves int8 to uint8 where one node alone reads it, and runs other convolutions in float."""
    graph = QDQ("int8")
    data = graph.quantize("x", 0.03, -8)
    first = conv(graph, data, "f", 0.37, zero=5)
    second = conv(graph, first, "y", 5.0, zero=-20)
    outputs = [second]
    if readers == 2:
        outputs.append(graph.node("Neg", first, "n"))
    model = build_model(graph.nodes, images(), graph.constants, tuple(outputs))
    assert_exact(model, images())
    assert ops(model) == ["QLinearConv"] * (2 if readers == 1 else 0)


def test_int8_codes_of_two_readers_stay_int8(build_model: Build, assert_exact: Check) -> None:
    graph = QDQ("int8")
    first = conv(graph, graph.quantize("x", 0.03, -8), "f", 0.37, zero=5)
    outputs = [conv(graph, first, "y", 5.0, zero=-20)]
    outputs.append(graph.node("DequantizeLinear", "f_q f_s f_z", "again"))
    model = build_model(graph.nodes, images(), graph.constants, tuple(outputs))
    assert_exact(model, images())
    assert ops(model) == []


@pytest.mark.parametrize("is_output", [True, False])
def test_int8_additions(is_output: bool, build_model: Build, assert_exact: Check) -> None:
    """With zero points moved by 128 a sum is rounded otherwise, which shows on ties; codes read twice are not moved."""
    graph = QDQ("int8")
    values = np.arange(-128, 128, dtype=np.float32)
    feeds = {
        "a": np.repeat(values + 111, 256) * np.float32(0.034),
        "b": np.tile(values - 124, 256) * np.float32(0.034),
    }
    left, right = graph.quantize("a", 0.034, -111), graph.quantize("b", 0.034, 124)
    graph.node("Add", f"{left} {right}", "y")
    outputs = [graph.quantize("y", 0.204, -12)]
    if is_output:
        outputs += [graph.node("DequantizeLinear", f"{n}_q {n}_s {n}_z", f"{n}_again") for n in "aby"]
    model = build_model(graph.nodes, feeds, graph.constants, tuple(outputs))
    assert_exact(model, feeds)
    assert ops(model) == ["QLinearAdd"]
