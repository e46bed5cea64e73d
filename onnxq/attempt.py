"""One attempt at a compile: a pipeline run from the prepared model to an emitted one, and the proof that that is sound."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import onnx

from onnxq.calibration.table import CalibrationTable
from onnxq.data import Dataset
from onnxq.memory import give_back
from onnxq.model.disk import DataFile, Spool
from onnxq.model.load import model_digest
from onnxq.model.skeleton import model_bytes
from onnxq.model.tensors import data_files
from onnxq.pipeline import Context, Pipeline, Step
from onnxq.program import Program
from onnxq.provenance import stamp
from onnxq.verify import Verification, verify

LARGE = 32 << 20  # bytes of a model whose weights are worth a look for what is not used any more


@dataclass
class Clock:
    """Wall time of each stage, in seconds."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


@dataclass(frozen=True)
class Original:
    """What is remembered of the model as it was read, whose weights need not be held beside those of the prepared one.

    Attributes:
        size: bytes of its file.
        files: that hold its data.
        typed: inner tensors whose types it states.
        digest: None where neither samples nor a table of statistics ask for it.
    """

    size: int
    files: frozenset[DataFile]
    typed: frozenset[str]
    digest: str | None

    @classmethod
    def of(cls, model: onnx.ModelProto, has_digest: bool) -> Original:
        typed = frozenset(info.name for info in model.graph.value_info)
        digest = model_digest(model) if has_digest else None
        return cls(model_bytes(model), data_files(model), typed, digest)


@dataclass(frozen=True, eq=False)
class Job:
    """What attempts start from.

    Attributes:
        original: the model as it was read.
        prepared: what passes start from.
        notes: what preparing it has to say.
        data: calibration samples.
        table: statistics to start from.
        spool: takes what passes make of a model whose weights are too many for memory.
    """

    original: Original
    prepared: onnx.ModelProto
    notes: Sequence[str]
    data: Dataset | None
    table: CalibrationTable | None
    spool: Spool | None

    def program(self) -> Program:
        """A program without a plan."""
        made = Program.from_model(self.prepared)
        made.spool = self.spool
        if self.table is not None:
            made.statistics.update(self.table.tensors)
        return made


@dataclass(frozen=True, eq=False)
class Attempt:
    """What one pipeline made.

    Attributes:
        steps: the pipeline.
        ran: its passes as they ran.
        program: emitted.
        model: what it became.
        table: calibration statistics, None without any.
        deployed: losses of the model, by the pass that asked for them.
        verification: what the checks found.
    """

    steps: Pipeline
    ran: Sequence[Step]
    program: Program
    model: onnx.ModelProto
    table: CalibrationTable | None
    deployed: dict[str, float]
    verification: Verification

    @property
    def size(self) -> int:
        """Bytes of the model's file."""
        return model_bytes(self.model)


def attempt(job: Job, steps: Pipeline, ctx: Context, clock: Clock, *, speed: bool) -> Attempt:
    """Run a pipeline, emit the model and verify it.

    Args:
        job: stays as it is.
        clock: takes the time of each pass and stage.
        speed: whether to time the result against float.

    Raises:
        OnnxqError: a pass fails, or the model is not sound.
    """
    program = job.program()
    ran = steps.run(program, ctx)
    for step in ran:
        clock.add(step.name, step.seconds)
    with clock.stage("emit"):
        table = _table(job, program, ctx)
        model = program.to_model()
        slim(model, job.original.typed, job.prepared)
        stamp(model, str(_reproducible(steps)), ctx.seed, table)
    if job.original.size > LARGE:
        give_back()
    with clock.stage("verify"):
        deployed = {name: measure(model) for name, measure in program.deployed.items()}
        ctx.progress("verifying", 0, None)
        verification = verify(job.prepared, model, program, ctx, speed=speed)
    return Attempt(steps, ran, program, model, table, deployed, verification)


def _reproducible(steps: Pipeline) -> Pipeline:
    """The pipeline without what has no influence on the result: where a search ran and kept its state."""
    return steps.with_option("cluster", None, needed=False).with_option("checkpoint", None, needed=False)


def slim(compiled: onnx.ModelProto, typed: Collection[str], prepared: onnx.ModelProto) -> None:
    """Take out what runtimes do not need and small files feel: types of inner tensors but those that the user's model states, and
    names of nodes that it does not have."""
    kept = [info for info in compiled.graph.value_info if info.name in typed]
    del compiled.graph.value_info[:]
    compiled.graph.value_info.extend(kept)
    named = {node.name for node in prepared.graph.node}
    for node in compiled.graph.node:
        if node.name not in named:
            node.ClearField("name")


def _table(job: Job, program: Program, ctx: Context) -> CalibrationTable | None:
    if not program.statistics:
        return None
    if ctx.data is None:
        return job.table
    count = ctx.data.count()
    used = ctx.calibrated if count is None else min(count, ctx.calibrated)
    assert job.original.digest is not None
    return CalibrationTable(
        job.original.digest, ctx.data.digest(ctx.calibrated), used, dict(program.statistics)
    )
