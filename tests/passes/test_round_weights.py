"""Rounding weights anew: outputs come closer, the grid stays, and no kernel saturates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq import moments
from onnxq.affine import dequantize
from onnxq.bias import least_scales
from onnxq.data import input_specs, open_data
from onnxq.model.session import make_session
from onnxq.pipeline import Context, PassResult, Pipeline
from onnxq.program import Program
from onnxq.rounding import Feedback
from onnxq.saturation import excess, kernel_kind, pair_limit

Array = NDArray[Any]
ParseProgram = Callable[..., Program]


def normal(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def smooth(*shape: int) -> NDArray[np.float32]:
    """Samples whose last axis is a sum of few waves, far from independent."""
    waves = np.cos(np.outer(np.arange(4), np.arange(shape[-1])) / 3)
    return np.abs(np.random.default_rng(7).normal(size=(*shape[:-1], 4)) @ waves).astype(np.float32)


IMAGES, ROWS = smooth(32, 6, 8, 8), smooth(128, 48)
IMAGE = "g (float[N,6,8,8] x) => (float[a,b,c,d] y)"
LAYERS: dict[str, tuple[str, tuple[int, ...], Array]] = {
    "conv": (f"{IMAGE} {{ y = Conv<pads=[1,1,1,1]>(x, w) }}", (9, 6, 3, 3), IMAGES),
    "groups": (f"{IMAGE} {{ y = Conv<group=2,strides=[2,2]>(x, w) }}", (8, 3, 3, 3), IMAGES),
    "depthwise": (f"{IMAGE} {{ y = Conv<group=6,pads=[1,1,1,1]>(x, w) }}", (6, 1, 3, 3), IMAGES),
    "three channels": (
        "g (float[N,3,8,8] x) => (float[a,b,c,d] y) { y = Conv(x, w) }",
        (9, 3, 3, 3),
        IMAGES[:, :3],
    ),
    "gemm": ("g (float[N,48] x) => (float[a,b] y) { y = Gemm<transB=1>(x, w) }", (16, 48), ROWS),
    "matmul": ("g (float[N,48] x) => (float[a,b] y) { y = MatMul(x, w) }", (48, 16), ROWS),
}


def context(program: Program, x: Array | None, **options: Any) -> Context:
    data = None if x is None else open_data({"x": x}, input_specs(program.source))
    return Context(data, threads=1, **options)


def prepared(
    parse: ParseProgram, text: str, weights: Mapping[str, Array], x: Array, scheme: str = "int8:channel"
) -> Program:
    """A program whose weights have codes."""
    program = parse(text, weights, 17)
    steps = f"annotate:small=0,weights={scheme} calibrate choose-ranges quantize-weights"
    Pipeline.parse(steps).run(program, context(program, x))
    return program


def rounded(program: Program, x: Array | None, options: str = "", **more: Any) -> PassResult:
    text = ",".join(filter(None, ("when=always", options)))
    (step,) = Pipeline.parse(f"round-weights:{text}").run(program, context(program, x, **more))
    return step.result


def codes(program: Program, weight: str = "w") -> Array:
    found = program.plan[weight].codes
    assert found is not None
    return found.copy()


def output(program: Program, x: Array, values: Array | None = None) -> Array:
    """What the float graph makes of x, with other weights in place of w."""
    tensor = program.graph.tensors()["w"]
    kept = tensor.values
    tensor.values = kept if values is None else values
    (y,) = make_session(program.to_model(), threads=1).run(None, {"x": x})
    tensor.values = kept
    return np.asarray(y, np.float64)


def output_errors(program: Program, x: Array) -> Array:
    """Mean squared error of each output channel that the codes of w cause on x."""
    found = output(program, x, dequantize(codes(program), program.params("w")))
    axis = 1 if found.ndim == 4 else -1
    errors: Array = (
        np.moveaxis((found - output(program, x)) ** 2, axis, -1).reshape(-1, found.shape[axis]).mean(axis=0)
    )
    return errors


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("scheme", ["int8:channel", "int8:tensor"])
def test_outputs_come_closer_on_the_same_grid(layer: str, scheme: str, parse_program: ParseProgram) -> None:
    text, shape, x = LAYERS[layer]
    program = prepared(parse_program, text, {"w": normal(*shape)}, x, scheme)
    before, params = output_errors(program, x), program.params("w")
    result = rounded(program, x, "steps=kept")
    assert result.changed == 1
    assert result.facts["noise_db"]["w"] < -1
    assert output_errors(program, x).sum() < 0.8 * before.sum()
    assert program.params("w") is params
    assert codes(program).dtype == np.int8
    kind = kernel_kind(program.graph.nodes[0])
    assert not excess(
        codes(program), kind, program.units[program.graph.nodes[0].name].channel_axis, pair_limit()
    ).any()


@pytest.mark.parametrize("layer", ["gemm", "matmul"])
def test_no_channel_gets_worse(layer: str, parse_program: ParseProgram) -> None:
    """All rows of all samples are looked at here, so the expected error is the error."""
    text, shape, x = LAYERS[layer]
    for seed in range(5):
        w = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        program = prepared(parse_program, text, {"w": w}, x, "int8:tensor")
        before = output_errors(program, x)
        rounded(program, x)
        assert np.all(output_errors(program, x) <= before * (1 + 1e-4))  # the moments are float32


def test_saturation_may_be_ignored(parse_program: ParseProgram) -> None:
    text, _, x = LAYERS["gemm"]
    w = np.abs(normal(16, 48)) + 1
    program = parse_program(text, {"w": w}, 17)
    steps = "annotate:small=0 calibrate choose-ranges quantize-weights:saturation=ignore"
    Pipeline.parse(steps).run(program, context(program, x))
    rounded(program, x, "saturation=ignore")
    assert excess(codes(program), "Gemm", 0, pair_limit()).any()


def test_the_seed_decides(parse_program: ParseProgram) -> None:
    text, shape, x = LAYERS["conv"]
    found = []
    for seed in (0, 0, 1):
        program = prepared(parse_program, text, {"w": normal(*shape)}, x)
        rounded(program, x, "patches=2", seed=seed)
        found.append(codes(program))
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


def test_layers_that_are_left_say_why(parse_program: ParseProgram) -> None:
    text, shape, x = LAYERS["conv"]
    program = prepared(parse_program, text, {"w": normal(*shape)}, x)
    before, node = codes(program), program.graph.nodes[0].name
    assert rounded(program, x, "largest=53").skipped == {
        node: "it reduces over 54 values, more than largest=53"
    }
    assert rounded(program, None).skipped == {node: "there are no calibration samples to round by"}
    np.testing.assert_array_equal(codes(program), before)
    assert rounded(program, x, "largest=54").changed == 1
    assert (codes(program) != before).any()
    bare = parse_program(text, {"w": normal(*shape)}, 17)
    Pipeline.parse("annotate").run(bare, context(bare, x))
    assert rounded(bare, x).skipped == {node: "its weights have no codes yet"}


SHARED = "g (float[N,48] x) => (float[a,b] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, w) }"


def test_shared_weights_serve_all_their_readers(parse_program: ParseProgram) -> None:
    program = prepared(parse_program, SHARED, {"w": normal(48, 48)}, ROWS)
    before = output_errors(program, ROWS)
    assert rounded(program, ROWS).changed == 1
    assert output_errors(program, ROWS).sum() < 0.8 * before.sum()


def test_layers_in_parts_give_the_same(parse_program: ParseProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "g (float[N,48] x) => (float[a,b] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }"
    weights, found = {"w": normal(48, 20), "v": normal(20, 9)}, []
    for limit in (1 << 28, 1):
        monkeypatch.setattr(moments, "MOMENT_BYTES", limit)
        program = prepared(parse_program, text, weights, ROWS)
        assert rounded(program, ROWS, "patches=128").changed == 2
        found.append((codes(program), codes(program, "v")))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_a_fixed_batch_may_be_larger_than_the_samples(parse_program: ParseProgram) -> None:
    text, shape, x = LAYERS["gemm"]
    program = prepared(parse_program, text.replace("N,", "128,"), {"w": normal(*shape)}, x)
    assert rounded(program, x, "samples=8").changed == 1


def test_codes_that_are_no_better_are_not_taken(
    parse_program: ParseProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, shape, x = LAYERS["gemm"]
    program = prepared(parse_program, text, {"w": normal(*shape)}, x)
    before = codes(program)
    for method in ("round", "settle"):
        monkeypatch.setattr(Feedback, method, lambda self, rows, *rest: np.zeros_like(rows))
    params = program.params("w")
    assert rounded(program, x).facts["noise_db"]["w"] == 0.0
    np.testing.assert_array_equal(codes(program), before)
    np.testing.assert_array_equal(program.params("w").scale, params.scale)


@pytest.mark.parametrize("layer", LAYERS)
def test_channels_take_better_steps_where_each_has_its_own(layer: str, parse_program: ParseProgram) -> None:
    text, shape, x = LAYERS[layer]
    errors = {}
    for steps in ("kept", "refit"):
        program = prepared(parse_program, text, {"w": normal(*shape)}, x, "int3:channel,first_last=same")
        start = program.params("w").scale
        rounded(program, x, f"steps={steps}")
        errors[steps] = output_errors(program, x).sum()
        assert (program.params("w").scale != start).any() == (steps == "refit")
        assert set(np.unique(codes(program))) <= set(range(-4, 4))
    assert errors["refit"] < 0.97 * errors["kept"]


def test_a_shared_step_and_a_pattern_of_steps_stay(parse_program: ParseProgram) -> None:
    text, shape, x = LAYERS["gemm"]
    for scheme, folded in (("int3:tensor", False), ("int3:channel", True)):
        program = prepared(parse_program, text, {"w": normal(*shape)}, x, scheme)
        if folded:
            program.folded["w"] = np.ones(shape[0])
        before = program.params("w")
        assert rounded(program, x).changed == 1
        assert program.params("w") is before or (program.params("w").scale == before.scale).all()


def test_better_steps_leave_room_for_the_bias(parse_program: ParseProgram) -> None:
    """A bias so large that its int32 codes allow only steps above those of the weights."""
    text = "g (float[N,48] x) => (float[N,16] y) { y = Gemm <transB = 1> (x, w, b) }"
    program = parse_program(text, {"w": normal(16, 48), "b": np.full(16, 3e7, np.float32)}, 17)
    steps = "annotate:small=0,weights=int3:channel,first_last=same calibrate choose-ranges quantize-weights"
    Pipeline.parse(f"{steps} round-weights:when=always").run(program, context(program, ROWS))
    (unit,) = program.units.values()
    assert np.all(program.params("w").scale >= least_scales(program, [unit]) * (1 - 1e-6))


@pytest.mark.parametrize(("spread", "runs"), [(1000.0, True), (1.0, False)])
def test_by_default_it_runs_where_channels_drown(
    parse_program: ParseProgram, spread: float, runs: bool
) -> None:
    text, shape, x = LAYERS["conv"]
    sizes = np.array([spread] + [1.0] * 8, np.float32).reshape(9, 1, 1, 1)
    program = prepared(parse_program, text, {"w": normal(*shape) * sizes}, x, "int8:tensor")
    (step,) = Pipeline.parse("round-weights").run(program, context(program, x))
    assert (step.result.changed > 0) == runs
    assert bool(step.result.skipped) != runs


@pytest.mark.parametrize("bits", [6, 7])
def test_by_default_it_runs_below_8_bits(parse_program: ParseProgram, bits: int) -> None:
    text, shape, x = LAYERS["conv"]
    program = prepared(parse_program, text, {"w": normal(*shape)}, x, f"int{bits}:channel,first_last=same")
    before = output_errors(program, x)
    (step,) = Pipeline.parse("round-weights").run(program, context(program, x))
    assert step.result.changed == 1
    assert output_errors(program, x).sum() < 0.8 * before.sum()
