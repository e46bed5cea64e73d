"""The documentation runs, lists every pass, and links to files that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import onnx
import pytest
import typer
from onnx import ModelProto

from onnxq import Pass
from onnxq.cli import app
from onnxq.commands.listing import list_passes
from onnxq.presets import PRESETS

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "writing-a-pass.md"
USERS = ROOT / "docs" / "guide.md"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("models/*.md")]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def test_the_guide_to_writing_a_pass_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    found = blocks(GUIDE, "python")
    assert len(found) >= 2
    module = ModuleType("guide")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look there
    for number, text in enumerate(found):
        exec(compile(text, f"{GUIDE.name}, block {number}", "exec"), vars(module))
    mine = vars(module)["KeepSmall"]
    assert isinstance(mine, type)
    assert issubclass(mine, Pass)
    printed = capsys.readouterr().out.splitlines()
    small = [line for line in printed if re.search(r" it has only \d+ weights$", line)]
    assert small  # the pass keeps layers, and the report says so
    assert all(int(line.split()[-2]) < 2000 for line in small)
    saved: ModelProto = onnx.load("digits_small_float.onnx")
    kept = {line.split()[0] for line in small}
    assert kept <= {n.name for n in saved.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")}
    assert any(n.op_type == "QuantizeLinear" for n in saved.graph.node)  # larger layers are quantized


def test_the_sessions_of_the_guide_run(tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models", target_is_directory=True)
    commands = re.findall(r"^\$ onnxq (.*)$", USERS.read_text("utf-8"), re.MULTILINE)
    assert len(commands) >= 10
    (tmp_path / "calib.py").write_text(blocks(USERS, "python")[0])
    commands.append("compile models/digits_cnn.onnx -o own.onnx --calib calib.py:feeds")
    for command in commands:
        words = [sys.executable, "-m", "onnxq", *shlex.split(command)]
        words += ["--samples", "64"] if {"analyze", "lapq"} & set(words) else []  # the longest of them
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)


def test_options_named_in_the_pages_exist() -> None:
    """Those in code quotes, beside the commands that run above."""
    commands = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    known = {"--help"} | {option for c in commands for p in c.params for option in p.opts}
    assert "--calib" in known
    for page in (USERS, *(ROOT / "docs" / name for name in ("lapq.md", "multipoint.md", "passes.md"))):
        named = set(
            re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"<!--.*?-->", "", page.read_text("utf-8")))
        )
        assert named - known == set(), page.name


def test_every_pass_is_listed_with_help_for_it_and_its_options() -> None:
    """One file, one pass, one name."""
    listed = {p["name"]: p for p in list_passes()["passes"]}
    files = {p.stem.replace("_", "-") for p in (ROOT / "passes").glob("*.py") if p.stem != "__init__"}
    assert files <= set(listed)
    for name in files:
        assert listed[name]["help"].endswith("."), name
        assert [o["name"] for o in listed[name]["options"] if not o["help"]] == [], name


def test_the_page_of_passes_is_what_the_passes_say() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "passes.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_pass_of_a_preset_is_built_in() -> None:
    files = {p.stem.replace("_", "-") for p in (ROOT / "passes").glob("*.py")}
    assert {word.partition(":")[0] for text in PRESETS.values() for word in text.split()} <= files


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    broken = []
    for link in LINK.findall(prose):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        if re.match(r"[a-z]+:", link):
            continue  # elsewhere; tests use no network
        if not target.exists() or (heading and heading not in headings(target)):
            broken.append(link)
    assert broken == []


def headings(page: Path) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_the_pages_that_must_be_there_link_to_others() -> None:
    linked = [link for page in PAGES for link in LINK.findall(page.read_text("utf-8"))]
    assert len(linked) >= 5  # the test above has something to look at
    assert GUIDE in PAGES


def test_files_named_in_the_guides_exist() -> None:
    """Paths in code quotes that name a file or folder of the repository."""
    for page in (GUIDE, USERS, ROOT / "docs" / "design.md", ROOT / "CONTRIBUTING.md"):
        named = re.findall(r"`((?:onnxq|passes|tests|docs|bench|models)/[\w./-]*)`", page.read_text("utf-8"))
        assert [name for name in named if not (ROOT / name).exists()] == [], page.name
