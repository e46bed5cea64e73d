"""Writing files whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def obstacle(path: Path) -> str | None:
    """Why no file can be written there, as a clause; None when nothing speaks against it.

    Raises:
        OSError, RuntimeError: the path cannot be looked at (a name too long, links in a loop).
    """
    target = path.resolve()
    if target.is_dir():
        return "it is a directory"
    if not target.parent.is_dir():
        return f"there is no directory {target.parent}"
    if not os.access(target.parent, os.W_OK):
        return f"the directory {target.parent} is read-only"
    if not target.exists():
        return None
    if not target.is_file():
        return "it is not a regular file"
    return None if os.access(target, os.W_OK) else "it is read-only"


def reason(error: BaseException) -> str:
    """What the system says about a failed file operation, as a clause."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text[:1].lower() + text[1:]


@contextmanager
def new_file(target: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file beside the target, with its permissions; gone afterwards unless it was moved.

    Raises:
        OSError: it cannot be created.
    """
    path = target.with_name(f".onnxq-{secrets.token_hex(6)}.tmp")
    try:
        with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), "wb") as file:
            if target.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            yield file, path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of the one at `path`, links followed, when the block ends well.

    Raises:
        OSError, RuntimeError: it cannot be written; what was there before is untouched.
    """
    target = path.resolve()
    with new_file(target) as (file, temporary):
        yield file
        flush(file)
        os.replace(temporary, target)
    flush_directory(target.parent)


def flush(file: BinaryIO) -> None:
    """Bring what was written to the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_directory(path: Path) -> None:
    """Bring renames in a directory to the disk where the file system can."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
