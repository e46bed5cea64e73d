"""Names, options, and every method on every odd tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq.affine import SMALLEST_SCALE, affine_params, dequantize, quantize
from onnxq.calibration.statistics import Needs, TensorStatistics
from onnxq.errors import DataError, UsageError
from onnxq.quantizers import METHODS, parse_quantizer, weight_params
from onnxq.quantizers.aciq import Aciq
from onnxq.quantizers.base import channel_params
from onnxq.quantizers.lp import Lp
from onnxq.quantizers.percentile import Percentile
from onnxq.scheme import QuantScheme

Gather = Callable[[NDArray[Any]], TensorStatistics]

NAMES = [method.name for method in METHODS]
SCHEMES = ["uint8", "uint2", "int8", "int4", "int8:asymmetric", "uint8:symmetric"]
rng = np.random.default_rng(11)
ODD = {
    "zeros": np.zeros(100),
    "one value": np.array([3.7]),
    "constant": np.full(1000, 3.7),
    "negative constant": np.full(1000, -3.7),
    "two values": np.array([-1.0, 2.0] * 50),
    "zero or one": np.array([0.0, 1.0]),
    "subnormal": rng.normal(size=1000).astype(np.float32) * np.float32(1e-41),
    "tiny": rng.normal(size=1000) * 1e-36,
    "huge": rng.normal(size=1000) * 1e30,
    "nearly all": np.array([1e38, -1e38, 1.0, 1e-45, -1e-45]),
    "of 60 decades": np.append(rng.normal(size=1000) * 1e-30, 1e30),
    "far from zero": 1000.0 + rng.random(1000) * 1e-3,
    "one spike": np.append(np.zeros(20_000), 5.0),
    "negative": -rng.random(1000),
}


@pytest.mark.parametrize(
    "text", ["minmax", "percentile", "mse", "lp", "lp:p=3.5", "aciq:family=gauss", "entropy"]
)
def test_text_round_trip(text: str) -> None:
    assert str(parse_quantizer(text)) == text
    assert parse_quantizer(str(parse_quantizer(text))) == parse_quantizer(text)


def test_options() -> None:
    assert (
        parse_quantizer("percentile=99.9")
        == parse_quantizer("percentile:percentile=99.9")
        == Percentile(99.9)
    )
    assert parse_quantizer("lp=3") == parse_quantizer(" lp:p=3 ") == Lp(3.0)
    assert parse_quantizer("aciq=laplace") == Aciq("laplace")
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "entrpy",
            "unknown range method 'entrpy'; did you mean 'entropy'? The choices are: aciq, entropy, lp",
        ),
        ("", "unknown range method ''; the choices are: aciq"),
        ("lp:q=3", "unknown option 'q' of the range method 'lp'; the choices are: p"),
        ("mse=2", "unknown option '' of the range method 'mse'; there are none"),
        ("lp=two", "cannot read 'p=two' in the range method 'lp=two'; p is a number"),
        ("lp=0", "p is 0.0; it must be from 0.5 to 16"),
        ("lp=nan", "p is nan; it must be from 0.5 to 16"),
        ("percentile=50", "percentile is 50.0; it must be above 50 and at most 100"),
        ("percentile=101", "percentile is 101.0; it must be above 50 and at most 100"),
        (
            "aciq=cauchy",
            "unknown family 'cauchy' of the method 'aciq'; the choices are: auto, gauss, laplace",
        ),
    ],
)
def test_bad_text(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_quantizer(text)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("method", NAMES)
def test_lacking_statistics(method: str) -> None:
    quantizer, scheme = parse_quantizer(method), QuantScheme.parse("uint8")
    with pytest.raises(DataError, match="tensor 'x' has no calibration values"):
        quantizer(TensorStatistics("x", Needs(histogram=True)), scheme)
    plain = TensorStatistics("x", Needs())
    plain.update(np.array([1.0, 2.0]))
    if not quantizer.needs.histogram:
        assert float(quantizer(plain, scheme).high) == pytest.approx(2.0, rel=1e-6)
        return
    with pytest.raises(DataError, match=f"tensor 'x' has no histogram; the method '{method}' needs one"):
        quantizer(plain, scheme)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("method", [*NAMES, "lp=1.3", "lp=16", "aciq=laplace"])
def test_odd_tensors(kind: str, method: str, gather: Gather) -> None:
    values = ODD[kind].astype(np.float32)
    statistics, limit = gather(values), float(np.abs(values).max())
    for grid in map(QuantScheme.parse, SCHEMES):
        activation = parse_quantizer(method)(statistics, grid)
        weight = weight_params(method, np.stack((values, values)), 0, grid)
        for params in (activation, weight):
            assert params.scale.dtype == np.float32
            assert params.zero_point.dtype == np.int32
            assert np.all(np.isfinite(params.scale))
            assert np.all(params.scale >= SMALLEST_SCALE)
            zero = np.zeros((2, 1), np.float32)
            np.testing.assert_array_equal(dequantize(quantize(zero, params), params), 0.0)
            if not grid.symmetric and values.min() >= 0.0:
                assert np.all(params.zero_point == grid.qmin)
            elif not grid.symmetric and values.max() <= 0.0:
                assert np.all(params.zero_point == grid.qmax)
        # A grid of both signs spans two limits; few values may lie best on a wider one at 2 bits.
        if limit > 1e-30:
            assert float(activation.scale) * (grid.qmax - grid.qmin) <= 4.0 * limit


@pytest.mark.parametrize("scheme", SCHEMES)
def test_channels_follow_the_rule_of_one_tensor(scheme: str) -> None:
    grid = QuantScheme.parse(scheme)
    ends = np.random.default_rng(2).normal(size=(2, 200)) * 10.0 ** np.random.default_rng(3).uniform(
        -40, 20, 200
    )
    ends[:, :3] = [[0.0, 0.0, -2.0], [0.0, 5.0, 0.0]]
    low, high = ends.min(axis=0), ends.max(axis=0)
    params = channel_params(low, high, grid, 0)
    each = [affine_params(a, b, grid) for a, b in zip(low, high, strict=True)]
    np.testing.assert_array_equal(params.scale, [p.scale for p in each])
    np.testing.assert_array_equal(params.zero_point, [p.zero_point for p in each])


def test_names_in_the_literature() -> None:
    assert parse_quantizer("mmse") == parse_quantizer("omse") == parse_quantizer("mse")
    assert parse_quantizer("kld") == parse_quantizer("entropy")
