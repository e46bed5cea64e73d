"""`onnxq evaluate`, `compare` and `bench`: what models give, how they differ, and how fast they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.commands.checks import check_provider
from onnxq.commands.sources import Warn, check_inputs, image_options, load, pass_on
from onnxq.data import InputSpec, input_specs, open_data
from onnxq.data.checks import check_shape
from onnxq.errors import DataError, ModelError, UsageError, unknown
from onnxq.measure.compare import compare_sessions, run
from onnxq.measure.metrics import evaluate_model, find_metric
from onnxq.measure.speed import race
from onnxq.model.session import CPU, make_session
from onnxq.pipeline import Progress, counter, no_progress
from onnxq.report.model import finite


def evaluate_file(
    model: Path,
    data: str,
    metric: str = "top1",
    *,
    samples: int | None = None,
    images: str | None = None,
    batch: int = 32,
    threads: int = 0,
    provider: str = CPU,
    progress: Progress = no_progress,
    warn: Warn = lambda sentence: None,
) -> dict[str, Any]:
    """A metric of a model on labelled data, as {"metric", "value", "samples"}.

    Raises:
        UsageError: an unknown metric, provider or image option.
        OnnxqError: the model, the data or the metric's function failed.
    """
    if ":" not in metric:
        find_metric(metric)
    check_provider(provider)
    options = image_options(images)
    loaded = load(model, progress)
    source = open_data(data, input_specs(loaded), images=options)
    result = evaluate_model(
        loaded,
        source,
        metric,
        limit=samples,
        batch=batch,
        threads=threads,
        provider=provider,
        progress=progress,
    )
    pass_on(source, warn)
    figures: dict[str, Any] = finite(
        {"metric": result.metric, "value": result.value, "samples": result.samples}
    )
    return figures


def compare_files(
    a: Path,
    b: Path | None,
    data: str,
    *,
    samples: int | None = None,
    images: str | None = None,
    batch: int = 32,
    threads: int = 0,
    provider: str = CPU,
    progress: Progress = no_progress,
    warn: Warn = lambda sentence: None,
) -> dict[str, Any]:
    """Outputs of two models on the same samples: figures of the main output, of each, and the samples.

    Raises:
        UsageError: no second model, or an unknown provider or image option.
        OnnxqError: a model or the data failed, or the outputs cannot be compared.
    """
    if b is None:
        raise UsageError("compare takes two models, A and B; only with --exact may B be left out")
    check_provider(provider)
    options = image_options(images)
    first, second = load(a, progress), load(b, progress)
    check_inputs(first, second)
    source = open_data(data, input_specs(first), images=options)
    one, other = (make_session(m, threads=threads, provider=provider) for m in (first, second))
    show = counter("comparing", progress, source, samples)
    result = compare_sessions(one, other, source, limit=samples, batch=batch, progress=show)
    pass_on(source, warn)
    never = next((name for name in result.apart if name not in result.outputs), None)
    if never is not None:
        raise ModelError(f"output {never!r} has different shapes in the two models in all samples")
    for sentence in result.remarks():
        warn(sentence)
    if result.main is None:
        raise ModelError(f"{a} has no outputs of numbers to compare")
    outputs = {name: difference.as_json() for name, difference in result.outputs.items()}
    figures: dict[str, Any] = finite({**result.main.as_json(), "outputs": outputs, "samples": result.samples})
    return figures


def bench_files(
    a: Path,
    b: Path,
    *,
    batch: int = 1,
    threads: int = 1,
    shapes: Sequence[str] = (),
    seconds: float = 5.0,
    provider: str = CPU,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, float | int]:
    """Time two models in turn on the same random inputs, as {"ms_a", "ms_b", "speedup", "runs"}.

    Args:
        batch: size of each input's leading dimension where that is dynamic.
        shapes: `NAME=1x3x224x224` for inputs with further dynamic dimensions.
        seconds: wall time to spend.

    Raises:
        UsageError: an unknown provider or input, or a shape that is missing or does not fit.
        ModelError: a model cannot be read or run, or the two take different inputs.
    """
    check_provider(provider)
    first, second = load(a, progress), load(b, progress)
    check_inputs(first, second)
    feeds = random_feeds(input_specs(first), batch, shapes, np.random.default_rng(seed))
    one, other = (make_session(m, threads=threads, provider=provider) for m in (first, second))
    progress("timing", 0, None)
    for session in (one, other):
        run(session, feeds)
    return race(one, other, feeds, seconds=seconds).as_json()


def random_feeds(
    specs: Sequence[InputSpec], batch: int, shapes: Sequence[str], rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """An array for each input: standard normal floats; zeros and ones as integers, which fit ids and masks.

    Raises:
        UsageError: a shape that is missing, cannot be read, does not fit, or is of no input; or a batch that
            no input can take.
    """
    given = _shapes(specs, shapes)
    leading = [spec.shape[0] for spec in specs if spec.shape]
    fixed = leading and all(isinstance(size, int) and size != batch for size in leading)
    if batch != 1 and fixed and not given:
        raise UsageError(f"the model fixes its batch at {leading[0]}; leave --batch out")
    feeds = {}
    for spec in specs:
        shape = given[spec.name] if spec.name in given else _shape(spec, batch)
        if "float" in spec.dtype.name:
            feeds[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        elif spec.dtype.kind in "biu":
            feeds[spec.name] = rng.integers(0, 2, shape).astype(spec.dtype)
        else:
            raise ModelError(f"input {spec.name!r} is {spec.dtype}; only numbers can be made at random")
    return feeds


def _shape(spec: InputSpec, batch: int) -> tuple[int, ...]:
    """The input's shape with the batch in front; refused when that does not settle it."""
    if spec.shape is not None:
        sizes = tuple(batch if i == 0 and not isinstance(d, int) else d for i, d in enumerate(spec.shape))
        known = tuple(d for d in sizes if isinstance(d, int))
        if len(known) == len(sizes):
            return known
    raise UsageError(
        f"input {spec.name!r} is {spec}; give its shape with --shape {spec.name}={_example(spec)}"
    )


def _example(spec: InputSpec) -> str:
    if spec.shape is None:
        return "1x3x224x224"
    guesses = ["1", *["128"] * len(spec.shape)]
    return "x".join(
        str(d) if isinstance(d, int) else guess for d, guess in zip(spec.shape, guesses, strict=False)
    )


def _shapes(specs: Sequence[InputSpec], texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shapes that `NAME=1x3x224x224` texts give, by input."""
    by_name = {spec.name: spec for spec in specs}
    given: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, equals, sizes = text.rpartition("=")
        numbers = sizes.split("x")
        if not equals or not all(n.isascii() and n.isdecimal() and 0 < int(n) < 2**31 for n in numbers):
            raise UsageError(f"cannot read the shape {text!r}; write NAME=1x3x224x224")
        if name not in by_name:
            raise unknown("input", name, by_name)
        spec, given[name] = by_name[name], tuple(int(n) for n in numbers)
        try:
            if spec.shape is not None:
                check_shape("--shape", given[name], spec, spec.shape)
        except DataError as error:
            raise UsageError(str(error)) from None
    return given
