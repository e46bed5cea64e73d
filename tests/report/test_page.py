"""The page: well-formed, alone in the world, and complete."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from onnxq import compile_model
from onnxq.choices import Choices
from onnxq.commands.compiling import compile_file
from onnxq.commands.reporting import report_file
from onnxq.errors import OnnxqError, UsageError
from onnxq.presets import PRESETS
from onnxq.report.page import page

MODELS = Path(__file__).parents[2] / "models"
CNN, CALIB = MODELS / "digits_cnn.onnx", MODELS / "digits_calib.npz"
VOID = {"meta", "link", "br", "path", "circle", "polyline"}  # closed by themselves, also `<path/>`
TEST = MODELS / "digits_test.npz"
MULTIPOINT = {
    "budget": 0.1,
    "extra_weights": 288,
    "bits_mean": 4.4,
    "form": "folded",
    "error_left": 0.2,
    "curve": [[0.0, 1.0], [0.05, 0.4], [0.1, 0.2], [0.4, 0.1], [1.0, 0.05]],
    "channels": [
        {
            "tensor": "w",
            "channel": 3,
            "points": 2,
            "weights": 144,
            "factors": [0.1, 0.01],
            "error_before": 1.0,
            "error_after": 0.1,
        },
        {
            "tensor": "w",
            "channel": 5,
            "points": 2,
            "weights": 144,
            "factors": [0.1, 0.01],
            "error_before": 0.5,
            "error_after": 0.2,
        },
    ],
}

FLOOR = {
    "min_sqnr_db": 20.0,
    "tries": [{"sqnr_db": None, "bytes": 90_000}, {"sqnr_db": 21.34, "bytes": 120_000}],
    "raised": {"stage1.conv": "w6a8"},
}


class Reader(HTMLParser):
    """Tags must nest; ids, texts, and what would be fetched are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        assert len(named) == len(attrs), f"<{tag}> has an attribute twice"
        self.ids += [named["id"] or ""] if "id" in named else []
        self.fetched += [
            named[key] or "" for key in ("href", "src", "action", "data", "srcset") if key in named
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read(text: str) -> Reader:
    """The page, parsed; it must be well-formed."""
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    assert len(set(reader.ids)) == len(reader.ids)
    return reader


@pytest.fixture(scope="module")
def full() -> dict[str, Any]:
    """A report with everything, some of it odd."""
    done = compile_model(
        CNN,
        CALIB,
        samples=64,
        bits="w4a4",
        ranges="lapq",
        search_budget="12",
        skip=("classifier",),
        test=TEST,
        layers=True,
        threads=1,
    )
    found: dict[str, Any] = json.loads(json.dumps(done.report.as_json()))
    return {**found, "multipoint": MULTIPOINT, "floor": FLOOR}


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_has_a_page_that_fetches_nothing(name: str) -> None:
    done = compile_model(CNN, CALIB, samples=8, preset=name, speed=False, threads=1)
    text = page(done.report.as_json())
    reader = read(text)
    assert {"layers", "passes", "provenance"} <= set(reader.ids)
    assert reader.fetched == ["data:,"]
    assert not re.search(r"https?:|url\(|@import|//\w", text)
    assert done.report.pipeline in "".join(reader.texts)


def test_every_section_that_has_figures_is_there(full: dict[str, Any]) -> None:
    ids = set(read(page(full)).ids)
    assert ids == {
        *("reasons", "figures", "noise", "norm", "search", "points"),
        *("layers", "tensors", "multipoint", "passes", "provenance"),
    }


def test_a_floor_is_told_attempt_by_attempt(full: dict[str, Any]) -> None:
    said = "Floor: 20 dB kept by more bits in 1 layer (none in 90 kB, 21.3 dB in 120 kB)."
    assert said in read(page(full)).texts
    assert "Floor" not in page({**full, "floor": None})


@pytest.mark.parametrize(
    ("key", "value", "gone"),
    [
        ("lapq", None, {"norm", "search"}),
        ("multipoint", None, {"points", "multipoint"}),
        ("tensors", [], {"noise", "tensors"}),
    ],
)
def test_what_has_no_figures_is_left_out(
    full: dict[str, Any], key: str, value: object, gone: set[str]
) -> None:
    assert set(read(page(full)).ids) - set(read(page({**full, key: value})).ids) == gone
    older = {k: v for k, v in full.items() if k != key}
    assert set(read(page(older)).ids) == set(read(page({**full, key: value})).ids)


def test_figures_that_json_cannot_hold(full: dict[str, Any]) -> None:
    lapq = {
        **full["lapq"],
        "p_losses": [None, *full["lapq"]["p_losses"][1:]],
        "loss_end": None,
        "held_end": None,
    }
    read(page({**full, "lapq": lapq, "speed": None, "coverage": None, "calibration": None}))


def test_whether_outputs_of_layers_were_matched(full: dict[str, Any]) -> None:
    def said(outputs: object) -> str:
        return " ".join(read(page({**full, "outputs": outputs})).texts)

    taken = said({"matched": True, "sqnr_db": [13.4, 16.12]})
    assert "Layers: outputs matched with float (SQNR 16.1 dB, without that 13.4 dB)." in taken
    rejected = said({"matched": False, "sqnr_db": [None, 6.4]})
    assert "outputs not matched with float (SQNR none, with that 6.4 dB)." in rejected
    assert full["outputs"]["sqnr_db"] is None  # behind a search
    assert "matched with float." in said(full["outputs"])
    assert "matched with float" not in said(None)


def test_figures_are_those_of_the_report(full: dict[str, Any]) -> None:
    text = " ".join(read(page(full)).texts)
    size, speed = full["size"], full["speed"]
    assert f"{size['float_bytes'] / size['quantized_bytes']:.2f}x" in text
    assert f"{speed['speedup']:.2f}x" in text
    assert f"{full['quality']['sqnr_db']:.1f} dB" in text
    metric = full["quality"]["metric"]
    assert f"{metric['quantized']:.2%} {metric['float']:.2%} in float, 797 test samples" in text
    assert page(full).count("<svg") == 4 + sum(1 for t in full["tensors"] if t["histogram"])


def test_older_reports_have_no_accuracy(full: dict[str, Any]) -> None:
    older = {key: value for key, value in full["quality"].items() if key != "metric"}
    assert "Top-1 agreement" in page({**full, "quality": older})
    assert "test samples" not in page({**full, "quality": older})


def test_an_input_is_not_the_output_of_its_reader(full: dict[str, Any]) -> None:
    node = {"name": "n", "op": "Conv", "status": "integer", "reason": ""}
    rows = [
        {**full["tensors"][0], "layer": "n", "kind": kind, "sqnr_db": ratio}
        for kind, ratio in (("output", 21.2), ("output", 12.1), ("input", 55.5), ("weight", 33.3))
    ]
    text = page({**full, "nodes": [node], "tensors": rows, "layers": None})
    layers = text[text.index('id="layers"') : text.index('id="tensors"')]
    assert re.findall(r'<td class="n">([\d.]*)</td>', layers) == ["33.3", "12.1"]


def test_deployed_noise_and_what_a_layer_costs_alone(full: dict[str, Any]) -> None:
    nodes = [{"name": name, "op": "Conv", "status": "integer", "reason": ""} for name in ("n", "m")]
    rows = [
        {**full["tensors"][0], "layer": "n", "tensor": tensor, "kind": "output", "sqnr_db": None}
        for tensor in ("t", "u")
    ]
    found = {"deployed_db": {"t": 21.2, "u": 12.1}, "alone_db": {"n": 33.3}, "count": 1, "samples": 32}
    text = page({**full, "nodes": nodes, "tensors": rows, "layers": found})
    layers = text[text.index('id="layers"') : text.index('id="tensors"')]
    assert re.findall(r'<td class="n">([\d.]*)</td>', layers) == ["", "", "12.1", "33.3", *[""] * 4]
    assert "(32 samples)" in layers
    assert text.count('class="line third"') == 1
    short = page({**full, "nodes": nodes, "tensors": rows, "layers": {**found, "count": 2}})
    assert "time for 1 of 2 layers" in short
    older = {key: value for key, value in full.items() if key != "layers"}
    assert "Alone, dB" not in page(older)
    assert "Alone, dB" in page(full)


def test_the_curve_of_budgets(full: dict[str, Any]) -> None:
    text = page(full)
    figure = text[text.index('id="points"') : text.index('id="layers"')]
    assert "10.0%, 288 further weights, with 20.0% of the error left" in figure
    (line,) = re.findall(r'<polyline class="line" points="([^"]*)"', figure)
    assert len(line.split()) == 4  # up to four times the budget
    (x, y) = re.findall(r'class="dot second" cx="([\d.]+)" cy="([\d.]+)"', figure)[0]
    assert f"{x},{y}" == line.split()[2]
    older = {key: value for key, value in MULTIPOINT.items() if key not in ("curve", "error_left")}
    assert 'id="points"' not in page({**full, "multipoint": older})
    assert "0.1, 0.01" in page({**full, "multipoint": older})


def test_names_are_never_markup(full: dict[str, Any]) -> None:
    odd = '"><script>alert(1)</script>&amp;'
    node = {"name": odd, "op": odd, "status": "float", "reason": odd}
    tensors = [{**full["tensors"][0], "tensor": odd, "layer": odd}]
    step = {**full["passes"][0], "skipped": {odd: odd}}
    renamed = {
        "nodes": [node],
        "tensors": tensors,
        "passes": [step],
        "model": odd,
        "pipeline": odd,
        "warnings": [odd],
    }
    text = page({**full, **renamed})
    assert text.count("<script") == 1
    assert "".join(read(text).texts).count(odd) >= 9


def test_the_suffix_decides(tmp_path: Path) -> None:
    for name, start in (
        ("r.html", "<!doctype html>"),
        ("r.HTM", "<!doctype html>"),
        ("r.json", "{"),
        ("r", "{"),
    ):
        compile_file(CNN, tmp_path / "q.onnx", Choices(preset="weight-only"), report=tmp_path / name)
        assert (tmp_path / name).read_text("utf-8").startswith(start)


def test_a_page_from_a_file(tmp_path: Path, full: dict[str, Any]) -> None:
    run, out = tmp_path / "run.json", tmp_path / "run.html"
    run.write_text(json.dumps(full))
    report_file(run, out)
    assert out.read_text("utf-8") == page(full)
    with pytest.raises(UsageError, match="the page would replace the report"):
        report_file(run, run)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "it is no JSON"),
        (b"\xff\xfe\xfa", "it is no JSON"),
        (b"[" * 100_000, "it is no JSON"),
        (b"[]", "it is no report of `onnxq compile --report`: it lacks 'model'"),
        (b'{"model": "m"}', "it lacks 'output'"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    run, out = tmp_path / "run.json", tmp_path / "run.html"
    run.write_bytes(content)
    with pytest.raises(OnnxqError, match=re.escape(said)) as caught:
        report_file(run, out)
    assert str(run) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize(
    "key",
    [
        "nodes",
        "size",
        "quality",
        "passes",
        "seconds",
        "tensors",
        "lapq",
        "output",
        "outputs",
        "floor",
        "layers",
    ],
)
def test_a_damaged_report_is_one_sentence(full: dict[str, Any], key: str) -> None:
    for value in (7, "text", [1]):
        if key == "output" and value == "text":
            continue
        with pytest.raises(OnnxqError, match="damaged"):
            page({**full, key: value})


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(OnnxqError, match=r"cannot read the report .*: no such file"):
        report_file(tmp_path / "none.json", tmp_path / "p.html")
