"""The tables of `onnxq compare --exact` from figures as the command gives them."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from onnxq.report.exactness import SHOWN, exactness


def side(names: list[str], max_abs: float | None) -> dict[str, Any]:
    return {
        "same": not names and not max_abs,
        "tensors": len(names),
        "codes": 7 * len(names),
        "first": names[0] if names else None,
        "differences": {n: {"values": 100, "differing": 7, "largest": 3} for n in names},
        "outputs": {"y": {"max_abs": max_abs, "sqnr_db": None, "agreement": None, "equal": not max_abs}},
    }


def shown(**changes: Any) -> str:
    found = {
        "model": "m[red].onnx",
        "tensors": 4,
        "codes": 400,
        "float_operators": 2,
        "saturating": [],
        "unseen": [],
        "same_everywhere": True,
        "avx2": side([], 0.0),
        "runtime": {"nearest": "32-bit sums", **side([], 0.0)},
        **changes,
    }
    console = Console(width=120, record=True, file=io.StringIO())
    for part in exactness({"models": [found], "samples": 1}):
        console.print(part)
    return console.export_text()


def test_all_the_same() -> None:
    text = shown()
    assert "m[red].onnx" in text  # the name is no markup
    assert text.count("the same codes and outputs") == 2
    assert "AVX2 differs" not in text
    assert "operators stay float" not in text


def test_what_differs() -> None:
    names = [f"t{i}" for i in range(SHOWN + 3)]
    text = shown(
        same_everywhere=False,
        avx2=side(names, 0.25),
        runtime={"nearest": "AVX2 pairs", **side(["t1"], 0.0)},
        unseen=["u"],
    )
    assert (
        f"{7 * len(names)} codes (40.250%) in {len(names)} tensors differ, first in t0; outputs by up to 0.25"
        in text
    )
    assert "as AVX2 pairs: 7 codes (1.750%) in 1 tensors differ, first in t1" in text
    assert "3 more with --json" in text
    assert "1 int8 tensors" in text
    assert "2 operators stay float" in text
    row = next(line for line in text.splitlines() if line.startswith("t1 "))
    assert row.split() == ["t1", "100", "7", "3", "7", "3"]


def test_outputs_alone_differ() -> None:
    assert "the same codes; outputs by up to 0.5" in shown(
        runtime={"nearest": "32-bit sums", **side([], 0.5)}
    )
