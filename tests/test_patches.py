"""Patches of a layer's input: what the layer makes of its whole input, it makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from onnxq.model.session import make_session
from onnxq.patches import input_patches
from onnxq.program import Program
from onnxq.saturation import as_rows

CONVS = {
    "plain": ("", (4, 3, 3, 2), (2, 3, 6, 5)),
    "strides": ("<strides=[2,1],pads=[1,0,2,1]>", (4, 3, 3, 2), (2, 3, 6, 5)),
    "dilations": ("<dilations=[2,1],pads=[2,0,0,1]>", (4, 3, 3, 2), (2, 3, 6, 5)),
    "upper": ('<auto_pad="SAME_UPPER",strides=[2,2]>', (4, 3, 3, 2), (2, 3, 6, 5)),
    "lower": ('<auto_pad="SAME_LOWER",strides=[2,3]>', (4, 3, 4, 2), (2, 3, 7, 5)),
    "valid": ('<auto_pad="VALID">', (4, 3, 3, 2), (2, 3, 6, 5)),
    "groups": ("<group=2,pads=[1,1,1,1]>", (6, 2, 3, 3), (2, 4, 5, 5)),
    "depthwise": ("<group=4,pads=[1,1,1,1]>", (4, 1, 3, 3), (2, 4, 5, 5)),
    "one axis": ("<pads=[1,1]>", (4, 3, 3), (2, 3, 9)),
    "three axes": ("<pads=[1,0,0,0,1,0]>", (4, 2, 2, 3, 2), (2, 2, 3, 4, 3)),
}


@pytest.mark.parametrize("name", CONVS)
def test_patches_of_convolutions_are_all_their_inputs(
    name: str, parse_program: Callable[..., Program]
) -> None:
    attributes, shape, size = CONVS[name]
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=shape).astype(np.float32), rng.normal(size=size).astype(np.float32)
    text = f"g (float[{','.join(map(str, size))}] x) => (float[{','.join('abcde'[: len(size)])}] y)"
    program = parse_program(f"{text} {{ y = Conv{attributes}(x, w) }}", {"w": w}, 17)
    (y,) = make_session(program.to_model(), threads=1).run(None, {"x": x})
    (node,) = program.graph.nodes
    group = node.attrs.get("group", 1)
    patches = input_patches(node, x, rng, 600)
    rows = as_rows(w, "Conv", 0).reshape(group, shape[0] // group, -1)
    found = (patches @ rows.transpose(0, 2, 1)).transpose(1, 0, 2).reshape(-1, shape[0])  # (patches, C_out)
    expected = np.moveaxis(y, 1, -1).reshape(-1, shape[0])
    distance = np.abs(found[:, None] - expected).max(axis=2)
    assert distance.min(axis=1).max() < 1e-5  # float32 sums of some dozen terms
    assert set(distance.argmin(axis=1)) == set(
        range(len(expected))
    )  # 600 draws of at most 60 places miss none


@pytest.mark.parametrize("shape", [(5, 7), (5, 3, 7), (5, 2, 3, 7)])
def test_patches_of_products_are_rows(shape: tuple[int, ...], parse_program: Callable[..., Program]) -> None:
    x: Any = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    dims = ",".join(map(str, shape))
    text = f"g (float[{dims}] x) => (float[{','.join('abcd'[: len(shape)])}] y) {{ y = MatMul(x, w) }}"
    (node,) = parse_program(text, {"w": np.ones((7, 2), np.float32)}).graph.nodes
    rows = {tuple(row) for row in x.reshape(-1, 7)}
    few, all_ = (input_patches(node, x, np.random.default_rng(0), n) for n in (1, 100))
    assert few.shape == (1, 5, 7)
    assert len({tuple(row) for row in few[0]} & rows) == 5
    assert {tuple(row) for row in all_[0]} == rows
    assert all_.shape == (1, len(rows), 7)
