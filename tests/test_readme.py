"""What README.md shows is true: its commands run, its table is the one in bench/results."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SESSION = re.search(r"<!-- session.*?-->\n```\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with the models that ship."""
    shutil.copytree(ROOT / "models", tmp_path / "models")
    return tmp_path


def test_the_session_runs(workplace: Path) -> None:
    assert SESSION is not None
    commands = re.findall(r"^\$ onnxq (.*)$", SESSION[1], re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        words = [sys.executable, "-m", "onnxq", *shlex.split(command)]
        done = subprocess.run(words, cwd=workplace, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["table.py", "figures.py"])
def test_tables_and_figures_are_those_of_the_results(script: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / script, "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_python_example_runs(workplace: Path) -> None:
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert example is not None
    done = subprocess.run([sys.executable, "-c", example[1]], cwd=workplace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sqnr_db" in done.stdout
