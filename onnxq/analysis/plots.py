"""Plots of an analysis, with matplotlib (extra `plots`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.analysis.study import Analysis
from onnxq.errors import OnnxqError, UsageError
from onnxq.files import reason

FORMATS = ("svg", "png", "pdf")
MOST = 24  # tensors of the bar chart


def write_plots(analysis: Analysis, directory: Path, form: str = "svg") -> list[Path]:
    """Write each figure into a file of its own.

    Args:
        directory: made where it does not exist.
        form: svg, png or pdf.

    Raises:
        UsageError: see `check_plots`.
        OnnxqError: a file cannot be written.
    """
    check_plots(form)
    from matplotlib.figure import Figure

    try:
        return _write(analysis, directory, form, Figure)
    except OSError as error:
        raise OnnxqError(f"cannot write plots into {directory}: {reason(error)}") from None


def check_plots(form: str) -> None:
    """Refuse plots that cannot be drawn.

    Raises:
        UsageError: matplotlib is not installed, or there is no such format.
    """
    if form not in FORMATS:
        raise UsageError(f"plots are written as {', '.join(FORMATS)}, not {form!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("plots need matplotlib; install it with: pip install 'onnxq[plots]'")


def _write(analysis: Analysis, directory: Path, form: str, new_figure: Callable[..., Any]) -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in DRAWINGS.items():
        if name == "norms" and not analysis.norms:
            continue
        figure = new_figure(figsize=(7.0, 4.5), layout="constrained")
        draw(analysis, figure.add_subplot())
        path = directory / f"{name}.{form}"
        figure.savefig(path)
        written.append(path)
    return written


def _sensitivity(analysis: Analysis, axes: Any) -> None:
    order = np.argsort(analysis.rise)[-MOST:]
    axes.barh([analysis.names[i] for i in order], [analysis.rise[i] for i in order])
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel(f"change of the {analysis.loss} loss at a step 10 % off")


def _norms(analysis: Analysis, axes: Any) -> None:
    axes.plot(*zip(*analysis.norms, strict=True), marker="o")
    axes.axhline(analysis.loss_start, linestyle="--", color="grey")
    axes.set_xlabel("p of the layer-wise norm (dashed: the plan)")
    axes.set_ylabel(f"{analysis.loss} loss")


def _contour(analysis: Analysis, axes: Any) -> None:
    moves = np.exp(analysis.offsets)
    lines = axes.contourf(moves, moves, np.array(analysis.contour).T, levels=14)
    axes.figure.colorbar(lines, label=f"{analysis.loss} loss")
    axes.set_xlabel(f"step of {analysis.pair[0]} / start")
    axes.set_ylabel(f"step of {analysis.pair[1]} / start")


def _hessian(analysis: Analysis, axes: Any) -> None:
    matrix = np.array(analysis.hessian)
    limit = float(np.abs(matrix).max()) or 1.0
    image = axes.imshow(matrix, cmap="coolwarm", vmin=-limit, vmax=limit)
    places = range(len(analysis.ranked))
    axes.set_xticks(places, analysis.ranked, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(places, analysis.ranked, fontsize=7)
    axes.figure.colorbar(image, label="second derivative over log steps")


DRAWINGS: Mapping[str, Callable[[Analysis, Any], None]] = {
    "sensitivity": _sensitivity,
    "norms": _norms,
    "contour": _contour,
    "hessian": _hessian,
}
