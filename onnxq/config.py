"""Options of a command from a TOML file; what the command line says counts before it."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxq.errors import OnnxqError, UsageError, unknown
from onnxq.files import reason


@dataclass(frozen=True)
class Setting:
    """One option that a file may set.

    Attributes:
        name: as the command's function calls it.
        key: as the file calls it: the long option without its dashes, or the argument in lower case.
        is_list: it may be given several times.
        is_flag: it is either there or not.
        is_path: its text names a file or starts with one.
    """

    name: str
    key: str
    is_list: bool = False
    is_flag: bool = False
    is_path: bool = False


def read_config(path: Path, settings: Iterable[Setting]) -> dict[str, Any]:
    """Values by option name.

    Args:
        path: a TOML file; files that it names are looked for beside it.
        settings: what it may set.

    Raises:
        OnnxqError: the file cannot be read or is no TOML.
        UsageError: a key is unknown or its value has the wrong type.
    """
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:  # decoding errors are ValueErrors
        said = reason(error) if isinstance(error, OSError) else str(error)
        raise OnnxqError(f"cannot read the configuration {path}: {said}") from None
    known = {setting.key: setting for setting in settings}
    values = {}
    for key, value in table.items():
        if key not in known:
            raise unknown("option", key, known, where=f" in {path}")
        values[known[key].name] = _value(path, known[key], value)
    return values


def _value(path: Path, setting: Setting, value: Any) -> Any:
    if setting.is_list:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise UsageError(f"option {setting.key!r} in {path} is {value!r}; it must be a list of texts")
        return value
    if setting.is_flag:
        if not isinstance(value, bool):
            raise UsageError(f"option {setting.key!r} in {path} is {value!r}; it must be true or false")
        return value
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise UsageError(f"option {setting.key!r} in {path} is {value!r}; it must be one text or number")
    if setting.is_path:
        return str(path.parent / str(value))
    return str(value)
