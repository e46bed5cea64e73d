"""Folders of images as samples; sub-folders are classes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onnxq.data.dataset import Batch
from onnxq.data.images import Color, ImageOptions, Layout, load_image, normalized, pillow
from onnxq.data.inputs import InputSpec
from onnxq.data.samples import Take
from onnxq.errors import DataError, UsageError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageFolder:
    """Images as samples, decoded when they are taken.

    Attributes:
        folder: the root.
        names: paths of the images below it.
        labels: class numbers (n,), None for a flat folder.
        spec: the model's only input.
        options: with crop, layout and color resolved.
    """

    folder: Path
    names: list[str]
    labels: NDArray[np.int64] | None
    spec: InputSpec
    options: ImageOptions

    whole = False

    @property
    def count(self) -> int:
        """Images."""
        return len(self.names)

    @property
    def has_labels(self) -> bool:
        """Whether the images lie in folders of classes."""
        return self.labels is not None

    def reader(self) -> AbstractContextManager[Take]:
        """See `Samples.reader`; gives one piece."""
        return nullcontext(self._take)

    def _take(self, rows: NDArray[np.int64]) -> list[Batch]:
        pixels = np.stack([load_image(self.folder / self.names[row], self.options) for row in rows.tolist()])
        feed = normalized(pixels, self.options, self.spec.dtype)
        return [Batch({self.spec.name: feed}, None if self.labels is None else self.labels[rows], len(rows))]


def has_images(folder: Path) -> bool:
    """Whether a folder or one below it holds an image."""
    return any(_is_image(path) for path in folder.rglob("*"))


def image_folder(folder: Path, inputs: Sequence[InputSpec], options: ImageOptions) -> ImageFolder:
    """List the images of a folder, sorted by name. Sub-folders, sorted by name, are classes 0, 1, …; a class
    holds the images below its folder, and keeps its number when there are none.

    Raises:
        DataError: Pillow is missing, the input is no image, or images lie both in folders and beside them.
    """
    pillow()  # so that a missing one is told at once
    spec, options = _resolved(f"'{folder}'", inputs, options)
    flat = sorted(path.name for path in folder.iterdir() if _is_image(path))
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    nested = [
        sorted(str(path.relative_to(folder)) for path in each.rglob("*") if _is_image(path))
        for each in classes
    ]
    if flat and any(nested):
        raise DataError(
            f"'{folder}' holds images both beside and inside its folders; use one folder per class or none"
        )
    if flat:
        return ImageFolder(folder, flat, None, spec, options)
    labels = np.repeat(np.arange(len(nested)), [len(names) for names in nested])
    return ImageFolder(folder, [name for names in nested for name in names], labels, spec, options)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _resolved(
    where: str, inputs: Sequence[InputSpec], options: ImageOptions
) -> tuple[InputSpec, ImageOptions]:
    """The only input, and the options with crop, layout and color filled in from it."""
    spec = inputs[0]
    if len(inputs) > 1:
        names = ", ".join(each.name for each in inputs)
        raise DataError(
            f"{where} holds images, but the model has {len(inputs)} inputs: {names}; use a .npz file"
        )
    shape = spec.shape or (None, None, None, None)
    if spec.shape is not None and len(shape) != 4:
        raise DataError(f"{where} holds images, but the model's input {spec.name!r} is {spec}, not of rank 4")
    layout: Layout = options.layout or ("nhwc" if shape[3] in (1, 3) and shape[1] not in (1, 3) else "nchw")
    channels = shape[3 if layout == "nhwc" else 1]
    color: Color = options.color or ("gray" if channels == 1 else "rgb")
    depth = 1 if color == "gray" else 3
    if isinstance(channels, int) and channels != depth:
        raise DataError(
            f"{where}: {color} images in {layout} do not fit the model's input {spec.name!r}, {spec}"
        )
    crop = _crop(where, spec, shape[1:3] if layout == "nhwc" else shape[2:4], options)
    for name, values in (("mean", options.mean), ("std", options.std)):
        if len(values) not in (1, depth):
            raise UsageError(
                f"image {name} has {len(values)} numbers for {depth} channels; give 1 or {depth}"
            )
    plain = replace(options, scale=1 / 255, mean=(0.0,), std=(1.0,))
    if spec.dtype.kind in "iu" and options != plain:
        raise UsageError(f"image scale, mean and std do not apply to the model's input {spec.name!r}, {spec}")
    return spec, replace(options, crop=crop, layout=layout, color=color)


def _crop(
    where: str, spec: InputSpec, sizes: tuple[int | str | None, ...], options: ImageOptions
) -> tuple[int, int]:
    """(height, width), the options' or the model's."""
    height, width = options.crop or sizes
    if not isinstance(height, int) or not isinstance(width, int):
        raise DataError(
            f"{where}: the model's input {spec.name!r} is {spec}; say the images' height and width (crop)"
        )
    if any(isinstance(want, int) and want != have for have, want in zip((height, width), sizes, strict=True)):
        raise DataError(
            f"{where}: crop {height} x {width} does not fit the model's input {spec.name!r}, {spec}"
        )
    return height, width
