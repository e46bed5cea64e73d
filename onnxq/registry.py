"""Names of passes: the built-in ones, and those of other packages by the entry-point group `onnxq.passes`."""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from onnxq.errors import OnnxqError, unknown
from onnxq.passes import BUILT_IN
from onnxq.pipeline import Pass

GROUP = "onnxq.passes"
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@cache
def passes() -> dict[str, type[Pass]]:
    """Every known pass by name, built-in ones first.

    Raises:
        OnnxqError: a plug-in cannot be imported, is no pass, has no name or takes that of another.
    """
    found = {name: built_in(name) for name in BUILT_IN}
    for point in entry_points(group=GROUP):
        where = f"the plug-in pass {point.name!r} ({point.value})"
        try:
            cls = point.load()
        except (ImportError, AttributeError) as error:
            raise OnnxqError(f"{where} cannot be imported: {error}") from error
        if not (isinstance(cls, type) and issubclass(cls, Pass)):
            raise OnnxqError(f"{where} is no subclass of onnxq.Pass")
        name = getattr(cls, "name", "")
        if not NAME.fullmatch(name):
            raise OnnxqError(f"{where} has the name {name!r}; names are lower-case words joined by hyphens")
        if name in found:
            raise OnnxqError(f"{where} takes the name {name!r} of {found[name].__module__}")
        found[name] = cls
    return found


def built_in(name: str) -> type[Pass]:
    """The pass in the file of that name, which is loaded.

    Args:
        name: one of `onnxq.passes.BUILT_IN`.
    """
    file = import_module(f"onnxq.passes.{name.replace('-', '_')}")
    classes = (value for value in vars(file).values() if isinstance(value, type))
    return next(cls for cls in classes if issubclass(cls, Pass) and cls.__module__ == file.__name__)


def find_pass(name: str) -> type[Pass]:
    """The pass of that name. Of the built-in ones no other is loaded, and no plug-in.

    Raises:
        UsageError: there is none; the message holds the nearest match and the choices.
        OnnxqError: it is no built-in one, and a plug-in cannot be loaded.
    """
    if name in BUILT_IN:
        return built_in(name)
    known = passes()
    if name not in known:
        raise unknown("pass", name, known)
    return known[name]
