"""Rows of tensors against numpy on the values themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxq import compile_model
from onnxq.affine import affine_params, symmetric_params
from onnxq.calibration.statistics import Needs, TensorStatistics
from onnxq.measure.tensors import BINS, tensor_rows
from onnxq.program import Program, QuantDecision, Unit
from onnxq.scheme import QuantScheme

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Of the CNN that ships at four bits, where histograms are gathered."""
    done = compile_model(
        MODELS / "digits_cnn.onnx",
        MODELS / "digits_calib.npz",
        samples=32,
        bits="w4a4",
        speed=False,
        threads=1,
    )
    return list(done.report.as_json()["tensors"])


def test_every_weight_and_activation_has_a_row(rows: list[dict[str, Any]]) -> None:
    kinds = [row["kind"] for row in rows]
    assert kinds.count("weight") == 16  # the first convolution, over one channel, stays float
    assert kinds.count("output") >= 16
    (entry,) = [row["tensor"] for row in rows if row["kind"] == "input"]
    assert entry.startswith("stem.relu")
    assert all(row["layer"] for row in rows)
    assert all(len(row["histogram"]) == BINS for row in rows if row["kind"] == "weight")


def test_channels_with_several_points_reach_as_far_as_their_sums() -> None:
    done = compile_model(
        MODELS / "digits_cnn.onnx",
        MODELS / "digits_calib.npz",
        samples=64,
        bits="w3a8",
        multipoint=0.5,
        speed=False,
        threads=1,
    )
    weights = {row["tensor"]: row for row in done.report.tensors if row["kind"] == "weight"}
    assert done.report.multipoint is not None
    pointed = {channel["tensor"] for channel in done.report.multipoint["channels"]}
    assert len(pointed) > 8
    for channel in done.report.multipoint["channels"]:
        # codes of 3 bits: from -4 to 3, of each point
        largest = max(sum(abs(factor) * 3 for factor in channel["factors"]), 0.0)
        low, high = weights[channel["tensor"]]["clip"]
        assert max(-low, high) >= 0.99 * largest


def test_codes_fit_the_scheme(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert 1 < row["codes"] <= 1 << QuantScheme.parse(row["scheme"]).bits
        assert row["clip"][0] <= 0 <= row["clip"][1]


def activation(values: np.ndarray[Any, Any], scheme: str, low: float, high: float) -> dict[str, Any]:
    """The row of an activation of these values on the grid of [low, high]."""
    import onnx.parser

    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    )
    program = Program.from_model(model)
    program.units["relu"] = Unit("Relu", ("relu",), ("x",), ("y",))
    params = affine_params(low, high, QuantScheme.parse(scheme))
    program.plan["x"] = QuantDecision(params.scheme, "x", params=params)
    program.statistics["x"] = TensorStatistics("x", Needs(histogram=True))
    program.statistics["x"].update(values)
    (row,) = tensor_rows(program)
    return row


def test_noise_of_an_activation_is_that_of_its_values() -> None:
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    values[::3] = 0.0
    row = activation(values, "uint4", -2.0, 2.5)
    params = affine_params(-2.0, 2.5, QuantScheme.parse("uint4"))
    scale, zero = float(params.scale), int(params.zero_point)
    rounded = (np.clip(np.rint(values / scale) + zero, 0, 15) - zero) * scale
    truth = 10 * np.log10(np.sum(values**2) / np.sum((values - rounded) ** 2))
    assert row["sqnr_db"] == pytest.approx(truth, abs=0.05)  # a bin is 1/100 of a step wide
    assert sum(row["histogram"]) == values.size
    assert (row["layer"], row["kind"]) == ("relu", "input")
    counts, _ = np.histogram(values, BINS)
    # values of a fine bin that lies across an edge go to one side: one fine bin, of about 100 values, at each end
    assert np.abs(counts - row["histogram"]).max() <= 220


def test_values_beyond_the_range_are_noise() -> None:
    values = np.linspace(-1, 1, 1001, dtype=np.float32)
    wide, narrow = (activation(values, "uint8", -end, end)["sqnr_db"] for end in (1.0, 0.5))
    assert wide > 45 > 20 > narrow


def test_a_constant_has_no_histogram() -> None:
    row = activation(np.full(8, 3.0, np.float32), "uint8", 0.0, 3.0)
    assert row["histogram"] == []


def test_a_weight_counts_the_codes_that_it_uses() -> None:
    import onnx.parser

    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1,2] x) => (float[1,2] y) '
        "<float[2,2] w = {-1, 0, 0.6, 1}> { y = MatMul(x, w) }"
    )
    program = Program.from_model(model)
    params = symmetric_params(1.0, QuantScheme.parse("int4"))
    codes = np.array([[-7, 0], [4, 7]], np.int8)
    program.plan["w"] = QuantDecision(params.scheme, "w", True, 1, params, codes)
    (row,) = tensor_rows(program)
    assert row["codes"] == 4
    assert row["data"] == [-1.0, 1.0]
    error = 0.6 - 4 / 7
    assert row["sqnr_db"] == pytest.approx(10 * np.log10(2.36 / error**2), abs=1e-4)  # float32 scales
