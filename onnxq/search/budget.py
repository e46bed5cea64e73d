"""How much a search may spend, and what it is expected to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from onnxq.errors import UsageError

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
PATTERN = re.compile(r"(\d+|\d*\.\d+|\d+\.\d*)\s*([smh]?)")


@dataclass(frozen=True)
class Budget:
    """Limits of a search; None sets none.

    Attributes:
        evaluations: of the loss on all search samples; those on fewer count as their share.
        seconds: of wall time. Both count what a resumed search had spent before.
    """

    evaluations: float | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """`200` evaluations, `120s`, `2m` or `1.5h`, or two of them with a comma between: `200,2m`.

        >>> Budget.parse("2m")
        Budget(evaluations=None, seconds=120.0)

        Raises:
            UsageError: it is none of these.
        """
        limits: dict[str, float] = {}
        for word in text.split(","):
            match = PATTERN.fullmatch(word.strip().lower())
            key = "seconds" if match and match[2] else "evaluations"
            whole = match and (match[2] or match[1].isdigit())
            if not match or not whole or not float(match[1]) > 0 or key in limits:
                raise UsageError(
                    f"search budget {text!r} is not understood; give evaluations such as 200, or time such as 120s, 2m or 1h"
                )
            limits[key] = float(match[1]) * UNITS.get(match[2], 1.0)
        return cls(limits.get("evaluations"), limits.get("seconds"))

    def __str__(self) -> str:
        parts = [f"{self.evaluations:g} evaluations"] if self.evaluations is not None else []
        parts += [f"{self.seconds:g} s"] if self.seconds is not None else []
        return " and ".join(parts) or "no limit"
