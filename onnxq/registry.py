"""Names of passes: the built-in ones, and those of other packages by the entry-point group `onnxq.passes`."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import entry_points

from onnxq.errors import OnnxqError, unknown
from onnxq.pipeline import Pass

GROUP = "onnxq.passes"
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@cache
def passes() -> dict[str, type[Pass]]:
    """Every known pass by name, built-in ones first.

    Raises:
        OnnxqError: a plug-in cannot be imported, is no pass, has no name or takes that of another.
    """
    from onnxq.passes import BUILT_IN

    found: dict[str, type[Pass]] = {cls.name: cls for cls in BUILT_IN}
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


def find_pass(name: str) -> type[Pass]:
    """The pass of that name.

    Raises:
        UsageError: there is none; the message holds the nearest match and the choices.
    """
    known = passes()
    if name not in known:
        raise unknown("pass", name, known)
    return known[name]
