"""Folders of images as samples and classes."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnxq.data import ImageOptions, InputSpec, open_data
from onnxq.errors import DataError, UsageError


def inputs(*shape: int | str | None, dtype: Any = np.float32) -> tuple[InputSpec, ...]:
    return (InputSpec("image", np.dtype(dtype), shape),)


NCHW = inputs("N", 3, 4, 4)


def picture(path: Path, value: int) -> None:
    """A 4 x 4 image of one gray value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, value, value)).save(path)


def classes(folder: Path) -> Path:
    """Values tell the order: class b has 10, 11; class a has 0, 1, 2; class c has none; d nests."""
    for name, value in (("b/y.png", 11), ("b/x.png", 10), ("a/2.png", 2), ("a/0.png", 0), ("a/1.png", 1)):
        picture(folder / name, value)
    (folder / "c").mkdir()
    picture(folder / "d/images/z.PNG", 30)
    (folder / "a/readme.txt").write_text("no image")
    picture(folder / "a/._2.png", 99)
    picture(folder / ".cache/q.png", 99)
    return folder


def refused(folder: Path, specs: tuple[InputSpec, ...], **options: Any) -> str:
    with pytest.raises((DataError, UsageError)) as error:
        open_data(folder, specs, images=ImageOptions(**options))
    return str(error.value)


def test_sub_folders_are_classes_by_name(tmp_path: Path) -> None:
    data = open_data(classes(tmp_path), NCHW)
    assert (data.count(), data.has_labels) == (6, True)
    (batch,) = data.batches(32)
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 0, 0, 1, 1, 3]
    assert np.rint(batch.feeds["image"][:, 0, 0, 0] * 255).tolist() == [0, 1, 2, 10, 11, 30]
    assert batch.feeds["image"].shape == (6, 3, 4, 4)
    (spaced,) = data.batches(32, limit=3)
    assert spaced.labels is not None
    assert spaced.labels.tolist() == [0, 0, 1]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    picture(tmp_path / "b.png", 2)
    picture(tmp_path / "a.jpg", 1)
    (tmp_path / "empty").mkdir()
    data = open_data(tmp_path, inputs(1, 3, 4, 4))
    assert not data.has_labels
    values = [float(batch.feeds["image"][0, 0, 0, 0]) for batch in data.batches(8)]
    np.testing.assert_allclose(np.multiply(values, 255), [1, 2], atol=1e-4)  # one float32 rounding


def test_digest_is_independent_of_batches(tmp_path: Path) -> None:
    digest = open_data(classes(tmp_path), NCHW).digest(5)
    data = open_data(tmp_path, NCHW)
    list(data.batches(2, 5, digested=True))
    assert data.digest(5) == digest
    brighter = open_data(tmp_path, NCHW, images=ImageOptions(mean=(0.5,)))
    assert brighter.digest(5) != digest


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        (("N", 4, 4, 3), {}, (1, 4, 4, 3)),
        (("N", 1, 4, 4), {}, (1, 1, 4, 4)),
        (("N", 4, 4, 1), {}, (1, 4, 4, 1)),
        (("N", "C", "H", "W"), {"crop": (2, 3)}, (1, 3, 2, 3)),
        (("N", "C", "H", "W"), {"crop": (2, 3), "layout": "nhwc", "color": "gray"}, (1, 2, 3, 1)),
        (("N", 3, "H", "W"), {"crop": (2, 3), "size": 3}, (1, 3, 2, 3)),
        (("N", 3, 8, "W"), {"crop": (8, 3)}, (1, 3, 8, 3)),
    ],
)
def test_layout_color_and_crop_follow_the_model(
    tmp_path: Path, shape: tuple[int | str, ...], options: dict[str, Any], expected: tuple[int, ...]
) -> None:
    picture(tmp_path / "a.png", 1)
    (batch,) = open_data(tmp_path, inputs(*shape), images=ImageOptions(**options)).batches(1)
    assert batch.feeds["image"].shape == expected


def test_an_input_of_unknown_rank_needs_the_crop(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 1)
    specs = (InputSpec("image", np.dtype(np.float32), None),)
    (batch,) = open_data(tmp_path, specs, images=ImageOptions(crop=(2, 2))).batches(1)
    assert batch.feeds["image"].shape == (1, 3, 2, 2)
    assert refused(tmp_path, specs).endswith("say the images' height and width (crop)")


def test_integer_inputs(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 200)
    specs = inputs("N", 4, 4, 3, dtype=np.uint8)
    (batch,) = open_data(tmp_path, specs).batches(1)
    assert batch.feeds["image"].dtype == np.uint8
    assert batch.feeds["image"].min() == batch.feeds["image"].max() == 200
    assert refused(tmp_path, specs, mean=(0.5,)) == (
        "image scale, mean and std do not apply to the model's input 'image', uint8 (N, 4, 4, 3)"
    )


def test_models_that_take_no_images(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 1)
    assert refused(tmp_path, inputs("N", 10)) == (
        f"'{tmp_path}' holds images, but the model's input 'image' is float32 (N, 10), not of rank 4"
    )
    assert refused(tmp_path, (*NCHW, InputSpec("mask", np.dtype(np.float32), ("N",)))) == (
        f"'{tmp_path}' holds images, but the model has 2 inputs: image, mask; use a .npz file"
    )
    assert refused(tmp_path, inputs("N", 4, 4, 4)) == (
        f"'{tmp_path}': rgb images in nchw do not fit the model's input 'image', float32 (N, 4, 4, 4)"
    )


def test_options_that_do_not_fit_the_model(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 1)
    fit = "do not fit the model's input 'image', float32 (N, 3, 4, 4)"
    assert refused(tmp_path, NCHW, color="gray") == f"'{tmp_path}': gray images in nchw {fit}"
    assert refused(tmp_path, NCHW, layout="nhwc") == f"'{tmp_path}': rgb images in nhwc {fit}"
    assert refused(tmp_path, NCHW, crop=(4, 5)) == (
        f"'{tmp_path}': crop 4 x 5 does not fit the model's input 'image', float32 (N, 3, 4, 4)"
    )
    assert refused(tmp_path, NCHW, size=3) == "image size 3 is smaller than the crop 4 x 4"
    assert refused(tmp_path, NCHW, mean=(0.5, 0.5)) == "image mean has 2 numbers for 3 channels; give 1 or 3"
    assert refused(tmp_path, inputs("N", 3, "H", "W")) == (
        f"'{tmp_path}': the model's input 'image' is float32 (N, 3, H, W); "
        "say the images' height and width (crop)"
    )


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 1)
    (tmp_path / "b.jpg").write_bytes(b"text")
    with pytest.raises(DataError) as error:
        list(open_data(tmp_path, NCHW).batches(1))
    assert str(error.value).startswith(f"image '{tmp_path / 'b.jpg'}' cannot be read: ")


def test_images_beside_and_inside_folders(tmp_path: Path) -> None:
    picture(classes(tmp_path) / "stray.png", 1)
    assert refused(tmp_path, NCHW) == (
        f"'{tmp_path}' holds images both beside and inside its folders; use one folder per class or none"
    )


def test_a_missing_pillow_is_told_on_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png", 1)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert refused(tmp_path, NCHW) == "reading images needs Pillow: pip install onnxq[images]"
