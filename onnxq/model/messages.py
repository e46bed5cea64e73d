"""Long messages of other libraries made into one short sentence."""

from __future__ import annotations

import re

SOURCE = r"\S*/\S+\.(?:cc|h|cpp):\d+:? "
FUNCTION = (
    r"[\w:~&*<> ]+\([^()]*(?:\([^()]*\)[^()]*)*\)(?:::<lambda\([^)]*\)>)?(?: const)?(?: \[with [^\]]*\])? "
)
NOISE = tuple(
    re.compile(pattern)
    for pattern in (
        r"\[ONNXRuntimeError\] : \d+ : \w+ : ",
        r"Load model from \S+ failed:\s*",
        r"(?:Exception during initialization:|Fatal error:|This is an invalid model\.)\s*",
        rf"{SOURCE}(?:[\w()]+: (?=Assertion)|{FUNCTION})",
        r"==> Context:.*",
        r"\[(?:ShapeInferenceError|TypeInferenceError)\]\s*",
    )
)


def one_sentence(error: BaseException | str, limit: int = 240) -> str:
    """A message without source paths, error codes and a trailing period, at most `limit` characters.

    >>> one_sentence("[ONNXRuntimeError] : 1 : FAIL : Fatal error: a:B(-1) is not a registered function/op")
    'a:B(-1) is not a registered function/op'
    """
    text = " ".join(str(error).split())
    for noise in NOISE:
        text = noise.sub("", text)
    text = text.strip().rstrip(".")
    if not text:
        return error if isinstance(error, str) and error else type(error).__name__
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
