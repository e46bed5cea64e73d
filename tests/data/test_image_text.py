"""Image options as text."""

from __future__ import annotations

import pytest

from onnxq.data.image_text import parse_image_options
from onnxq.data.images import ImageOptions
from onnxq.errors import UsageError


def test_every_option() -> None:
    text = "size=256, crop=224x192, scale=1/127.5, mean=0.485|0.456|1, std=0.5, layout=nhwc, color=bgr, resample=bicubic"
    assert parse_image_options(text) == ImageOptions(
        size=256,
        crop=(224, 192),
        scale=1 / 127.5,
        mean=(0.485, 0.456, 1.0),
        std=(0.5,),
        layout="nhwc",
        color="bgr",
        resample="bicubic",
    )


def test_nothing_is_the_defaults() -> None:
    assert parse_image_options("") == ImageOptions()


def test_one_side_is_a_square() -> None:
    assert parse_image_options("crop=32").crop == (32, 32)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sise=2", "unknown image option 'sise'; did you mean 'size'"),
        ("size", "image option 'size' has no value; write size=VALUE"),
        ("size=", "image option 'size' has no value; write size=VALUE"),
        ("size=2,size=3", "image option 'size' is given twice"),
        ("size=2.5", "image option 'size' takes whole pixels, not '2.5'"),
        ("size=-2", "image option 'size' takes whole pixels, not '-2'"),
        ("crop=1x2x3", "image option 'crop' takes a side or HEIGHTxWIDTH, not '1x2x3'"),
        ("crop=0", "image crop must be at least 1 pixel, not 0"),
        ("mean=1|a", "image option 'mean' takes numbers, not 'a'"),
        ("scale=1/0", "image option 'scale' takes numbers, not '1/0'"),
        ("scale=nan", "image option 'scale' takes numbers, not 'nan'"),
        ("color=rbg", "unknown image color 'rbg'; did you mean 'rgb'"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_image_options(text)
    assert str(caught.value).startswith(sentence)
