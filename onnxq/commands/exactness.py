"""`onnxq compare --exact`: whether quantized files give the same codes on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnxq.commands.checks import check_provider
from onnxq.commands.sources import Warn, check_inputs, image_options, load, pass_on
from onnxq.data import input_specs, open_data
from onnxq.errors import ModelError
from onnxq.model.session import CPU
from onnxq.pipeline import Progress, counter, no_progress
from onnxq.reference.agreement import Agreement, CodeDifference, Side, agreement
from onnxq.reference.run import Reference
from onnxq.report.model import finite


def compare_exactly(
    models: Sequence[Path],
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
    """For each quantized file, how its codes differ between 32-bit sums, AVX2's 16-bit pairs and onnxruntime here.

    Args:
        models: files; those without quantized tensors are only named.

    Raises:
        UsageError: an unknown provider or image option.
        OnnxqError: a model or the data failed, or no file has quantized tensors.
    """
    check_provider(provider)
    options = image_options(images)
    loaded = {path: Reference(load(path, progress), threads=threads) for path in models}
    quantized = {path: reference for path, reference in loaded.items() if reference.code_names}
    if not quantized:
        named = " or ".join(map(str, models))
        raise ModelError(f"there are no 8-bit codes in {named}, so there is nothing to compare exactly")
    first, *others = quantized.values()
    for other in others:
        check_inputs(first.model, other.model)
    source = open_data(data, input_specs(first.model), images=options)
    rows, done = [], 0
    for path in models:
        if path not in quantized:
            warn(f"{path} computes no 8-bit codes and is left out")
            continue
        show = counter(f"running {path.name}", progress, source, samples)
        found = agreement(
            loaded[path],
            source,
            limit=samples,
            batch=batch,
            threads=threads,
            provider=provider,
            progress=show,
        )
        if not found.is_undisturbed:
            warn(
                f"reading the codes of {path} from onnxruntime changes its outputs, so it may run other kernels otherwise"
            )
        rows.append({"model": str(path), **_figures(found)})
        done = found.avx2.outputs.samples
    pass_on(source, warn)
    result: dict[str, Any] = finite({"models": rows, "samples": done})
    return result


def _figures(found: Agreement) -> dict[str, Any]:
    codes = found.avx2.codes
    return {
        "tensors": len(codes),
        "codes": sum(c.values for c in codes.values()),
        "float_operators": found.float_operators,
        "saturating": found.saturating,
        "unseen": found.unseen,
        "same_everywhere": found.avx2.is_same,
        "avx2": _side(found.avx2),
        "runtime": _runtime(found),
    }


def _runtime(found: Agreement) -> dict[str, Any]:
    """The runtime here against the arithmetic that it is closest to."""
    sides = {"32-bit sums": found.runtime, "AVX2 pairs": found.runtime_avx2}
    nearest = min(sides, key=lambda name: (not sides[name].is_same, _count(sides[name])))
    return {"nearest": nearest, **_side(sides[nearest])}


def _side(side: Side) -> dict[str, Any]:
    differing = side.differing
    return {
        "same": side.is_same,
        "tensors": len(differing),
        "codes": _count(side),
        "first": next(iter(differing), None),
        "differences": {name: _difference(found) for name, found in differing.items()},
        "outputs": {name: found.as_json() for name, found in side.outputs.outputs.items()},
    }


def _count(side: Side) -> int:
    return sum(found.differing for found in side.codes.values())


def _difference(found: CodeDifference) -> dict[str, int]:
    return {"values": found.values, "differing": found.differing, "largest": found.largest}
