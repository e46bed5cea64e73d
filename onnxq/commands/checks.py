"""What can be refused before any work starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort

from onnxq.errors import OnnxqError, UsageError, unknown
from onnxq.files import obstacle, reason


def check_provider(name: str) -> None:
    """Refuse an execution provider that this onnxruntime does not have.

    Raises:
        UsageError: naming the nearest one and all.
    """
    if name not in ort.get_available_providers():
        raise unknown("execution provider", name, ort.get_available_providers())


def check_files(written: Mapping[str, Path | None], read: Mapping[str, Path | None]) -> None:
    """Refuse files that cannot be written, and files that would replace another one of the same run.

    Args:
        written, read: paths by what they are for; None for what is not asked for.

    Raises:
        UsageError: two files are the same.
        OnnxqError: a file cannot be written.
    """
    taken = {kind: path for kind, path in read.items() if path is not None}
    for kind, path in written.items():
        if path is None:
            continue
        problem = _obstacle(path)
        if problem is not None:
            raise OnnxqError(f"cannot write the {kind} {path}: {problem}")
        for other, place in taken.items():
            if _same(path, place):
                raise UsageError(f"the {kind} would replace the {other} {place}; choose another name")
        taken[kind] = path


def _obstacle(path: Path) -> str | None:
    try:
        return obstacle(path)
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, links in a loop, a null byte
        return reason(error)


def _same(one: Path, other: Path) -> bool:
    try:
        return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))
    except (OSError, RuntimeError, ValueError):
        return False
