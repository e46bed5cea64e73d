"""Recurrent layers on codes: against the arithmetic of the kernel in numpy, and against float."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

import onnxq
from onnxq.affine import sqnr_db
from onnxq.errors import DataError
from onnxq.measure.macs import count_macs
from onnxq.model.session import make_session, session_and_optimized
from onnxq.passes.quantize_recurrent import QuantizeRecurrent
from onnxq.pipeline import Context, PassResult
from onnxq.program import Program
from onnxq.scheme import QuantScheme
from onnxq.target import ONNX, find_target
from onnxq.verify import node_rows

ParseProgram = Callable[..., Program]
Array = NDArray[Any]

STEPS, BATCH, INPUTS, UNITS = 6, 3, 20, 16
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
PAIR = 128  # 255 times more overflows 16 bits
RNG = np.random.default_rng(2)
X = RNG.normal(size=(STEPS, BATCH, INPUTS)).astype(np.float32)


def weights(op: str, directions: int = 1) -> dict[str, Array]:
    rows = GATES[op] * UNITS
    shapes = {"w": (directions, rows, INPUTS), "r": (directions, rows, UNITS), "b": (directions, 2 * rows)}
    return {name: RNG.uniform(-0.5, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def layer(parse: ParseProgram, op: str = "LSTM", directions: int = 1, opset: int = 17) -> Program:
    way = "bidirectional" if directions == 2 else "forward"
    text = f"""g (float[s,n,{INPUTS}] x) => (float[s,d,n,{UNITS}] y) {{
        y = {op}<hidden_size={UNITS}, direction="{way}">(x, w, r, b)
    }}"""
    return parse(text, weights(op, directions), opset)


def quantized(program: Program, ctx: Context | None = None, **options: Any) -> PassResult:
    return QuantizeRecurrent(small=0, **options).run(program, ctx or Context())


def outputs(program: Program) -> tuple[Array, Array]:
    """Of the source and of what became of it."""
    models = program.source, program.to_model()
    exact, found = (make_session(model, threads=1).run(None, {"x": X})[0] for model in models)
    return exact, found


def kernels(program: Program) -> set[str]:
    return {node.op_type for node in session_and_optimized(program.to_model(), threads=1)[1].graph.node}


def initializer(program: Program, name: str) -> Array:
    return numpy_helper.to_array(next(t for t in program.to_model().graph.initializer if t.name == name))


def as_it_runs(values: Array) -> Array:
    """What DynamicQuantizeLinear of ONNX makes of values, dequantized."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    step = np.float32((high - low) / 255) or np.float32(1)
    zero = np.rint(np.float32(-low) / step)
    return np.asarray((np.clip(np.rint(values / step) + zero, 0, 255) - zero) * step)


def lstm(x: Array, w: Array, r: Array, b: Array) -> Array:
    """An LSTM of one direction whose inputs and states are quantized as they come, (steps, batch, units)."""
    state = cell = np.zeros((x.shape[1], UNITS))
    found, data = [], as_it_runs(x)
    for step in data:
        sums = step @ w.T + as_it_runs(state) @ r.T + b[: len(w)] + b[len(w) :]
        i, o, f, c = np.split(sums, 4, axis=-1)
        cell = cell / (1 + np.exp(-f)) + np.tanh(c) / (1 + np.exp(-i))
        state = np.tanh(cell) / (1 + np.exp(-o))
        found.append(state)
    return np.stack(found)


def test_the_kernel_computes_with_the_codes(parse_program: ParseProgram) -> None:
    program = layer(parse_program)
    quantized(program)
    codes = {n: initializer(program, f"{n}_quantized")[0].astype(np.float64) for n in ("w", "r")}
    scales = {n: initializer(program, f"{n}_scale")[0] for n in ("w", "r")}
    values = {n: (codes[n] * scales[n]).T for n in ("w", "r")}
    wanted = lstm(X.astype(np.float64), values["w"], values["r"], initializer(program, "b")[0])
    _, found = outputs(program)
    # a state that float32 rounds to another code moves its sums by one step in 255; there are few
    assert sqnr_db(wanted.astype(np.float32), found[:, 0]) > 45.0


@pytest.mark.parametrize("opset", [7, 11, 17, 22])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(("bits", "least"), [(8, 34.0), (4, 12.0)])
def test_lstms_run_in_integers(
    bits: int, least: float, directions: int, opset: int, parse_program: ParseProgram
) -> None:
    program = layer(parse_program, "LSTM", directions, opset)
    result = quantized(program, weights=QuantScheme.parse(f"int{bits}:channel"), first_last="same")
    assert result.facts["bits"] == dict.fromkeys(program.stored, f"w{bits}a8")
    if bits == 8:  # narrower codes are packed
        assert "DynamicQuantizeLSTM" in kernels(program)
        assert sqnr_db(*outputs(program)) > least
        return
    done = onnxq.compile_model(
        program.source, {"x": X[None]}, bits="w4a8", first_last="same", speed=False, threads=1
    )
    assert done.report.difference is not None
    assert done.report.difference.main is not None
    assert (done.report.difference.main.sqnr_db or 0.0) > least


def test_codes_do_not_saturate_pairs(parse_program: ParseProgram) -> None:
    """Large weights side by side, which symmetric int8 codes would push over the limit."""
    program = layer(parse_program)
    quantized(program)
    for name in ("w", "r"):
        codes = initializer(program, f"{name}_quantized")[0].astype(int)  # (inputs, rows)
        pairs = codes.reshape(-1, 2, codes.shape[1])
        for signed in (np.maximum(pairs, 0), -np.minimum(pairs, 0)):
            assert signed.sum(axis=1).max() <= PAIR
        assert np.abs(codes).max() > PAIR // 3  # the range is used


@pytest.mark.parametrize("op", ["GRU", "RNN", "LSTM"])
@pytest.mark.parametrize("directions", [1, 2])
def test_others_read_codes_times_scale(op: str, directions: int, parse_program: ParseProgram) -> None:
    program = layer(parse_program, op, directions)
    quantized(program, Context(target=ONNX))
    assert list(program.stored.values()) == ["weights are stored as int8 and computed in float"]
    assert op in kernels(program)
    for name in ("w", "r"):
        codes, scale = (initializer(program, f"{name}_{part}") for part in ("quantized", "scale"))
        given = numpy_helper.to_array(next(t for t in program.source.graph.initializer if t.name == name))
        assert codes.dtype == np.int8
        assert np.abs(codes * scale - given).max() <= scale.max() * 0.5001  # float32
    assert sqnr_db(*outputs(program)) > 38.0


@pytest.mark.parametrize("scheme", ["int8:channel", "int8:tensor", "uint8:block=16"])
def test_weights_alone_leave_inputs_in_float(scheme: str, parse_program: ParseProgram) -> None:
    program = layer(parse_program)
    quantized(program, inputs="float", weights=QuantScheme.parse(scheme))
    assert kernels(program) == {"LSTM"}
    assert np.unique(initializer(program, "w_scale")).size == (1 if "tensor" in scheme else 4 * UNITS)


def test_layers_that_stay_float_say_why(parse_program: ParseProgram) -> None:
    def reason(program: Program, ctx: Context | None = None, **options: Any) -> str:
        result = QuantizeRecurrent(**options).run(program, ctx or Context())
        assert result.changed == 0
        assert dict(result.skipped).items() <= program.floats.items()
        return next(iter(result.skipped.values()), "")

    assert reason(layer(parse_program), small=4096) == "its 2304 weights are too few to repay codes"
    assert reason(layer(parse_program), skip=("LSTM",)) == "skipped by pattern 'LSTM'"
    assert "override 'LSTM=float'" in reason(layer(parse_program), override=("LSTM=float",))
    text = f"g (float[s,n,{INPUTS}] x, float[1,64,{INPUTS}] w) => (float[s,d,n,16] y) {{ y = LSTM<hidden_size=16>(x, w, r) }}"
    given = parse_program(text, {"r": weights("LSTM")["r"]})
    assert reason(given, small=0) == "its weights are no float32 initializers"
    assert reason(layer(parse_program), Context(target=find_target("tensorrt"))) == ""


def test_weights_that_are_not_numbers_are_refused(parse_program: ParseProgram) -> None:
    broken = weights("LSTM")
    broken["r"][0, 3, 2] = np.nan
    text = f"g (float[s,n,{INPUTS}] x) => (float[s,d,n,16] y) {{ y = LSTM<hidden_size=16>(x, w, r, b) }}"
    with pytest.raises(DataError, match=r"NaN.*'LSTM_0'"):
        quantized(parse_program(text, broken))


def test_absent_inputs_and_outputs_stay_absent(parse_program: ParseProgram) -> None:
    text = f"""g (float[s,n,{INPUTS}] x, float[1,n,{UNITS}] h) => (float[1,n,{UNITS}] z) {{
        , z = LSTM<hidden_size={UNITS}>(x, w, r, , , h)
    }}"""
    program = parse_program(text, {n: v for n, v in weights("LSTM").items() if n != "b"})
    quantized(program)
    feeds = {"x": X, "h": X[:1, :, :UNITS]}
    exact, found = (
        make_session(model, threads=1).run(None, feeds)[0] for model in (program.source, program.to_model())
    )
    assert sqnr_db(exact, found) > 34.0


@pytest.mark.parametrize("options", [{}, {"bits": "w8a8"}, {"bits": "w8"}])
def test_a_compile_takes_them_along(options: dict[str, Any], parse_program: ParseProgram) -> None:
    """In front of a product, by each preset."""
    wide = {"v": RNG.normal(size=(UNITS, 256)).astype(np.float32), **weights("LSTM")}
    text = f"""g (float[s,n,{INPUTS}] x) => (float[a,b,c,d] y) {{
        h = LSTM<hidden_size={UNITS}>(x, w, r, b) y = MatMul(h, v)
    }}"""
    source = parse_program(text, wide).source
    calibration = {"x": X[None]} if options else None
    done = onnxq.compile_model(source, calibration, speed=False, threads=1, **options)
    row = next(row for row in done.report.nodes if row.op == "LSTM")
    assert row.status == ("storage" if options.get("bits") == "w8" else "integer")
    assert done.report.quantized_bytes < 0.5 * done.report.float_bytes


def test_multiply_adds_of_all_steps_count(parse_program: ParseProgram) -> None:
    program = layer(parse_program, "GRU", 2)
    rows = 2 * GATES["GRU"] * UNITS
    assert count_macs(program.source, {"x": X}) == {"GRU_0": STEPS * BATCH * rows * (INPUTS + UNITS)}


def test_bodies_are_named(parse_program: ParseProgram) -> None:
    inner = weights("LSTM")
    text = f"""g (float[s,n,{INPUTS}] x, bool take) => (float[s,1,n,{UNITS}] y) {{
        y = If(take) <
            then_branch = g1 () => (float[s,1,n,{UNITS}] a) {{ a = LSTM<hidden_size={UNITS}>(x, w, r, b) }},
            else_branch = g2 () => (float[s,1,n,{UNITS}] c) {{ c = LSTM<hidden_size={UNITS}>(x, w, r) }}
        >
    }}"""
    program = parse_program(text, inner)
    quantized(program)
    rows = [row for row in node_rows(program.source, program, None) if row.op == "LSTM"]
    assert [row.reason for row in rows] == ["inside a body of If node 'If_0'"] * 2
