"""Tables that nodes look up as codes, against the table that the codes stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from onnxq import table_storage
from onnxq.affine import sqnr_db
from onnxq.blocks import quantize_blocks
from onnxq.model.session import make_session
from onnxq.model.tensors import tensor_nbytes
from onnxq.model.write import write_model
from onnxq.program import Program
from onnxq.scheme import QuantScheme
from onnxq.table_storage import TableWriter, in_halves
from onnxq.target import ORT_CPU, Target

Floats = NDArray[np.float32]
Parse = Callable[..., Program]

RNG = np.random.default_rng(7)
PORTABLE = replace(ORT_CPU, contrib=False)
INDICES = np.array([[0, 5, -1], [199, 7, -200]])
LOOKUP = "g (int64[N, S] i) => (float[N, S, D] y) { y = Gather(t, i) }"


def normal(*shape: int) -> Floats:
    return RNG.standard_normal(shape).astype(np.float32)


def stored(
    parse_program: Parse, tmp_path: Path, table: Floats, scheme: str, target: Target, opset: int = 21
) -> tuple[int, Path]:
    program = parse_program(LOOKUP, {"t": table}, opset)
    writer = TableWriter(program.graph, target, search=True)
    bits = writer.store_table(list(program.graph.nodes), QuantScheme.parse(scheme))
    program.graph.toposort()
    path = tmp_path / "model.onnx"
    write_model(program.to_model(), path)
    onnx.checker.check_model(str(path), full_check=True)
    return bits, path


def rows_in(path: Path, indices: NDArray[np.int64] = INDICES) -> Floats:
    found: list[Floats] = [
        make_session(path, threads=1, optimize=o).run(None, {"i": indices})[0] for o in (True, False)
    ]
    imports = onnx.load(path).opset_import
    if {e.domain for e in imports} == {""} and imports[0].version >= 21:
        found.append(np.asarray(next(iter(ReferenceEvaluator(str(path)).run(None, {"i": indices})))))
    for other in found[1:]:
        assert np.array_equal(found[0], other)
    return found[0]


def sizes(path: Path) -> list[int]:
    return [tensor_nbytes(t) for t in onnx.load(path).graph.initializer]


@pytest.mark.parametrize("target", [ORT_CPU, PORTABLE], ids=["contrib", "portable"])
@pytest.mark.parametrize(
    ("width", "scheme", "block"),
    [
        (64, "int4:block=32", 32),
        (64, "int4:channel", 64),
        (64, "int4", 64),
        (64, "int2:block=16", 16),
        (100, "int3:block=32", 100),
        (20, "int4:block=32", 20),
        (48, "int4:block=16", 16),
    ],
)
def test_four_bits_have_a_scale_for_each_block_of_a_row(
    parse_program: Parse, tmp_path: Path, width: int, scheme: str, block: int, target: Target
) -> None:
    if target.contrib and block == 100:
        block = 32  # GatherBlockQuantized takes rows that are no whole number of blocks
    table = normal(200, width)
    bits, path = stored(parse_program, tmp_path, table, scheme, target)
    values = quantize_blocks(table, 1, 4, block).values()
    assert bits == 4
    assert np.array_equal(rows_in(path), values[INDICES])
    assert max(sizes(path)) == 200 * width // 2
    ops = {n.op_type for n in onnx.load(path).graph.node}
    assert ("GatherBlockQuantized" in ops) == target.contrib


@pytest.mark.parametrize("target", [ORT_CPU, PORTABLE], ids=["contrib", "portable"])
def test_short_rows_have_a_scale_for_each_column(
    parse_program: Parse, tmp_path: Path, target: Target
) -> None:
    table = normal(200, 8) * np.geomspace(0.1, 10, 8).astype(np.float32)
    bits, path = stored(parse_program, tmp_path, table, "int4:block=32", target)
    assert bits == 4
    assert np.array_equal(rows_in(path), quantize_blocks(table, 0, 4, 200, symmetric=False).values()[INDICES])
    assert sum(sizes(path)) < 200 * 4 + 8 * 5 + 10


@pytest.mark.parametrize(("width", "opset"), [(33, 21), (64, 17)], ids=["odd", "old"])
@pytest.mark.parametrize("target", [ORT_CPU, PORTABLE], ids=["contrib", "portable"])
def test_what_four_bits_cannot_hold_takes_eight(
    parse_program: Parse, tmp_path: Path, width: int, opset: int, target: Target
) -> None:
    table = normal(200, width)
    bits, path = stored(parse_program, tmp_path, table, "int4:channel", target, opset)
    expected = 4 if target.contrib and width == 64 else 8
    assert bits == expected
    assert sqnr_db(table[INDICES], rows_in(path)) > (18 if bits == 4 else 38)  # of normal values


@pytest.mark.parametrize("scheme", ["int8:channel", "int5:block=32", "int8"])
def test_eight_bits_have_one_scale_where_that_is_good_enough(
    parse_program: Parse, tmp_path: Path, scheme: str
) -> None:
    table = RNG.uniform(-1, 3, (200, 64)).astype(np.float32)
    bits, path = stored(parse_program, tmp_path, table, scheme, ORT_CPU)
    assert bits == 8
    assert sizes(path).count(200 * 64) == 1
    assert sum(sizes(path)) < 200 * 64 + 16
    found = rows_in(path)
    assert np.abs(found - table[INDICES]).max() <= 4 / 255  # half a step, and as much for what saturates
    assert sqnr_db(table[INDICES], found) > 40


def test_eight_bits_have_a_scale_for_each_row_where_rows_are_unlike(
    parse_program: Parse, tmp_path: Path
) -> None:
    table = normal(200, 64) * np.geomspace(0.001, 10, 200).astype(np.float32)[:, None]
    bits, path = stored(parse_program, tmp_path, table, "int8:block=32", ORT_CPU)
    assert bits == 8
    values = quantize_blocks(table, 1, 8, 64, search=False).values()
    assert np.array_equal(rows_in(path), values[INDICES])


def test_a_few_large_rows_do_not_spoil_a_large_table(parse_program: Parse, tmp_path: Path) -> None:
    """One scale is tried on a sample of a large table, and then on the whole."""
    table = RNG.uniform(-1, 1, (9000, 64)).astype(np.float32)
    table[1] *= 1000
    _, path = stored(parse_program, tmp_path, table, "int8:channel", ORT_CPU)
    found = rows_in(path, np.array([[0, 1]]))[0]
    assert min(sqnr_db(table[i], found[i]) for i in (0, 1)) > 38  # 8 bits of uniform values


def test_a_very_large_table_is_not_asked(
    parse_program: Parse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_storage, "LARGE", 1000)
    table = RNG.uniform(-1, 1, (200, 64)).astype(np.float32)
    _, path = stored(parse_program, tmp_path, table, "int8:channel", ORT_CPU)
    assert np.array_equal(rows_in(path), quantize_blocks(table, 1, 8, 64, search=False).values()[INDICES])


def test_halves_of_a_row_share_bytes() -> None:
    codes = RNG.integers(-8, 8, (5, 6, 10)).astype(np.int8)
    packed = in_halves(codes)
    assert packed.shape == (5, 6, 5)
    assert np.array_equal(np.concatenate([packed & 15, packed >> 4], -1).astype(np.int8) - 8, codes)
