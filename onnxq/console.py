"""What the commands print, and where: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

err = Console(stderr=True, highlight=False)
out = Console(highlight=False)


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[str, int, int | None], None]]:
    """A live bar on standard error while work goes on; none for machines."""
    if quiet or not err.is_terminal:
        yield lambda label, done, total: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(24),
        TextColumn("{task.fields[count]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=err, transient=True) as bar:
        task = bar.add_task("starting", total=None, count="")

        def show(label: str, done: int, total: int | None) -> None:
            count = f"{done}/{total}" if total else str(done or "")
            bar.update(task, description=escape(label), completed=done, total=total, count=count)

        yield show


def say(sentences: Sequence[str]) -> None:
    """Notes for the user, each once."""
    for sentence in dict.fromkeys(sentences):
        err.print(f"[yellow]note:[/yellow] {escape(sentence)}", soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON object on a line of its own."""
    sys.stdout.write(json.dumps(value) + "\n")


def fail(sentence: str, code: int, debug: bool) -> NoReturn:
    """Say why, with the traceback for --debug, and leave."""
    if debug and sys.exc_info()[0] is not None:
        traceback.print_exc()
    err.print(f"[red]onnxq: error:[/red] {escape(' '.join(sentence.split()))}", soft_wrap=True)
    sys.exit(code)
