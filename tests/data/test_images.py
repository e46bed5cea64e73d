"""Image options against Pillow and numpy directly."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from onnxq.data.images import ImageOptions, load_image, normalized
from onnxq.errors import DataError, UsageError

PIXELS = np.random.default_rng(7).integers(0, 256, (40, 60, 3)).astype(np.uint8)  # height, width, rgb


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def loaded(path: Path, size: int | None, crop: tuple[int, int], **others: Any) -> NDArray[np.uint8]:
    return load_image(path, ImageOptions(size=size, crop=crop, **others))


def test_the_shorter_side_is_resized_and_the_centre_cropped(path: Path) -> None:
    small = Image.fromarray(PIXELS).resize((30, 20), Image.Resampling.BILINEAR)
    expected = np.asarray(small)[2:18, 7:23]
    np.testing.assert_array_equal(loaded(path, 20, (16, 16)), expected)
    np.testing.assert_array_equal(loaded(path, 20, (16, 16), color="rgb"), expected)


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_resampling(path: Path, name: Any) -> None:
    expected = Image.fromarray(PIXELS).resize((30, 20), Image.Resampling[name.upper()])
    np.testing.assert_array_equal(loaded(path, 20, (20, 30), resample=name), np.asarray(expected))


@pytest.mark.parametrize(
    ("crop", "resized", "corner"),
    [((20, 20), (30, 20), (5, 0)), ((10, 60), (60, 40), (0, 15)), ((80, 80), (120, 80), (20, 0))],
)
def test_without_a_size_the_crop_is_just_covered(
    path: Path, crop: tuple[int, int], resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    image = Image.fromarray(PIXELS).resize(resized, Image.Resampling.BILINEAR)
    left, top = corner
    expected = np.asarray(image)[top : top + crop[0], left : left + crop[1]]
    np.testing.assert_array_equal(loaded(path, None, crop), expected)


def test_an_image_of_the_right_size_is_left_alone(path: Path) -> None:
    np.testing.assert_array_equal(loaded(path, None, (40, 60)), PIXELS)
    np.testing.assert_array_equal(loaded(path, 40, (40, 60)), PIXELS)


def test_modes(tmp_path: Path, path: Path) -> None:
    gray = loaded(path, None, (40, 60), color="gray")
    np.testing.assert_array_equal(gray, np.asarray(Image.fromarray(PIXELS).convert("L"))[..., None])
    for mode in ("L", "P", "RGBA", "1"):
        Image.fromarray(PIXELS).convert(mode).save(tmp_path / "b.png")
        assert loaded(tmp_path / "b.png", None, (40, 60)).shape == (40, 60, 3)
    palette = Image.fromarray(PIXELS).convert("P")
    palette.save(tmp_path / "p.png", transparency=bytes(range(256)))
    np.testing.assert_array_equal(
        loaded(tmp_path / "p.png", None, (40, 60)), np.asarray(palette.convert("RGB"))
    )


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        load_image(path, ImageOptions(**options))
    return str(error.value)


def test_images_that_cannot_be_used(tmp_path: Path, path: Path) -> None:
    deep = tmp_path / "deep.png"
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(deep)
    assert refused(deep, crop=(4, 4)) == f"image '{deep}' has mode I;16; only 8 bits a channel can be read"
    assert refused(path, size=20, crop=(20, 31)) == (
        f"image '{path}' has 20 x 30 pixels after resizing, less than the crop 20 x 31"
    )
    path.write_bytes(path.read_bytes()[:2000])
    assert refused(path, crop=(4, 4)).startswith(f"image '{path}' cannot be read: ")
    path.write_bytes(b"text")
    assert refused(path, crop=(4, 4)).startswith(f"image '{path}' cannot be read: cannot identify image file")


def test_normalization() -> None:
    pixels = PIXELS[None]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    options = ImageOptions(mean=mean, std=std, layout="nhwc", color="rgb")
    expected = (pixels / 255.0 - np.array(mean)) / np.array(std)
    nhwc = normalized(pixels, options, np.dtype(np.float32))
    assert nhwc.dtype == np.float32
    np.testing.assert_allclose(nhwc, expected, atol=2e-6)  # values up to 3 in float32, three operations
    nchw = normalized(
        pixels, ImageOptions(mean=mean, std=std, layout="nchw", color="rgb"), np.dtype(np.float32)
    )
    np.testing.assert_array_equal(nchw, nhwc.transpose(0, 3, 1, 2))
    assert nchw.flags.c_contiguous


def test_channel_order_applies_before_mean_and_std() -> None:
    options = ImageOptions(mean=(1.0, 2.0, 3.0), scale=1.0, layout="nhwc", color="bgr")
    expected = PIXELS[None, ..., ::-1].astype(np.float32) - np.array([1, 2, 3], np.float32)
    np.testing.assert_array_equal(normalized(PIXELS[None], options, np.dtype(np.float32)), expected)


def test_integer_inputs_get_the_pixels() -> None:
    options = ImageOptions(layout="nhwc", color="rgb")
    np.testing.assert_array_equal(normalized(PIXELS[None], options, np.dtype(np.uint8)), PIXELS[None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "nhcw"}, "unknown image layout 'nhcw'; did you mean 'nhwc'? The choices are: nchw, nhwc"),
        (
            {"color": "grey"},
            "unknown image color 'grey'; did you mean 'gray'? The choices are: bgr, gray, rgb",
        ),
        (
            {"resample": "x"},
            "unknown image resample 'x'; the choices are: bicubic, bilinear, lanczos, nearest",
        ),
        ({"size": 0}, "image size must be at least 1 pixel, not 0"),
        ({"crop": (4, 0)}, "image crop must be at least 1 pixel, not 0"),
        ({"size": 9, "crop": (10, 10)}, "image size 9 is smaller than the crop 10 x 10"),
        ({"std": (1.0, 0.0, 1.0)}, "image scale and std must not be zero"),
        ({"scale": 0.0}, "image scale and std must not be zero"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        ImageOptions(**options)
    assert str(error.value) == message


def test_without_pillow(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert refused(path) == "reading images needs Pillow: pip install onnxq[images]"
