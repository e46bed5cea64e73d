"""Passes and the pipeline that runs them.

A pass is a frozen dataclass whose fields are its options. Pipeline text names passes in order, separated by
white space, each with its options: `fold-batchnorm annotate:weights=int8:channel,skip=head.*|stem`. A
backslash makes a comma, a bar or a backslash part of a value; words with white space, quotes or backslashes
are quoted.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import time
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from onnxq.data import Dataset
from onnxq.errors import OnnxqError, UsageError, unknown
from onnxq.packing import needed_opset
from onnxq.program import Program
from onnxq.scheme import BYTE, QuantScheme
from onnxq.target import ORT_CPU, Target

Progress = Callable[[str, int, int | None], None]
BYTE_SAMPLES = 128  # for statistics at 8 bits, which are no better with more, see bench/results/samples.json
FEW_BIT_SAMPLES = 512


def no_progress(label: str, done: int, total: int | None) -> None:
    """A listener that listens to nothing."""


def counter(label: str, progress: Progress, data: Dataset, limit: int | None) -> Callable[[int], None]:
    """Shows how many samples of a source are done."""
    count = data.count()
    total = limit if count is None else min(count, limit or count)
    progress(label, 0, total)
    return lambda done: progress(label, done, total)


@dataclass(frozen=True)
class Context:
    """What passes may read and not change.

    Attributes:
        data: calibration samples, None when compiling without data.
        samples: how many of them to use; None leaves that to the passes.
        enough: how many statistics are of where `samples` leaves it open.
        target: the runtime to emit for.
        seed: of every random choice.
        threads: intra-op threads of sessions, 0 for the runtime's default.
        provider: execution provider of sessions.
        progress: called with a label, the work done and the total (None when unknown).
        warn: called with one sentence for the user.
        layers: whether the noise of each layer will be measured, for which the float model is kept.
        alone_seconds: time for that of layers alone, after which no further one is measured.
        held: samples that passes do not see, to judge the result by; None to judge it by the calibration samples.
    """

    data: Dataset | None = None
    samples: int | None = None
    enough: int = BYTE_SAMPLES
    target: Target = ORT_CPU
    seed: int = 0
    threads: int = 0
    provider: str = "CPUExecutionProvider"
    progress: Progress = no_progress
    warn: Callable[[str], None] = lambda sentence: None
    layers: bool = False
    alone_seconds: float = 20.0
    held: Dataset | None = None

    @property
    def judged(self) -> Dataset | None:
        """The samples that tell how good a result is."""
        return self.data if self.held is None else self.held

    @property
    def calibrated(self) -> int:
        """Samples that statistics are gathered from, where there are as many."""
        return self.enough if self.samples is None else self.samples

    def up_to(self, wanted: int) -> int:
        """Samples for a pass that wants so many: no more than are to be used, and no less than the model takes at once."""
        least = 1 if self.data is None else self.data.least
        return max(wanted if self.samples is None else min(wanted, self.samples), least)

    def named(self, name: str) -> Context:
        """A context whose progress says what it is of."""
        return dataclasses.replace(
            self, progress=lambda label, *counts: self.progress(f"{name}: {label}", *counts)
        )

    def rng(self) -> np.random.Generator:
        """A fresh generator from the seed."""
        return np.random.default_rng(self.seed)


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        changed: number of sites changed.
        skipped: reason for each site (a node or tensor name) that was left.
        facts: figures for the report, JSON-ready.
    """

    changed: int = 0
    skipped: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes: frozen dataclasses whose fields are their options, each with a default."""

    name: ClassVar[str]

    @abstractmethod
    def run(self, program: Program, ctx: Context) -> PassResult:
        """Change the program in place; say what was changed and why the rest was left."""

    def stored_bits(self) -> frozenset[int]:
        """Widths at which the pass may have weights stored; the model is raised to an operator set that holds them."""
        return frozenset()

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Option names with their defaults, in order."""
        return {f.name: f.default for f in dataclasses.fields(cls)}

    def __str__(self) -> str:
        changed = [
            f"{f.name}={_print_value(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return self.name + (f":{','.join(changed)}" if changed else "")


@dataclass(frozen=True)
class Step:
    """One pass as it ran: its result and its time in seconds."""

    spec: str
    result: PassResult
    seconds: float

    @property
    def name(self) -> str:
        """Name of the pass."""
        return self.spec.partition(":")[0]


@dataclass(frozen=True)
class Pipeline:
    """Passes in order.

    >>> str(Pipeline.parse("fold-constants annotate:weights=int8:tensor,skip=head.*"))
    'fold-constants annotate:weights=int8,skip=head.*'
    """

    passes: tuple[Pass, ...]

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read pipeline text.

        Raises:
            UsageError: an unknown pass or option, or a value of the wrong type.
        """
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise UsageError(f"cannot read the pipeline {text!r}: {error}") from error
        return cls(tuple(parse_pass(word) for word in words))

    def __str__(self) -> str:
        words = [str(p) for p in self.passes]
        return " ".join(shlex.quote(w) if re.search(r"[\s'\"\\]", w) else w for w in words)

    def with_option(self, option: str, value: object, *, needed: bool = True) -> Pipeline:
        """A pipeline in which every pass that has the option takes the value.

        Raises:
            UsageError: no pass of the pipeline has the option and it is needed.
        """
        if needed and not any(option in p.options() for p in self.passes):
            raise UsageError(f"no pass of the pipeline '{self}' has the option {option!r}")
        return Pipeline(
            tuple(_replace(p, option, value) if option in p.options() else p for p in self.passes)
        )

    def values(self, option: str) -> list[Any]:
        """What the passes that have the option take for it, in order; the parts of those that take several."""
        found = [getattr(p, option) for p in self.passes if option in p.options()]
        return [part for value in found for part in (value if isinstance(value, tuple) else (value,))]

    def opset(self, target: Target) -> int:
        """The oldest operator set that can hold what the passes write for a target."""
        widths = frozenset[int]().union(*(p.stored_bits() for p in self.passes))
        return max(target.min_opset, needed_opset(widths, target.packed))

    @property
    def fewest_bits(self) -> int:
        """The smallest width of codes that a pass asks for."""
        widths = {bits for p in self.passes for bits in p.stored_bits()}
        widths |= {scheme.bits for scheme in self.values("activations")}
        return min(widths, default=BYTE)

    def samples(self) -> int:
        """Calibration samples that statistics should be of: few bits take more."""
        return FEW_BIT_SAMPLES if self.fewest_bits < BYTE else BYTE_SAMPLES

    def run(self, program: Program, ctx: Context) -> tuple[Step, ...]:
        """Run all passes on the program; times each and names the culprit of a failure.

        Raises:
            OnnxqError: the first failing pass, as "pass 3/9 (lapq) failed: …".
        """
        return tuple(self._steps(program, ctx))

    def _steps(self, program: Program, ctx: Context) -> Iterator[Step]:
        total = len(self.passes)
        for index, step in enumerate(self.passes, 1):
            ctx.progress(step.name, 0, None)
            start = time.perf_counter()
            try:
                result = step.run(program, ctx)
            except UsageError:
                raise
            except OnnxqError as error:
                raise type(error)(f"pass {index}/{total} ({step.name}) failed: {error}") from error
            yield Step(str(step), result, time.perf_counter() - start)


def parse_pass(word: str) -> Pass:
    """Read one pass with its options, e.g. `annotate:weights=int8:tensor,skip=a|b`.

    Raises:
        UsageError: an unknown pass or option, or a value of the wrong type.
    """
    from onnxq.registry import find_pass

    name, _, text = word.partition(":")
    cls = find_pass(name)
    values: dict[str, object] = {}
    for assignment in filter(None, _split(text, ",")):
        option, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f"option {assignment!r} of pass {name!r} has no value; write {option}=VALUE")
        if option in values:
            raise UsageError(f"option {option!r} of pass {name!r} is given twice")
        values[option] = parse_option(cls, option, value)
    return make_pass(cls, values)


def make_pass(cls: type[Pass], values: Mapping[str, object]) -> Pass:
    """A pass with the given options; unknown ones are refused.

    Raises:
        UsageError: the pass has no such option.
    """
    for option in values:
        if option not in cls.options():
            raise unknown("option", option, cls.options(), where=f" of pass {cls.name!r}")
    return cls(**values)


def parse_option(cls: type[Pass], option: str, value: str) -> object:
    """The text of an option as its field's type: bool, int, float, str, QuantScheme, or tuple of str (a|b).

    Raises:
        UsageError: the pass has no such option, or the text is not of its type.
    """
    if option not in cls.options():
        raise unknown("option", option, cls.options(), where=f" of pass {cls.name!r}")
    try:
        return _parse_value(typing.get_type_hints(cls)[option], value)
    except (ValueError, UsageError) as error:
        raise UsageError(f"option {option!r} of pass {cls.name!r}: {error}") from error


def _parse_value(kind: Any, text: str) -> object:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        options = [k for k in typing.get_args(kind) if k is not types.NoneType]
        return None if text in ("", "none") else _parse_value(options[0], text)
    if typing.get_origin(kind) is tuple:
        return tuple(_unescape(item) for item in _split(text, "|") if item)
    text = _unescape(text)
    if typing.get_origin(kind) is typing.Literal:
        if text not in typing.get_args(kind):
            raise unknown("value", text, typing.get_args(kind))
        return text
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"{text!r} is neither true nor false")
        return text == "true"
    if kind is QuantScheme:
        return QuantScheme.parse(text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"{text!r} is no {'whole ' if kind is int else ''}number") from None
    return text


def _print_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return "|".join(map(_escape, value))
    return _escape(str(value))


def _split(text: str, separator: str) -> list[str]:
    """Parts between separators that no backslash precedes; backslashes stay."""
    parts = [""]
    for token in re.findall(r"\\.|.", text, re.DOTALL):
        if token == separator:
            parts.append("")
        else:
            parts[-1] += token
    return parts


def _escape(value: str) -> str:
    return re.sub(r"([\\,|])", r"\\\1", value)


def _unescape(text: str) -> str:
    return re.sub(r"\\([\\,|])", r"\1", text)


def _replace(step: Pass, option: str, value: object) -> Pass:
    parsed = parse_option(type(step), option, value) if isinstance(value, str) else value
    return dataclasses.replace(step, **{option: parsed})
