"""Other libraries' messages without their noise."""

from __future__ import annotations

import pytest

from onnxq.model.messages import one_sentence

RUNTIME = "[ONNXRuntimeError] : 1 : FAIL : "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            RUNTIME
            + "Load model from /a/b.onnx failed:/src/core/graph/model.cc:149 ort::Model::Model(ModelProto&&, "
            "const std::function<void(int)>&) Unsupported model IR version: 99, max supported IR version: 11\n",
            "Unsupported model IR version: 99, max supported IR version: 11",
        ),
        (
            RUNTIME + "Exception during initialization: /src/cpu/text/n.cc:235 "
            "ort::Locale::Locale(const std::string&)::<lambda()> Failed to construct locale",
            "Failed to construct locale",
        ),
        (
            "/src/x.h:563 void ort::It::Init(long, long) axis == 1 || axis == 2 was false.",
            "axis == 1 || axis == 2 was false",
        ),
        (
            "/src/a.cc:101: convert: Assertion `a(b)` failed: no (such) op",
            "Assertion `a(b)` failed: no (such) op",
        ),
        ("/src/a.h:35: operator(): Assertion `x` failed", "Assertion `x` failed"),
        (
            "No Op registered for Foo\n\n==> Context: Bad node spec for node. Name: a",
            "No Op registered for Foo",
        ),
        (
            "(op_type:Add): [ShapeInferenceError] Incompatible dimensions",
            "(op_type:Add): Incompatible dimensions",
        ),
    ],
)
def test_noise_goes_and_the_cause_stays(text: str, expected: str) -> None:
    assert one_sentence(text) == expected


def test_long_messages_are_cut() -> None:
    assert one_sentence("word " * 100, limit=12) == "word word w…"


def test_an_error_without_a_message_gives_its_kind() -> None:
    assert one_sentence(MemoryError()) == "MemoryError"
