"""`onnxq compile`: from file to verified file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onnxq.choices import Choices
from onnxq.commands.checks import check_files, check_provider
from onnxq.commands.reporting import report_bytes
from onnxq.compiler import CompiledModel, compile_model
from onnxq.data.image_text import parse_image_options
from onnxq.errors import OnnxqError, UsageError
from onnxq.files import reason, replacing
from onnxq.model.session import CPU
from onnxq.pipeline import Progress, no_progress
from onnxq.report.model import Report


def compile_file(
    model: Path,
    output: Path,
    *,
    calibration: str | None = None,
    samples: int | None = None,
    images: str | None = None,
    ranges: str | None = None,
    loss: str | None = None,
    search_budget: str | None = None,
    checkpoint: Path | None = None,
    multipoint: float | None = None,
    multipoint_error: float | None = None,
    multipoint_size: str | None = None,
    cluster: str | None = None,
    bias_correction: str | None = None,
    multipoint_form: str | None = None,
    save_calibration: Path | None = None,
    load_calibration: Path | None = None,
    test: str | None = None,
    metric: str | None = None,
    preset: str | None = None,
    pipeline: str | None = None,
    bits: str | None = None,
    weights: str | None = None,
    activations: str | None = None,
    override: Sequence[str] = (),
    first_last: str | None = None,
    elementwise: str | None = None,
    skip: Sequence[str] = (),
    target: str = "ort-cpu",
    form: str | None = None,
    report: Path | None = None,
    as_json: bool = False,
    seed: int = 0,
    threads: int = 0,
    provider: str = CPU,
    progress: Progress = no_progress,
) -> Report:
    """Quantize a model file; what can be refused without reading the model is refused first.

    Args: as `onnxq.compile_model`, with None for an option that was not given and `images` as text. Layers are measured for a
        report, in a file or printed (`as_json`).

    Returns:
        The report, which was also written to `report` if that is given.

    Raises:
        UsageError: an unknown or contradictory option.
        OnnxqError: as `compile_model`, or a file cannot be written; an existing output is then untouched.
    """
    _refuse_contradictions(
        calibration, load_calibration, save_calibration, samples, images, test, preset, pipeline
    )
    Choices(
        preset=preset,
        pipeline=pipeline,
        form=form,
        target=target,
        bits=bits,
        weights=weights,
        activations=activations,
        override=tuple(override),
        first_last=first_last,
        elementwise=elementwise,
        ranges=ranges,
        loss=loss,
        budget=search_budget,
        checkpoint=None if checkpoint is None else str(checkpoint),
        multipoint=multipoint,
        multipoint_error=multipoint_error,
        multipoint_size=multipoint_size,
        cluster=cluster,
        bias_correction=bias_correction,
        multipoint_form=multipoint_form,
        skip=tuple(skip),
    ).resolve(calibration is not None or load_calibration is not None)
    check_provider(provider)
    options = parse_image_options(images) if images is not None else None
    check_files(
        {"output": output, "report": report, "calibration table": save_calibration},
        {"model": model, "calibration data": _path(calibration), "test data": _path(test)},
    )
    done = compile_model(
        model,
        calibration,
        samples=512 if samples is None else samples,
        preset=preset,
        pipeline=pipeline,
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
        multipoint=multipoint,
        multipoint_error=multipoint_error,
        multipoint_size=multipoint_size,
        cluster=cluster,
        bias_correction=bias_correction,
        multipoint_form=multipoint_form,
        skip=skip,
        form=form,
        target=target,
        images=options,
        load_calibration=load_calibration,
        test=test,
        metric=metric,
        save_calibration=save_calibration,
        seed=seed,
        threads=threads,
        provider=provider,
        layers=report is not None or as_json,
        scratch=output.resolve().parent,
        progress=progress,
    )
    progress("writing", 0, None)
    full = replace(done.report, output=str(output))
    _write(done, full, output, report, progress)
    return full


def _path(source: str | None) -> Path | None:
    return None if source is None else Path(source)


def _refuse_contradictions(
    calibration: str | None,
    load_calibration: Path | None,
    save_calibration: Path | None,
    samples: int | None,
    images: str | None,
    test: str | None,
    preset: str | None,
    pipeline: str | None,
) -> None:
    """No option is silently ignored."""
    if preset is not None and pipeline is not None:
        raise UsageError("give --preset or --passes, not both")
    if calibration is not None:
        return
    if samples is not None:
        raise UsageError("--samples says how to read calibration samples; give them with --calib")
    if images is not None and test is None:
        raise UsageError("--images says how to read samples; give them with --calib or --test")
    if save_calibration is not None and load_calibration is None:
        raise UsageError("--save-calibration has nothing to save; give samples with --calib")


def _write(done: CompiledModel, report: Report, output: Path, path: Path | None, progress: Progress) -> None:
    """Write the model and the report if asked for; when one cannot be written, the other is not either."""
    if path is None:
        done.save(output, progress)
        return
    try:
        with replacing(path) as file:
            file.write(report_bytes(report.as_json(), path))
            file.flush()
            done.save(output, progress)
    except OSError as error:
        raise OnnxqError(f"cannot write the report {path}: {reason(error)}") from None
