"""Stored weights: the codes that the file holds against the float weights, and the graph that the runtime makes of them."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from onnxq import packing
from onnxq.affine import sqnr_db
from onnxq.blocks import quantize_blocks
from onnxq.compiler import compile_model
from onnxq.data import input_specs, open_data
from onnxq.errors import DataError, UsageError
from onnxq.model.prepare import prepare
from onnxq.model.session import make_session, session_and_optimized
from onnxq.model.tensors import tensor_nbytes
from onnxq.passes.quantize_dynamic import QuantizeDynamic
from onnxq.passes.store_weights import StoreWeights
from onnxq.pipeline import Context, PassResult
from onnxq.program import Program
from onnxq.scheme import QuantScheme
from onnxq.target import ORT_CPU, TARGETS, Target

Floats = NDArray[np.float32]

RNG = np.random.default_rng(11)
INT4 = QuantScheme.parse("int4:block=32")
GOOD_DB = 38.0  # 8 bits of a few hundred normal values give 40 dB and more
CONV = "(float[N, 8, 9, 9] x) => (float[N, 16, 7, 7] y) { c = Conv(x, w, b) y = Relu(c) }"


def normal(*shape: int) -> Floats:
    return RNG.standard_normal(shape).astype(np.float32)


def model(body: str, opset: int = 17, **weights: Floats) -> onnx.ModelProto:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> g {body}')
    proto.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in weights.items())
    return prepare(proto, 13)[0]


def stored(
    proto: onnx.ModelProto, target: Target = ORT_CPU, **options: Any
) -> tuple[Program, onnx.ModelProto, PassResult]:
    program = Program.from_model(proto)
    result = StoreWeights(**options).run(program, Context(target=target))
    return program, program.to_model(), result


def outputs(proto: onnx.ModelProto, feeds: dict[str, NDArray[Any]]) -> list[Floats]:
    return list(make_session(proto, threads=1).run(None, feeds))


def kernels(proto: onnx.ModelProto) -> Counter[str]:
    return Counter(n.op_type for n in session_and_optimized(proto, threads=1)[1].graph.node)


def initializers(proto: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def test_convolutions_store_a_quarter_and_run_as_the_float_ones_do() -> None:
    scales = np.geomspace(0.01, 10, 16).astype(np.float32).reshape(-1, 1, 1, 1)
    w, b = normal(16, 8, 3, 3) * scales, normal(16)
    proto = model(CONV, w=w, b=b)
    program, compiled, result = stored(proto)
    values = initializers(compiled)
    assert result.changed == 1
    assert values["w_quantized"].dtype == np.int8
    assert values["w_scale"].shape == (16, 1, 1, 1)
    assert "w" not in values
    floats = values["w_quantized"] * values["w_scale"]
    for channel, reference in zip(floats, w, strict=True):
        assert sqnr_db(reference, channel) > GOOD_DB
    assert kernels(compiled) == kernels(proto)
    x = normal(2, 8, 9, 9)
    reference = model(CONV, w=floats, b=b)
    assert np.array_equal(outputs(compiled, {"x": x})[0], outputs(reference, {"x": x})[0])
    assert list(program.stored.values()) == ["weights are stored as int8 and computed in float"]


def test_a_scheme_per_tensor_has_one_scale() -> None:
    values = initializers(
        stored(model(CONV, w=normal(16, 8, 3, 3), b=normal(16)), weights=QuantScheme.parse("int8"))[1]
    )
    assert values["w_scale"].size == 1


@pytest.mark.parametrize(
    ("body", "weight", "shape"),
    [
        ("ConvTranspose(x, w)", normal(8, 16, 3, 3), (1, 16, 1, 1)),
        ("ConvTranspose <group: int = 2> (x, w)", normal(8, 16, 3, 3), ()),
        ("MatMul(x, w)", normal(8, 9, 16), (1, 1, 16)),
        ("Conv <group: int = 8> (x, w)", normal(32, 1, 3, 3), (32, 1, 1, 1)),
    ],
)
def test_scales_lie_along_the_output_channels(body: str, weight: Floats, shape: tuple[int, ...]) -> None:
    proto = model(f"(float[2, 8, 9, 9] x) => (float y) {{ y = {body} }}", w=weight)
    _, compiled, _ = stored(proto)
    assert initializers(compiled)["w_scale"].shape == shape
    assert kernels(compiled) == kernels(proto)
    x = normal(2, 8, 9, 9)
    assert sqnr_db(outputs(proto, {"x": x})[0], outputs(compiled, {"x": x})[0]) > GOOD_DB


@pytest.mark.parametrize(
    ("body", "weight", "along"),
    [
        ("Conv(x, w)", normal(16, 8, 3, 3), (2, 3)),
        ("Conv(x, w)", normal(16, 8, 1, 1), (1,)),
        ("ConvTranspose(x, w)", normal(8, 16, 3, 3), (2, 3)),
        ("MatMul(x, w)", normal(8, 9, 16), (1,)),
    ],
)
def test_rounding_errors_cancel_where_the_layer_sums(
    body: str, weight: Floats, along: tuple[int, ...]
) -> None:
    values = initializers(
        stored(model(f"(float[2, 8, 9, 9] x) => (float y) {{ y = {body} }}", w=weight), small=1)[1]
    )
    steps = (values["w_quantized"] - weight / values["w_scale"]).sum(axis=along)
    assert np.abs(steps).max() <= 0.5 + 1e-4  # float32 quotients


@pytest.mark.parametrize(("transposed", "shape"), [(0, (1, 40)), (1, (40, 1))])
def test_gemm_has_its_channels_where_transb_puts_them(transposed: int, shape: tuple[int, ...]) -> None:
    weight = normal(40, 30) if transposed else normal(30, 40)
    body = f"Gemm <transB: int = {transposed}> (x, w)"
    _, compiled, _ = stored(model(f"(float[N, 30] x) => (float[N, 40] y) {{ y = {body} }}", w=weight))
    assert initializers(compiled)["w_scale"].shape == shape


def test_products_in_integers_are_left_alone_and_floats_keep_their_reason() -> None:
    proto = model(
        "(float[N, 64] x) => (float[N, 48] y, float[N, 8] z) { y = MatMul(x, w) z = Gemm(x, v) }",
        w=normal(64, 48),
        v=normal(64, 8),
    )
    program = Program.from_model(proto)
    QuantizeDynamic().run(program, Context())
    result = StoreWeights().run(program, Context())
    names = {n.op_type: n.name for n in proto.graph.node}
    assert result.changed == 1
    assert list(program.units) == [names["MatMul"]]
    assert program.stored == {
        names["Gemm"]: "weights are stored as int8 and computed in float: "
        "its 512 weights are too few to repay the quantization of its input"
    }
    assert not program.floats
    assert kernels(program.to_model()) == {"DynamicQuantizeMatMul": 1, "Gemm": 1}


TABLE = "(int64[N, S] i) => (float[N, S, 64] y) { y = Gather(t, i) }"
INDICES = np.array([[0, 5, -1], [99, 7, 7]])


def test_a_table_is_looked_up_as_codes() -> None:
    table = RNG.uniform(-1, 3, (100, 64)).astype(np.float32)
    program, compiled, _ = stored(model(TABLE, t=table))
    values = initializers(compiled)
    assert values["t_quantized"].dtype == np.uint8
    assert values["t_scale"].size == 1
    readers = [n.op_type for n in compiled.graph.node if "t_quantized" in n.input]
    assert readers == ["Gather"]
    (got,) = outputs(compiled, {"i": INDICES})
    assert (
        np.abs(got - table[INDICES]).max() <= 0.51 * 4 / 255
    )  # half a step of the range, and float rounding
    assert list(program.stored.values()) == [
        "its table is stored in 8 bits and the rows that are looked up become float"
    ]


@pytest.mark.parametrize("weights", ["int8:channel", "int8:tensor"])
def test_a_table_with_unlike_rows_gets_a_scale_for_each(weights: str) -> None:
    table = normal(100, 64) * np.geomspace(0.001, 10, 100).astype(np.float32)[:, None]
    _, compiled, _ = stored(model(TABLE, t=table), weights=QuantScheme.parse(weights))
    (got,) = outputs(compiled, {"i": INDICES})
    assert (sqnr_db(table[0], got[0, 0]) > GOOD_DB) == (weights == "int8:channel")
    if weights == "int8:channel":
        assert got.shape == (2, 3, 64)
        assert (
            min(sqnr_db(r, g) for r, g in zip(table[INDICES.ravel()], got.reshape(-1, 64), strict=True))
            > GOOD_DB
        )


def test_lookups_in_one_table_share_its_codes() -> None:
    proto = model(
        "(int64[N] i, int64[N] j) => (float[N, 64] y, float[N, 64] z) { y = Gather(t, i) z = Gather(t, j) }",
        t=normal(100, 64),
    )
    program, compiled, _ = stored(proto)
    assert len(program.stored) == 2
    assert sum(v.shape == (100, 64) for v in initializers(compiled).values()) == 1
    feeds = {"i": np.array([1, 2]), "j": np.array([2, 3])}
    y, z = outputs(compiled, feeds)
    assert np.array_equal(y[1], z[0])


def test_a_convolution_shared_by_two_is_stored_once() -> None:
    proto = model(
        "(float[N, 8, 9, 9] x) => (float[N, 16, 7, 7] y) { a = Conv(x, w) n = Neg(x) c = Conv(n, w) y = Sub(a, c) }",
        w=normal(16, 8, 3, 3),
    )
    program, compiled, _ = stored(proto)
    assert len(program.stored) == 2
    assert sum(v.size == 1152 for v in initializers(compiled).values()) == 1
    x = normal(1, 8, 9, 9)
    assert sqnr_db(outputs(proto, {"x": x})[0], outputs(compiled, {"x": x})[0]) > GOOD_DB


@pytest.mark.parametrize(
    ("body", "shape", "reason"),
    [
        (
            "(float[N, 8, 9, 9] x) => (float y, float z) { y = Conv(x, w) z = Exp(w) }",
            (16, 8, 3, 3),
            "needed in float32 by node",
        ),
        (
            "(float[N, 8, 9, 9] x) => (float y, float w) { y = Conv(x, w) }",
            (16, 8, 3, 3),
            "needed in float32 outside",
        ),
        (
            "(float[N, 8, 9, 9] x, bool c) => (float y, float z) { y = Conv(x, w) z = If (c) <"
            "then_branch = t () => (float p) { p = Neg(w) }, else_branch = e () => (float q) { q = Exp(w) } > }",
            (16, 8, 3, 3),
            "needed in float32 outside",
        ),
        (
            "(float[N, 90] x, int64[N] i) => (float y, float z) { y = MatMul(x, w) z = Gather <axis: int = 1> (w, i) }",
            (90, 64),
            "needed in float32 by node",
        ),
    ],
    ids=["another reader", "graph output", "body", "a reader that is refused"],
)
def test_weights_that_others_need_stay_float(body: str, shape: tuple[int, ...], reason: str) -> None:
    proto = model(body, w=normal(*shape))
    program, compiled, result = stored(proto)
    assert result.changed == 0
    assert any(reason in r for r in program.floats.values())
    assert {v.dtype for v in initializers(compiled).values() if v.size > 1} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("body", "shape", "reason"),
    [
        (
            "(float[N, 3, 9, 9] x) => (float y) { y = Conv(x, w) }",
            (9, 3, 3, 3),
            "its 243 weights are too few",
        ),
        (
            "(int64[N] i) => (float y) { y = Gather(w, i) }",
            (100, 40),
            "its table of 4000 values is too small",
        ),
        (
            "(int64[N] i) => (float y) { y = Gather <axis: int = 1> (w, i) }",
            (100, 64),
            "it is no embedding lookup",
        ),
        ("(float[N, 300] x) => (float y) { y = MatMul(x, w) }", (300,), "its weights are a vector"),
        ("(float[N, 30] x) => (float y) { y = Sigmoid(x) }", (1,), "only weights are stored as integers"),
    ],
)
def test_what_stays_float_has_a_reason(body: str, shape: tuple[int, ...], reason: str) -> None:
    proto = model(body, w=normal(*shape))
    program, _, result = stored(proto)
    assert result.changed == 0
    assert list(program.floats) == [proto.graph.node[0].name]
    assert program.floats[proto.graph.node[0].name].startswith(reason)


def test_skipped_nodes_keep_their_floats_and_a_wrong_pattern_is_an_error() -> None:
    proto = model(CONV, w=normal(16, 8, 3, 3), b=normal(16))
    program, compiled, result = stored(proto, skip=("Conv",))
    assert result.changed == 0
    assert "skipped by pattern 'Conv'" in program.floats.values()
    assert "w" in initializers(compiled)
    with pytest.raises(UsageError, match="'conv9' matches no node name and no op type"):
        stored(proto, skip=("conv9",))


LAYERS = (
    "(float[N, 64] x) => (float[N, 64] y) "
    "{ a = MatMul(x, u) b = Relu(a) c = Gemm <transB: int = 1> (b, v, d) e = Relu(c) y = MatMul(e, w) }"
)
SCHEMES = (
    "int4:block=32",
    "uint4:block=32",
    "int8:block=16",
    "uint2:block=64",
    "int3:block=32",
    "int6:block=48",
)


def layers() -> onnx.ModelProto:
    return model(LAYERS, opset=25, u=normal(64, 100), v=normal(64, 100), d=normal(64), w=normal(64, 64))


def run_floats(weights: dict[str, Floats], x: Floats) -> Floats:
    hidden = np.maximum(x @ weights["u"], 0) @ weights["v"].T + weights["d"]
    result: Floats = np.maximum(hidden, 0) @ weights["w"]
    return result


def quantized(proto: onnx.ModelProto, scheme: QuantScheme) -> dict[str, Floats]:
    """The weights of `LAYERS` as the scheme's arithmetic says."""
    found = initializers(proto)
    for name, axis in (("u", 0), ("v", 1), ("w", 0)):
        found[name] = quantize_blocks(
            found[name], axis, scheme.bits, scheme.block, symmetric=scheme.symmetric
        ).values()
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("target", ["ort-cpu", "onnx"])
def test_products_compute_with_the_weights_that_their_blocks_stand_for(scheme: str, target: str) -> None:
    proto, parsed = layers(), QuantScheme.parse(scheme)
    options: dict[str, Any] = {"weights": parsed, "first_last": "same", "accuracy": 1}
    program, compiled, result = stored(proto, TARGETS[target], **options)
    assert result.changed == len(program.stored) == 3
    domains = {e.domain for e in compiled.opset_import}
    assert target == "ort-cpu" or domains == {""}
    x = normal(5, 64)
    wanted = run_floats(quantized(proto, parsed), x)
    exact = {"session.qdq_matmulnbits_accuracy_level": "1"}
    (got,) = make_session(compiled, threads=1, config=exact).run(None, {"x": x})
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())  # float32 sums


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_default_accuracy_is_near(bits: int) -> None:
    """Inputs of three products in a row are rounded to int8 in blocks: measured near 0.7 % of the largest output."""
    proto, parsed = layers(), QuantScheme.parse(f"int{bits}:block=32")
    _, compiled, _ = stored(proto, weights=parsed, first_last="same")
    assert kernels(compiled)["MatMulNBits"] == 3
    assert {a.i for n in compiled.graph.node for a in n.attribute if a.name == "accuracy_level"} == {4}
    x = normal(5, 64)
    wanted = run_floats(quantized(proto, parsed), x)
    assert np.abs(outputs(compiled, {"x": x})[0] - wanted).max() < 0.02 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("scheme", "accuracy", "kernel"),
    [
        ("int4:block=32", 4, True),
        ("int4:block=32", 0, True),
        ("int2:block=32", 4, True),
        ("int2:block=32", 1, False),
        ("int8:block=32", 1, False),
        ("int3:block=32", 4, False),
        ("int4:block=48", 4, False),
        ("int4:channel", 4, False),
        ("int4:tensor", 4, False),
    ],
)
def test_products_run_as_the_kernel_where_it_is_fast(scheme: str, accuracy: int, kernel: bool) -> None:
    _, compiled, _ = stored(layers(), weights=QuantScheme.parse(scheme), first_last="same", accuracy=accuracy)
    assert (kernels(compiled)["MatMulNBits"] == 3) == kernel
    assert kernels(compiled)["DequantizeLinear"] == 0


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block=32"])
def test_convolutions_have_a_scale_for_each_channel_at_any_width(
    bits: int, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "PLANES_BYTES", 0)  # as for large weights
    w, b = normal(16, 8, 3, 3), normal(16)
    proto = model(CONV, opset=25, w=w, b=b)
    scheme = QuantScheme.parse(f"int{bits}:{granularity}")
    _, compiled, result = stored(proto, weights=scheme, first_last="same", few=0)
    assert result.changed == 1
    assert kernels(compiled) == kernels(proto)
    scale = initializers(compiled)["w_scale"]
    assert scale.size == (1 if granularity == "tensor" else 16)
    assert 1152 * bits // 8 in [tensor_nbytes(t) for t in compiled.graph.initializer]
    session = make_session(compiled, threads=1, optimize=False, extra_outputs=["w_dequantized"])
    x = normal(2, 8, 9, 9)
    y, floats = session.run(None, {"x": x})
    codes = floats / scale
    assert np.abs(codes - np.rint(codes)).max() < 1e-3
    assert codes.round().min() == -(1 << (bits - 1))
    assert codes.round().max() < 1 << (bits - 1)
    off = np.abs((codes - w / scale).sum(axis=(2, 3)))
    assert off.max() <= 0.5 + 1e-3 + 4 * (bits == 2)  # of nine weights on four codes not enough can move
    assert np.median(off) < 0.3
    (optimized,) = outputs(model(CONV, w=floats, b=b), {"x": x})
    np.testing.assert_allclose(y, optimized, rtol=0, atol=1e-5 * np.abs(y).max())  # float32 sums


def smooth(count: int) -> Floats:
    """Samples whose neighbours are much alike, as of images, with a mean."""
    x = RNG.standard_normal((count, 8, 9, 9)) + 1.0
    for axis in (1, 2, 3):
        x = (x + np.roll(x, 1, axis)) / 2
    return x.astype(np.float32)


@pytest.mark.parametrize("scheme", ["int4:channel", "int3:channel", "int4:tensor", "int4:block=32"])
@pytest.mark.parametrize("group", [1, 2, 8])
def test_with_samples_convolutions_are_rounded_by_their_outputs(scheme: str, group: int) -> None:
    body = f"(float[N, 8, 9, 9] x) => (float[N, 16, 7, 7] y) {{ c = Conv <group = {group}> (x, w, b) y = Relu(c) }}"
    proto = model(body, 21, w=normal(16, 8 // group, 3, 3), b=normal(16))
    options: dict[str, Any] = {
        "weights": QuantScheme.parse(scheme),
        "first_last": "same",
        "few": 0,
        "small": 0,
    }
    calib, x = smooth(64), smooth(64)
    (wanted,) = outputs(proto, {"x": x})
    found = {}
    for name, data in (("blind", None), ("fitted", open_data({"x": calib}, input_specs(proto)))):
        program = Program.from_model(proto)
        StoreWeights(**options).run(program, Context(data=data, threads=1))
        compiled = program.to_model()
        assert kernels(compiled) == kernels(proto)
        found[name] = sqnr_db(wanted, outputs(compiled, {"x": x})[0])
    # the blind ones cancel within each kernel, which smooth inputs reward too
    assert found["fitted"] > found["blind"] + 0.5


def test_samples_leave_what_needs_none_alone() -> None:
    proto = model(CONV, w=normal(16, 8, 3, 3), b=normal(16))
    data = open_data({"x": smooth(8)}, input_specs(proto))
    for scheme in ("int8:channel", "int4:channel"):
        made = []
        for context in (Context(threads=1), Context(data=data, threads=1)):
            program = Program.from_model(proto)
            StoreWeights(weights=QuantScheme.parse(scheme)).run(program, context)
            made.append(program.to_model().SerializeToString())
        assert made[0] == made[1]  # 8 bits, of its own or as a layer of few weights


def test_first_and_last_layers_have_eight_bits_unless_told_otherwise() -> None:
    proto = layers()
    names = [n.name for n in proto.graph.node if n.op_type != "Relu"]
    facts = {
        ends: stored(proto, weights=INT4, first_last=ends)[2].facts["bits"] for ends in ("8", "same", "float")
    }
    assert facts["8"] == {
        names[0]: "w8 (first layer)",
        names[1]: "w4",
        names[2]: "w8 (last layer)",
    }
    assert facts["same"] == dict.fromkeys(names, "w4")
    assert facts["float"] == {names[1]: "w4"}
    program, compiled, _ = stored(proto, weights=INT4, first_last="float")
    assert program.floats[names[0]] == "it is the first layer (first-last=float)"
    assert {"u", "w"} <= initializers(compiled).keys()


def test_overrides_come_last() -> None:
    proto = layers()
    first, middle, last = (n.name for n in proto.graph.node if n.op_type != "Relu")
    override = (f"{first}=w2", f"{middle}=float", "MatMul=w6")
    program, _, result = stored(proto, weights=INT4, override=override)
    assert result.facts["bits"] == dict.fromkeys((first, last), "w6 (override 'MatMul=w6')")
    assert program.floats[middle] == f"it is float by override '{middle}=float'"
    with pytest.raises(UsageError, match="override 'lm_head' matches no node name and no op type"):
        stored(proto, weights=INT4, override=("lm_head=w8",))
    with pytest.raises(UsageError, match="asks for integer activations"):
        stored(proto, weights=INT4, override=("MatMul=w8a8",))


def test_layers_of_few_weights_keep_eight_bits_unless_named() -> None:
    body = "(float[N, 32] x) => (float[N, 40] y) { a = MatMul(x, u) b = MatMul(a, v) y = MatMul(b, w) }"
    proto = model(body, opset=21, u=normal(32, 90), v=normal(90, 20), w=normal(20, 40))
    names = [n.name for n in proto.graph.node]
    _, compiled, result = stored(proto, weights=INT4, first_last="same")
    facts = result.facts["bits"]
    assert facts == {
        names[0]: "w4",
        names[1]: "w8 (it has only 1800 weights)",
        names[2]: "w8 (it has only 800 weights)",
    }
    assert kernels(compiled) == {"MatMulNBits": 1, "MatMul": 2}
    named = stored(proto, weights=INT4, first_last="same", override=(f"{names[1]}=w4",))[2].facts["bits"]
    assert named[names[1]].startswith("w4 (override")
    assert set(stored(proto, weights=INT4, first_last="same", few=0)[2].facts["bits"].values()) == {"w4"}


@pytest.mark.parametrize("bits", range(2, 9))
def test_tables_have_four_bits_or_eight(bits: int) -> None:
    table = normal(100, 64)
    program, compiled, result = stored(
        model(TABLE, opset=25, t=table), weights=QuantScheme.parse(f"int{bits}:block=32"), first_last="same"
    )
    used = 4 if bits <= 4 else 8
    assert list(result.facts["bits"].values()) == [f"w{used}"]
    assert list(program.stored.values()) == [
        f"its table is stored in {used} bits and the rows that are looked up become float"
    ]
    assert 6400 * used // 8 in [tensor_nbytes(t) for t in compiled.graph.initializer]
    (got,) = outputs(compiled, {"i": INDICES})
    assert sqnr_db(table[INDICES], got) > (GOOD_DB if used == 8 else 20.0)  # 4 bits of normal values: 21.6 dB


@pytest.mark.parametrize("target", ["ort-cpu", "onnx"])
def test_a_table_that_a_product_shares_is_stored_for_each(target: str) -> None:
    proto = model(
        "(int64[N] i) => (float[N, 100] y) { e = Gather(t, i) y = Gemm <transB: int = 1> (e, t) }",
        opset=21,
        t=normal(100, 64),
    )
    _, compiled, result = stored(proto, TARGETS[target], weights=INT4)
    assert result.changed == 2
    assert result.facts["bits"] == {
        proto.graph.node[0].name: "w8 (first layer)",
        proto.graph.node[1].name: "w8 (last layer)",
    }
    assert "t" not in initializers(compiled)
    i = np.array([0, 99, -1])
    assert sqnr_db(outputs(proto, {"i": i})[0], outputs(compiled, {"i": i})[0]) > 30.0  # 8 bits, two times


def test_a_layer_that_stays_float_keeps_the_weights_of_the_others() -> None:
    proto = model(
        "(float[N, 64] x) => (float[N, 64] y) { a = MatMul(x, w) y = MatMul(a, w) }",
        opset=21,
        w=normal(64, 64),
    )
    first, second = (n.name for n in proto.graph.node)
    program, compiled, result = stored(proto, weights=INT4, override=(f"{first}=float",))
    assert result.changed == 0
    assert program.floats[second] == f"its weights 'w' are needed in float32 by node {first!r}"
    assert [t.data_type for t in compiled.graph.initializer] == [onnx.TensorProto.FLOAT]
    shared = stored(proto, weights=INT4, override=(f"{first}=w8", f"{second}=w4"))[1]
    assert [n.attribute[2].i for n in shared.graph.node] == [8, 8]


@pytest.mark.parametrize(
    "scheme", ["int4:block=32", "uint4:block=32", "int3:block=32", "int4:channel", "int8:channel"]
)
@pytest.mark.parametrize("target", ["ort-cpu", "onnx"])
def test_weights_behind_a_transpose_are_stored(scheme: str, target: str) -> None:
    proto = model(
        "(float[N, 64] x) => (float[N, 80] y) { t = Transpose <perm = [1, 0]> (w) y = MatMul(x, t) }",
        opset=21,
        w=normal(80, 64),
    )
    parsed = QuantScheme.parse(scheme)
    _, compiled, result = stored(proto, TARGETS[target], weights=parsed, first_last="same", accuracy=1)
    assert result.changed == 1
    largest = max(tensor_nbytes(t) for t in compiled.graph.initializer)
    assert largest <= 80 * 64 * (4 if parsed.bits == 3 else parsed.bits) // 8  # bit planes would not pay here
    onnx.checker.check_model(compiled, full_check=True)
    x = normal(3, 64)
    exact = {"session.qdq_matmulnbits_accuracy_level": "1"}
    (got,) = make_session(compiled, threads=1, config=exact).run(None, {"x": x})
    if parsed.granularity == "block":
        w = quantize_blocks(initializers(proto)["w"], 1, parsed.bits, 32, symmetric=parsed.symmetric).values()
        np.testing.assert_allclose(got, x @ w.T, rtol=0, atol=1e-4)  # float32 sums of 64 products near 1
    assert sqnr_db(x @ initializers(proto)["w"].T, got) > 6 * parsed.bits - 7  # 17 dB at 4 bits


def test_a_product_that_is_also_an_output_and_read_twice() -> None:
    proto = model(
        "(float[N, 64] x) => (float[N, 64] a, float[N, 64] y) { a = MatMul(x, w) b = Relu(a) y = Add(a, b) }",
        opset=21,
        w=normal(64, 64),
    )
    w = quantize_blocks(initializers(proto)["w"], 0, 4, 32).values()
    x = normal(3, 64)
    for target in ("ort-cpu", "onnx"):
        compiled = stored(proto, TARGETS[target], weights=INT4, first_last="same", accuracy=1)[1]
        a, y = make_session(compiled, threads=1, optimize=False).run(None, {"x": x})
        np.testing.assert_allclose(a, x @ w, rtol=0, atol=1e-4)  # float32 sums of 64 products near 1
        assert np.array_equal(y, a + np.maximum(a, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": QuantScheme.parse("uint4:channel")}, "takes weights intB:tensor or intB:channel"),
        ({"accuracy": 3}, "MatMulNBits has the accuracy levels 0, 1, 4, not 3"),
        ({"override": ("x",)}, "cannot read the override 'x'"),
    ],
)
def test_what_cannot_be_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        stored(layers(), **options)


@pytest.mark.parametrize("scheme", ["int4:block=32", "int4:channel", "int8:channel"])
def test_weights_without_codes_are_named(scheme: str) -> None:
    w = normal(64, 100)
    w[3, 4] = np.nan
    proto = model("(float[N, 64] x) => (float[N, 100] y) { y = MatMul(x, w) }", opset=21, w=w)
    with pytest.raises(DataError, match=r"NaN or infinite values \('w'\)"):
        stored(proto, weights=QuantScheme.parse(scheme), first_last="same")


def test_a_target_without_codes_in_float_graphs_refuses() -> None:
    with pytest.raises(
        UsageError, match="target 'tensorrt' takes weights and activations in integers together"
    ):
        stored(layers(), TARGETS["tensorrt"], weights=INT4)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("target", ["ort-cpu", "onnx"])
def test_weights_alone_compile_at_every_width(tmp_path: Path, bits: int, target: str) -> None:
    proto = model(
        "(int64[N, S] i) => (float[N, S, 64] y) { e = Gather(t, i) a = MatMul(e, u) b = Relu(a) y = MatMul(b, w) }",
        t=normal(100, 64),
        u=normal(64, 80),
        w=normal(80, 64),
    )
    path = tmp_path / "model.onnx"
    compiled = compile_model(
        proto, None, bits=f"w{bits}", first_last="same", target=target, output=path, threads=1, speed=False
    )
    rows = {row.name: row.status for row in compiled.report.nodes}
    assert list(rows.values()) == ["storage", "storage", "float", "storage"]
    onnx.checker.check_model(str(path), full_check=True)
    wanted = outputs(proto, {"i": INDICES})[0]
    (got,) = make_session(path, threads=1).run(None, {"i": INDICES})
    assert sqnr_db(wanted, got) > min(5 * bits - 5, 30)  # a bit is worth 6 dB; 8-bit inputs cap it


def test_a_model_compiles_without_data(tmp_path: Path) -> None:
    proto = model(
        "(float[N, 8, 9, 9] x) => (float[N, 40] y) { c = Conv(x, w, b) f = Flatten(c) y = Gemm(f, v, d) }",
        w=normal(16, 8, 3, 3),
        b=normal(16),
        v=normal(784, 40),
        d=normal(40),
    )
    compiled = compile_model(proto, None, output=tmp_path / "model.onnx", threads=1, speed=False)
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    rows = {row.op: row.status for row in compiled.report.nodes}
    assert rows == {"Conv": "storage", "Flatten": "float", "Gemm": "integer"}
    assert compiled.model.ByteSize() < 0.3 * proto.ByteSize()
    x = normal(4, 8, 9, 9)
    assert (
        sqnr_db(outputs(proto, {"x": x})[0], outputs(compiled.model, {"x": x})[0]) > 30.0
    )  # 8-bit activations
