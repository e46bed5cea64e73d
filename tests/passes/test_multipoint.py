"""Further points: chosen channels come closer, their rows are stored at the width of the others, and one int8 kernel remains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

from onnxq.affine import dequantize
from onnxq.compiler import compile_model
from onnxq.data import input_specs, open_data
from onnxq.errors import UsageError
from onnxq.model.session import make_session, optimized_model
from onnxq.passes.multipoint import Multipoint
from onnxq.pipeline import Context, PassResult, Pipeline
from onnxq.point_rows import Form
from onnxq.presets import preset_pipeline
from onnxq.program import Program
from onnxq.reference.run import Reference
from onnxq.saturation import excess, kernel_kind, pair_limit

Array = NDArray[Any]
ParseProgram = Callable[..., Program]


def uneven(*shape: int, axis: int = 0) -> NDArray[np.float32]:
    """Weights whose channels differ in size up to 30 times."""
    rng = np.random.default_rng(sum(shape))
    size = np.geomspace(0.1, 3.0, shape[axis])[rng.permutation(shape[axis])]
    spread = size.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return (rng.normal(size=shape) * spread).astype(np.float32)


IMAGES = np.abs(np.random.default_rng(3).normal(size=(32, 6, 8, 8))).astype(np.float32)
ROWS = np.abs(np.random.default_rng(4).normal(size=(128, 48))).astype(np.float32)
IMAGE = "g (float[N,6,8,8] x) => (float[a,b,c,d] y)"
LAYERS: dict[str, tuple[str, Array, Array]] = {
    "conv": (f"{IMAGE} {{ y = Conv<pads=[1,1,1,1]>(x, w) }}", uneven(9, 6, 3, 3), IMAGES),
    "groups": (f"{IMAGE} {{ y = Conv<group=2,strides=[2,2]>(x, w) }}", uneven(8, 3, 3, 3), IMAGES),
    "depthwise": (f"{IMAGE} {{ y = Conv<group=6,pads=[1,1,1,1]>(x, w) }}", uneven(6, 1, 3, 3), IMAGES),
    "gemm": (
        "g (float[N,48] x) => (float[a,b] y) { y = Gemm<transB=1>(x, w) }",
        uneven(16, 48),
        ROWS,
    ),
    "matmul": ("g (float[N,48] x) => (float[a,b] y) { y = MatMul(x, w) }", uneven(48, 16, axis=1), ROWS),
}


def context(program: Program, x: Array, seed: int = 0) -> Context:
    return Context(open_data({"x": x}, input_specs(program.source)), threads=1, seed=seed)


def prepared(
    parse: ParseProgram, text: str, weights: Mapping[str, Array], x: Array, scheme: str = "int3:channel"
) -> Program:
    """A program whose weights have codes."""
    program = parse(text, weights, 21)
    steps = f"annotate:small=0,first_last=same,weights={scheme} calibrate choose-ranges quantize-weights"
    Pipeline.parse(steps).run(program, context(program, x))
    return program


def pointed(program: Program, x: Array, options: str, seed: int = 0) -> PassResult:
    (step,) = Pipeline.parse(f"multipoint:{options}").run(program, context(program, x, seed))
    return step.result


def channel_errors(program: Program, x: Array) -> Array:
    """Mean squared error of each output channel with the weights of the plan, in the float graph."""
    decision, weight = program.plan["w"], program.graph.tensors()["w"]
    assert decision.codes is not None
    assert decision.params is not None
    kept = weight.values
    outputs = []
    for values in (kept, dequantize(decision.codes, decision.params)):
        weight.values = values
        (found,) = make_session(program.to_model(), threads=1).run(None, {"x": x})
        outputs.append(found)
    weight.values = kept
    difference = np.moveaxis(outputs[1] - outputs[0], 1, 0)
    error: Array = (difference.reshape(len(difference), -1) ** 2).mean(axis=1)
    return error


@pytest.mark.parametrize("scheme", ["int2:channel", "int3", "int4:channel", "int4", "int6:channel"])
@pytest.mark.parametrize("layer", LAYERS)
def test_chosen_channels_come_closer(parse_program: ParseProgram, layer: str, scheme: str) -> None:
    text, values, x = LAYERS[layer]
    program = prepared(parse_program, text, {"w": values}, x, scheme)
    before, old = channel_errors(program, x), program.plan["w"]
    result = pointed(program, x, "share=0.34")
    after, new = channel_errors(program, x), program.plan["w"]
    facts = result.facts["multipoint"]
    chosen = [channel["channel"] for channel in facts["channels"]]
    axis = program.units[next(iter(program.units))].channel_axis
    assert len(chosen) == int(0.34 * values.shape[axis])
    # the pass judges by random patches of samples, and by what feedback of rounding errors makes of those
    assert (after[chosen] < 0.8 * before[chosen]).all()
    left = np.setdiff1d(np.arange(values.shape[axis]), chosen)
    np.testing.assert_array_equal(after[left], before[left])
    assert new.points is not None
    assert old.codes is not None
    assert new.codes is not None
    np.testing.assert_array_equal(new.points.codes(), new.codes)
    assert new.points.rows.min() >= old.scheme.qmin
    assert new.points.rows.max() <= old.scheme.qmax
    assert new.points.extra == len(chosen)
    assert new.scheme.bits == old.scheme.bits


@pytest.mark.parametrize("layer", LAYERS)
def test_no_kernel_saturates(parse_program: ParseProgram, layer: str) -> None:
    text, values, x = LAYERS[layer]
    program = prepared(parse_program, text, {"w": values}, x, "int5:channel")
    pointed(program, x, "share=1.0")
    (node,) = program.graph.nodes
    codes = program.plan["w"].codes
    assert codes is not None
    assert np.abs(codes).max() > 30  # they use what five bits do not reach
    axis = program.units[node.name].channel_axis
    assert not excess(codes, kernel_kind(node), axis, pair_limit()).any()


def test_more_points_than_two(parse_program: ParseProgram) -> None:
    text, values, x = LAYERS["conv"]
    found = []
    for points in (2, 4):
        program = prepared(parse_program, text, {"w": values}, x, "int2:channel")
        facts = pointed(program, x, f"share=5.0,points={points}").facts["multipoint"]
        assert {channel["points"] for channel in facts["channels"]} <= set(range(2, points + 1))
        decision = program.plan["w"]
        assert decision.points is not None
        assert decision.codes is not None
        np.testing.assert_array_equal(decision.points.codes(), decision.codes)
        found.append(channel_errors(program, x).sum())
    assert found[1] < found[0] / 4  # each further bit takes off 6 dB, and two points add two bits


def test_factors_are_those_of_the_points(parse_program: ParseProgram) -> None:
    text, values, x = LAYERS["gemm"]
    program = prepared(parse_program, text, {"w": values}, x)
    facts = pointed(program, x, "share=0.2").facts["multipoint"]
    points = program.plan["w"].points
    assert points is not None
    for channel in facts["channels"]:
        rows = points.rows[points.places[channel["channel"]]].astype(float)
        approximation = np.array(channel["factors"]) @ rows
        weights = values[channel["channel"]]
        assert np.abs(approximation - weights).mean() < 0.05 * np.abs(weights).max()
        assert channel["error_after"] < channel["error_before"]


def test_chosen_beat_random_channels(parse_program: ParseProgram) -> None:
    text, values, x = LAYERS["matmul"]
    left = {}
    for choose in ("error", "loss", "threshold", "random"):
        program = prepared(parse_program, text, {"w": values}, x, "int3")
        facts = pointed(program, x, f"share=0.25,choose={choose}").facts["multipoint"]
        assert facts["budget"] <= 0.25
        left[choose] = channel_errors(program, x).sum()
    assert left["error"] == left["loss"] <= left["threshold"] < left["random"]  # one layer needs no weighing


def test_random_channels_go_by_the_seed(parse_program: ParseProgram) -> None:
    text, values, x = LAYERS["matmul"]
    found = []
    for seed in (0, 0, 1):
        program = prepared(parse_program, text, {"w": values}, x)
        facts = pointed(program, x, "share=0.25,choose=random", seed).facts["multipoint"]
        found.append([channel["channel"] for channel in facts["channels"]])
    assert found[0] == found[1] != found[2]


def test_an_error_to_keep(parse_program: ParseProgram) -> None:
    """Channels above it have further points, all others one."""
    text, values, x = LAYERS["conv"]
    program = prepared(parse_program, text, {"w": values}, x, "int3")
    power = (make_session(program.to_model(), threads=1).run(None, {"x": x})[0] ** 2).mean()
    before = channel_errors(program, x) / power
    limit = float(np.median(before))
    facts = pointed(program, x, f"error={limit}").facts["multipoint"]
    chosen = [channel["channel"] for channel in facts["channels"]]
    clearly = (before > 1.5 * limit) | (before < limit / 1.5)  # the pass sees patches of the samples only
    np.testing.assert_array_equal(np.isin(np.arange(9), chosen)[clearly], (before > limit)[clearly])


def test_a_budget_over_several_layers(parse_program: ParseProgram) -> None:
    """It goes to the layer whose codes are coarse for its outputs."""
    coarse = uneven(48, 48)
    coarse[:, 0] = 40.0
    weights: dict[str, Array] = {"v": coarse, "w": np.round(uneven(16, 48)) / 4}
    text = "g (float[N,48] x) => (float[a,b] y) { h = Gemm<transB=1>(x, v) y = Gemm<transB=1>(h, w) }"
    program = prepared(parse_program, text, weights, ROWS, "int4:channel")
    facts = pointed(program, ROWS, "share=0.1").facts["multipoint"]
    layers = facts["layers"]
    assert layers["v"]["with_points"] > 0
    assert layers["v"]["sqnr_db_after"] > layers["v"]["sqnr_db_before"]
    total = sum(layer["extra_weights"] for layer in layers.values())
    assert total == facts["extra_weights"] <= 0.1 * 64 * 48
    assert facts["bits_mean"] == pytest.approx(4.0 * (1 + total / (64 * 48)))
    further = [(c["points"] - 1) * c["weights"] for c in facts["channels"]]
    assert sum(further) == total
    curve = np.array(facts["curve"])
    assert (curve[0] == [0.0, 1.0]).all()
    assert (np.diff(curve, axis=0) * [1, -1] > 0).all()
    assert facts["error_left"] == pytest.approx(np.interp(facts["budget"], *curve.T), rel=1e-6)
    parts = [10 ** -(layer["sqnr_db_before"] / 10) for layer in layers.values()]
    left = [10 ** -(layer["sqnr_db_after"] / 10) for layer in layers.values()]
    assert facts["error_left"] == pytest.approx(sum(left) / sum(parts))


def test_layers_of_8_bits_are_left_with_the_reason(parse_program: ParseProgram) -> None:
    text, values, x = LAYERS["conv"]
    program = prepared(parse_program, text, {"w": values}, x, "int8:channel")
    result = pointed(program, x, "share=0.5")
    assert list(result.skipped.values()) == ["its weights have 8 bits, which fill the codes of the kernel"]
    assert program.plan["w"].points is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "takes one of share"),
        ({"share": 0.1, "error": 0.1}, "takes one of share"),
        ({"share": -0.1}, "share of multipoint is -0.1"),
        ({"error": 0.1, "choose": "loss"}, "choose=loss weighs errors against a budget"),
        ({"error": 0.1, "choose": "random"}, "choose=random of multipoint spends a share"),
        ({"share": 0.1, "points": 1}, "points is 1"),
    ],
)
def test_refusals(parse_program: ParseProgram, options: dict[str, Any], said: str) -> None:
    text, values, x = LAYERS["gemm"]
    program = prepared(parse_program, text, {"w": values}, x)
    with pytest.raises(UsageError, match=said):
        Multipoint(**options).run(program, context(program, x))


@pytest.mark.parametrize("form", ["qdq", "integer"])
@pytest.mark.parametrize("bits", ["w2a8", "w3a8", "w4a4"])
def test_deployed(models_dir: Path, bits: str, form: str) -> None:
    """The kernels read one constant each; codes are those of the integer reference, with and without 16-bit pairs."""
    done = compile_model(
        models_dir / "digits_cnn.onnx",
        models_dir / "digits_calib.npz",
        bits=bits,
        multipoint=0.2,
        form=form,
        samples=32,
        threads=1,
        speed=False,
    )
    facts = done.report.as_json()["multipoint"]
    assert 0.1 < facts["budget"] <= 0.2
    optimized = optimized_model(done.model)
    constants = {t.name for t in optimized.graph.initializer}
    kernels = [n for n in optimized.graph.node if n.op_type in ("QLinearConv", "QGemm")]
    assert len(kernels) >= 4
    assert all(node.input[3] in constants for node in kernels)
    assert not {"MatMulInteger", "Gather"} & {n.op_type for n in optimized.graph.node}
    with np.load(models_dir / "digits_test.npz") as file:
        feeds = {"image": file["image"][:8]}
    exact = Reference(done.model)
    (found,) = make_session(done.model, threads=1).run(None, feeds)
    for arithmetic in (exact, exact.using("avx2")):
        np.testing.assert_array_equal(arithmetic.run(feeds)["logits"], found)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layer", ["conv", "gemm", "matmul"])
def test_rows_give_what_folded_points_give(parse_program: ParseProgram, layer: str, bias: bool) -> None:
    """Both forms multiply by the same sums; the additions behind the rows are those of floats and round, 6e-8 each."""
    text, values, x = LAYERS[layer]
    weights: dict[str, Array] = {"w": values}
    if bias:
        weights["b"] = np.linspace(-2, 2, values.shape[1 if layer == "matmul" else 0]).astype(np.float32)
        text = text.replace("y = MatMul(x, w)", "h = MatMul(x, w) y = Add(h, b)").replace(
            "(x, w)", "(x, w, b)"
        )
        text = text.replace("MatMul(x, w, b)", "MatMul(x, w)")
    outputs, shapes = [], []
    forms: tuple[Form, ...] = ("fold", "rows")
    for form in forms:
        program = prepared(parse_program, text, weights, x)
        facts = pointed(program, x, "share=0.34,form=rows").facts["multipoint"]
        assert facts["form"] == "rows"
        decision = program.plan["w"]
        assert decision.points is not None
        program.plan["w"] = replace(decision, points=replace(decision.points, form=form))
        Pipeline.parse("emit-qdq").run(program, Context())
        model = program.to_model()
        shapes.append({t.name: list(t.dims) for t in model.graph.initializer})
        outputs.append(make_session(model, threads=1).run(None, {"x": x})[0])
    widths = [max(max(dims, default=0) for n, dims in found.items() if "_scale" in n) for found in shapes]
    channels = widths[0]
    assert widths[1] == (channels + int(0.34 * channels)) // 8 * 8 + 8
    difference = np.abs(outputs[1] - outputs[0])
    if layer != "conv":  # its output is float
        assert difference.max() <= 1e-6 * np.abs(outputs[0]).max()
        return
    step = np.diff(np.unique(outputs[0])).min()
    assert difference.max() <= 1.01 * step  # one code
    assert (difference > step / 2).mean() < 0.001  # where the sum lies on the edge between two


def test_groups_have_no_rows(parse_program: ParseProgram) -> None:
    text, values, x = LAYERS["groups"]
    program = prepared(parse_program, text, {"w": values}, x)
    result = pointed(program, x, "share=0.5,form=rows")
    assert "its channels lie in groups" in next(iter(result.skipped.values()))
    assert program.plan["w"].points is None


def test_rows_deployed(models_dir: Path) -> None:
    """A whole network of rows, also in the integer form, is closer to float than without; its depthwise layers have none."""
    found = {}
    for form, emitted in ((None, "qdq"), ("rows", "qdq"), ("rows", "integer")):
        done = compile_model(
            models_dir / "digits_cnn.onnx",
            models_dir / "digits_calib.npz",
            bits="w3a8",
            multipoint=None if form is None else 0.2,
            multipoint_form=form,
            form=emitted,
            samples=32,
            threads=1,
            speed=False,
        )
        difference = done.report.difference
        assert difference is not None
        assert difference.main is not None
        assert difference.main.sqnr_db is not None
        found[form, emitted] = difference.main.sqnr_db
        assert ("ReduceSum" in {n.op_type for n in done.model.graph.node}) == (form == "rows")
    plain = found.pop((None, "qdq"))
    assert min(found.values()) > plain + 1.0  # dB
    assert found["rows", "qdq"] == pytest.approx(found["rows", "integer"], abs=0.1)  # single codes differ


def test_a_size_to_stay_within(models_dir: Path) -> None:
    files = {}
    for size in ("130kB", "145kB"):
        done = compile_model(
            models_dir / "digits_cnn.onnx",
            models_dir / "digits_calib.npz",
            bits="w3a8",
            multipoint_size=size,
            samples=32,
            threads=1,
            speed=False,
        )
        assert not done.report.warnings
        files[size] = done.report.quantized_bytes
    assert 126_000 < files["130kB"] <= 130_000 < 141_000 < files["145kB"] <= 145_000
    with pytest.raises(UsageError, match="bytes without further points, more than the 1,000 given"):
        compile_model(
            models_dir / "digits_cnn.onnx",
            models_dir / "digits_calib.npz",
            bits="w3a8",
            multipoint_size="1kB",
        )


def test_preset_places_it_behind_what_rounds() -> None:
    for preset in ("int8", "int8-accurate"):
        names = [p.name for p in Pipeline.parse(preset_pipeline(preset, points=True)).passes]
        place = names.index("multipoint")
        assert names[place - 1 : place + 2] == ["round-weights", "multipoint", "correct-bias"]
    with pytest.raises(UsageError, match="has no integer layers"):
        preset_pipeline("weight-only", points=True)


def test_golden(parse_program: ParseProgram, golden: Callable[[str, ModelProto], None]) -> None:
    """All numbers are multiples of powers of two."""
    taps = (np.arange(3 * 4 * 4).reshape(3, 4, 2, 2) * 5 % 13 - 6) / np.array([1, 2, 16]).reshape(3, 1, 1, 1)
    text = "g (float[n,4,6,6] x) => (float[n,3,5,5] y) { y = Conv(x, w) }"
    x = ((np.arange(2 * 4 * 36) * 5 % 33 - 16) / 8).astype(np.float32).reshape(2, 4, 6, 6)
    program = prepared(parse_program, text, {"w": taps.astype(np.float32)}, x, "int4:channel")
    pointed(program, x, "share=0.4")
    Pipeline.parse("emit-qdq").run(program, Context())
    golden("multipoint", program.to_model())
