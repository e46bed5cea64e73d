"""Packed codes come back whole in onnxruntime and in onnx's evaluator, take b bits each, and cost no node at run time."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, checker, helper
from onnx.reference import ReferenceEvaluator

from onnxq.graph import Names
from onnxq.model.session import make_session, optimized_model
from onnxq.model.skeleton import model_bytes
from onnxq.packing import Packer, needed_opset
from onnxq.point_rows import PointRows, point_rows
from onnxq.program import Program

Codes = NDArray[np.integer[Any]]


def stored(codes: Codes, bits: int, packed: tuple[int, ...], points: PointRows | None = None) -> ModelProto:
    """A model that adds an input of zeros to the stored codes as int32; stored as sums of rows where those are given."""
    shape = list(codes.shape)
    opset = max(21, needed_opset([bits], packed))
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.INT32, [1])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, shape)],
    )
    source = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    program = Program.from_model(source)
    names = Names(program.graph)
    packer = Packer(program.graph, names, packed)
    found = packer.tensor("w", codes, bits) if points is None else packer.sums("w", points, bits)
    wide = gs.Variable("wide", np.dtype(np.int32), shape)
    program.graph.nodes.append(
        gs.Node("Cast", "widen", attrs={"to": TensorProto.INT32}, inputs=[found], outputs=[wide])
    )
    last = program.graph.nodes[0]
    last.op, last.inputs = "Add", [wide, program.graph.inputs[0]]
    program.graph.toposort()
    model = program.to_model()
    checker.check_model(model, full_check=True)
    return model


def random_codes(bits: int, shape: tuple[int, ...], signed: bool) -> Codes:
    rng = np.random.default_rng(bits)
    low = -(1 << (bits - 1)) if signed else 0
    return rng.integers(low, low + (1 << bits), size=shape).astype(np.int8 if signed else np.uint8)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(16, 40, 3, 3), (73, 71), (3, 5), (1,)])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("packed", [(2, 4), (4,), ()])
def test_codes_come_back(bits: int, shape: tuple[int, ...], signed: bool, packed: tuple[int, ...]) -> None:
    codes = random_codes(bits, shape, signed)
    model = stored(codes, bits, packed)
    feeds = {"x": np.zeros(1, np.int32)}
    for optimize in (True, False):
        (found,) = make_session(model, optimize=optimize).run(None, feeds)
        np.testing.assert_array_equal(found, codes)
    (found,) = ReferenceEvaluator(model).run(None, feeds)
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize("bits", range(2, 8))
def test_a_code_takes_its_bits_and_no_node_at_run_time(bits: int) -> None:
    few, many = (stored(random_codes(bits, (n, 64), True), bits, (2, 4)) for n in (256, 1280))
    assert model_bytes(many) - model_bytes(few) == pytest.approx(
        1024 * 64 * bits / 8, abs=64
    )  # lengths in varints
    assert [n.op_type for n in optimized_model(many).graph.node] == ["Add"]


@pytest.mark.parametrize("bits", range(2, 8))
def test_few_codes_take_no_more_than_in_a_wider_type(bits: int) -> None:
    codes = random_codes(bits, (8, 40), True)
    wider = 4 if bits <= 4 else 8
    assert model_bytes(stored(codes, bits, (4,))) <= model_bytes(stored(codes, wider, (4,)))


@pytest.mark.parametrize(("bits", "code"), [(4, 8), (4, -9), (3, 4), (2, -3), (7, 64)])
def test_codes_out_of_range_are_refused(bits: int, code: int) -> None:
    with pytest.raises(ValueError, match=f"'w' do not fit into {bits} bits"):
        stored(np.array([[0, code]], np.int8), bits, (2, 4))


def test_widths_ask_for_the_operator_set_of_their_type() -> None:
    assert needed_opset([8], (2, 4)) == 1
    assert needed_opset([8, 4], (2, 4)) == 21
    assert needed_opset([4, 2], (2, 4)) == 25
    assert needed_opset([2, 3], (4,)) == 21  # few codes of 3 bits are stored at 4
    assert needed_opset([5, 6], (4,)) == 10


def random_points(bits: int, shape: tuple[int, ...], axis: int) -> PointRows:
    """A weight of which some channels have two points, and one has three, at ratios of at most 4."""
    rng = np.random.default_rng(bits)
    codes = random_codes(bits, shape, True)
    channels = rng.permutation(shape[axis])[:4]
    row = np.moveaxis(codes, axis, 0).shape[1:]
    two, three = (random_codes(bits, (n, c, *row), True) for n, c in ((2, 3), (3, 1)))
    ratios = rng.integers(2, 5, 4)
    return point_rows(codes, axis, [(channels[:3], two, ratios[:3]), (channels[3:], three // 4, ratios[3:])])


@pytest.mark.parametrize(
    ("shape", "axis"), [((16, 40, 3, 3), 0), ((300, 71), 1), ((300, 71), 0), ((8, 1, 3, 3), 0)]
)
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("packed", [(2, 4), (4,), ()])
def test_sums_of_rows(bits: int, shape: tuple[int, ...], axis: int, packed: tuple[int, ...]) -> None:
    """One int8 kernel remains: what it reads are the sums, and no node makes them at run time."""
    points = random_points(bits, shape, axis)
    expected = np.zeros(np.moveaxis(np.empty(shape), axis, 0).shape, int)
    for channel, (places, factors) in enumerate(zip(points.places, points.factors, strict=True)):
        for place, factor in zip(places, factors, strict=True):
            expected[channel] += int(factor) * points.rows[place].astype(int)
    expected = np.moveaxis(expected, 0, axis)
    np.testing.assert_array_equal(points.codes(), expected)
    model, feeds = stored(points.codes(), bits, packed, points), {"x": np.zeros(1, np.int32)}
    for optimize in (True, False):
        (found,) = make_session(model, optimize=optimize).run(None, feeds)
        np.testing.assert_array_equal(found, expected)
    (found,) = ReferenceEvaluator(model).run(None, feeds)
    np.testing.assert_array_equal(found, expected)
    assert [n.op_type for n in optimized_model(model).graph.node] == ["Add"]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_other_codes_within_reach(bits: int, axis: int) -> None:
    """The same channels keep their points: every code that their rows can sum up to is one, and no other."""
    points = random_points(bits, (16, 40), axis)
    ends = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    low, high = points.reach(ends)
    grids = [
        np.array(np.meshgrid(*[np.arange(ends[0], ends[1] + 1)] * np.count_nonzero(f)))
        for f in points.factors
    ]
    for channel, (factors, grid) in enumerate(zip(points.factors.astype(int), grids, strict=True)):
        sums = np.tensordot(factors[factors != 0], grid, 1)
        assert (low[channel], high[channel]) == (max(sums.min(), -127), min(sums.max(), 127))
    rng = np.random.default_rng(bits)
    shape = (len(low), points.rows.shape[1])
    codes = np.moveaxis(rng.integers(low[:, None], high[:, None] + 1, shape).astype(np.int8), 0, axis)
    other = points.with_codes(codes, ends)
    np.testing.assert_array_equal(other.codes(), codes)
    assert other.rows.min() >= ends[0]
    assert other.rows.max() <= ends[1]
    np.testing.assert_array_equal(other.places, points.places)
    beyond = np.moveaxis(np.repeat(high[:, None] + 1, shape[1], axis=1), 0, axis)
    with pytest.raises(ValueError, match="do not split"):
        points.with_codes(beyond.astype(np.int16), ends)


def test_further_points_take_their_bits() -> None:
    codes, ratio = random_codes(4, (64, 512), True), np.full(32, 4)
    further = random_codes(4, (2, 32, 512), True) // 2
    few, many = (
        stored(p.codes(), 4, (2, 4), p)
        for p in (point_rows(codes, 0, [(np.arange(n), further[:, :n], ratio[:n])]) for n in (1, 32))
    )
    assert model_bytes(many) - model_bytes(few) == pytest.approx(31 * 512 / 2, abs=16)  # lengths in varints


def test_a_factor_beyond_a_byte_is_refused() -> None:
    codes = random_codes(4, (3, 5), True)
    with pytest.raises(ValueError, match="factors from 0 to 256"):
        point_rows(codes, 0, [(np.array([1]), random_codes(4, (3, 1, 5), True), np.array([16]))])
