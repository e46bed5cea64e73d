"""Models and samples as the commands that measure take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from onnx import ModelProto

from onnxq.data import Dataset, ImageOptions, InputSpec, input_specs
from onnxq.data.image_text import parse_image_options
from onnxq.errors import ModelError
from onnxq.model.load import load_model
from onnxq.pipeline import Progress

Warn = Callable[[str], None]


def image_options(text: str | None) -> ImageOptions:
    """Image options from text, the usual ones without."""
    return ImageOptions() if text is None else parse_image_options(text)


def load(path: Path, progress: Progress) -> ModelProto:
    """A model from its file."""
    progress(f"loading {path.name}", 0, None)
    return load_model(path)


def check_inputs(first: ModelProto, second: ModelProto) -> None:
    """Refuse models that take other inputs than each other.

    Raises:
        ModelError: naming the input.
    """
    names: list[Mapping[str, InputSpec]] = [{s.name: s for s in input_specs(m)} for m in (first, second)]
    for name in sorted(names[0].keys() ^ names[1].keys()):
        which = "first" if name in names[0] else "second"
        raise ModelError(f"only the {which} model has an input {name!r}; both must take the same inputs")
    for name, spec in names[0].items():
        other = names[1][name].dtype
        if other != spec.dtype:
            raise ModelError(f"input {name!r} is {spec.dtype} in the first model and {other} in the second")


def pass_on(data: Dataset, warn: Warn) -> None:
    """Hand on what a source has to warn of."""
    for sentence in data.warnings():
        warn(sentence)
