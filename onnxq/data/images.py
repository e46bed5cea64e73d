"""From an image file to a model's input: decode, resize the shorter side, crop the centre, normalize.

Needs Pillow, which is imported when the first image is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import DataError, UsageError, unknown

if TYPE_CHECKING:
    from PIL import Image as PillowImage

Layout = Literal["nchw", "nhwc"]
Color = Literal["rgb", "bgr", "gray"]
Resample = Literal["nearest", "bilinear", "bicubic", "lanczos"]


@dataclass(frozen=True)
class ImageOptions:
    """From an image to the model's input: x = (pixel * scale - mean) / std, in float32.

    Attributes:
        size: pixels of the shorter side after resizing; None resizes so that the crop is just covered.
        crop: (height, width) cut from the centre; None takes the model's.
        scale: factor on pixels 0..255.
        mean, std: one number, or one per channel in the order of `color`, after `scale`. An integer input
            gets the pixels as they are.
        layout: order of the axes; None reads it off the model's input (nchw when that does not tell).
        color: order of the channels; None is gray for a model with one channel, else rgb.
        resample: Pillow's filter.

    Raises:
        UsageError: a value out of range.
    """

    size: int | None = None
    crop: tuple[int, int] | None = None
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Layout | None = None
    color: Color | None = None
    resample: Resample = "bilinear"

    def __post_init__(self) -> None:
        for kind, value, choices in (
            ("layout", self.layout, get_args(Layout)),
            ("color", self.color, get_args(Color)),
            ("resample", self.resample, get_args(Resample)),
        ):
            if value is not None and value not in choices:
                raise unknown(f"image {kind}", str(value), choices)
        for name, pixels in (("size", self.size), ("crop", None if self.crop is None else min(self.crop))):
            if pixels is not None and pixels < 1:
                raise UsageError(f"image {name} must be at least 1 pixel, not {pixels}")
        if self.size is not None and self.crop is not None and self.size < min(self.crop):
            raise UsageError(
                f"image size {self.size} is smaller than the crop {self.crop[0]} x {self.crop[1]}"
            )
        if not self.scale or not all(self.std):
            raise UsageError("image scale and std must not be zero")


def pillow() -> Any:
    """The module PIL.Image.

    Raises:
        DataError: it is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("reading images needs Pillow: pip install onnxq[images]") from error
    return Image


def load_image(path: Path, options: ImageOptions) -> NDArray[np.uint8]:
    """Decode, resize and crop: uint8 (height, width, channels), rgb or gray. EXIF rotation is not applied.

    Raises:
        DataError: unreadable, of more than 8 bits a channel, or too small for the crop after resizing.
    """
    library = pillow()
    try:
        with library.open(path) as image:
            image.load()
            if image.mode[0] in "IF":
                raise DataError(f"image '{path}' has mode {image.mode}; only 8 bits a channel can be read")
            if image.mode == "P":  # a palette may have an alpha channel, which goes first
                image = image.convert("RGBA")
            image = image.convert("L" if options.color == "gray" else "RGB")
    except (OSError, ValueError, SyntaxError, EOFError, library.DecompressionBombError) as error:
        raise DataError(f"image '{path}' cannot be read: {error}") from error
    return np.atleast_3d(np.asarray(_fitted(path, image, options), np.uint8))


def _fitted(path: Path, image: PillowImage.Image, options: ImageOptions) -> PillowImage.Image:
    width, height = image.size
    crop = options.crop or (height, width)
    if options.size is None:  # the crop is just covered
        tall = crop[0] * width >= crop[1] * height  # the crop's height decides
        target = (width * crop[0] // height, crop[0]) if tall else (crop[1], height * crop[1] // width)
    else:
        short = min(width, height)
        target = options.size * width // short, options.size * height // short
    if target[0] < crop[1] or target[1] < crop[0]:
        resized = f"{target[1]} x {target[0]} pixels after resizing"
        raise DataError(f"image '{path}' has {resized}, less than the crop {crop[0]} x {crop[1]}")
    image = image.resize(target, pillow().Resampling[options.resample.upper()])
    left, top = round((target[0] - crop[1]) / 2), round((target[1] - crop[0]) / 2)
    return image.crop((left, top, left + crop[1], top + crop[0]))


def normalized(pixels: NDArray[np.uint8], options: ImageOptions, dtype: np.dtype[Any]) -> NDArray[Any]:
    """uint8 (n, height, width, channels) to the model's layout, channel order and dtype."""
    if options.color == "bgr":
        pixels = pixels[..., ::-1]
    if options.layout == "nchw":
        pixels = pixels.transpose(0, 3, 1, 2)
    if dtype.kind in "iu":
        return np.ascontiguousarray(pixels, dtype)
    axis = (-1, 1, 1) if options.layout == "nchw" else (-1,)
    mean, std = (np.asarray(values, np.float32).reshape(axis) for values in (options.mean, options.std))
    return np.ascontiguousarray((pixels * np.float32(options.scale) - mean) / std, dtype)
