"""Axes of weights, held against what the operators do with them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from onnxq.model.session import make_session
from onnxq.program import Program
from onnxq.weight_axes import is_plain_product, output_axis, summed_axes

Parse = Callable[..., Program]
RNG = np.random.default_rng(4)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("body", "shape", "axis"),
    [
        ("Conv(x, w)", (6, 8, 3, 3), 0),
        ("Conv <group: int = 8> (x, w)", (16, 1, 3, 3), 0),
        ("ConvTranspose(x, w)", (8, 5, 3, 3), 1),
        ("ConvTranspose <group: int = 2> (x, w)", (8, 5, 3, 3), None),
        ("MatMul(x, w)", (9, 7), 1),
        ("MatMul(x, w)", (8, 9, 7), 2),
        ("Gemm(f, w)", (72, 4), 1),
        ("Gemm <transB: int = 1> (f, w)", (4, 72), 0),
    ],
)
def test_scaling_a_place_of_the_output_axis_scales_one_output_channel(
    parse_program: Parse, body: str, shape: tuple[int, ...], axis: int | None
) -> None:
    shape_of_y = "A, B" if "f, w" in body else "A, B, C, D"
    text = f"g (float[1, 8, 9, 9] x, float[9, 72] f) => (float[{shape_of_y}] y) {{ y = {body} }}"
    program = parse_program(text, {"w": normal(*shape)})
    (node,) = program.graph.nodes
    assert output_axis(node) == axis
    if axis is None:
        return
    model = program.to_model()
    feeds = {"x": normal(1, 8, 9, 9), "f": normal(9, 72)}
    (before,) = make_session(model, threads=1, optimize=False).run(None, feeds)
    scaled = np.array(node.inputs[1].values)
    np.moveaxis(scaled, axis, 0)[2] *= 2
    node.inputs[1].values = scaled
    (after,) = make_session(program.to_model(), threads=1, optimize=False).run(None, feeds)
    channels = 1 if "Conv" in body else -1
    ratio = np.moveaxis(after / before, channels, 0).reshape(before.shape[channels], -1)
    np.testing.assert_allclose(ratio[2], 2, rtol=1e-5)  # float32 sums
    np.testing.assert_allclose(np.delete(ratio, 2, 0), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("body", "shape", "axes"),
    [
        ("Conv(x, w)", (6, 8, 3, 3), (2, 3)),
        ("Conv(x, w)", (6, 8, 1, 1), (1,)),
        ("ConvTranspose(x, w)", (8, 5, 3, 3), (2, 3)),
        ("MatMul(x, w)", (9, 7), (0,)),
        ("MatMul(x, w)", (8, 9, 7), (1,)),
    ],
)
def test_rounding_errors_should_cancel_over_a_kernel_or_the_inputs(
    parse_program: Parse, body: str, shape: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    program = parse_program(
        f"g (float[1, 8, 9, 9] x) => (float[A, B, C, D] y) {{ y = {body} }}", {"w": normal(*shape)}
    )
    assert summed_axes(program.graph.nodes[0]) == axes


@pytest.mark.parametrize(
    "body",
    [
        "Gemm <transA: int = 1> (x, w)",
        "Gemm <alpha: float = 2.0> (x, w)",
        "Gemm <beta: float = 2.0> (x, w, b)",
        "Gemm(x, w, c)",
        "Gemm(x, w, x)",
        "MatMul(x, v)",
    ],
)
def test_products_that_the_kernel_does_not_do(parse_program: Parse, body: str) -> None:
    weights = {"w": normal(40, 40), "b": normal(40), "c": normal(40, 40), "v": normal(2, 40, 40)}
    program = parse_program(f"g (float[40, 40] x) => (float y) {{ y = {body} }}", weights)
    (node,) = [n for n in program.graph.nodes if n.op in ("Gemm", "MatMul")]
    assert not is_plain_product(node)
