"""Means of channels are kept by a shared point of ones, and spreads by the scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import onnxq
from onnxq.affine import dequantize
from onnxq.mean_point import with_means, with_spread
from onnxq.model.session import make_session, optimized_model
from onnxq.program import QuantDecision
from onnxq.quantizers import weight_params
from onnxq.reference.run import Reference
from onnxq.saturation import excess
from onnxq.scheme import QuantScheme
from onnxq.weights import safe_codes


def decided(
    bits: int, granularity: str, axis: int, seed: int = 0
) -> tuple[QuantDecision, NDArray[np.float32]]:
    """Skewed weights, whose channels quantization shifts, and their codes."""
    weights = np.random.default_rng(seed).gamma(0.5, size=(6, 10)).astype(np.float32) - 0.3
    scheme = QuantScheme.parse(f"int{bits}:{granularity}")
    params = weight_params("mse", weights, axis if granularity == "channel" else None, scheme)
    params, codes, _ = safe_codes(weights, params, "Gemm", axis, 0)
    return QuantDecision(scheme, "w", is_weight=True, axis=axis, params=params, codes=codes), weights


def shifts(decision: QuantDecision, weights: NDArray[np.float32], axis: int) -> NDArray[Any]:
    assert decision.codes is not None
    assert decision.params is not None
    error = dequantize(decision.codes, decision.params).astype(np.float64) - weights
    found: NDArray[Any] = error.mean(axis=1 - axis)
    return found


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("limit", [0, 128])
def test_means_are_kept_to_half_a_finer_step(bits: int, granularity: str, axis: int, limit: int) -> None:
    decision, weights = decided(bits, granularity, axis)
    found = with_means(decision, weights, "Gemm", limit)
    assert isinstance(found, QuantDecision)
    assert found.params is not None
    assert found.codes is not None
    assert found.points is not None
    finer = found.params.scale
    assert (np.abs(shifts(found, weights, axis)) <= finer * (0.5 + 1e-4)).all()  # float32 of the scale
    assert np.abs(shifts(found, weights, axis)).sum() < 0.6 * np.abs(shifts(decision, weights, axis)).sum()
    assert not limit or not excess(found.codes, "Gemm", axis, limit).any()
    np.testing.assert_array_equal(found.points.codes(), found.codes)
    # nothing but the means has changed
    before, after = (
        dequantize(d.codes, d.params)
        for d in (decision, found)
        if d.codes is not None and d.params is not None
    )
    change = after - before
    np.testing.assert_allclose(
        change, np.broadcast_to(change.mean(1 - axis, keepdims=True), change.shape), atol=1e-6
    )


def test_wide_codes_leave_no_room() -> None:
    decision, weights = decided(8, "tensor", 0)
    assert with_means(decision, weights, "Gemm", 0) == "its codes leave no room for a finer grid in 8 bits"


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_spreads_are_kept(granularity: str) -> None:
    decision, weights = decided(3, granularity, 0)
    found = with_spread(decision, weights)
    assert found.params is not None
    assert found.codes is not None
    coded = dequantize(found.codes, found.params)
    alive = coded.any(axis=1)
    assert alive.sum() >= 4
    np.testing.assert_allclose(coded.std(axis=1)[alive], weights.std(axis=1)[alive], rtol=1e-5)  # float32


def test_deployed(models_dir: Path) -> None:
    """The point folds into the codes of the same kernels, which the integer reference computes with and without 16-bit pairs."""
    plain, exact = (
        onnxq.compile_model(
            models_dir / "digits_cnn.onnx",
            models_dir / "digits_calib.npz",
            bits="w3a8",
            bias_correction=correction,
            samples=32,
            threads=1,
            speed=False,
        ).model
        for correction in ("output", "exact")
    )
    kernels = [[n.op_type for n in optimized_model(m).graph.node] for m in (plain, exact)]
    assert kernels[0] == kernels[1]
    with np.load(models_dir / "digits_test.npz") as file:
        feeds = {"image": file["image"][:8]}
    (found,) = make_session(exact, threads=1).run(None, feeds)
    for arithmetic in (Reference(exact), Reference(exact).using("avx2")):
        np.testing.assert_array_equal(arithmetic.run(feeds)["logits"], found)
