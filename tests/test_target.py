"""What targets refuse, and that their names are where a user looks for them."""

from __future__ import annotations

from pathlib import Path

import pytest

import onnxq
from onnxq.options import TARGETS as TOLD
from onnxq.scheme import QuantScheme
from onnxq.target import TARGETS, find_target


def test_the_help_tells_every_target() -> None:
    assert all(name in TOLD for name in TARGETS)


def test_an_unknown_target_names_the_choices() -> None:
    with pytest.raises(onnxq.UsageError, match=r"did you mean 'tensorrt'.*onnx, openvino, ort-cpu, tensorrt"):
        find_target("tensort")


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("tensorrt", {"bits": "w4a8"}, "target 'tensorrt' takes codes of 8 bits, not 4"),
        ("tensorrt", {"bits": "w8a4"}, "target 'tensorrt' takes codes of 8 bits, not 4"),
        ("tensorrt", {"override": ("stem.*=w4a8",)}, "target 'tensorrt' takes codes of 8 bits, not 4"),
        ("tensorrt", {"activations": "uint8"}, "takes activations intB, B = 8, not uint8"),
        ("tensorrt", {"weights": "uint8:channel"}, "takes weights intB:tensor or intB:channel, B = 8"),
        ("tensorrt", {"form": "integer"}, "target 'tensorrt' takes the format qdq alone"),
        ("openvino", {"form": "integer"}, "target 'openvino' takes the format qdq alone"),
    ],
)
def test_what_a_target_cannot_run_is_refused(
    target: str, options: dict[str, str], message: str, models_dir: Path
) -> None:
    data = models_dir / "digits_calib.npz"
    with pytest.raises(onnxq.UsageError, match=message):
        onnxq.compile_model(models_dir / "digits_cnn.onnx", data, target=target, samples=8, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", [None, "weight-only"])
def test_tensorrt_is_not_compiled_for_without_ranges(preset: str | None, models_dir: Path) -> None:
    with pytest.raises(onnxq.UsageError, match="give calibration data"):
        onnxq.compile_model(models_dir / "digits_cnn.onnx", target="tensorrt", preset=preset)


def test_signed_activations_stand_where_the_kernels_take_them() -> None:
    int8 = QuantScheme.parse("int8")
    assert str(find_target("tensorrt").activation_scheme(int8)) == "int8"
    assert str(find_target("openvino").activation_scheme(int8)) == "uint8:symmetric"


@pytest.mark.parametrize("target", ["onnx", "openvino", "tensorrt"])
def test_nothing_is_claimed_of_a_runtime_that_was_not_run(target: str, models_dir: Path) -> None:
    data = models_dir / "digits_calib.npz"
    report = onnxq.compile_model(models_dir / "digits_cnn.onnx", data, target=target, samples=64).report
    assert (report.coverage, report.speed) == (None, None)
    assert not report.warnings
    assert report.difference is not None  # onnxruntime gives the numbers
    assert report.difference.main is not None
    assert report.difference.main.agreement == 1.0
    assert all(row.status == "integer" for row in report.nodes if row.op in ("Conv", "Add"))
