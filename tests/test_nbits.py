"""The layout of MatMulNBits against onnxruntime, which multiplies the identity by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxq.blocks import quantize_blocks
from onnxq.model.session import make_session
from onnxq.nbits import INT8, LARGEST_BLOCK, has_kernel, kernel_block, nbits_layout, packed_rows

RNG = np.random.default_rng(8)


def product(matrix: Any, block: int, accuracy: int) -> ModelProto:
    layout = nbits_layout(matrix, block)
    arrays: dict[str, NDArray[Any]] = {"codes": layout.codes, "scale": layout.scale}
    if layout.zero_point is not None:
        arrays["zero"] = layout.zero_point
    node = helper.make_node(
        "MatMulNBits",
        ["x", *arrays],
        ["y"],
        domain="com.microsoft",
        accuracy_level=accuracy,
    )
    node.attribute.extend(helper.make_attribute(k, v) for k, v in layout.attrs.items())
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy"]
    tensors = [numpy_helper.from_array(v, k) for k, v in arrays.items()]
    graph = helper.make_graph([node], "g", info[:1], info[1:], tensors)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(model: ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = make_session(model, threads=1).run(None, {"x": x})[0]
    return found


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("size", "block"), [(96, 32), (100, 32), (20, 32), (161, 16), (130, 128)])
def test_the_runtime_reads_the_weights_that_the_codes_stand_for(
    bits: int, axis: int, symmetric: bool, size: int, block: int
) -> None:
    w = RNG.standard_normal((size, 24)).astype(np.float32)
    matrix = quantize_blocks(w if axis == 0 else w.T.copy(), axis, bits, block, symmetric=symmetric)
    wanted = matrix.values() if axis == 0 else matrix.values().T
    assert np.array_equal(run(product(matrix, block, 0), np.eye(size, dtype=np.float32)), wanted)


@pytest.mark.parametrize("bits", LARGEST_BLOCK)
def test_every_block_that_has_a_kernel_runs_and_the_others_are_known(bits: int) -> None:
    """Relative errors of int8 inputs in blocks are near 0.5 %; 2 % of the largest output is far from any other layout's."""
    x, w = (RNG.standard_normal(s).astype(np.float32) for s in ((3, 300), (300, 40)))
    blocks = [16 << i for i in range(7)]
    assert [b for b in blocks if has_kernel(bits, b, INT8)] == [b for b in blocks if b <= LARGEST_BLOCK[bits]]
    for block in (b for b in blocks if has_kernel(bits, b, INT8)):
        matrix = quantize_blocks(w, 0, bits, block)
        wanted = x @ matrix.values()
        assert np.abs(run(product(matrix, block, INT8), x) - wanted).max() < 0.02 * np.abs(wanted).max()


def test_what_has_no_kernel() -> None:
    assert not any(has_kernel(bits, 32, INT8) for bits in (3, 5, 6, 7))
    assert not any(has_kernel(4, block, INT8) for block in (8, 24, 48))
    assert [b for b in (2, 4, 8) if has_kernel(b, 32, 1)] == [4]


@pytest.mark.parametrize(
    ("block", "size", "wanted"), [(128, 100, 128), (128, 64, 64), (32, 5, 16), (32, 4096, 32)]
)
def test_a_block_is_no_longer_than_needed(block: int, size: int, wanted: int) -> None:
    assert kernel_block(block, size) == wanted


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_codes_are_packed_with_the_first_in_the_low_bits(bits: int, axis: int) -> None:
    codes = RNG.integers(-(1 << (bits - 1)), 1 << (bits - 1), (50, 70)).astype(np.int8)
    found = packed_rows(codes, axis, bits, 16)
    rows = np.moveaxis(codes, axis, 1).astype(np.int64) + (1 << (bits - 1))
    filled = np.pad(rows, [(0, 0), (0, -rows.shape[1] % 16)])
    lanes = 8 // bits
    groups = filled.reshape(len(rows), -1, lanes)
    assert np.array_equal(found, (groups << (bits * np.arange(lanes))).sum(-1))
