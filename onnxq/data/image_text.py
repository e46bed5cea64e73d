"""Image options as text: `size=256,crop=224,mean=0.485|0.456|0.406,std=0.229|0.224|0.225`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from onnxq.data.images import ImageOptions
from onnxq.errors import UsageError, unknown

OPTIONS = tuple(field.name for field in fields(ImageOptions))


def parse_image_options(text: str) -> ImageOptions:
    """Read NAME=VALUE pairs between commas; the names are the attributes of `ImageOptions`.

    A crop is a side or HEIGHTxWIDTH, numbers may be fractions, and mean and std have one number, or one
    per channel with | between.

    Raises:
        UsageError: an unknown name, one given twice, or a value that cannot be read or is out of range.

    >>> parse_image_options("crop=224x192,scale=1/127.5,mean=1").crop
    (224, 192)
    """
    values: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name not in OPTIONS:
            raise unknown("image option", name, OPTIONS)
        if not equals or not value:
            raise UsageError(f"image option {name!r} has no value; write {name}=VALUE")
        if name in values:
            raise UsageError(f"image option {name!r} is given twice")
        values[name] = READERS.get(name, _word)(name, value)
    return ImageOptions(**values)


def _word(name: str, text: str) -> str:
    return text


def _pixels(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 9:
        raise UsageError(f"image option {name!r} takes whole pixels, not {text!r}")
    return int(text)


def _sides(name: str, text: str) -> tuple[int, int]:
    sides = text.split("x")
    if len(sides) > 2:
        raise UsageError(f"image option {name!r} takes a side or HEIGHTxWIDTH, not {text!r}")
    return _pixels(name, sides[0]), _pixels(name, sides[-1])


def _number(name: str, text: str) -> float:
    top, slash, bottom = text.partition("/")
    try:
        value = float(top) / (float(bottom) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"image option {name!r} takes numbers, not {text!r}")
    return value


def _numbers(name: str, text: str) -> tuple[float, ...]:
    return tuple(_number(name, number) for number in text.split("|"))


READERS: dict[str, Callable[[str, str], Any]] = {
    "size": _pixels,
    "crop": _sides,
    "scale": _number,
    "mean": _numbers,
    "std": _numbers,
}
