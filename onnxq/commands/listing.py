"""`onnxq passes`: every pass with its options, read off the classes and their docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from typing import Any

from onnxq.pipeline import Pass
from onnxq.presets import PRESETS
from onnxq.registry import passes
from onnxq.scheme import QuantScheme

ENTRY = re.compile(r" {4}(\w+(?:, \w+)*): (.+)")


def list_passes() -> dict[str, Any]:
    """Passes with name, one line of help and options, and the presets as pipeline text.

    Raises:
        OnnxqError: a plug-in pass cannot be loaded.
    """
    return {"passes": [_describe(cls) for cls in passes().values()], "presets": dict(PRESETS)}


def _describe(cls: type[Pass]) -> dict[str, Any]:
    hints, said = typing.get_type_hints(cls), attribute_help(inspect.getdoc(cls) or "")
    options = [
        {
            "name": f.name,
            "type": type_name(hints[f.name]),
            "default": _plain(f.default),
            "help": said.get(f.name, ""),
        }
        for f in dataclasses.fields(cls)
    ]
    return {"name": cls.name, "help": first_line(cls), "options": options}


def first_line(cls: type) -> str:
    """The first paragraph of the docstring on one line."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


def attribute_help(text: str) -> dict[str, str]:
    """Help of each attribute that a docstring lists under `Attributes:`, on one line.

    >>> attribute_help("A pass.\\n\\nAttributes:\\n    a, b: two\\n        numbers.\\n    c: one.\\nRaises:\\n    E: no.")
    {'a': 'two numbers.', 'b': 'two numbers.', 'c': 'one.'}
    """
    _, found, section = text.partition("Attributes:\n")
    said: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines() if found else []:
        if line and not line.startswith(" "):
            break  # the next section
        entry = ENTRY.fullmatch(line)
        if entry:
            names = entry[1].split(", ")
            said |= dict.fromkeys(names, entry[2])
        else:
            said |= {name: f"{said[name]} {line.strip()}".strip() for name in names}
    return said


def type_name(kind: Any) -> str:
    """An option's type as a user writes its values.

    >>> type_name(float), type_name(tuple[str, ...]), type_name(str | None)
    ('float', 'a|b|...', 'str or none')
    """
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " or ".join("none" if k is types.NoneType else type_name(k) for k in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return "a|b|..."
    if kind is QuantScheme:
        return "scheme"
    return getattr(kind, "__name__", str(kind))


def _plain(value: Any) -> Any:
    """A default as JSON has it."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)
