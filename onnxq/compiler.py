"""`compile_model`: the one road under the command line and the API, from model to verified model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from onnxq.attempt import Clock, Job, Original, attempt
from onnxq.calibration.table import CalibrationTable
from onnxq.choices import Choices
from onnxq.data import Dataset, ImageOptions, input_specs, open_data, sources
from onnxq.errors import DataError, UsageError
from onnxq.measure.metrics import Accuracy, Evaluation, evaluate_model, find_metric
from onnxq.memory import peak_rss_bytes
from onnxq.model.disk import DataFile, Spool
from onnxq.model.load import load_model
from onnxq.model.prepare import prepare
from onnxq.model.quantized import ALREADY, is_quantized
from onnxq.model.session import CPU
from onnxq.model.skeleton import model_bytes
from onnxq.model.write import write_model
from onnxq.pipeline import Context, Pipeline, Progress, no_progress
from onnxq.provenance import versions
from onnxq.report.model import Report
from onnxq.scheme import QuantScheme
from onnxq.second_attempt import better_attempt
from onnxq.sizes import parse_bytes
from onnxq.target import find_target

METRIC = "top1"  # of test samples, where none is named
Source = sources.Source | Dataset


@dataclass(frozen=True, eq=False)
class CompiledModel:
    """A model ready to deploy, and what is known about it.

    Attributes:
        model: the ONNX model.
        report: what was done and measured.
        table: the calibration statistics, None without data.
        files: that hold weights of a model too large for memory, temporary ones and the user's; only what `save` writes can then
            be read by others.
    """

    model: onnx.ModelProto
    report: Report
    table: CalibrationTable | None
    files: frozenset[DataFile] = frozenset()

    def save(self, path: str | Path, progress: Progress = no_progress) -> None:
        """Write the model atomically; weights go to PATH.data when it would pass 2 GB, or they were too many for memory.

        Raises:
            ModelError: the file cannot be written; an existing one is untouched.
        """
        write_model(self.model, path, spared=self.files, progress=_megabytes(progress))


def compile_model(
    model: str | Path | onnx.ModelProto,
    calibration: Source | None = None,
    *,
    output: str | Path | None = None,
    samples: int | None = None,
    preset: str | None = None,
    pipeline: Pipeline | str | None = None,
    bits: str | None = None,
    weights: str | QuantScheme | None = None,
    activations: str | QuantScheme | None = None,
    override: Sequence[str] = (),
    first_last: str | None = None,
    elementwise: str | None = None,
    ranges: str | None = None,
    loss: str | None = None,
    search_budget: str | None = None,
    checkpoint: str | Path | None = None,
    multipoint: float | None = None,
    multipoint_error: float | None = None,
    multipoint_size: str | None = None,
    cluster: str | None = None,
    bias_correction: str | None = None,
    multipoint_form: str | None = None,
    skip: Sequence[str] = (),
    min_sqnr: float | None = None,
    form: str | None = None,
    target: str = "ort-cpu",
    images: ImageOptions | None = None,
    test: Source | None = None,
    metric: str | None = None,
    load_calibration: str | Path | None = None,
    save_calibration: str | Path | None = None,
    seed: int = 0,
    threads: int = 0,
    provider: str = CPU,
    speed: bool = True,
    layers: bool = False,
    scratch: str | Path | None = None,
    progress: Progress = no_progress,
) -> CompiledModel:
    """Quantize a model and prove that the result loads and runs.

    Args:
        model: a path or a model in memory (which is not changed).
        calibration: samples: a path as for `--calib`, a dict of arrays by input name, an array where there is one
            input, a list of feeds, a function that yields them, or a Dataset; None quantizes what needs no activation ranges.
        output: where to write; nothing is written when None.
        samples: calibration samples to use, evenly spaced over the source; None takes 128 for ranges at 8 bits, and up to 512
            for all else.
        preset: named pipeline, `int8` when left out.
        pipeline: passes to run instead of a preset.
        bits: widths of weights and activations, e.g. w8a8, w4a8, w4a4; w4 leaves activations in float. It refines the preset.
        weights, activations: schemes such as int4:channel and uint8 (or `float`), which refine `bits`.
        override: exceptions by node name or op type, e.g. layer1.*=w8a8 or head=float.
        first_last: width of the first and last layers: 8 for at least 8 bits (the default without `min_sqnr`), same (with it), or
            float.
        elementwise: width of activations that only additions, concatenations or pooling read: 8 (the default) or same.
        ranges: range method of activations: minmax, percentile, mse, entropy, aciq; or lapq, which searches all steps together by
            the network's loss; None for the pipeline's own.
        loss: of that search: auto, cross-entropy, kl, mse, cosine or FILE.py:FUNCTION.
        search_budget: what it may cost, as evaluations (200) or time (2m).
        checkpoint: file that keeps its state, to go on from.
        multipoint: give the channels that hurt most further points: this part more weights, e.g. 0.05.
        multipoint_error: instead, as many as bring the error of each channel's output below this part of its layer's power.
        multipoint_size: instead, as many as a file of this size holds, e.g. 400KB.
        cluster: where it evaluates the loss: local:N for N workers here (a script that asks for them needs the usual
            `if __name__ == "__main__":`), or the address of a Dask scheduler.
        multipoint_form: `fold` sums points up when the model is loaded, `rows` lets layers compute each and adds up
            their outputs; None for what the target takes.
        bias_correction: of what quantization does to means and spreads: deployed matches them in the network as it will run;
            output takes what weights do to means out of the biases; exact keeps means by a point of ones that the channels of a
            layer below 8 bits share; better is the one of deployed and output with less noise; none; auto (the default) is
            better below 8 bits, else output, and better there too where the network's output would be noisy.
        skip: node names or op types to leave in float; * and ? match as in file names.
        min_sqnr: give the layers that hurt most more bits than `bits`, or leave them in float, until the network's main output
            has this SQNR in dB; compiles several times, a quarter of the samples held back to judge by.
        form: `qdq` or `integer`; None for the preset's, qdq.
        target: runtime to compile for.
        images: how to read a directory of images.
        test: labelled samples, as `calibration`, on which float and the result are measured; all are taken.
        metric: of them: top1 (the default), top5, cross-entropy, mse or FILE.py:FUNCTION.
        load_calibration, save_calibration: a table of statistics to start from, and where to keep the one made.
        seed: of every random choice.
        threads: intra-op threads of sessions, 0 for onnxruntime's default.
        provider: onnxruntime execution provider for calibration, search and checks.
        speed: whether to time the result against float.
        layers: whether to measure the noise of each layer in the deployed network, and of each alone at the output (a few
            seconds, at most about 20).
        scratch: directory for a temporary file that takes the results of a model whose weights are too many for memory; None for
            that of `output`, or the system's.
        progress: called with a label, work done and total.

    Returns:
        The compiled model and its report.

    Raises:
        UsageError: an unknown or contradictory option.
        ModelError: the model cannot be read, prepared, run or written.
        DataError: the samples cannot be read or do not fit.
    """
    choices = Choices(
        preset=preset,
        pipeline=pipeline,
        form=form,
        target=target,
        bits=bits,
        weights=weights,
        activations=activations,
        override=override,
        first_last=first_last,
        elementwise=elementwise,
        ranges=ranges,
        loss=loss,
        search_budget=search_budget,
        checkpoint=checkpoint,
        cluster=cluster,
        bias_correction=bias_correction,
        skip=skip,
        min_sqnr=min_sqnr,
        multipoint=multipoint,
        multipoint_error=multipoint_error,
        multipoint_size=multipoint_size,
        multipoint_form=multipoint_form,
    )
    return compile_chosen(
        model,
        calibration,
        choices,
        output=output,
        samples=samples,
        images=images,
        test=test,
        metric=metric,
        load_calibration=load_calibration,
        save_calibration=save_calibration,
        seed=seed,
        threads=threads,
        provider=provider,
        speed=speed,
        layers=layers,
        scratch=scratch,
        progress=progress,
    )


def compile_chosen(
    model: str | Path | onnx.ModelProto,
    calibration: Source | None,
    choices: Choices,
    *,
    output: str | Path | None = None,
    samples: int | None = None,
    images: ImageOptions | None = None,
    test: Source | None = None,
    metric: str | None = None,
    load_calibration: str | Path | None = None,
    save_calibration: str | Path | None = None,
    seed: int = 0,
    threads: int = 0,
    provider: str = CPU,
    speed: bool = True,
    layers: bool = False,
    scratch: str | Path | None = None,
    progress: Progress = no_progress,
) -> CompiledModel:
    """`compile_model`, with all that shapes the pipeline in one value.

    Args: as `compile_model`.

    Raises:
        UsageError, ModelError, DataError: as `compile_model`.
    """
    clock, goal = Clock(), find_target(choices.target)
    metric = _metric(metric, test)
    has_data = calibration is not None or load_calibration is not None
    steps = choices.resolve(has_data)
    if choices.min_sqnr is not None and load_calibration is not None:
        raise UsageError(
            "min-sqnr holds samples back, which a table of statistics has seen; give samples with --calib alone"
        )
    warnings: list[str] = []
    with clock.stage("load"):
        progress("loading", 0, None)
        folder = scratch or (Path(output).parent if output is not None else None)
        job = _load(model, calibration, load_calibration, images, steps.opset(goal), folder)
        context = Context(
            data=job.data,
            samples=samples,
            enough=steps.samples() if job.table is None else job.table.samples,
            target=goal,
            seed=seed,
            threads=threads,
            provider=provider,
            progress=progress,
            warn=warnings.append,
            layers=layers,
        )
        _check_table(job, context)
        files = job.original.files | ({job.spool} if job.spool is not None else set())
    tests = _open(test, job.prepared, images)
    with clock.stage("evaluate"):  # first, so that samples or labels that do not fit are found at once
        before = _evaluate(job.prepared, tests, metric, context)
    floor, notes = None, list(job.notes)
    run = partial(attempt, job, clock=clock, speed=speed)
    if choices.min_sqnr is not None:
        from onnxq.mixed_precision import keep_floor

        # wider codes than those of the pipeline need no newer operator set, so that all attempts start from the same model
        made, floor = keep_floor(run, steps, context, choices.min_sqnr, insist=choices.may_insist)
    elif choices.may_insist:
        made, note = better_attempt(run, steps, context)
        notes += [] if note is None else [note]
    else:
        made = run(steps, context)
    compiled, table, verification = made.model, made.table, made.verification
    with clock.stage("evaluate"):
        accuracy = Accuracy.of(before, _evaluate(compiled, tests, metric, context), tests)
    with clock.stage("write"):
        if save_calibration is not None:
            _save_table(table, save_calibration)
        if output is not None:
            write_model(compiled, output, spared=files, progress=_megabytes(progress))
    if choices.falls_back(has_data):
        warnings.insert(
            0, f"there is no calibration data, so the pipeline is '{steps}': no activation has a fixed range"
        )
    warnings += _too_large(choices.multipoint_size, model_bytes(compiled))
    report = Report(
        model="" if isinstance(model, onnx.ModelProto) else str(model),
        output="" if output is None else str(output),
        target=goal.name,
        pipeline=str(made.steps),
        calibration=_calibration(table, job.data),
        steps=made.ran,
        nodes=verification.nodes,
        coverage=verification.coverage,
        difference=verification.difference,
        accuracy=accuracy,
        layers=verification.layers,
        speed=verification.speed,
        float_bytes=job.original.size,
        quantized_bytes=model_bytes(compiled),
        seconds=clock.seconds,
        peak_rss_bytes=peak_rss_bytes(),
        versions=versions(),
        notes=notes,
        deployed=made.deployed,
        floor=floor,
        warnings=(*dict.fromkeys(warnings), *_remarks(job.data), *_remarks(tests), *verification.warnings),
    )
    return CompiledModel(compiled, report, table, files)


def _metric(name: str | None, test: Source | None) -> str:
    """The metric of test samples; refused where it does not exist or nothing is there to measure."""
    if name is not None and test is None:
        raise UsageError(f"metric {name!r} is measured on labelled samples; give them with --test")
    if name is not None:
        find_metric(name)
    return name or METRIC


def _evaluate(model: onnx.ModelProto, tests: Dataset | None, metric: str, ctx: Context) -> Evaluation | None:
    """The metric of a model, None without test samples."""
    if tests is None:
        return None
    settings: dict[str, Any] = {"threads": ctx.threads, "provider": ctx.provider, "progress": ctx.progress}
    return evaluate_model(model, tests, metric, **settings)


def _remarks(data: Dataset | None) -> tuple[str, ...]:
    """What reading samples found suspicious."""
    return () if data is None else data.warnings()


def _too_large(limit: str | None, size: int) -> list[str]:
    """That the file is larger than was asked for, which goes by an estimate."""
    if limit is None or size <= parse_bytes(limit):
        return []
    return [f"the file takes {size:,} bytes, more than multipoint-size={limit}"]


def _megabytes(progress: Progress) -> Callable[[int, int], None]:
    """Takes bytes written and all of them."""
    return lambda done, total: progress("writing (MB)", done >> 20, total >> 20)


def _load(
    model: str | Path | onnx.ModelProto,
    calibration: Source | None,
    table_path: str | Path | None,
    images: ImageOptions | None,
    opset: int,
    scratch: str | Path | None,
) -> Job:
    read = model if isinstance(model, onnx.ModelProto) else load_model(model)
    prepared, notes = prepare(read, opset)
    notes = (f"the model is {ALREADY}", *notes) if is_quantized(read) else notes
    data = _open(calibration, prepared, images)
    original = Original.of(read, data is not None or table_path is not None)
    table = None if table_path is None else CalibrationTable.load(table_path)
    return Job(original, prepared, notes, data, table, Spool(scratch) if original.files else None)


def _open(source: Source | None, model: onnx.ModelProto, images: ImageOptions | None) -> Dataset | None:
    if source is None or isinstance(source, Dataset):
        return source
    return open_data(source, input_specs(model), images=images or ImageOptions())


def _check_table(job: Job, ctx: Context) -> None:
    """Refuse statistics of another model or other samples."""
    if job.table is None:
        return
    assert job.original.digest is not None
    job.table.check(job.original.digest, None if job.data is None else job.data.digest(ctx.calibrated))


def _save_table(table: CalibrationTable | None, path: str | Path) -> None:
    if table is None:
        raise DataError("there are no calibration statistics to save: the pipeline gathered none")
    table.save(path)


def _calibration(table: CalibrationTable | None, data: Dataset | None) -> dict[str, Any] | None:
    if table is None:
        return None
    source = data.source if data is not None else None
    return {"source": source, "samples": table.samples, "digest": table.data_digest}
