"""Budgets as users write them."""

from __future__ import annotations

import pytest

from onnxq.errors import UsageError
from onnxq.search import Budget


@pytest.mark.parametrize(
    ("text", "evaluations", "seconds", "shown"),
    [
        ("200", 200, None, "200 evaluations"),
        ("120s", None, 120, "120 s"),
        (" 2 M ", None, 120, "120 s"),
        ("1.5h", None, 5400, "5400 s"),
        (".5m", None, 30, "30 s"),
        ("200,2m", 200, 120, "200 evaluations and 120 s"),
    ],
)
def test_parse(text: str, evaluations: float | None, seconds: float | None, shown: str) -> None:
    budget = Budget.parse(text)
    assert (budget.evaluations, budget.seconds, str(budget)) == (evaluations, seconds, shown)


@pytest.mark.parametrize(
    "text", ["", "0", "0s", "-3", "1.5", "two", "2d", "2m,3s", "200,", "1e3", "nan", "inf"]
)
def test_what_is_not_understood(text: str) -> None:
    with pytest.raises(UsageError, match=r"search budget .* is not understood; give evaluations such as 200"):
        Budget.parse(text)


def test_no_limit() -> None:
    assert str(Budget()) == "no limit"
