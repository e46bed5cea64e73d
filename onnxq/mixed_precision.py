"""More bits for the layers that hurt most, until the network's output keeps a given SQNR.

Each attempt is compiled and measured as it will be deployed. While it falls short, `onnxq.bit_allocation` says from the noise of
each layer alone which of them need more bits, and the next attempt aims a little higher than the one before.

A quarter of the samples is held back from the attempts to measure them by: rounding fits what it sees, with few bits all the
more, and the layers that fit best would seem to need the fewest. With the widths found, all samples make the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from onnxq.bit_allocation import Allocation, NoisyLayer, allocate
from onnxq.data import Part
from onnxq.errors import ModelError, UsageError
from onnxq.pipeline import Context, Pipeline
from onnxq.precision import Bits, parse_override
from onnxq.program import Program, Unit
from onnxq.scheme import BYTE
from onnxq.second_attempt import better_attempt
from onnxq.selection import matching_nodes

if TYPE_CHECKING:
    from onnxq.attempt import Attempt

OPTION = "raised"  # of the pass that takes what is found
FIRST_MARGIN_DB = (
    0.25  # that a correction aims above the floor if the one before fell short; twice as much each time
)
DIVIDED = 512  # samples, unless their number is chosen
HELD_BACK = 4  # one sample in so many
FEW = 16  # samples of which none can be spared
MOST_DB = 60.0  # of noise above the signal, of an output that holds NaN or infinity too


@dataclass(frozen=True)
class Try:
    """What one attempt came to.

    Attributes:
        sqnr_db: of the network's main output on samples held back; None without noise.
        bytes: of the file.
    """

    sqnr_db: float | None
    bytes: int


@dataclass(frozen=True)
class Floor:
    """What it took to keep the SQNR asked for.

    Attributes:
        min_sqnr_db: what was asked for.
        tries: the attempts in order; the last one keeps it.
        raised: widths of the layers that got more bits, None for float, by name.
    """

    min_sqnr_db: float
    tries: Sequence[Try]
    raised: Mapping[str, Bits | None]

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {
            "min_sqnr_db": self.min_sqnr_db,
            "tries": [{"sqnr_db": t.sqnr_db, "bytes": t.bytes} for t in self.tries],
            "raised": {name: _text(bits) for name, bits in self.raised.items()},
        }


def check_floor(steps: Pipeline, min_sqnr: float, *, has_data: bool, checkpoint: object) -> None:
    """Refuse a floor that cannot be kept or measured.

    Raises:
        UsageError: the SQNR is no number, there are no samples, or the pipeline's layers have no widths to raise.
    """
    if not math.isfinite(min_sqnr):
        raise UsageError(f"min-sqnr is a number of dB, not {min_sqnr}")
    if not has_data:
        raise UsageError("min-sqnr is measured on calibration samples; give some with --calib")
    if not any(OPTION in p.options() for p in steps.passes):
        raise UsageError(f"min-sqnr needs integer activations, as in --bits w4a8; the pipeline is '{steps}'")
    if checkpoint is not None:
        raise UsageError(
            "a checkpoint keeps one search, and min-sqnr compiles several times; leave one of them out"
        )


def keep_floor(
    make: Callable[..., Attempt], steps: Pipeline, ctx: Context, min_sqnr: float, *, insist: bool
) -> tuple[Attempt, Floor]:
    """A compile whose output keeps the floor.

    Args:
        make: runs a pipeline in a context; with `speed=False` it times nothing.
        steps: the pipeline as it was asked for.
        ctx: of the result; there are calibration samples.
        min_sqnr: of the network's main output, dB.
        insist: whether what the pipeline leaves open may be chosen thoroughly before layers get more bits.

    Raises:
        ModelError: the output does not keep it whatever layers are raised, or cannot be measured.
        DataError: the samples cannot be read.
    """
    trial, run = _trial(ctx), partial(make, speed=False)
    first = trial.named("attempt 1")
    made = better_attempt(run, steps, first, min_sqnr)[0] if insist else run(steps, first)
    steps = made.steps
    raised: Allocation = {}
    tries: list[Try] = []
    while True:
        reached = _sqnr_db(made)
        tries.append(Try(reached, made.size))
        if _keeps(reached, min_sqnr):
            done = make(made.steps, ctx)
            if reached is None or _keeps(_sqnr_db(done), min_sqnr):
                return done, Floor(min_sqnr, tries, raised)
        assert reached is not None
        fixed = _fixed(made)
        margin = FIRST_MARGIN_DB * (2 ** (len(tries) - 1) - 1)
        aim = max(min_sqnr + margin, reached + FIRST_MARGIN_DB)
        found = allocate(_layers(made, fixed), _power(reached), _power(aim), ctx.target.packed)
        more = raised | _by_reader(made.program, found)
        if more == raised:
            raise ModelError(_out_of_reach(reached, min_sqnr, bool(fixed)))
        raised = more
        del made  # before the next one takes as much memory
        chosen = steps.with_option(OPTION, _texts(raised))
        made = run(chosen, trial.named(f"attempt {len(tries) + 1}"))


def _trial(ctx: Context) -> Context:
    """The context of attempts: layers are measured, on samples held back where there are enough. Only results warn."""
    assert ctx.data is not None
    measuring = replace(ctx, layers=True, alone_seconds=math.inf, warn=lambda sentence: None)
    if sum(1 for _ in ctx.data.batches(1, ctx.up_to(FEW * ctx.data.least))) < FEW:
        return measuring
    seen, held = (Part(ctx.data, ctx.up_to(DIVIDED), HELD_BACK, held=held) for held in (False, True))
    return replace(measuring, data=seen, held=held)


def _keeps(reached: float | None, min_sqnr: float) -> bool:
    return reached is None or reached >= min_sqnr


def _out_of_reach(reached: float, min_sqnr: float, has_fixed: bool) -> str:
    layers = "every layer that no override fixes" if has_fixed else "every layer"
    return f"the output keeps {reached:.1f} dB with {layers} in float that adds noise, less than min-sqnr={min_sqnr:g}"


def _fixed(made: Attempt) -> set[str]:
    """Names of the nodes whose bits overrides say."""
    reference = made.program.reference
    assert reference is not None
    planned = replace(reference, source=made.program.source)
    patterns = [parse_override(text)[0] for text in made.steps.values("override")]
    return set[str]().union(*(matching_nodes(planned, pattern, "override") for pattern in patterns))


def _layers(made: Attempt, fixed: set[str]) -> dict[str, NoisyLayer]:
    """The layers that add noise, but the fixed ones."""
    noise, program = made.verification.layers, made.program
    alone = (
        {} if noise is None else {n: db for n, db in noise.alone.items() if db is not None and n not in fixed}
    )
    readers = _readers(program)
    found = {}
    for name, ratio in alone.items():
        unit = program.units[name]
        weights = program.plan.get(unit.weight or "")
        groups = _own_groups(program, unit)
        kept = any(reader.name in fixed for group in groups for reader in readers.get(group, ()))
        widths = [BYTE] if kept else [program.plan[group].scheme.bits for group in groups if group in readers]
        found[name] = NoisyLayer(
            _power(ratio),
            Bits(BYTE if weights is None else weights.scheme.bits, min(widths, default=BYTE)),
            0 if weights is None or weights.codes is None else weights.codes.size,
        )
    return found


def _by_reader(program: Program, found: Allocation) -> Allocation:
    """What to ask of each layer: activations have the width of what multiplies them, so readers are asked for a layer's own."""
    widths = {name: bits for name, bits in found.items() if bits is not None}
    wanted: dict[str, int] = {}
    for name, bits in widths.items():
        for group in _own_groups(program, program.units[name]):
            wanted[group] = max(wanted.get(group, 0), bits.activations or BYTE)
    asked: Allocation = {name: None for name, bits in found.items() if bits is None}
    for unit in program.units.values():
        if unit.is_layout or unit.name in asked:
            continue
        decisions = [program.plan[tensor] for tensor in unit.multiplied if tensor in program.plan]
        now = min((d.scheme.bits for d in decisions), default=BYTE)
        activations = max([now, *(wanted.get(d.group, 0) for d in decisions)])
        weights = program.plan.get(unit.weight or "")
        old = Bits(BYTE if weights is None else weights.scheme.bits, now)
        new = Bits(widths[unit.name].weights if unit.name in widths else old.weights, activations)
        if new != old:
            asked[unit.name] = new
    return asked


def _own_groups(program: Program, unit: Unit) -> set[str]:
    """Groups of the activations whose noise counts as the unit's: what it writes, and what it reads that no unit writes."""
    written = {tensor for other in program.units.values() for tensor in other.outputs}
    own = [*unit.outputs, *(tensor for tensor in unit.inputs if tensor not in written)]
    return {program.plan[tensor].group for tensor in own if tensor in program.plan}


def _readers(program: Program) -> dict[str, list[Unit]]:
    """The units that multiply a tensor of each group."""
    found: dict[str, list[Unit]] = {}
    for unit in program.units.values():
        for tensor in unit.multiplied if not unit.is_layout else ():
            if tensor in program.plan:
                found.setdefault(program.plan[tensor].group, []).append(unit)
    return found


def _sqnr_db(made: Attempt) -> float | None:
    difference = made.verification.difference
    if difference is None or difference.main is None:
        raise ModelError("the outputs of this model cannot be compared with float here, as min-sqnr asks")
    return difference.main.sqnr_db


def _power(sqnr_db: float) -> float:
    """Of noise, against the signal."""
    return float(10.0 ** (-max(sqnr_db, -MOST_DB) / 10.0))


def _texts(raised: Mapping[str, Bits | None]) -> tuple[str, ...]:
    return tuple(f"{name}={_text(bits)}" for name, bits in raised.items())


def _text(bits: Bits | None) -> str:
    return "float" if bits is None else str(bits)
