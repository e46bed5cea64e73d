"""One command measures all that the pages quote."""

from __future__ import annotations

import runpy
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"


def test_every_script_with_results_is_run() -> None:
    listed = runpy.run_path(str(BENCH / "run.py"))["SCRIPTS"]
    writing = {
        path.relative_to(BENCH).as_posix()
        for path in (*BENCH.glob("*.py"), *BENCH.glob("peers/*.py"))
        if "RESULTS.write_text" in path.read_text("utf-8")
    }
    assert len(writing) > 15
    assert writing <= set(listed)
    assert all((BENCH / script).exists() for script in listed)
