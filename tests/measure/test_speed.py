"""Races on a clock that the runners themselves move."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from onnxq.measure.speed import Speed, race


@dataclass
class Track:
    """A clock, and who ran when."""

    now: float = 0.0
    runs: list[str] = field(default_factory=list)


@dataclass
class Runner:
    """A session whose runs take given seconds, the last one for ever after."""

    name: str
    track: Track
    seconds: list[float]
    fed: list[Any] = field(default_factory=list)

    def run(self, outputs: None, feeds: Any) -> list[Any]:
        self.fed.append(feeds)
        self.track.runs.append(self.name)
        self.track.now += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        return []


@pytest.fixture
def track(monkeypatch: pytest.MonkeyPatch) -> Track:
    found = Track()
    monkeypatch.setattr("onnxq.measure.speed.time.perf_counter", lambda: found.now)
    return found


def test_the_runners_take_turns_and_change_sides(track: Track) -> None:
    a, b = Runner("a", track, [0.004]), Runner("b", track, [0.002])
    found = race(a, b, {"x": 1}, seconds=0.0, least=4)
    assert "".join(track.runs) == "ab" + "baabbaab"  # each once to warm up
    assert [found.ms_a, found.ms_b] == pytest.approx([4, 2])
    assert found.speedup == pytest.approx(2)
    assert found.runs == 4
    assert all(feeds == {"x": 1} for feeds in a.fed + b.fed)


def test_the_first_runs_and_stragglers_do_not_count(track: Track) -> None:
    a = Runner("a", track, [9.0, 0.003, 5.0, 0.003])
    b = Runner("b", track, [9.0, 0.001, 0.001, 7.0, 0.001])
    found = race(a, b, {}, seconds=0.0, least=5)
    assert [found.ms_a, found.ms_b] == pytest.approx([3, 1])


@pytest.mark.parametrize(
    ("seconds", "least", "most", "runs"),
    [(1.0, 1, 100, 10), (0.1, 3, 100, 3), (10.0, 1, 7, 7), (0.0, 1, 5, 1)],
)
def test_it_ends_with_the_time_or_the_most_runs(
    seconds: float, least: int, most: int, runs: int, track: Track
) -> None:
    a, b = (
        Runner("a", track, [0.0625]),
        Runner("b", track, [0.046875]),
    )  # exact in binary: 10 rounds pass 1 second
    found = race(a, b, {}, seconds=seconds, least=least, most=most)
    assert found.runs == runs
    assert track.runs.count("a") == track.runs.count("b") == runs + 1


def test_the_figures_as_json() -> None:
    assert Speed(6.0, 2.0, 11).as_json() == {"ms_a": 6.0, "ms_b": 2.0, "speedup": 3.0, "runs": 11}
