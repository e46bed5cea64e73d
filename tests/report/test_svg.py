"""Plots: where points land, and that they are well-formed."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest

from onnxq.report.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis, Plot


def test_ends_of_the_axes_are_corners_of_the_frame() -> None:
    plot = Plot(Axis(2, 6), Axis(0.01, 100, log=True), "corners")
    assert plot.at(2, 0.01) == pytest.approx((LEFT, HEIGHT - BOTTOM))
    assert plot.at(6, 100) == pytest.approx((WIDTH - RIGHT, TOP))
    assert plot.at(4, 1) == pytest.approx(((LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2))


@pytest.mark.parametrize(
    "axis",
    [
        Axis(0, 1),
        Axis(-3, 7),
        Axis(1e-9, 2e-9),
        Axis(1e-4, 30, log=True),
        Axis(2, 9, log=True),
        Axis(0, 1e12),
    ],
)
def test_ticks_are_few_and_within(axis: Axis) -> None:
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 9
    assert ticks == sorted(ticks)
    assert all(axis.low <= tick <= axis.high for tick in ticks)


def test_an_axis_around_equal_values_has_length() -> None:
    for value in (0.0, 5.0, -2.0):
        axis = Axis.around([value, value], "")
        assert axis.low < value < axis.high


def test_an_axis_with_zero_is_not_logarithmic() -> None:
    assert not Axis.around([0.0, 100.0], "", log=True).log
    assert Axis.around([0.1, 100.0], "", log=True).log


def test_the_picture_is_xml_and_escapes_names() -> None:
    plot = Plot(Axis(0, 1, "<x>"), Axis(0, 1, "a & b"), '"quoted" <label>')
    plot.line([(0, 0), (1, 1)])
    plot.dots([(0.5, 0.5)])
    plot.bars([0.0, 1.0], 0.0, 1.0)
    plot.mark(0.5, "<here>")
    plot.mark(2.0, "outside")
    plot.level(0.5, "<level>")
    plot.level(0.4, "left", left=True, below=True)
    plot.rug([0.1, 5.0])
    tree = ET.fromstring(plot.__html__())
    assert tree.attrib["aria-label"] == '"quoted" <label>'
    texts = [element.text for element in tree.iter("text")]
    assert {"<x>", "a & b", "<level>"} <= set(texts)
    names = {e.text: float(e.attrib["y"]) for e in tree.iter("text") if e.attrib["text-anchor"] == "start"}
    assert names.keys() == {"left"}
    assert names["left"] > plot.at(0, 0.4)[1]  # pixels count downwards
    assert "outside" not in plot.__html__()
    bars = next(e for e in tree.iter("path") if e.attrib["class"] == "bar").attrib["d"]
    assert f"V{TOP:.1f}H" in bars  # the bar of 1 reaches the top
    assert len(list(tree.iter("circle"))) == 1
    assert not math.isnan(float(next(tree.iter("circle")).attrib["cx"]))
