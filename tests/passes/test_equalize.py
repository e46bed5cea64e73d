"""Equalizing channels: the float network stays the same, its quantization gets better, and nobody else is touched."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

from onnxq.affine import sqnr_db
from onnxq.calibration.statistics import TensorStatistics
from onnxq.data import input_specs, open_data
from onnxq.errors import DataError
from onnxq.model.load import load_model
from onnxq.model.prepare import prepare
from onnxq.model.session import make_session
from onnxq.passes.equalize import Equalize
from onnxq.pipeline import Context, PassResult, Pipeline
from onnxq.program import Program
from onnxq.scheme import QuantScheme

Array = NDArray[Any]
ParseProgram = Callable[..., Program]
TENSOR, CHANNEL = QuantScheme.parse("int8:tensor"), QuantScheme.parse("int8:channel")


def uneven(*shape: int) -> NDArray[np.float32]:
    """Weights whose output channels, along axis 0, span two decades."""
    values = np.random.default_rng(sum(shape)).normal(size=shape)
    return (values * np.geomspace(0.1, 10, shape[0]).reshape(-1, *[1] * (len(shape) - 1))).astype(np.float32)


X = {"x": np.random.default_rng(1).normal(size=(8, 4, 6, 6)).astype(np.float32)}
W = {
    "w": uneven(6, 4, 3, 3),
    "b": uneven(6),
    "v": uneven(6, 6, 1, 1),
    "u": uneven(5, 6, 1, 1),
    "c": uneven(5),
    "wide": uneven(5, 12, 1, 1),
    "few": uneven(5, 3, 1, 1),
    "deep": uneven(6, 1, 3, 3),
    "half": uneven(6, 3, 1, 1),
    "double": uneven(12, 1, 1, 1),
    "rows": uneven(216, 7),
    "last": uneven(6, 5),
    "squeezed": uneven(6, 7),
}


def context(program: Program, feeds: Mapping[str, Array] = X) -> Context:
    return Context(open_data(feeds, input_specs(program.source)), threads=1)


def outputs(model: ModelProto, feeds: Mapping[str, Array] = X) -> list[Array]:
    found: list[Array] = make_session(model, threads=1, optimize=False).run(None, dict(feeds))
    return found


def assert_equal(before: ModelProto, after: ModelProto, feeds: Mapping[str, Array] = X) -> None:
    """Both models give the same, to float32 rounding: 6e-8 in each of a few layers of some hundred terms."""
    for old, new in zip(outputs(before, feeds), outputs(after, feeds), strict=True):
        np.testing.assert_allclose(new, old, rtol=0, atol=1e-5 * np.abs(old).max())


def equalized(program: Program, feeds: Mapping[str, Array] = X, scheme: QuantScheme = TENSOR) -> PassResult:
    """Run the pass and compare what the float network computes before and after."""
    before = program.to_model()
    result = Equalize(weights=scheme, when="always").run(program, context(program, feeds))
    assert_equal(before, program.to_model(), feeds)
    return result


def image_graph(body: str, outputs: str = "y") -> str:
    """A graph from an image x to outputs of unknown size; its weights come from W."""
    written = ", ".join(f"float[i{o},j{o},k{o},l{o}] {o}" for o in outputs.split())
    return f"g (float[N,4,6,6] x) => ({written}) {{ {body} }}"


def parsed(parse: ParseProgram, text: str, **more: Any) -> Program:
    """The program of a text with those weights that it names."""
    return parse(text, {k: v for k, v in {**W, **more}.items() if f"{k})" in text or f"{k}," in text}, 17)


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


START = "a = Conv<pads=[1,1,1,1]>(x, w, b)"
MOVING = {
    "relu": f"{START} r = Relu(a) y = Conv(r, u, c)",
    "no activation": f"{START} y = Conv(a, u)",
    "leaky": f"{START} r = LeakyRelu<alpha=0.3>(a) y = Conv(r, u)",
    "slope": f"{START} r = PRelu(a, slope) y = Conv(r, u)",
    "max": f"{START} r = MaxPool<kernel_shape=[2,2]>(a) y = Conv(r, u)",
    "mean": f"{START} r = AveragePool<kernel_shape=[2,2],pads=[1,1,0,0]>(a) y = Conv(r, u)",
    "global": f"{START} r = GlobalAveragePool(a) y = Conv(r, u)",
    "depthwise": f"{START} r = Conv<group=6>(a, deep) y = Conv(r, u)",
    "grouped": f"{START} r = Conv<group=2>(a, half) y = Conv(r, u)",
    "multiplier": f"{START} r = Conv<group=6>(a, double) y = Conv(r, wide)",
    "two readers": f"{START} r = Conv(a, v) s = Conv(a, u) y = Conv(r, u2) z = Identity(s)",
    "residual": f"{START} r = Conv(a, v) s = Add(r, a) t = Relu(s) y = Conv(t, u)",
    "maximum": f"{START} r = Conv(a, v) s = Max(r, a) y = Conv(s, u)",
    "concat": f"{START} r = Conv(a, v) s = Concat<axis=1>(r, a) y = Conv(s, wide)",
    "stack": f"{START} r = Conv(a, v) s = Concat<axis=2>(r, a) y = Conv(s, u)",
    "slice": f"{START} s = Slice(a, one, six, one, two) y = Conv(s, few)",
    "slice of places": f"{START} s = Slice(a, one, six, two) y = Conv(s, u)",
    "backwards": f"{START} s = Slice(a, minus, far, minus3, minus) y = Conv(s, u)",
    "pad": f"{START} s = Pad(a, pads) t = Conv(a, double12) r = Add(s, t) y = Conv(r, wide)",
    "reflect": f'{START} s = Pad<mode="reflect">(a, around) y = Conv(s, u)',
    "free clip": f"{START} r = Clip(a, , huge) y = Conv(r, u)",
    "sum": f"{START} r = Conv(a, v) s = Sum(r, a, a) y = Conv(s, u)",
}
MORE = {
    "slope": np.full((6, 1, 1), 0.2, np.float32),
    "u2": uneven(5, 6, 1, 1)[::-1].copy(),
    "one": ints(1),
    "two": ints(2),
    "six": ints(6),
    "minus": ints(-1),
    "minus3": ints(-3),
    "far": ints(-(2**63)),
    "pads": ints(0, 2, 0, 0, 0, 4, 0, 0),
    "around": ints(0, 0, 1, 1, 0, 0, 2, 2),
    "double12": uneven(12, 6, 1, 1),
    "huge": np.float32(1e4),
}


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("scheme", [TENSOR, CHANNEL])
def test_factors_move_through(name: str, scheme: QuantScheme, parse_program: ParseProgram) -> None:
    body = MOVING[name]
    program = parsed(parse_program, image_graph(body, "y z" if "z =" in body else "y"), **MORE)
    result = equalized(program, scheme=scheme)
    assert result.changed > 0
    assert result.facts["noise_db"] < 0


PRODUCTS = {
    "flatten": f"{START} r = Flatten(a) y = Gemm(r, rows)",
    "reshape": f"{START} r = Reshape(a, flat) y = Gemm(r, rows)",
    "pooled": f"{START} p = GlobalAveragePool(a) r = Flatten(p) y = Gemm(r, squeezed)",
    "last axis": f"{START} r = Transpose<perm=[0,2,3,1]>(a) y = MatMul(r, last)",
    "back and forth": f"{START} r = Transpose<perm=[0,2,3,1]>(a) s = Reshape(r, matrix) y = Gemm(s, last)",
    "scaled": f"{START} p = Flatten(a) h = Gemm<alpha=0.5,beta=2.0>(p, rows, seven) y = Gemm<transB=1>(h, t)",
    "one number": f"{START} p = Flatten(a) h = Gemm(p, rows, single) r = Relu(h) y = Gemm<transB=1>(r, t)",
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_factors_move_into_products(name: str, parse_program: ParseProgram) -> None:
    body = PRODUCTS[name]
    shape = "i,j,k,l" if "MatMul" in body else "i,j"
    more = {
        "flat": ints(0, 216),
        "matrix": ints(-1, 6),
        "seven": uneven(7),
        "t": uneven(3, 7),
        "single": uneven(1),
    }
    program = parsed(parse_program, f"g (float[N,4,6,6] x) => (float[{shape}] y) {{ {body} }}", **more)
    assert equalized(program).changed > 0


HELD = {
    "graph output": (f"{START} z = Relu(a) y = Conv(z, u)", "it leaves the graph"),
    "unknown reader": (f"{START} z = Sigmoid(a) y = Conv(a, u)", "Sigmoid .* reads it"),
    "constant added": (f"{START} s = Add(a, shift) y = Conv(s, u)", "of other channels"),
    "constant factor": (f"{START} s = Mul(a, shift) y = Conv(s, u)", "Mul .* reads it"),
    "input added": ("t = Conv(x, w4) s = Add(t, x) y = Conv(s, u4)", "of other channels"),
    "offset pad": (f"{START} s = Pad(a, around, fill) y = Conv(s, u)", "other than zero"),
    "cropped": (f"{START} s = Pad(a, crop) y = Conv(s, few4)", "crops or repeats"),
    "clip from 1": (f"{START} s = Clip(a, above) y = Conv(s, u)", "does not let zero through"),
    "mixed": (f"{START} s = Reshape(a, other) y = Conv(s, three)", "mixes its channels"),
    "norm": (f"{START} s = BatchNormalization(a, six1, six1, six1, six2) y = Conv(s, u)", "reads it"),
    "split": (f"{START} s, t = Split<axis=1>(a) y = Conv(s, few) z = Identity(t)", "Split .* reads it"),
    "shared weights": (f"{START} r = Conv(a, v) s = Conv(r, v) y = Sigmoid(s)", "used elsewhere too"),
    "computed weights": (f"{START} n = Neg(u) y = Conv(a, n)", "no float32 initializer"),
}


@pytest.mark.parametrize("name", HELD)
def test_channels_that_cannot_move_stay(name: str, parse_program: ParseProgram) -> None:
    body, reason = HELD[name]
    more = MORE | {
        "shift": uneven(6, 1, 1),
        "w4": uneven(4, 4, 1, 1),
        "u4": uneven(5, 4, 1, 1),
        "fill": np.float32(1),
        "above": np.float32(0.5),
        "crop": ints(0, -1, 0, 0, 0, -1, 0, 0),
        "few4": uneven(5, 4, 1, 1),
        "other": ints(-1, 3, 8, 9),
        "three": uneven(5, 3, 1, 1),
        "six1": uneven(6),
        "six2": np.abs(uneven(6)),
    }
    program = parsed(
        parse_program, image_graph(body, "y z" if " z" in body or "t =" in body[-20:] else "y"), **more
    )
    names = set(program.graph.tensors())
    result = equalized(program)
    assert result.changed == 0
    assert set(program.graph.tensors()) == names
    assert any(re.search(reason, why) for why in result.skipped.values())


def test_what_a_body_captures_stays(parse_program: ParseProgram) -> None:
    body = """{START} s = Conv(a, v) p = Relu(s) r = Conv(p, u) flag = Constant<value = bool {{1}}>()
        z = If (flag) <then_branch = t () => (float[a,b,c,d] q) {{ q = Identity(s) }},
                       else_branch = e () => (float[a,b,c,d] k) {{ k = Neg(s) }}>
        y = Identity(r)"""
    program = parsed(parse_program, image_graph(body.format(START=START), "y z"))
    result = equalized(program)
    assert result.changed == 1  # only a, whose readers all absorb its factors
    assert "s" in program.graph.tensors()


def test_inputs_outputs_and_nodes_keep_their_names_and_scaled_tensors_do_not(
    parse_program: ParseProgram,
) -> None:
    program = parsed(parse_program, image_graph(MOVING["relu"]))
    nodes = [n.name for n in program.graph.nodes]
    equalized(program)
    assert [n.name for n in program.graph.nodes] == nodes
    tensors = program.graph.tensors()
    assert {"x", "y", "a_equalized_tensor", "r_equalized_tensor"} <= set(tensors)
    assert not {"a", "r"} & set(tensors)


def test_shared_biases_are_copied(parse_program: ParseProgram) -> None:
    body = f"{START} r = Relu(a) s = Conv(r, v, b) t = Relu(s) y = Conv(t, u) z = Conv(x, w2, b)"
    program = parsed(parse_program, image_graph(body, "y z"), w2=uneven(6, 4, 1, 1))
    assert equalized(program).changed == 4
    (last,) = [n for n in program.graph.nodes if n.outputs[0].name == "z"]
    np.testing.assert_array_equal(last.inputs[2].values, W["b"])


@pytest.mark.parametrize("limits", [(0.0, 6.0), (-6.0, 6.0)])
def test_clips_take_no_effect_and_channels_that_saturate_stay(
    limits: tuple[float, float], parse_program: ParseProgram
) -> None:
    """Two decades of output channels in front of a Clip: small ones may grow up to it, large ones are clipped."""
    program = parsed(
        parse_program,
        image_graph("a = Conv<pads=[1,1,1,1]>(x, w) r = Clip(a, low, high) y = Conv(r, u)"),
        low=np.float32(limits[0]),
        high=np.float32(limits[1]),
    )
    result = equalized(program)  # compares the outputs
    low, high = result.facts["factors"]
    assert high > 1.5
    first, second = (n for n in program.graph.nodes if n.op == "Conv")
    grown = first.inputs[1].values / W["w"]
    assert np.allclose(grown[-1], 1.0)  # the largest one saturates
    assert not np.allclose(grown[0], 1.0)
    assert low > 0
    np.testing.assert_allclose(second.inputs[1].values * grown[:, 0, 0, 0, None, None], W["u"], rtol=1e-5)


def quantized_db(parse: ParseProgram, steps: str) -> float:
    """SQNR of a network all of whose uneven inner channels matter equally, quantized per tensor."""
    even = uneven(6, 5, 1, 1)[::-1].transpose(1, 0, 2, 3).copy()
    program = parsed(parse, image_graph(f"{START} r = Relu(a) y = Conv(r, even)"), even=even)
    expected = outputs(program.to_model())[0]
    text = f"{steps} annotate:weights=int8:tensor calibrate choose-ranges quantize-weights emit-qdq"
    Pipeline.parse(text).run(program, context(program))
    return sqnr_db(expected, outputs(program.to_model())[0])


def test_per_tensor_quantization_gains(parse_program: ParseProgram) -> None:
    # Channels over two decades lose 3.3 bits, 20 dB, on average; half of that is far above the noise of rounding.
    gained = quantized_db(parse_program, "equalize:weights=int8:tensor,when=always") - quantized_db(
        parse_program, ""
    )
    assert gained > 10.0


@pytest.mark.parametrize(
    ("scheme", "spread", "runs"), [(TENSOR, 1000.0, True), (TENSOR, 2.0, False), (CHANNEL, 1000.0, False)]
)
def test_it_runs_where_channels_drown(
    parse_program: ParseProgram, scheme: QuantScheme, spread: float, runs: bool
) -> None:
    sizes = np.array([spread, 1.0, 1.0, 1.0, 1.0, 1.0], np.float32).reshape(
        6, 1, 1, 1
    )  # 127 steps for all: 60 dB apart
    weights = np.random.default_rng(3).normal(size=(6, 5, 1, 1)).astype(np.float32) * sizes
    text = "g (float[N,5,4,4] x) => (float[N,6,4,4] y) { a = Conv(x, weights) r = Relu(a) y = Conv(r, last) }"
    program = parse_program(text, {"weights": weights, "last": np.ones((6, 6, 1, 1), np.float32)}, 17)
    feeds = {"x": np.random.default_rng(4).normal(size=(8, 5, 4, 4)).astype(np.float32)}
    before = program.to_model().SerializeToString()
    result = Equalize(weights=scheme).run(program, context(program, feeds))
    assert (result.changed > 0) == runs
    assert (program.to_model().SerializeToString() == before) != runs
    if not runs:
        assert set(result.skipped) == {n.name for n in program.graph.nodes if n.op == "Conv"}
        assert not program.statistics


def test_a_table_stands_for_the_data(parse_program: ParseProgram) -> None:
    first, second = (parsed(parse_program, image_graph(MOVING["residual"])) for _ in range(2))
    Equalize(weights=TENSOR, when="always").run(first, context(first))
    assert first.statistics
    for key, found in first.statistics.items():
        assert key.startswith("equalize/")
        second.statistics[key] = TensorStatistics.from_arrays(key, found.to_arrays())
        assert second.statistics[key].merge(found).count == 2 * found.count  # the name goes with the key
    Equalize(weights=TENSOR, when="always").run(second, Context(threads=1))
    assert first.to_model().SerializeToString() == second.to_model().SerializeToString()


def test_a_table_without_its_statistics_is_refused(parse_program: ParseProgram) -> None:
    program = parsed(parse_program, image_graph(MOVING["relu"]))
    program.statistics["x"] = TensorStatistics("x")
    with pytest.raises(DataError, match="the calibration table lacks 'equalize/"):
        Equalize(weights=TENSOR, when="always").run(program, Context(threads=1))
    program.statistics.clear()
    with pytest.raises(DataError, match="no calibration data"):
        Equalize(weights=TENSOR, when="always").run(program, Context(threads=1))


def model_equalized(path: Path, feeds: Mapping[str, Array]) -> int:
    """Equalize a file's network as the preset does; compares outputs on the feeds, which are its samples."""
    program = Program.from_model(prepare(load_model(path), 13)[0])
    here = Context(open_data(feeds, input_specs(program.source)), threads=1)
    Pipeline.parse("fold-constants fold-batchnorm fold-pad flatten-matmul").run(program, here)
    before = program.to_model()
    result = Equalize(weights=TENSOR, when="always").run(program, here)
    for old, new in zip(outputs(before, feeds), outputs(program.to_model(), feeds), strict=True):
        np.testing.assert_allclose(new, old, rtol=0, atol=1e-4 * np.abs(old).max())  # dozens of layers
    return result.changed


@pytest.mark.parametrize(("name", "least"), [("digits_cnn", 1), ("digits_transformer", 0)])
def test_shipped_models_stay_the_same(name: str, least: int, models_dir: Path) -> None:
    with np.load(models_dir / "digits_calib.npz") as archive:
        samples = {k: v[:16] for k, v in archive.items()}
    inputs = input_specs(prepare(load_model(models_dir / f"{name}.onnx"), 13)[0])
    feeds = {i.name: samples[i.name] for i in inputs}
    assert model_equalized(models_dir / f"{name}.onnx", feeds) >= least


REAL = [
    "cifar10_resnet20",
    "kws_dscnn",
    "cifar10_resnet8_mlperftiny",
    "imagenet_mobilenetv1_025",
    "mnist_cntk",
]


@pytest.mark.parametrize("name", REAL)
def test_real_models_stay_the_same(name: str, data_dir: Path) -> None:
    path = data_dir / "models" / f"{name}.onnx"
    rng = np.random.default_rng(0)
    (spec,) = input_specs(prepare(load_model(path), 13)[0])
    shape = [d if isinstance(d, int) else 2 for d in spec.shape or ()]
    feeds = {spec.name: rng.normal(size=shape).astype(np.float32)}
    assert model_equalized(path, feeds) > 0
