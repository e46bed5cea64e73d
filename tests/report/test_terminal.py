"""Tables fit the terminal and show names as they are."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console, RenderableType

from onnxq.measure.compare import Difference, OutputDifference
from onnxq.measure.coverage import Coverage
from onnxq.measure.metrics import Accuracy
from onnxq.measure.speed import Speed
from onnxq.pipeline import PassResult, Step
from onnxq.report.model import NodeRow, Report
from onnxq.report.terminal import comparison, human_bytes, inspection, pass_table, reasons, summary

LONG = "/model/encoder/layers.11/self_attention/output/dense[/bold]/" + "MatMul" * 20


def shown(part: RenderableType, width: int) -> str:
    """What a terminal of that width shows; no line may be wider."""
    console = Console(file=StringIO(), width=width, force_terminal=False)
    console.print(part)
    text = console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    assert max(map(len, text.splitlines())) <= width
    return str(text)


def report(**changes: Any) -> Report:
    fields: dict[str, Any] = {
        "model": "m",
        "output": "q",
        "target": "ort-cpu",
        "pipeline": "",
        "calibration": None,
        "nodes": [
            NodeRow("a", "Conv", "integer"),
            NodeRow(LONG, "MatMul", "float", "it is [bold]odd[/bold]"),
        ],
        "coverage": Coverage(750, 1000, {}, frozenset()),
        "difference": Difference(64, {"y": OutputDifference(1000.0, 1.0, 0.1, 63, 64, 640)}),
        "speed": Speed(2.0, 1.0, 9),
        "float_bytes": 4_000_000,
        "quantized_bytes": 1_000_000,
        "seconds": {"load": 0.5, "emit": 1.0},
        "peak_rss_bytes": 123_456_789,
        "versions": {},
    }
    return Report(**{**fields, **changes})


def test_summary() -> None:
    text = shown(summary(report()), 80)
    for part in (
        "4 MB -> 1 MB, 4.00x smaller",
        "75.0% of multiply-adds, 1 of 2 nodes",
        "SQNR 30.0 dB, top-1 agreement 98.4%",
        "2 ms -> 1 ms, 2.00x",
        "1.5 s, peak memory 123 MB",
    ):
        assert part in text
    assert len(text.splitlines()) == 5


def test_summary_of_accuracy() -> None:
    found = Accuracy("top1", 0.915, 0.914, 1000, "test.npz")
    assert "accuracy  top1 91.50% -> 91.40% (1,000 test samples)" in shown(
        summary(report(accuracy=found)), 80
    )
    worse = Accuracy("mse", 0.25, float("nan"), 8, "test.npz")
    assert "mse 0.25 -> not finite (8 test samples)" in shown(summary(report(accuracy=worse)), 80)


def test_summary_of_outputs_that_were_matched() -> None:
    result = PassResult(3, facts={"outputs": {"matched": True, "sqnr_db": (13.4, 16.12)}})
    text = shown(summary(report(steps=[Step("correct-bias", result, 0.1)])), 80)
    assert "outputs matched with float (SQNR 16.1 dB, without that 13.4 dB)" in text
    assert "matched" not in shown(summary(report()), 80)


def test_summary_when_little_is_known_or_good() -> None:
    text = shown(summary(report(difference=None, speed=None, quantized_bytes=5_000_000)), 80)
    assert "larger than before" in text
    assert len(text.splitlines()) == 3
    assert "slower than float here" in shown(summary(report(speed=Speed(1.0, 2.0, 9))), 80)
    equal = Difference(64, {"y": OutputDifference(1000.0, 0.0)})
    assert "equal outputs (64 samples" in shown(summary(report(difference=equal)), 80)


def test_summary_of_a_model_for_another_runtime() -> None:
    text = shown(summary(report(coverage=None, speed=None, target="tensorrt")), 80)
    assert "1 of 2 nodes by the rules of tensorrt, on which it was not run" in text
    assert "64 samples against float in onnxruntime" in " ".join(text.split())
    assert "speed" not in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_reasons_group_nodes_and_keep_their_names(width: int) -> None:
    rows = [
        NodeRow("c", "Conv", "integer"),
        *[NodeRow(f"e{i}", "Erf", "float", "no kernel for Erf") for i in range(3)],
        NodeRow("a", "Add", "float", "an operand is constant"),
        NodeRow("m", "Mul", "storage", "an operand is constant"),
        NodeRow(LONG, "MatMul", "float", "it is [bold]odd[/bold]"),
    ]
    table = reasons(rows)
    assert table is not None
    text = shown(table, width)
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == "not in integers"
    assert lines[1:3] == ["3  no kernel for Erf", "Erf e0 and 2 more"]
    assert lines[3].split(maxsplit=1) == ["2", "an operand is constant"]
    assert lines[4] == "Add(1), Mul(1)"
    assert lines[5].split(maxsplit=1) == ["1", "it is [bold]odd[/bold]"]
    assert LONG in text.replace("\n", "").replace(" ", "")


def test_reasons_are_limited_and_may_be_none() -> None:
    assert reasons([NodeRow("c", "Conv", "integer")]) is None
    table = reasons([NodeRow(str(i), "Op", "float", f"reason {i}") for i in range(30)])
    assert table is not None
    text = shown(table, 80)
    assert "20 more reasons" in text
    assert len(text.splitlines()) == 1 + 2 * 10 + 1


def test_comparison() -> None:
    figures = {"sqnr_db": 42.123, "agreement": 0.5, "max_abs": 0.25, "equal": False}
    outputs = {
        "[logits]": figures,
        "boxes": {"sqnr_db": None, "agreement": None, "max_abs": 0.0, "equal": True},
        "wild": {"sqnr_db": None, "agreement": None, "max_abs": None, "equal": False},
    }
    lines = [line.split() for line in shown(comparison({"outputs": outputs}), 80).splitlines()]
    assert lines[1] == ["[logits]", "42.12", "dB", "50.00%", "0.25"]
    assert lines[2] == ["boxes", "equal", "0"]
    assert lines[3] == ["wild", "none", "not", "finite"]


def test_inspection() -> None:
    found = {
        "model": "m",
        "target": "ort-cpu",
        "opset": 17,
        "domains": {"com.microsoft": 1},
        "ir_version": 8,
        "inputs": [{"name": "x[0]", "dtype": "float32", "shape": ["N", None, 3]}],
        "outputs": [{"name": "y", "dtype": "sequence", "shape": None}],
        "ops": {f"Op{i}": 1 for i in range(14)},
        "kernels": None,
        "parameters": {"float32": 1_000_000, "int64": 8},
        "nodes": [NodeRow("n", "Erf", "float", "no kernel").as_json()],
        "hazards": ["[odd] hazard"],
    }
    text = "".join(shown(part, 80) for part in inspection(found))
    for part in (
        "17, com.microsoft 1 (IR version 8)",
        "x[0]  float32 (N, ?, 3)",
        "y  sequence",
        "and 2 more",
        "float32 1 MB\n",
        "0 of 1 nodes would run in integers",
        "Erf n",
        "[odd] hazard",
    ):
        assert part in text.replace(" \n", "\n").replace("  \n", "\n") or part.strip() in text
    bare = {**found, "opset": None, "nodes": None, "hazards": [], "parameters": {}}
    text = "".join(shown(part, 80) for part in inspection(bare))
    assert "would run" not in text
    assert "hazards" not in text


def test_passes_with_their_options() -> None:
    options = [
        {"name": "skip", "type": "a|b|...", "default": ["a", "b"], "help": "names."},
        {"name": "on", "type": "bool", "default": True, "help": ""},
        {"name": "ranges", "type": "str or none", "default": None, "help": "method."},
    ]
    text = shown(pass_table({"passes": [{"name": "p", "help": "Do it.", "options": options}]}), 80)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines == [
        "p Do it.",
        "skip names. (a|b|..., default a|b)",
        "on (bool, default true)",
        "ranges method. (str or none, default none)",
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_499, "999 kB"), (999_500, "1 MB"), (2.5e12, "2500 GB")],
)
def test_bytes_for_humans(count: float, text: str) -> None:
    assert human_bytes(count) == text
