"""Every width from 2 to 8 bits, from plan to file: codes saturate, weights come back whole, and kernels stay integer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

import onnxq
from onnxq.affine import dequantize
from onnxq.data import input_specs, open_data
from onnxq.model.session import make_session, optimized_model
from onnxq.model.write import write_model
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program
from onnxq.reference.agreement import agreement
from onnxq.scheme import QuantScheme
from onnxq.target import ORT_CPU
from onnxq.weights import code_limit

ParseProgram = Callable[..., Program]
MODELS = ("digits_cnn", "digits_transformer")
TEXT = """g (float[N,3,9,9] x) => (float[N,5] y) {
    [stem] a0 = Conv<pads=[1,1,1,1]>(x, w0, b0)
    [act0] a = Relu(a0)
    [one] c0 = Conv<pads=[1,1,1,1]>(a, w1, b1)
    [act1] c = Clip(c0, zero, six)
    [pool] p = MaxPool<kernel_shape=[3,3], strides=[2,2]>(c)
    [wide] d = Conv<pads=[1,1,1,1], group=8>(p, w2, b2)
    [sum] s = Add(d, p)
    [cat] k = Concat<axis=1>(s, p)
    [mix] m0 = Conv(k, w3, b3)
    [act2] m = Relu(m0)
    [mean] g = GlobalAveragePool(m)
    [flat] f = Flatten(g)
    [head] y = Gemm<transB=1>(f, h, b4)
}"""
SHAPES = {
    "w0": (8, 3, 3, 3),
    "w1": (8, 8, 3, 3),
    "w2": (8, 1, 3, 3),
    "w3": (8, 16, 1, 1),
    "h": (5, 8),
    **{f"b{i}": (8,) for i in range(4)},
    "b4": (5,),
}


def quantized(parse_program: ParseProgram, weights: str, activations: str, emit: str) -> Program:
    """The network above through the whole chain, every layer at the same widths."""
    rng = np.random.default_rng(3)
    values = {name: rng.normal(size=shape).astype(np.float32) / 2 for name, shape in SHAPES.items()}
    ends = {"zero": np.float32(0.0), "six": np.float32(6.0)}
    steps = Pipeline.parse(
        f"annotate:weights={weights},activations={activations},first_last=same,small=0 calibrate choose-ranges "
        f"quantize-weights round-weights correct-bias pad-channels {emit}"
    )
    program = parse_program(TEXT, {**values, **ends}, opset=25)
    data = open_data({"x": rng.normal(size=(16, 3, 9, 9)).astype(np.float32)}, input_specs(program.source))
    steps.run(program, Context(data=data, threads=1))
    return program


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_weights_of_a_reloaded_file_are_those_of_the_plan(
    bits: int, granularity: str, parse_program: ParseProgram, tmp_path: Path
) -> None:
    program = quantized(parse_program, f"int{bits}:{granularity}", "uint8", "emit-qdq")
    path = tmp_path / "q.onnx"
    write_model(program.to_model(), path)
    model = onnx.load(path)
    read = {node.name: node.input[1] for node in model.graph.node if len(node.input) > 1}
    units = [u for u in program.units.values() if u.weight is not None]
    session = make_session(model, optimize=False, extra_outputs=[read[u.name] for u in units])
    found = dict(
        zip(
            [o.name for o in session.get_outputs()],
            session.run(None, {"x": np.zeros((1, 3, 9, 9), np.float32)}),
            strict=True,
        )
    )
    for unit in units:
        assert unit.weight is not None
        decision = program.plan[unit.weight]
        assert decision.codes is not None
        assert decision.params is not None
        assert decision.scheme.qmin <= decision.codes.min() <= decision.codes.max() <= decision.scheme.qmax
        np.testing.assert_array_equal(found[read[unit.name]], dequantize(decision.codes, decision.params))


@pytest.mark.parametrize("activations", ["uint2", "uint3", "uint4", "uint5", "uint7", "int4", "int8"])
@pytest.mark.parametrize("emit", ["emit-qdq", "emit-integer"])
def test_codes_stay_within_their_width_and_kernels_integer(
    activations: str, emit: str, parse_program: ParseProgram
) -> None:
    program = quantized(parse_program, "int4:channel", activations, emit)
    model = program.to_model()
    kernels = [n.op_type for n in optimized_model(model, threads=1).graph.node]
    assert kernels.count("QLinearConv") == 4
    assert {"QLinearAdd", "QGemm"} <= set(kernels)
    assert not {"Conv", "Gemm", "Add", "Relu"} & set(kernels)
    scheme = ORT_CPU.activation_scheme(QuantScheme.parse(activations))
    seen = _codes(model, program, [u.inputs[0] for u in program.units.values() if u.weight is not None])
    for name, codes in seen.items():
        assert scheme.qmin <= codes.min() <= codes.max() <= scheme.qmax, name
        assert codes.max() > codes.min(), name


def _codes(model: ModelProto, program: Program, tensors: list[str]) -> dict[str, NDArray[np.uint8]]:
    """Codes of tensors that layers read, on other samples than those of the calibration, and larger ones."""
    names = [f"{t}_q" for t in tensors if any(f"{t}_q" in n.output for n in model.graph.node)]
    session = make_session(model, extra_outputs=names)
    x = np.random.default_rng(5).normal(size=(8, 3, 9, 9)).astype(np.float32) * 3
    found = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"x": x}), strict=True))
    return {name: found[name] for name in names}


@pytest.mark.parametrize(
    ("weights", "activations"), [("int4:channel", "uint4"), ("int3", "uint8"), ("int8", "uint2")]
)
def test_both_forms_are_equal_to_the_bit(weights: str, activations: str, parse_program: ParseProgram) -> None:
    x = np.random.default_rng(5).normal(size=(8, 3, 9, 9)).astype(np.float32)
    first, second = (
        make_session(quantized(parse_program, weights, activations, emit).to_model()).run(None, {"x": x})[0]
        for emit in ("emit-qdq", "emit-integer")
    )
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("bits", ["w2a8", "w3a4", "w4a4", "w4a8", "w5a3", "w6a8", "w8a2"])
def test_models_that_ship_keep_their_kernels_and_equal_the_integer_reference(
    models_dir: Path, model: str, bits: str
) -> None:
    path = models_dir / f"{model}.onnx"
    done = onnxq.compile_model(
        path, models_dir / "digits_calib.npz", bits=bits, threads=1, speed=False, samples=64
    )
    plain = onnxq.compile_model(path, models_dir / "digits_calib.npz", threads=1, speed=False, samples=64)
    assert done.report.coverage is not None
    assert plain.report.coverage is not None
    assert done.report.coverage.integer_macs == plain.report.coverage.integer_macs
    data = open_data(models_dir / "digits_test.npz", input_specs(onnx.load(path)))
    found = agreement(done.model, data, limit=16)
    assert found.runtime.codes
    assert {name: c.differing for name, c in found.runtime.differing.items()} == {}
    assert {name: c.differing for name, c in found.avx2.differing.items()} == {}


def test_narrow_activations_leave_weights_their_full_range(parse_program: ParseProgram) -> None:
    """Pairs of products of 8-bit weights and 7-bit activations cannot overflow 16 bits: 127 (127 + 127) < 32768."""
    limits = {}
    for bits in (7, 8):
        program = quantized(parse_program, "int8:channel", f"uint{bits}", "emit-qdq")
        units = [u for u in program.units.values() if u.name == "one"]
        limits[bits] = code_limit(program, units, ORT_CPU)
    assert limits == {7: 0, 8: 128}
