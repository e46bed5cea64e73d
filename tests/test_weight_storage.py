"""Stored weights read back through runtimes: the identity times them gives what the codes stand for, exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from onnxq import packing
from onnxq.blocks import BlockCodes, quantize_blocks
from onnxq.model.session import make_session, session_and_optimized
from onnxq.model.tensors import tensor_nbytes
from onnxq.model.write import write_model
from onnxq.program import Program
from onnxq.target import ORT_CPU
from onnxq.weight_axes import is_plain_product
from onnxq.weight_storage import WeightWriter

Floats = NDArray[np.float32]
Parse = Callable[..., Program]

RNG = np.random.default_rng(3)
BITS = range(2, 9)
PORTABLE = replace(ORT_CPU, contrib=False)


def normal(*shape: int) -> Floats:
    return RNG.standard_normal(shape).astype(np.float32)


def matmul(parse_program: Parse, w: Floats) -> Program:
    return parse_program("g (float[N, S] x) => (float[N, T] y) { y = MatMul(x, w) }", {"w": w}, 25)


def emitted(program: Program, folder: Path) -> Path:
    """The program's graph as a file."""
    program.graph.toposort()
    path = folder / "model.onnx"
    write_model(program.to_model(), path)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def weights_in(path: Path, size: int, reference: bool = True) -> list[Floats]:
    """The matrix that the model multiplies by, as onnxruntime and onnx's evaluator see it."""
    x = np.eye(size, dtype=np.float32)
    found = [make_session(path, threads=1, optimize=o).run(None, {"x": x})[0] for o in (True, False)]
    if reference:
        found.append(np.asarray(next(iter(ReferenceEvaluator(str(path)).run(None, {"x": x})))))
    return found


def largest_initializer(path: Path) -> int:
    return max(tensor_nbytes(t) for t in onnx.load(path).graph.initializer)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [96, 100, 20])
def test_folded_blocks_are_the_weights_and_take_their_bits(
    parse_program: Parse,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    symmetric: bool,
    bits: int,
) -> None:
    monkeypatch.setattr(packing, "PLANES_BYTES", 0)  # as for large weights
    w = normal(size, 40)
    program = matmul(parse_program, w)
    (node,) = program.graph.nodes
    matrix = quantize_blocks(w, 0, bits, 32, symmetric=symmetric)
    WeightWriter(program.graph, ORT_CPU).folded_blocks([node], node.inputs[1], matrix)
    path = emitted(program, tmp_path)
    for found in weights_in(path, size):
        assert np.array_equal(found, matrix.values())
    filled = -(-size // matrix.block) * matrix.block * 40
    assert filled * bits // 8 in [tensor_nbytes(t) for t in onnx.load(path).graph.initializer]
    kernels = {n.op_type for n in session_and_optimized(path, threads=1)[1].graph.node}
    assert kernels == {"MatMul"}


@pytest.mark.parametrize("bits", BITS)
def test_folded_channels_are_the_weights(parse_program: Parse, tmp_path: Path, bits: int) -> None:
    program = matmul(parse_program, normal(50, 40))
    (node,) = program.graph.nodes
    codes = RNG.integers(-(1 << (bits - 1)), 1 << (bits - 1), (50, 40)).astype(np.int8)
    scale = normal(1, 40)
    WeightWriter(program.graph, ORT_CPU).folded([node], node.inputs[1], codes, scale, bits)
    for found in weights_in(emitted(program, tmp_path), 50):
        assert np.array_equal(found, codes * scale)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("size", [96, 100])
def test_dequantized_blocks_are_the_weights(
    parse_program: Parse, tmp_path: Path, size: int, transposed: int, symmetric: bool, bits: int
) -> None:
    w = normal(40, size) if transposed else normal(size, 40)
    body = f"y = Gemm <transB: int = {transposed}> (x, w, b)"
    text = f"g (float[N, S] x) => (float[N, 40] y) {{ {body} }}"
    program = parse_program(text, {"w": w, "b": np.zeros(40, np.float32)}, 25)
    (node,) = program.graph.nodes
    matrix = quantize_blocks(w, transposed, bits, 32, symmetric=symmetric)
    writer = WeightWriter(program.graph, PORTABLE)
    assert writer.takes_blocked(bits)
    writer.blocked([node], node.inputs[1], matrix)
    path = emitted(program, tmp_path)
    assert {e.domain for e in onnx.load(path).opset_import} == {""}
    assert largest_initializer(path) == max(size * 40 * bits // 8, 4 * matrix.scale.size)
    values = matrix.values().T if transposed else matrix.values()
    _, plain, reference = weights_in(path, size)
    assert np.array_equal(plain, values)
    assert np.array_equal(reference, values)
    session = make_session(path, threads=1, config={"session.qdq_matmulnbits_accuracy_level": "1"})
    assert np.array_equal(session.run(None, {"x": np.eye(size, dtype=np.float32)})[0], values)


def test_the_runtime_makes_its_kernel_of_dequantized_blocks(parse_program: Parse, tmp_path: Path) -> None:
    for transposed in (0, 1):
        w = normal(40, 96) if transposed else normal(96, 40)
        text = f"g (float[N, 96] x) => (float[N, 40] y) {{ y = Gemm <transB: int = {transposed}> (x, w) }}"
        program = parse_program(text, {"w": w}, 21)
        (node,) = program.graph.nodes
        matrix = quantize_blocks(w, transposed, 4, 32)
        WeightWriter(program.graph, PORTABLE).blocked([node], node.inputs[1], matrix)
        optimized = session_and_optimized(emitted(program, tmp_path), threads=1)[1]
        assert {n.op_type for n in optimized.graph.node} == {"MatMulNBits"}


def test_old_operator_sets_and_other_widths_have_no_dequantized_blocks(parse_program: Parse) -> None:
    for opset, bits, takes in ((20, 8, False), (21, 8, True), (21, 3, False), (25, 2, True)):
        program = parse_program("g (float[2] x) => (float[2] y) { y = Relu(x) }", None, opset)
        assert WeightWriter(program.graph, PORTABLE).takes_blocked(bits) == takes
    program = parse_program("g (float[2] x) => (float[2] y) { y = Relu(x) }", None, 25)
    assert not WeightWriter(program.graph, replace(PORTABLE, packed=(4,))).takes_blocked(2)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("body", "transposed", "bias"),
    [
        ("MatMul(x, w)", 0, None),
        ("Gemm(x, w)", 0, None),
        ("Gemm <transB: int = 1> (x, w)", 1, None),
        ("Gemm <transB: int = 1> (x, w, b)", 1, (40,)),
        ("Gemm(x, w, b)", 0, (1, 40)),
        ("Gemm(x, w, b)", 0, (1,)),
        ("Gemm(x, w, b)", 0, ()),
    ],
)
def test_the_kernel_multiplies_by_the_weights(
    parse_program: Parse,
    tmp_path: Path,
    body: str,
    transposed: int,
    bias: tuple[int, ...] | None,
    symmetric: bool,
    bits: int,
) -> None:
    w = normal(40, 100) if transposed else normal(100, 40)
    weights: dict[str, Any] = {"w": w} | ({} if bias is None else {"b": normal(*bias)})
    program = parse_program(f"g (float[N, 100] x) => (float[N, 40] y) {{ y = {body} }}", weights, 17)
    (node,) = program.graph.nodes
    assert is_plain_product(node)
    matrix = quantize_blocks(w, transposed, bits, 32, symmetric=symmetric)
    WeightWriter(program.graph, ORT_CPU).kernel([node], node.inputs[1], matrix, 32, 0)
    path = emitted(program, tmp_path)
    values = matrix.values().T if transposed else matrix.values()
    wanted = values + weights.get("b", np.float32(0))
    for found in weights_in(path, 100, reference=False):
        assert np.array_equal(found, wanted)
    (only,) = onnx.load(path).graph.node
    assert (only.op_type, only.domain) == ("MatMulNBits", "com.microsoft")
    assert largest_initializer(path) == 40 * 128 * bits // 8


def test_nodes_that_share_a_matrix_share_its_codes(parse_program: Parse, tmp_path: Path) -> None:
    w = normal(64, 64)
    text = "g (float[N, 64] x) => (float[N, 64] y) { a = MatMul(x, w) y = Gemm(a, w) }"
    forms: dict[str, Callable[[WeightWriter, list[gs.Node], gs.Tensor, BlockCodes], None]] = {
        "kernel": lambda writer, nodes, weight, matrix: writer.kernel(nodes, weight, matrix, 32, 1),
        "folded": lambda writer, nodes, weight, matrix: writer.folded_blocks(nodes, weight, matrix),
        "blocked": lambda writer, nodes, weight, matrix: writer.blocked(nodes, weight, matrix),
    }
    matrix = quantize_blocks(w, 0, 4, 32)
    x = normal(3, 64)
    wanted = x @ matrix.values() @ matrix.values()
    for form, write in forms.items():
        program = parse_program(text, {"w": w})
        write(
            WeightWriter(program.graph, ORT_CPU),
            list(program.graph.nodes),
            program.graph.tensors()["w"],
            matrix,
        )
        path = emitted(program, tmp_path)
        sizes = [tensor_nbytes(t) for t in onnx.load(path).graph.initializer]
        assert sizes.count(64 * 64 // 2) == 1, form
        assert max(sizes) == 64 * 64 // 2
        found = make_session(path, threads=1, optimize=False).run(None, {"x": x})[0]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())  # float32 sums
