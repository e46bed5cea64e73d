"""`onnxq analyze`: what each step of a quantized model matters, written as JSON and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from onnxq.analysis import Analysis, analyze
from onnxq.analysis.plots import check_plots, write_plots
from onnxq.commands.checks import check_files
from onnxq.commands.sources import image_options
from onnxq.errors import OnnxqError, UsageError
from onnxq.files import reason, replacing
from onnxq.pipeline import Progress
from onnxq.report.model import finite


def analyze_file(
    model: Path,
    calib: str,
    *,
    output: Path | None,
    plots: Path | None,
    form: str,
    bits: str,
    weights: str | None,
    override: Sequence[str],
    skip: Sequence[str],
    loss: str,
    samples: int,
    largest: int,
    pair: str | None,
    images: str | None,
    seed: int,
    threads: int,
    progress: Progress,
) -> Analysis:
    """Look at a model and write what was asked for; see `onnxq.analysis.analyze`.

    Raises:
        UsageError: an option is not understood.
        OnnxqError: a file cannot be read or written.
    """
    if output is not None:
        check_files({"analysis": output}, {"model": model})
    if plots is not None:
        check_plots(form)
    found = analyze(
        model,
        calib,
        bits=bits,
        weights=weights,
        override=override,
        skip=skip,
        loss=loss,
        samples=samples,
        largest=largest,
        pair=None if pair is None else _pair(pair),
        images=image_options(images),
        seed=seed,
        threads=threads,
        progress=progress,
    )
    if output is not None:
        text = json.dumps(finite(found.as_json()), indent=2).encode() + b"\n"
        try:
            with replacing(output) as file:
                file.write(text)
        except OSError as error:
            raise OnnxqError(f"cannot write the analysis {output}: {reason(error)}") from None
    if plots is not None:
        write_plots(found, plots, form)
    return found


def _pair(text: str) -> tuple[str, str]:
    first, comma, second = (part.strip() for part in text.partition(","))
    if not (first and comma and second):
        raise UsageError(
            f"cannot read the pair {text!r}; give two tensors with a comma between: conv1.weight,relu1"
        )
    return first, second
