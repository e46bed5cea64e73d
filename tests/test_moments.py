"""Second moments against numpy on all rows at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from onnxq.data import input_specs, open_data
from onnxq.moments import TOGETHER, second_moments, weight_sites
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program


@pytest.mark.parametrize("rows", [TOGETHER // 2, TOGETHER, 3 * TOGETHER + 5])
def test_moments_of_more_rows_than_are_added_at_once(
    parse_program: Callable[..., Program], rows: int
) -> None:
    x = np.random.default_rng(1).standard_normal((rows, 24)).astype(np.float32)
    weights = {"w": np.random.default_rng(2).standard_normal((24, 16)).astype(np.float32)}
    program = parse_program("g (float[N,24] x) => (float[N,16] y) { y = MatMul(x, w) }", weights)
    ctx = Context(open_data({"x": x}, input_specs(program.source)), threads=1)
    plan = "annotate:small=0,first_last=same calibrate choose-ranges quantize-weights"
    Pipeline.parse(plan).run(program, ctx)
    (site,), _ = weight_sites(program)
    found = second_moments(program, ctx, [site], samples=rows)["w"]
    wide = x.astype(np.float64)
    np.testing.assert_allclose(found[0], wide.T @ wide / rows, atol=1e-5)  # float32 sums of unit variances
