"""Losses against their formulas in scipy, sums over batches, and what `auto` stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial import distance
from scipy.special import softmax
from scipy.stats import entropy

from onnxq.errors import DataError, OnnxqError, UsageError
from onnxq.simulate.losses import find_loss

RNG = np.random.default_rng(4)
FOUND, WANTED = (RNG.normal(size=(12, 5)).astype(np.float32) for _ in range(2))
LABELS = RNG.integers(0, 5, size=12)
Array = NDArray[Any]


def per_sample(name: str, found: Array = FOUND, wanted: Array = WANTED) -> Array:
    return find_loss(name, {"y": WANTED}, LABELS).per_sample({"y": found}, {"y": wanted}, LABELS)


def test_against_scipy() -> None:
    """Both sides compute in float64 from the same float32 values; scipy's cosine computes in float32."""
    found, wanted = (softmax(a.astype(np.float64), axis=1) for a in (FOUND, WANTED))
    np.testing.assert_allclose(per_sample("cross-entropy"), -np.log(found[np.arange(12), LABELS]), rtol=1e-12)
    spread = np.sqrt(WANTED.astype(np.float64).var(axis=1).mean())
    assert spread < 1  # so that nothing is softened
    np.testing.assert_allclose(per_sample("kl"), entropy(wanted, found, axis=1), rtol=1e-9)
    angles = [distance.cosine(a, b) for a, b in zip(FOUND, WANTED, strict=True)]
    np.testing.assert_allclose(per_sample("cosine"), angles, rtol=1e-5)
    squares = ((FOUND.astype(np.float64) - WANTED) ** 2).sum(axis=1)
    power = (WANTED.astype(np.float64) ** 2).sum(axis=1).mean()
    np.testing.assert_allclose(per_sample("mse"), squares / power, rtol=1e-12)


def test_a_sure_model_is_softened() -> None:
    """Scores of a spread of 8 over the classes are divided by it, and the divergence counts 64 times."""
    scale = 8.0 / np.sqrt(WANTED.astype(np.float64).var(axis=1).mean())
    sure, found = (scale * a.astype(np.float64) for a in (WANTED, FOUND))
    loss = find_loss("kl", {"y": sure}, None)
    p, q = (softmax(a / 8.0, axis=1) for a in (sure, found))
    expected = 64.0 * entropy(p, q, axis=1).sum()
    assert loss({"y": found}, {"y": sure}, None) == pytest.approx(expected, rel=1e-9)


def test_probabilities_are_taken_as_such() -> None:
    """Softmax in float32 keeps 7 digits of numbers below 1."""
    scores = softmax(FOUND, axis=1)
    np.testing.assert_allclose(per_sample("kl", scores, softmax(WANTED, axis=1)), per_sample("kl"), atol=1e-5)


@pytest.mark.parametrize("name", ["kl", "mse", "cosine"])
def test_equal_outputs_lose_nothing(name: str) -> None:
    assert np.abs(per_sample(name, WANTED)).max() < 1e-12  # float64


def test_batches_add_up() -> None:
    loss = find_loss("kl", {"y": WANTED}, None)
    whole = loss({"y": FOUND}, {"y": WANTED}, None)
    parts = [loss({"y": FOUND[s]}, {"y": WANTED[s]}, None) for s in (slice(0, 5), slice(5, 12))]
    assert whole == pytest.approx(sum(parts), rel=1e-12)


def test_what_auto_stands_for() -> None:
    unsure, sure = WANTED, 50.0 * np.eye(5, dtype=np.float32)[LABELS]
    assert find_loss("auto", {"y": unsure}, LABELS).name == "cross-entropy"
    assert find_loss("auto", {"y": sure}, LABELS).name == "kl"  # it knows these samples by heart
    assert find_loss("auto", {"y": unsure}, None).name == "kl"
    assert find_loss("auto", {"y": unsure[:4]}, LABELS[:4]).name == "kl"  # fewer than there are classes
    assert find_loss("auto", {"y": unsure[:, :1]}, None).name == "mse"
    assert find_loss("auto", {"y": unsure, "z": unsure}, LABELS).name == "mse"


def test_an_output_of_another_shape_is_an_error() -> None:
    """A decoder that stops earlier: how long its text is follows from values."""
    short, long = np.ones((1, 7, 4), np.float32), np.ones((1, 9, 4), np.float32)
    with pytest.raises(
        DataError, match=r"output 'text' follows from values, \(1, 9, 4\) in float and \(1, 7, 4\) here"
    ):
        find_loss("mse", {"text": long}, None).per_sample({"text": short}, {"text": long}, None)


def test_mistakes() -> None:
    with pytest.raises(UsageError, match="unknown loss 'kll'; did you mean 'kl'"):
        find_loss("kll", {"y": WANTED}, None)
    with pytest.raises(DataError, match="loss 'cross-entropy' needs labels"):
        find_loss("cross-entropy", {"y": WANTED}, None)({"y": FOUND}, {"y": WANTED}, None)


def test_a_function_of_the_user(tmp_path: Path) -> None:
    file = tmp_path / "losses.py"
    file.write_text(
        "def good(outputs, reference, labels):\n    return abs(outputs['y'] - reference['y']).max(axis=1)\n"
        "def flat(outputs, reference, labels):\n    return 1.0\n"
        "def bad(outputs, reference, labels):\n    return 1 / 0\n"
    )
    good = find_loss(f"{file}:good", {"y": WANTED}, None)
    assert good({"y": FOUND}, {"y": WANTED}, None) == pytest.approx(np.abs(FOUND - WANTED).max(axis=1).sum())
    for name, said in (("flat", "must be one number a sample"), ("bad", "failed: ZeroDivisionError")):
        with pytest.raises(OnnxqError, match=said):
            find_loss(f"{file}:{name}", {"y": WANTED}, None)({"y": FOUND}, {"y": WANTED}, None)
