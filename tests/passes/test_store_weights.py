"""Stored weights: the codes that the file holds against the float weights, and the graph that the runtime makes of them."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from onnxq.affine import sqnr_db
from onnxq.compiler import compile_model
from onnxq.errors import UsageError
from onnxq.model.prepare import prepare
from onnxq.model.session import make_session, session_and_optimized
from onnxq.passes.quantize_dynamic import QuantizeDynamic
from onnxq.passes.store_weights import StoreWeights
from onnxq.pipeline import Context, PassResult
from onnxq.program import Program
from onnxq.scheme import QuantScheme

Floats = NDArray[np.float32]

RNG = np.random.default_rng(11)
GOOD_DB = 38.0  # 8 bits of a few hundred normal values give 40 dB and more
CONV = "(float[N, 8, 9, 9] x) => (float[N, 16, 7, 7] y) { c = Conv(x, w, b) y = Relu(c) }"


def normal(*shape: int) -> Floats:
    return RNG.standard_normal(shape).astype(np.float32)


def model(body: str, **weights: Floats) -> onnx.ModelProto:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["": 17]> g {body}')
    proto.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in weights.items())
    return prepare(proto, 13)[0]


def stored(proto: onnx.ModelProto, **options: Any) -> tuple[Program, onnx.ModelProto, PassResult]:
    program = Program.from_model(proto)
    result = StoreWeights(**options).run(program, Context())
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
    assert list(program.stored.values()) == [
        "weights are stored as int8 and computed in float: there is no calibration data"
    ]


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
            "(float[N, 90] x, int64[N] i) => (float y, float z) { y = MatMul(x, w) z = Gather(w, i) }",
            (90, 64),
            "shared with a node of another kind",
        ),
    ],
    ids=["another reader", "graph output", "body", "another kind"],
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
        ("(float[N, 30] x) => (float y) { y = Sigmoid(x) }", (1,), "there is no calibration data"),
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
