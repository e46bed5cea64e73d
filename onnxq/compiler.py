"""`compile_model`: the one road under the command line and the API, from model to verified model."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx

from onnxq.calibration.table import CalibrationTable
from onnxq.data import Dataset, ImageOptions, input_specs, open_data
from onnxq.errors import DataError, UsageError
from onnxq.model.load import load_model, model_digest
from onnxq.model.prepare import prepare
from onnxq.model.write import write_model
from onnxq.pipeline import Context, Pipeline, Progress, Step, no_progress
from onnxq.presets import WITHOUT_DATA, preset_pipeline
from onnxq.program import Program
from onnxq.report.model import Report
from onnxq.scheme import QuantScheme
from onnxq.target import find_target
from onnxq.verify import Verification, verify

Source = str | Path | Mapping[str, Any] | Callable[..., Any] | Dataset
PACKAGES = ("onnxq", "onnx", "onnxruntime", "onnx-graphsurgeon", "numpy", "scipy")


@dataclass(frozen=True, eq=False)
class CompiledModel:
    """A model ready to deploy, and what is known about it.

    Attributes:
        model: the ONNX model.
        report: what was done and measured.
        table: the calibration statistics, None without data.
    """

    model: onnx.ModelProto
    report: Report
    table: CalibrationTable | None

    def save(self, path: str | Path) -> None:
        """Write the model atomically; weights go to PATH.data when it would pass 2 GB.

        Raises:
            ModelError: the file cannot be written; an existing one is untouched.
        """
        write_model(self.model, path)


@dataclass
class _Clock:
    """Wall time of each stage, in seconds."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def compile_model(
    model: str | Path | onnx.ModelProto,
    calibration: Source | None = None,
    *,
    output: str | Path | None = None,
    samples: int = 512,
    preset: str = "int8",
    pipeline: Pipeline | str | None = None,
    weights: str | QuantScheme | None = None,
    activations: str | QuantScheme | None = None,
    ranges: str | None = None,
    skip: Sequence[str] = (),
    form: str | None = None,
    target: str = "ort-cpu",
    images: ImageOptions | None = None,
    load_calibration: str | Path | None = None,
    save_calibration: str | Path | None = None,
    seed: int = 0,
    threads: int = 0,
    provider: str = "CPUExecutionProvider",
    speed: bool = True,
    progress: Progress = no_progress,
) -> CompiledModel:
    """Quantize a model and prove that the result loads and runs.

    Args:
        model: a path or a model in memory (which is not changed).
        calibration: samples: a path as for `--calib`, a dict of arrays by input name, a function that yields feeds, or a
            Dataset; None quantizes what needs no activation ranges.
        output: where to write; nothing is written when None.
        samples: calibration samples to use, evenly spaced over the source.
        preset: named pipeline; ignored for `pipeline`.
        pipeline: passes to run instead of a preset.
        weights, activations: schemes such as int8:channel and uint8; None for the pipeline's own.
        ranges: range method of activations: minmax, percentile, mse, entropy, aciq; None for the pipeline's own.
        skip: node names or op types to leave in float; * and ? match as in file names.
        form: `qdq` or `integer`; None for the preset's, qdq.
        target: runtime to compile for.
        images: how to read a directory of images.
        load_calibration, save_calibration: a table of statistics to start from, and where to keep the one made.
        seed: of every random choice.
        threads: intra-op threads of sessions, 0 for onnxruntime's default.
        provider: onnxruntime execution provider for calibration and checks.
        speed: whether to time the result against float.
        progress: called with a label, work done and total.

    Returns:
        The compiled model and its report.

    Raises:
        UsageError: an unknown or contradictory option.
        ModelError: the model cannot be read, prepared, run or written.
        DataError: the samples cannot be read or do not fit.
    """
    clock, goal = _Clock(), find_target(target)
    has_data = calibration is not None or load_calibration is not None
    steps = _pipeline(pipeline, preset, form, has_data)
    steps = _with_options(
        steps, has_data, weights=weights, activations=activations, ranges=ranges, skip=tuple(skip)
    )
    with clock.stage("load"):
        progress("loading", 0, None)
        original = model if isinstance(model, onnx.ModelProto) else load_model(model)
        prepared, notes = prepare(original, goal.min_opset)
        data = _open(calibration, prepared, images)
        digest = model_digest(original)
        program = Program.from_model(prepared)
        table = _load_table(load_calibration, digest, data, samples)
        if table is not None:
            program.statistics.update(table.tensors)
    warnings: list[str] = []
    if pipeline is None and not has_data and preset in WITHOUT_DATA:
        notes = (
            *notes,
            f"no calibration data: compiled with preset {WITHOUT_DATA[preset]!r}, activations keep no fixed range",
        )
    context = Context(data, samples, goal, seed, threads, provider, progress, warnings.append)
    ran = steps.run(program, context)
    for step in ran:
        clock.add(step.name, step.seconds)
    made = _table(program, digest, data, samples, table)
    with clock.stage("emit"):
        compiled = program.to_model()
        _stamp(compiled, steps, seed, made)
    with clock.stage("verify"):
        progress("verifying", 0, None)
        verification = verify(prepared, compiled, program, context, speed=speed)
    with clock.stage("write"):
        if save_calibration is not None:
            _save_table(made, save_calibration)
        if output is not None:
            write_model(compiled, output)
    report = _report(
        model,
        output,
        original,
        compiled,
        steps,
        ran,
        program,
        made,
        data,
        verification,
        clock,
        notes,
        warnings,
        goal.name,
    )
    return CompiledModel(compiled, report, made)


def _open(source: Source | None, model: onnx.ModelProto, images: ImageOptions | None) -> Dataset | None:
    if source is None or isinstance(source, Dataset):
        return source
    return open_data(source, input_specs(model), images=images or ImageOptions())


def _pipeline(pipeline: Pipeline | str | None, preset: str, form: str | None, has_data: bool) -> Pipeline:
    if pipeline is None:
        return Pipeline.parse(preset_pipeline(preset, form, data=has_data))
    if form is not None:
        raise UsageError("a pipeline names its own emission pass; leave the format out")
    return Pipeline.parse(pipeline) if isinstance(pipeline, str) else pipeline


def _with_options(steps: Pipeline, has_data: bool, **options: object) -> Pipeline:
    """The pipeline with the given options set; those that only make sense with data are refused without."""
    for name, value in options.items():
        if value is None or value == ():
            continue
        if name in ("activations", "ranges") and not has_data:
            raise UsageError(f"{name} can only be chosen with calibration data; give some with --calib")
        steps = steps.with_option(name, value)
    return steps


def _load_table(
    path: str | Path | None, digest: str, data: Dataset | None, samples: int
) -> CalibrationTable | None:
    if path is None:
        return None
    table = CalibrationTable.load(path)
    table.check(digest, data.digest(samples) if data is not None else None)
    return table


def _table(
    program: Program, digest: str, data: Dataset | None, samples: int, loaded: CalibrationTable | None
) -> CalibrationTable | None:
    if not program.statistics:
        return None
    if data is None:
        return loaded
    count = data.count()
    used = samples if count is None else min(count, samples)
    return CalibrationTable(digest, data.digest(samples), used, dict(program.statistics))


def _save_table(table: CalibrationTable | None, path: str | Path) -> None:
    if table is None:
        raise DataError("there are no calibration statistics to save: the pipeline gathered none")
    table.save(path)


def versions() -> dict[str, str]:
    """Versions of onnxq and the packages it stands on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _stamp(model: onnx.ModelProto, steps: Pipeline, seed: int, table: CalibrationTable | None) -> None:
    """Say in the model's metadata how it was made."""
    made = {"pipeline": str(steps), "seed": str(seed), **{f"version.{k}": v for k, v in versions().items()}}
    if table is not None:
        made |= {"calibration.digest": table.data_digest, "calibration.samples": str(table.samples)}
    kept = [(p.key, p.value) for p in model.metadata_props if not p.key.startswith("onnxq.")]
    del model.metadata_props[:]
    for key, value in (*kept, *((f"onnxq.{k}", v) for k, v in made.items())):
        model.metadata_props.add(key=key, value=value)


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _calibration(table: CalibrationTable | None, data: Dataset | None) -> dict[str, Any] | None:
    if table is None:
        return None
    source = data.source if data is not None else None
    return {"source": source, "samples": table.samples, "digest": table.data_digest}


def _report(
    model: str | Path | onnx.ModelProto,
    output: str | Path | None,
    original: onnx.ModelProto,
    compiled: onnx.ModelProto,
    steps: Pipeline,
    ran: Sequence[Step],
    program: Program,
    table: CalibrationTable | None,
    data: Dataset | None,
    verification: Verification,
    clock: _Clock,
    notes: Sequence[str],
    warnings: Sequence[str],
    target: str,
) -> Report:
    return Report(
        model="" if isinstance(model, onnx.ModelProto) else str(model),
        output="" if output is None else str(output),
        target=target,
        pipeline=str(steps),
        calibration=_calibration(table, data),
        nodes=verification.nodes,
        coverage=verification.coverage,
        difference=verification.difference,
        speed=verification.speed,
        float_bytes=original.ByteSize(),
        quantized_bytes=compiled.ByteSize(),
        seconds=clock.seconds,
        peak_rss_bytes=peak_rss_bytes(),
        versions=versions(),
        notes=notes,
        warnings=(*warnings, *(data.warnings() if data is not None else ()), *verification.warnings),
        facts={step.name: step.result.facts for step in ran if step.result.facts},
    )
