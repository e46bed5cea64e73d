"""The page in a browser, where there is one: no errors, headings that sort, nothing wider than a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from onnxq import compile_model
from onnxq.report.page import page

MODELS = Path(__file__).parents[2] / "models"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE = 390
CLICKS = """
const heading = [...document.querySelectorAll("#layers th")].find(th => th.textContent === "Alone, dB");
const column = () => [...heading.closest("table").tBodies[0].rows].map(row => row.cells[heading.cellIndex].textContent);
const say = (name, value) => document.body.setAttribute("data-" + name, value);
heading.firstChild.click();
say("up", column()); say("sort", heading.getAttribute("aria-sort"));
heading.firstChild.click();
say("down", column());
document.querySelectorAll("details").forEach(part => part.open = true);
document.body.style.width = "PHONEpx";
say("width", document.querySelector("main").scrollWidth);
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], str]:
    """What the browser says of a page after some clicks: attributes, and its log."""
    if BROWSER is None:
        pytest.skip("there is no chromium on PATH")
    done = compile_model(
        MODELS / "digits_cnn.onnx",
        MODELS / "digits_calib.npz",
        samples=64,
        bits="w3a4",
        ranges="lapq",
        search_budget="8",
        multipoint=0.1,
        test=MODELS / "digits_test.npz",
        layers=True,
        threads=1,
    )
    folder = tmp_path_factory.mktemp("browser")
    report = {**done.report.as_json(), "model": "/a/long/path" * 9 + ".onnx"}
    clicks = CLICKS.replace("PHONE", str(PHONE))
    (folder / "page.html").write_text(page(report).replace("</body>", f"<script>{clicks}</script></body>"))
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"),
        *("--virtual-time-budget=2000", f"--user-data-dir={folder / 'profile'}"),
    ]
    shown = subprocess.run(
        [BROWSER, *flags, str(folder / "page.html")], capture_output=True, text=True, timeout=120
    )
    return dict(re.findall(r'data-(\w+)="([^"]*)"', shown.stdout)), shown.stderr


def test_the_console_stays_empty(loaded: tuple[dict[str, str], str]) -> None:
    assert [line for line in loaded[1].splitlines() if "CONSOLE" in line] == []


def test_a_heading_sorts_both_ways_with_empty_cells_last(loaded: tuple[dict[str, str], str]) -> None:
    found, _ = loaded
    assert found["sort"] == "ascending"
    for key, sign in (("up", 1), ("down", -1)):
        cells = found[key].split(",")
        filled = [float(cell) for cell in cells if cell]
        assert len(filled) > 10
        assert filled == sorted(filled, key=lambda value: sign * value)
        assert cells == [cell for cell in cells if cell] + [""] * (len(cells) - len(filled))


def test_nothing_is_wider_than_a_phone(loaded: tuple[dict[str, str], str]) -> None:
    assert int(loaded[0]["width"]) <= PHONE
