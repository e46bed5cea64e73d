"""The plots of a report, from its JSON; None where it holds no figures for one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log10
from typing import Any

from onnxq.report.svg import Axis, Plot, Point

Json = Mapping[str, Any]
BEYOND = 4.0  # times the budget that was taken, up to where its curve is shown
LEAST_SHOWN = 20.0  # %
CROWDED = 0.1  # of the axis: levels closer than this have their names on either side
MOST_CODES = 32  # more marks than these would be a solid bar


def noise_by_layer(tensors: Sequence[Json], deployed: Mapping[str, float]) -> Plot | None:
    """SQNR of every weight and activation on its own, in the order of the network, and of outputs as deployed.

    Args:
        tensors: rows of the report.
        deployed: SQNR in dB by tensor.
    """
    order = {layer: place for place, layer in enumerate(dict.fromkeys(t["layer"] for t in tensors), 1)}
    weights: list[Point] = []
    activations: list[Point] = []
    for tensor in tensors:
        if tensor["sqnr_db"] is not None:
            series = weights if tensor["kind"] == "weight" else activations
            series.append((float(order[tensor["layer"]]), tensor["sqnr_db"]))
    outputs = [(t["layer"], deployed.get(t["tensor"])) for t in tensors if t["kind"] == "output"]
    line = sorted((float(order[layer]), ratio) for layer, ratio in outputs if ratio is not None)
    found = weights + activations + line
    if not found:
        return None
    x = Axis(0.0, len(order) + 1.0, "layer, in order")
    plot = Plot(x, Axis.around([y for _, y in found], "SQNR, dB"), "SQNR of weights and activations by layer")
    plot.line(line, "line third")
    plot.dots(weights)
    plot.dots(activations, "dot second")
    return plot


def norm_losses(lapq: Json) -> Plot | None:
    """The network's loss against the p of the norm that chose all ranges."""
    points = _known(zip(lapq.get("p_values", ()), lapq.get("p_losses", ()), strict=True))
    if not points:
        return None
    levels = {} if lapq.get("loss_before") is None else {"each tensor alone": lapq["loss_before"]}
    rivals = lapq.get("range_losses") or {}
    if lapq.get("ranges") in rivals:
        levels[f"taken: {lapq['ranges']}"] = rivals[lapq["ranges"]]
    plot = _losses(sorted(points), levels, "p", lapq, "loss against p")
    if lapq.get("p_star") is not None:
        plot.mark(lapq["p_star"], f"taken: p = {lapq['p_star']:.3g}")
    return plot


def convergence(lapq: Json) -> Plot | None:
    """The loss as the joint search went on: it stays until a step is taken."""
    points = _known(lapq.get("history", ()))
    if not points:
        return None
    points.append((max(lapq.get("evaluations") or 0.0, points[-1][0]), points[-1][1]))
    stairs = [points[0]]
    for x, y in points[1:]:
        stairs += [(x, stairs[-1][1]), (x, y)]
    levels = {} if lapq.get("loss_deployed") is None else {"deployed": lapq["loss_deployed"]}
    return _losses(stairs, levels, "evaluations of the loss", lapq, "loss of the joint search", points[:-1])


def error_by_budget(multipoint: Json) -> Plot | None:
    """Output error left against further weights, those that gain most first, to beyond the budget that was taken."""
    points = [(100.0 * x, 100.0 * y) for x, y in _known(multipoint.get("curve") or ())]
    if len(points) < 2:
        return None
    taken = 100.0 * multipoint["budget"], 100.0 * multipoint["error_left"]
    end = min(points[-1][0], max(BEYOND * taken[0], LEAST_SHOWN))
    before = [point for point in points if point[0] <= end]
    x, y = Axis(0.0, max(end, taken[0]), "further weights, %"), Axis(0.0, 105.0, "output error left, %")
    plot = Plot(x, y, "output error left against further weights")
    plot.line(before)
    plot.mark(taken[0], f"taken: {taken[0]:.3g} %")
    plot.dots([taken], "dot second")
    return plot


def distribution(tensor: Json) -> Plot:
    """A histogram with the range that the codes represent, and the codes where they are few."""
    (low, high), (start, end) = tensor["data"], tensor["clip"]
    heights = [log10(1.0 + count) for count in tensor["histogram"]]
    x, y = Axis(min(low, start), max(high, end)), Axis(0.0, 1.05 * max(heights) or 1.0, "log₁₀ (1 + count)")
    plot = Plot(x, y, f"distribution of {tensor['tensor']}")
    plot.bars(heights, low, high)
    if tensor["scales"][0] == tensor["scales"][1] and round((end - start) / tensor["scales"][0]) < MOST_CODES:
        step = tensor["scales"][0]
        plot.rug([start + code * step for code in range(round((end - start) / step) + 1)])
    plot.mark(start, f"smallest code: {start:.4g}")
    plot.mark(end, f"largest code: {end:.4g}")
    return plot


def _losses(
    points: Sequence[Point],
    levels: Mapping[str, float],
    title: str,
    lapq: Json,
    label: str,
    dots: Sequence[Point] | None = None,
) -> Plot:
    """A line of losses, with named levels."""
    x = Axis.around([px for px, _ in points], title)
    y = Axis.around([*(py for _, py in points), *levels.values()], f"loss ({lapq['loss']})", log=True)
    plot = Plot(x, y, label)
    for name, value in levels.items():
        ends = [abs(y.place(points[at][1]) - y.place(value)) for at in (0, -1)]
        near = [other for other in levels.values() if 0.0 < y.place(other) - y.place(value) < CROWDED]
        plot.level(value, name, left=ends[0] > ends[1], below=bool(near))  # where the line is not
    plot.line(points)
    plot.dots(points if dots is None else dots)
    return plot


def _known(pairs: Any) -> list[Point]:
    """Pairs without missing figures."""
    return [(float(x), float(y)) for x, y in pairs if x is not None and y is not None]
