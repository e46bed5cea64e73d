"""`onnxq compile`: from file to verified file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onnxq.commands.checks import check_files, check_provider
from onnxq.compiler import CompiledModel, compile_model
from onnxq.data.image_text import parse_image_options
from onnxq.errors import OnnxqError, UsageError
from onnxq.files import reason, replacing
from onnxq.model.session import CPU
from onnxq.pipeline import Progress, no_progress
from onnxq.quantizers import parse_quantizer
from onnxq.report.model import Report
from onnxq.scheme import QuantScheme
from onnxq.target import find_target


def compile_file(
    model: Path,
    output: Path,
    *,
    calibration: str | None = None,
    samples: int | None = None,
    images: str | None = None,
    ranges: str | None = None,
    save_calibration: Path | None = None,
    load_calibration: Path | None = None,
    preset: str | None = None,
    pipeline: str | None = None,
    weights: str | None = None,
    activations: str | None = None,
    skip: Sequence[str] = (),
    target: str = "ort-cpu",
    form: str | None = None,
    report: Path | None = None,
    seed: int = 0,
    threads: int = 0,
    provider: str = CPU,
    progress: Progress = no_progress,
) -> Report:
    """Quantize a model file; what can be refused without reading the model is refused first.

    Args: as `onnxq.compile_model`, with None for an option that was not given and `images` as text.

    Returns:
        The report, which was also written to `report` if that is given.

    Raises:
        UsageError: an unknown or contradictory option.
        OnnxqError: as `compile_model`, or a file cannot be written; an existing output is then untouched.
    """
    _refuse_contradictions(calibration, load_calibration, save_calibration, samples, images, preset, pipeline)
    _check_options(ranges, weights, activations, target, provider)
    options = parse_image_options(images) if images is not None else None
    data = Path(calibration) if calibration is not None else None
    check_files(
        {"output": output, "report": report, "calibration table": save_calibration},
        {"model": model, "calibration data": data},
    )
    done = compile_model(
        model,
        calibration,
        samples=512 if samples is None else samples,
        preset=preset,
        pipeline=pipeline,
        weights=weights,
        activations=activations,
        ranges=ranges,
        skip=skip,
        form=form,
        target=target,
        images=options,
        load_calibration=load_calibration,
        save_calibration=save_calibration,
        seed=seed,
        threads=threads,
        provider=provider,
        progress=progress,
    )
    progress("writing", 0, None)
    full = replace(done.report, output=str(output))
    _write(done, full, output, report)
    return full


def _refuse_contradictions(
    calibration: str | None,
    load_calibration: Path | None,
    save_calibration: Path | None,
    samples: int | None,
    images: str | None,
    preset: str | None,
    pipeline: str | None,
) -> None:
    """No option is silently ignored."""
    if preset is not None and pipeline is not None:
        raise UsageError("give --preset or --passes, not both")
    if calibration is not None:
        return
    for option, value in (("--samples", samples), ("--images", images)):
        if value is not None:
            raise UsageError(f"{option} says how to read calibration samples; give them with --calib")
    if save_calibration is not None and load_calibration is None:
        raise UsageError("--save-calibration has nothing to save; give samples with --calib")


def _check_options(
    ranges: str | None, weights: str | None, activations: str | None, target: str, provider: str
) -> None:
    goal = find_target(target)
    if ranges is not None:
        parse_quantizer(ranges)
    if weights is not None or activations is not None:
        goal.check_schemes(QuantScheme.parse(weights or "int8"), QuantScheme.parse(activations or "uint8"))
    check_provider(provider)


def _write(done: CompiledModel, report: Report, output: Path, path: Path | None) -> None:
    """Write the model and the report if asked for; when one cannot be written, the other is not either."""
    if path is None:
        done.save(output)
        return
    try:
        with replacing(path) as file:
            file.write(json.dumps(report.as_json(), indent=2).encode() + b"\n")
            file.flush()
            done.save(output)
    except OSError as error:
        raise OnnxqError(f"cannot write the report {path}: {reason(error)}") from None
