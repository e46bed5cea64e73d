"""All that a search knows, as JSON: what a checkpoint holds and what a resumed search goes on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.errors import DataError
from onnxq.files import reason, replacing
from onnxq.search.line import Memory
from onnxq.search.objective import Vector

FORMAT = "onnxq search 1"
Identity = Mapping[str, Any]


@dataclass(frozen=True)
class State:
    """The state between two line searches.

    Attributes:
        point: the best accepted point (n,), as log(step / start).
        loss, coarse, held: its losses; `coarse` and `held` are None while nobody asked for them.
        start_loss, start_held: those of the start.
        directions: the direction set, each a coordinate's number or a vector (n,) of length 1.
        memories: what is known of each direction.
        sweep, position: sweeps finished, and directions searched in the present one.
        base_point, base_loss, base_held: where the present sweep began.
        drop, dropped: the largest decrease of the present sweep, and the direction that brought it.
        spent: evaluations, those on parts of the samples as their share.
        calls: evaluations of each part.
        seconds: wall time.
        history: (evaluations spent, best accepted loss), one entry for each change.
        gains: decrease of the loss in each finished sweep.
        rejected: steps that lost on the held-back samples.
        stopped: why the search ended of itself; empty while it goes on.
    """

    point: tuple[float, ...]
    loss: float
    held: float | None
    start_loss: float
    start_held: float | None
    directions: tuple[int | tuple[float, ...], ...]
    memories: tuple[Memory, ...]
    base_point: tuple[float, ...]
    base_loss: float
    base_held: float | None
    coarse: float | None = None
    sweep: int = 0
    position: int = 0
    drop: float = 0.0
    dropped: int = 0
    spent: float = 0.0
    calls: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    history: tuple[tuple[float, float], ...] = ()
    gains: tuple[float, ...] = ()
    rejected: int = 0
    stopped: str = ""

    def direction(self, index: int) -> Vector:
        """A direction as a unit vector (n,)."""
        found = self.directions[index]
        if isinstance(found, tuple):
            return np.array(found)
        unit = np.zeros(len(self.point))
        unit[found] = 1.0
        return unit

    def with_direction(self, direction: tuple[float, ...], memory: Memory) -> State:
        """The direction, last in the set, for the one of the largest decrease."""
        others = [i for i in range(len(self.directions)) if i != self.dropped]
        return replace(
            self,
            directions=(*(self.directions[i] for i in others), direction),
            memories=(*(self.memories[i] for i in others), memory),
        )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> State:
        """The state from what JSON made of it."""
        memories = tuple(Memory(**memory) for memory in values["memories"])
        lists = {name: _tuples(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists, "memories": memories})


def _tuples(value: Any) -> Any:
    """Lists, and lists in them, as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@dataclass(frozen=True)
class Checkpoint:
    """A file that holds the state of one search.

    Attributes:
        path: the file.
        identity: what the state is valid for, such as model, variables and seed; strings, numbers and lists of them.
    """

    path: Path
    identity: Identity

    def save(self, state: State) -> None:
        """Replace the file.

        Raises:
            DataError: it cannot be written; the state before stays in it.
        """
        record = {"format": FORMAT, "identity": dict(self.identity), "state": asdict(state)}
        try:
            with replacing(self.path) as file:
                file.write(json.dumps(record, allow_nan=False).encode())
        except (OSError, RuntimeError) as error:
            raise DataError(f"cannot write the checkpoint {self.path}: {reason(error)}") from error

    def load(self) -> State | None:
        """The state saved there; None when there is no file.

        Raises:
            DataError: it is not a checkpoint, or one of another search.
        """
        if not self.path.exists():
            return None
        try:
            record = json.loads(self.path.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read the checkpoint {self.path}: {reason(error)}") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise DataError(f"{self.path} is not a checkpoint of this version ({FORMAT!r})")
        self._refuse_others(record["identity"])
        return State.of(record["state"])

    def _refuse_others(self, found: Mapping[str, Any]) -> None:
        """Raise for a checkpoint of other variables, another model or another seed."""
        here = json.loads(json.dumps(dict(self.identity)))
        other = [key for key in here.keys() | found.keys() if here.get(key) != found.get(key)]
        if not other:
            return
        key = sorted(other)[0]
        raise DataError(
            f"the checkpoint {self.path} is of another search: its {key} is {_short(found.get(key))}, "
            f"here it is {_short(here.get(key))}; give another file or remove this one"
        )


def _short(value: Any) -> str:
    """A value for a sentence."""
    text = json.dumps(value)
    if isinstance(value, list):
        return f"a list of {len(value)} ({text[:40]}{'…' if len(text) > 40 else ''})"
    return text if len(text) <= 60 else f"{text[:60]}…"
