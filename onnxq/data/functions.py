"""Loads the user's Python functions, named as FILE.py:FUNCTION or package.module:FUNCTION."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from onnxq.errors import OnnxqError, UsageError, unknown


def is_function(text: str) -> bool:
    """Whether a text names a function rather than a file: `calib.py:feeds`, `package.module:feeds`."""
    place, colon, name = text.rpartition(":")
    dotted = all(part.isidentifier() for part in place.split("."))
    return bool(colon) and (place.endswith(".py") or (dotted and name.isidentifier()))


def load_function(spec: str, kind: str) -> Callable[..., Any]:
    """Import the function that FILE.py:FUNCTION or package.module:FUNCTION names.

    Modules beside the file (or in the working directory) can be imported while it is loaded.

    Args:
        kind: what the function is for ("data", "metric", "loss"), for sentences.

    Raises:
        UsageError: the text names no function, there is none such, or importing its module fails.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise UsageError(
            f"{spec!r} names no {kind} function; write FILE.py:FUNCTION or package.module:FUNCTION"
        )
    module = _load_file(Path(place), kind) if place.endswith(".py") else _load_module(place, kind)
    function = getattr(module, name, None)
    if function is None:
        own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        choices = [key for key, value in own.items() if getattr(value, "__module__", None) == module.__name__]
        raise unknown(f"{kind} function", name, choices, where=f" in {place!r}")
    if not callable(function):
        raise UsageError(f"{name!r} in {place!r} is a {type(function).__name__}, no {kind} function")
    return function  # type: ignore[no-any-return]  # its signature is the user's


def _load_file(path: Path, kind: str) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"there is no file {str(path)!r} with a {kind} function")
    name = f"onnxq_user_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise UsageError(f"{str(path)!r} is no Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # as import does: dataclasses and pickle look there
    try:
        with _importing(str(path), kind, path.resolve().parent):
            found.loader.exec_module(module)
    except OnnxqError:
        del sys.modules[name]
        raise
    return module


def _load_module(name: str, kind: str) -> ModuleType:
    importlib.invalidate_caches()  # the file may be newer than the last import
    with _importing(name, kind, Path.cwd()):
        return importlib.import_module(name)


@contextmanager
def _importing(place: str, kind: str, folder: Path) -> Iterator[None]:
    """Import with a folder on the path, as `python FILE.py` has it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    except OnnxqError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything; it stays the cause
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"the {kind} function's module {place!r} cannot be imported: {reason}") from error
    finally:
        with suppress(ValueError):  # the user's code may have removed it
            sys.path.remove(str(folder))
