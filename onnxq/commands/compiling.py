"""`onnxq compile`: from file to verified file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from onnxq.choices import Choices
from onnxq.commands.checks import check_files, check_provider
from onnxq.commands.reporting import report_bytes
from onnxq.compiler import CompiledModel, compile_chosen
from onnxq.data.image_text import parse_image_options
from onnxq.errors import OnnxqError, UsageError
from onnxq.files import reason, replacing
from onnxq.model.session import CPU
from onnxq.pipeline import Progress, no_progress
from onnxq.report.model import Report


def compile_file(
    model: Path,
    output: Path,
    choices: Choices,
    *,
    calibration: str | None = None,
    samples: int | None = None,
    images: str | None = None,
    save_calibration: Path | None = None,
    load_calibration: Path | None = None,
    test: str | None = None,
    metric: str | None = None,
    report: Path | None = None,
    as_json: bool = False,
    seed: int = 0,
    threads: int = 0,
    provider: str = CPU,
    progress: Progress = no_progress,
) -> Report:
    """Quantize a model file; what can be refused without reading the model is refused first.

    Args: as `onnxq.compile_model`, with None for an option that was not given, `images` as text, and in `choices` all that shapes
        the pipeline. Layers are measured for a report, in a file or printed (`as_json`).

    Returns:
        The report, which was also written to `report` if that is given.

    Raises:
        UsageError: an unknown or contradictory option.
        OnnxqError: as `compile_model`, or a file cannot be written; an existing output is then untouched.
    """
    _refuse_contradictions(choices, calibration, load_calibration, save_calibration, samples, images, test)
    choices.resolve(calibration is not None or load_calibration is not None)
    check_provider(provider)
    options = parse_image_options(images) if images is not None else None
    check_files(
        {"output": output, "report": report, "calibration table": save_calibration},
        {"model": model, "calibration data": _path(calibration), "test data": _path(test)},
    )
    done = compile_chosen(
        model,
        calibration,
        choices,
        samples=samples,
        images=options,
        test=test,
        metric=metric,
        load_calibration=load_calibration,
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
    choices: Choices,
    calibration: str | None,
    load_calibration: Path | None,
    save_calibration: Path | None,
    samples: int | None,
    images: str | None,
    test: str | None,
) -> None:
    """No option is silently ignored."""
    if choices.preset is not None and choices.pipeline is not None:
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
