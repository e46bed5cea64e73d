"""The errors that onnxq raises: one clear sentence each, naming the thing, the place and the choices."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OnnxqError(Exception):
    """Any failure that the user can act on. The message is one sentence without a trailing period."""


class UsageError(OnnxqError):
    """An unknown or contradictory option, pass, target, metric or node pattern (exit code 2)."""


class ModelError(OnnxqError):
    """A model that cannot be read, checked, run or written."""


class DataError(OnnxqError):
    """Samples that cannot be read or do not fit the model."""


def unknown(kind: str, name: str, choices: Iterable[str], *, where: str = "") -> UsageError:
    """An error for a name that is not among the choices, with the nearest match first.

    >>> str(unknown("pass", "anotate", ["annotate", "calibrate"]))
    "unknown pass 'anotate'; did you mean 'annotate'? The choices are: annotate, calibrate"
    """
    options = sorted(choices)
    if not options:
        return UsageError(f"unknown {kind} {name!r}{where}; there are none")
    near = difflib.get_close_matches(name, options, n=1)
    hint = f"did you mean {near[0]!r}? The" if near else "the"
    return UsageError(f"unknown {kind} {name!r}{where}; {hint} choices are: {', '.join(options)}")
