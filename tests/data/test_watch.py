"""Inputs that never change."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.data.inputs import InputSpec
from onnxq.data.watch import ConstantWatch

RAMP = np.arange(12, dtype=np.float32).reshape(4, 3)


def findings(*batches: dict[str, NDArray[Any]]) -> tuple[str, ...]:
    inputs = [InputSpec(name, array.dtype, None) for name, array in batches[0].items()]
    watch = ConstantWatch(inputs)
    for batch in batches:
        watch.see(batch, len(next(iter(batch.values()))))
    return watch.findings("F")


def test_changing_inputs_are_fine() -> None:
    assert findings({"x": RAMP}) == ()
    assert findings({"x": RAMP[:1]}, {"x": RAMP[1:2]}) == ()


def test_one_value_everywhere() -> None:
    half = np.full((2, 3), 0.5, np.float32)
    assert findings({"x": half}, {"x": half[:1]}) == ("F: every value of input 'x' is 0.5 in all 3 samples",)
    last = half.copy()
    last[1, 2] = 0.25
    assert findings({"x": half}, {"x": last}) == ()


def test_identical_samples() -> None:
    same = np.repeat(RAMP[:1], 3, axis=0)
    assert findings({"x": same}, {"x": same[:1]}) == ("F: all 4 samples are identical",)
    assert findings({"x": same, "y": RAMP[:3]}) == ("F: input 'x' is the same in all 3 samples",)


def test_one_sample_tells_nothing() -> None:
    assert findings({"x": np.zeros((1, 3), np.float32)}) == ()


def test_constant_integers_count_only_when_nothing_changes() -> None:
    ones, ids = np.ones((4, 3), np.int64), np.arange(12).reshape(4, 3)
    assert findings({"mask": ones, "ids": ids}) == ()
    assert findings({"mask": ones, "ids": ones}) == ("F: all 4 samples are identical",)


def test_samples_of_different_shapes_differ() -> None:
    assert findings({"x": RAMP[:2, :2]}, {"x": RAMP[:2, :1]}) == ()
