"""Each integer operator against onnxruntime, bit by bit, on random codes and grids with full-range weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

Array = NDArray[Any]
Build = Callable[..., ModelProto]
Check = Callable[..., dict[str, Array]]
MICROSOFT = "com.microsoft"


class Draw:
    """Random codes and grids from one seed."""

    def __init__(self, seed: int, dtype: str = "uint8") -> None:
        self.rng, self.dtype = np.random.default_rng(seed), dtype

    def codes(self, *shape: int, dtype: str = "") -> Array:
        info = np.iinfo(dtype or self.dtype)
        return self.rng.integers(info.min, info.max + 1, shape).astype(info.dtype)

    def grid(self, name: str, low: float = 0.005, high: float = 0.05) -> dict[str, Any]:
        """A scale and a zero point, which is the smallest code in half of the cases."""
        info = np.iinfo(self.dtype)
        zero = self.codes() if self.rng.integers(2) else np.array(info.min, info.dtype)
        return {f"{name}_scale": np.float32(self.rng.uniform(low, high)), f"{name}_zero": zero}

    def weights(self, shape: tuple[int, ...], dtype: str, channels: int | None) -> dict[str, Array]:
        size = () if channels is None else (channels,)
        zero = np.zeros(size, dtype) if dtype == "int8" else np.full(size, 128, dtype)
        scale = self.rng.uniform(0.005, 0.05, size).astype(np.float32)
        return {"w": self.codes(*shape, dtype=dtype), "w_scale": scale, "w_zero": zero}

    def bias(self, size: int) -> Array:
        return self.rng.integers(-20_000, 20_000, size).astype(np.int32)


CONVS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "padded": ((2, 16, 9, 8), (24, 16, 3, 3), {"pads": [1, 1, 1, 1]}),
    "odd channels": ((2, 5, 9, 8), (7, 5, 3, 3), {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
    "colours": ((2, 3, 9, 9), (16, 3, 3, 3), {"pads": [1, 1, 1, 1]}),
    "dilated": ((2, 4, 9, 9), (16, 4, 3, 3), {"dilations": [2, 1]}),
    "one channel": ((2, 1, 9, 9), (16, 1, 3, 3), {}),
    "pointwise": ((2, 33, 6, 6), (20, 33, 1, 1), {"strides": [2, 2]}),
    "grouped": ((2, 12, 6, 6), (8, 3, 3, 3), {"group": 4}),
    "wide groups": ((2, 32, 6, 6), (32, 16, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    "depthwise": ((2, 24, 6, 6), (24, 1, 3, 3), {"group": 24, "pads": [1, 1, 1, 1]}),
    "depthwise 5x5": ((2, 16, 9, 9), (16, 1, 5, 5), {"group": 16, "pads": [2] * 4, "strides": [2, 2]}),
    "depth multiplier": ((2, 8, 6, 6), (16, 1, 3, 3), {"group": 8}),
    "1-d": ((2, 6, 20), (9, 6, 5), {"pads": [2, 2]}),
    "3-d": ((1, 4, 5, 5, 5), (6, 4, 2, 3, 2), {}),
    "same upper": ((2, 6, 9, 8), (9, 6, 2, 3), {"auto_pad": "SAME_UPPER"}),
    "same lower": ((2, 6, 9, 8), (9, 6, 2, 3), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    "valid": ((2, 6, 9, 8), (9, 6, 2, 3), {"auto_pad": "VALID"}),
}


@pytest.mark.parametrize(
    "types", [("uint8", "int8"), ("uint8", "uint8"), ("int8", "int8")], ids=lambda types: "-".join(types)
)
@pytest.mark.parametrize("case", CONVS)
def test_convolutions(case: str, types: tuple[str, str], build_model: Build, assert_exact: Check) -> None:
    shape, kernel, given = CONVS[case]
    draw = Draw(len(case), types[0])
    by_channel = types[1] == "int8"  # the operator takes uint8 weights per tensor
    constants = draw.grid("x") | draw.weights(kernel, types[1], kernel[0] if by_channel else None)
    size = float(np.sqrt(np.prod(kernel[1:])))
    constants |= draw.grid("y", 0.03 * size, 0.15 * size) | {"b": draw.bias(kernel[0])}
    names = ["x", "x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero"]
    feeds = {"x": draw.codes(*shape)}
    for bias in (["b"], []):
        node = helper.make_node("QLinearConv", [*names, *bias], ["y"], **given)
        found = assert_exact(build_model([node], feeds, constants), feeds)["y"]
        assert len(np.unique(found)) > 20


PRODUCTS = {
    "row": ((1, 64), (64, 48)),
    "odd": ((5, 37), (37, 11)),
    "matrix": ((17, 255), (255, 70)),
    "stack": ((2, 7, 48), (48, 33)),
    "stacks": ((2, 7, 48), (2, 48, 33)),
}


@pytest.mark.parametrize("weights", ["int8", "uint8"])
@pytest.mark.parametrize("case", PRODUCTS)
@pytest.mark.parametrize("op", ["QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "biased"])
def test_matrix_products(op: str, case: str, weights: str, build_model: Build, assert_exact: Check) -> None:
    left, right = PRODUCTS[case]
    draw = Draw(len(case) + len(op))
    by_channel = right[-1] if len(right) == 2 and op != "MatMulInteger" else None
    constants = draw.grid("a") | draw.weights(right, weights, by_channel)
    constants |= draw.grid("y", 0.3, 1.5) | {"b": draw.rng.normal(size=right[-1]).astype(np.float32)}
    own = ["a", "w", "a_scale", "w_scale", "a_zero", "w_zero"]
    nodes = {
        "QLinearMatMul": (
            "",
            ["a", "a_scale", "a_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero"],
        ),
        "MatMulInteger": ("", ["a", "w", "a_zero", "w_zero"]),
        "MatMulIntegerToFloat": (MICROSOFT, own),
        "biased": (MICROSOFT, [*own, "b"]),
    }
    domain, inputs = nodes[op]
    name = "MatMulIntegerToFloat" if op == "biased" else op
    feeds = {"a": draw.codes(*left)}
    model = build_model([helper.make_node(name, inputs, ["y"], domain=domain)], feeds, constants)
    assert len(np.unique(assert_exact(model, feeds)["y"])) > 10


@pytest.mark.parametrize("types", [("uint8", "int8"), ("uint8", "uint8"), ("int8", "int8")])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize("given", [{}, {"transB": 1}, {"transA": 1, "alpha": 0.7}])
def test_gemms(
    given: dict[str, Any],
    coded: bool,
    bias: bool,
    types: tuple[str, str],
    build_model: Build,
    assert_exact: Check,
) -> None:
    draw = Draw(7, types[0])
    constants = draw.grid("a") | draw.grid("y", 0.3, 1.5) | {"b": draw.bias(11)}
    constants |= draw.weights((11, 70) if given.get("transB") else (70, 11), types[1], 11)
    inputs = ["a", "a_scale", "a_zero", "w", "w_scale", "w_zero", "b" if bias else ""]
    inputs += ["y_scale", "y_zero"] if coded else []
    feeds = {"a": draw.codes(*((70, 9) if given.get("transA") else (9, 70)))}
    node = helper.make_node("QGemm", inputs, ["y"], domain=MICROSOFT, **given)
    assert len(np.unique(assert_exact(build_model([node], feeds, constants), feeds)["y"])) > 20


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 9])
def test_products_quantized_at_run_time(
    rows: int, bias: bool, build_model: Build, assert_exact: Check
) -> None:
    draw = Draw(rows)
    constants = draw.weights((70, 40), "int8", 40) | {"b": draw.rng.normal(size=40).astype(np.float32)}
    constants["w_zero"] = np.zeros((), np.int8)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["a"], ["q", "q_scale", "q_zero"]),
        helper.make_node("MatMulInteger", ["q", "w", "q_zero", "w_zero"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["q_scale", "w_scale"], ["factor"]),
        helper.make_node("Mul", ["float", "factor"], ["scaled" if bias else "y"]),
        *([helper.make_node("Add", ["scaled", "b"], ["y"])] if bias else []),
    ]
    feeds = {"a": 3 * draw.rng.normal(size=(rows, 70)).astype(np.float32)}
    assert_exact(build_model(nodes, feeds, constants), feeds)
    one = helper.make_node(
        "DynamicQuantizeMatMul",
        ["a", "w", "w_scale", "w_zero", *(["b"] if bias else [])],
        ["y"],
        domain=MICROSOFT,
    )
    constants["w_zero"] = np.zeros(40, np.int8)
    assert_exact(build_model([one], feeds, constants), feeds)


def test_integer_convolutions(build_model: Build, assert_exact: Check) -> None:
    draw = Draw(3)
    constants = {"w": draw.codes(6, 4, 3, 3, dtype="uint8"), "x_zero": draw.codes(), "w_zero": draw.codes()}
    feeds = {"x": draw.codes(2, 4, 7, 7)}
    node = helper.make_node("ConvInteger", ["x", "w", "x_zero", "w_zero"], ["y"], pads=[1, 1, 1, 1])
    assert_exact(build_model([node], feeds, constants), feeds)


SHAPES = {
    "equal": ((2, 16, 32, 32), (2, 16, 32, 32)),
    "one of a pixel": ((2, 16, 32, 32), (2, 16, 1, 1)),
    "the other of a pixel": ((2, 16, 1, 1), (2, 16, 32, 32)),
    "batch": ((1, 16, 32), (4, 16, 32)),
    "vector": ((4, 32, 64), (64,)),
    "vector first": ((64,), (4, 32, 64)),
    "one": ((4, 32, 64), (1,)),
    "one first": ((1,), (4, 32, 64)),
    "both": ((4, 1, 64), (4, 32, 1)),
    "both the other way": ((4, 32, 1), (4, 1, 64)),
}


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("op", ["QLinearAdd", "QLinearMul"])
def test_additions_and_multiplications(
    op: str, case: str, dtype: str, build_model: Build, assert_exact: Check
) -> None:
    """Many grids, among them equal ones, whose sums lie on ties; a product added without fusing differs in some places."""
    for seed in range(12):
        draw = Draw(seed, dtype)
        constants = draw.grid("a") | draw.grid("b") | draw.grid("y", 0.01, 0.1)
        if seed % 3 == 0:
            constants["b_scale"] = constants["a_scale"]
            constants["y_scale"] = 2 * constants["a_scale"]
        if op == "QLinearMul":
            constants["y_scale"] = constants["a_scale"] * constants["b_scale"] * np.float32(5 + 9 * seed)
        feeds = {name: draw.codes(*shape) for name, shape in zip("ab", SHAPES[case], strict=True)}
        inputs = ["a", "a_scale", "a_zero", "b", "b_scale", "b_zero", "y_scale", "y_zero"]
        node = helper.make_node(op, inputs, ["y"], domain=MICROSOFT)
        assert_exact(build_model([node], feeds, constants), feeds)


# Scales and zero points of a, of b and of their sum, whose values lie on ties: one rounding more moves thousands of codes.
TIES = [
    (0.046, 205, 0.046, 186, 0.276, 82),
    (0.03, 95, 0.045, 249, 0.09, 90),
    (0.014, 152, 0.042, 165, 0.028, 36),
    (0.016, 175, 0.032, 150, 0.096, 75),
]


@pytest.mark.parametrize("grids", TIES)
def test_additions_on_ties(grids: tuple[float, ...], build_model: Build, assert_exact: Check) -> None:
    """All pairs of codes."""
    names = ["a_scale", "a_zero", "b_scale", "b_zero", "y_scale", "y_zero"]
    kinds = ("float32", "uint8") * 3
    constants = {n: np.array(v, kind) for n, v, kind in zip(names, grids, kinds, strict=True)}
    every = np.arange(256, dtype=np.uint8)
    feeds = {"a": np.repeat(every, 256), "b": np.tile(every, 256)}
    inputs = ["a", *names[:2], "b", *names[2:]]
    node = helper.make_node("QLinearAdd", inputs, ["y"], domain=MICROSOFT)
    assert_exact(build_model([node], feeds, constants), feeds)


@pytest.mark.parametrize("op", ["QLinearConv", "QLinearMatMul"])
def test_factors_round_as_in_the_runtime(op: str, build_model: Build, assert_exact: Check) -> None:
    """Of a million requantized sums a_scale (b_scale / y_scale) would move two, and nine, from these seeds."""
    is_conv = op == "QLinearConv"
    draw = Draw(8 if is_conv else 5)
    constants = draw.grid("a") | draw.weights((300, 64, 1, 1) if is_conv else (64, 300), "int8", 300)
    constants |= {"y_scale": np.float32(0.13), "y_zero": np.array(128, np.uint8)}
    constants["a_zero"] = np.array(128, np.uint8)
    feeds = {
        "a": draw.codes(*((10, 64, 20, 20) if is_conv else (4000, 64))) // 4 + 96
    }  # few sums pass the range
    inputs = ["a", "a_scale", "a_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero"]
    assert_exact(build_model([helper.make_node(op, inputs, ["y"])], feeds, constants), feeds)


def unary(
    op: str, feeds: dict[str, Array], constants: dict[str, Array], build: Build, **given: Any
) -> ModelProto:
    inputs = ["x", "x_scale", "x_zero", "y_scale", "y_zero"]
    return build([helper.make_node(op, inputs, ["y"], domain=MICROSOFT, **given)], feeds, constants)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_leaky_relus(dtype: str, build_model: Build, assert_exact: Check) -> None:
    for seed in range(20):
        draw = Draw(seed, dtype)
        feeds, constants = {"x": draw.codes(999)}, draw.grid("x") | draw.grid("y")
        assert_exact(unary("QLinearLeakyRelu", feeds, constants, build_model, alpha=0.02 * seed), feeds)


def test_sigmoids(build_model: Build, assert_exact: Check) -> None:
    """The seeds are such that no value lies within 1e-7 of the middle between two codes; of 1.28 million random ones, 4 do."""
    for seed in range(20):
        draw = Draw(seed)
        feeds = {"x": np.arange(256, dtype=np.uint8)}
        constants = draw.grid("x") | draw.grid("y", 1 / 400, 1 / 200)
        assert_exact(unary("QLinearSigmoid", feeds, constants, build_model), feeds)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize("axis", [1, -1])
def test_softmaxes(axis: int, opset: int, dtype: str, build_model: Build, assert_exact: Check) -> None:
    for seed, step in enumerate((1 / 256, 1 / 255, 0.0061, 0.02)):
        draw = Draw(seed, dtype)
        feeds = {"x": draw.codes(900, 6, 33)}
        constants = draw.grid("x", 0.005, 0.2)
        constants["y_scale"] = np.float32(step)
        constants["y_zero"] = np.array(np.iinfo(dtype).min, dtype)
        model = unary("QLinearSoftmax", feeds, constants, build_model, axis=axis, opset=opset)
        assert_exact(model, feeds)


POOLS: list[dict[str, Any]] = [
    {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [2, 2], "strides": [2, 2]},
    {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 0, 1], "count_include_pad": 1},
    {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    {"kernel_shape": [5, 5], "strides": [3, 3], "pads": [2, 2, 2, 2], "ceil_mode": 1},
    {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    {
        "kernel_shape": [2, 2],
        "strides": [4, 3],
        "pads": [1, 1, 1, 1],
        "ceil_mode": 1,
    },  # a last window in the padding
    {"kernel_shape": [9, 8]},
]


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("given", POOLS, ids=str)
def test_average_pools(given: dict[str, Any], dtype: str, build_model: Build, assert_exact: Check) -> None:
    for seed in range(5):
        draw = Draw(seed, dtype)
        feeds, constants = {"x": draw.codes(4, 8, 9, 8)}, draw.grid("x") | draw.grid("y")
        assert_exact(unary("QLinearAveragePool", feeds, constants, build_model, **given), feeds)


@pytest.mark.parametrize(
    "given", [*POOLS[:2], *POOLS[3:], {"kernel_shape": [3, 3], "dilations": [2, 1]}], ids=str
)
def test_max_pools(given: dict[str, Any], build_model: Build, assert_exact: Check) -> None:
    for dtype in ("uint8", "int8"):
        feeds = {"x": Draw(1, dtype).codes(4, 8, 9, 8)}
        node = helper.make_node("MaxPool", ["x"], ["y"], **given)
        assert_exact(build_model([node], feeds, {}), feeds)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("image", [(7, 7), (1, 1), (5,), (2, 3, 4)])
def test_global_averages(image: tuple[int, ...], dtype: str, build_model: Build, assert_exact: Check) -> None:
    for seed in range(10):
        draw = Draw(seed, dtype)
        feeds, constants = {"x": draw.codes(4, 33, *image)}, draw.grid("x") | draw.grid("y")
        assert_exact(unary("QLinearGlobalAveragePool", feeds, constants, build_model), feeds)


def test_global_averages_on_ties(build_model: Build, assert_exact: Check) -> None:
    """Means of 12 codes at 6 times the scale, whose halves depend on how the factor is rounded."""
    for scale in np.linspace(0.011, 0.05, 13, dtype=np.float32):
        feeds = {"x": Draw(1).codes(64, 256, 3, 4)}
        constants = {"x_scale": scale, "y_scale": scale * np.float32(0.7)}
        constants |= {"x_zero": np.array(3, np.uint8), "y_zero": np.array(9, np.uint8)}
        assert_exact(unary("QLinearGlobalAveragePool", feeds, constants, build_model), feeds)


def test_concatenations(build_model: Build, assert_exact: Check) -> None:
    for seed in range(10):
        draw = Draw(seed)
        constants = draw.grid("a") | draw.grid("b") | draw.grid("y")
        if seed % 2:
            constants |= {f"a_{end}": constants[f"y_{end}"] for end in ("scale", "zero")}
        feeds = {"a": draw.codes(4, 64), "b": draw.codes(4, 300)}
        inputs = ["y_scale", "y_zero", "a", "a_scale", "a_zero", "b", "b_scale", "b_zero"]
        node = helper.make_node("QLinearConcat", inputs, ["y"], domain=MICROSOFT, axis=1)
        assert_exact(build_model([node], feeds, constants), feeds)


MOVES: dict[str, tuple[list[str], dict[str, Array], dict[str, Any]]] = {
    "Reshape": (["x", "i"], {"i": np.array([0, -1])}, {}),
    "Transpose": (["x"], {}, {"perm": [0, 2, 3, 1]}),
    "Flatten": (["x"], {}, {}),
    "Unsqueeze": (["x", "i"], {"i": np.array([1])}, {}),
    "Slice": (["x", "i", "j", "k"], {"i": np.array([1]), "j": np.array([7]), "k": np.array([2])}, {}),
    "Pad": (["x", "i", "f"], {"i": np.array([0, 0, 1, 1, 0, 0, 2, 0]), "f": np.array(9, np.uint8)}, {}),
    "Expand": (["x", "i"], {"i": np.array([2, 1, 1, 1, 1])}, {}),
    "Tile": (["x", "i"], {"i": np.array([1, 2, 1, 1])}, {}),
    "Gather": (["x", "i"], {"i": np.array([[2, 0], [1, 1]])}, {"axis": 1}),
    "Concat": (["x", "x"], {}, {"axis": 1}),
    "DepthToSpace": (["x"], {}, {"blocksize": 2}),
    "SpaceToDepth": (["x"], {}, {"blocksize": 2}),
    "Resize": (["x", "", "s"], {"s": np.array([1, 1, 2, 3], np.float32)}, {"mode": "nearest"}),
    "Clip": (["x", "f", "g"], {"f": np.array(9, np.uint8), "g": np.array(99, np.uint8)}, {}),
    "Min": (["x", "f"], {"f": np.array(9, np.uint8)}, {}),
    "Max": (["x", "f"], {"f": np.array(9, np.uint8)}, {}),
    "Identity": (["x"], {}, {}),
}


@pytest.mark.parametrize("op", MOVES)
def test_moves_and_bounds_of_codes(op: str, build_model: Build, assert_exact: Check) -> None:
    inputs, constants, given = MOVES[op]
    feeds = {"x": Draw(1).codes(2, 8, 8, 6)}
    model = build_model([helper.make_node(op, inputs, ["y"], **given)], feeds, constants)
    assert_exact(model, feeds)


def test_a_split_gives_several_tensors(build_model: Build, assert_exact: Check) -> None:
    feeds = {"x": Draw(1).codes(2, 8)}
    node = helper.make_node("Split", ["x", "i"], ["y", "z"], axis=1)
    model = build_model([node], feeds, {"i": np.array([3, 5])}, ("y", "z"))
    assert assert_exact(model, feeds)["z"].shape == (2, 5)
