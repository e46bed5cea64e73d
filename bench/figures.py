"""Draw the figures of README.md and docs/ from bench/results/*.json into docs/figures/; `--check` only says whether they are
up to date.

    python bench/figures.py        needs the extra `plots`

A figure ends in the digest of the results that it was drawn from.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peers.tables import TOOLS, best, metric_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
NETWORKS = {
    "cifar10_resnet20": "ResNet-20",
    "cifar10_resnet56": "ResNet-56",
    "imagenet_squeezenet1_1": "SqueezeNet 1.1",
    "imagenet_mobilenetv1_025": "MobileNetV1-0.25",
    "kws_dscnn": "DS-CNN",
    "minilm_l6_v2": "MiniLM",
    "ncf_ml1m_mlp": "NCF",
}
SETTINGS = ("w8a8", "w4a8", "w4a4")
MARKS = dict(zip(TOOLS, ("o", "s", "^", "D", "v", "P"), strict=True))
COLOURS = dict(zip(TOOLS, ("#c05621", "#2563b8", "#2f855a", "#805ad5", "#b7791f", "#718096"), strict=True))
BUDGETS = (0, 2, 5, 10, 20, 40)


def tools(results: Mapping[str, Any]) -> Figure:
    """The best metric of each tool by model and setting; a tool without a mark has no file that runs."""
    models = [name for name in NETWORKS if name in results]
    figure, axes = _panels(-(-len(models) // 4), min(len(models), 4))
    for axis, model in zip(axes.ravel(), models, strict=False):
        _float(axis, results[model])
        for place, tool in enumerate(TOOLS):
            found = [best(results[model].get(setting, {}), tool) for setting in SETTINGS]
            x = [i + (place - 2.5) * 0.11 for i, row in enumerate(found) if row is not None]
            y = [100 * row[1]["metric"] for row in found if row is not None]
            axis.plot(x, y, MARKS[tool], color=COLOURS[tool], markersize=5, label=TOOLS[tool])
        axis.set_xticks(range(len(SETTINGS)), SETTINGS)
        axis.set_xlim(-0.5, len(SETTINGS) - 0.5)
        axis.set_title(NETWORKS[model])
        axis.set_ylabel(f"{metric_name(model)}, %")
    for spare in axes.ravel()[len(models) :]:
        spare.set_axis_off()
    _legend(figure, axes[0, 0])
    return figure


def sizes(results: Mapping[str, Any]) -> Figure:
    """Top-1 and SQNR against file size: plain widths, and channels with further points, at 8 bits for activations."""
    plain = [f"w{bits}a8 channel 0% chosen" for bits in range(2, 9)]
    models = [name for name in NETWORKS if results.get(name, {}).keys() >= set(plain)]
    figure, axes = _panels(2, len(models))
    curves = {"one point of 2 to 8 bits": plain}
    for bits in (2, 3, 4):
        curves[f"{bits} bits, further points"] = [f"w{bits}a8 channel {b}% chosen" for b in BUDGETS]
    for (top, bottom), model in zip(axes.T, models, strict=True):
        _float(top, results[model])
        for (label, keys), colour in zip(curves.items(), COLOURS.values(), strict=False):
            rows = [results[model][key] for key in keys if key in results[model]]
            x = [row["bytes"] / 1e3 for row in rows]
            look = {"color": colour, "markersize": 3.5, "linewidth": 1.2, "label": label}
            top.plot(x, [100 * row["metric"] for row in rows], "o-", **look)
            bottom.plot(x, [row["sqnr_db"] for row in rows], "o-", **look)
        top.set_title(NETWORKS[model])
        top.set_ylabel("top-1, %")
        bottom.set_ylabel("SQNR, dB")
        bottom.set_xlabel("file, kB")
    _legend(figure, axes[0, 0])
    return figure


def _float(axis: Axes, rows: Mapping[str, Any]) -> None:
    axis.axhline(100 * rows["float"]["metric"], color="#4a5568", linewidth=0.9, linestyle="--", label="float")


def _panels(lines: int, columns: int) -> tuple[Figure, Any]:
    """A figure with a grid of panels, (lines, columns)."""
    import matplotlib  # an extra, and --check does without

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "onnxq", "font.size": 8, "axes.titlesize": 9})
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(2.6 * columns, 2.1 * lines + 0.4), squeeze=False, layout="constrained"
    )
    for axis in axes.ravel():
        axis.grid(axis="y", color="#e2e8f0", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    columns = min(len(labels), int(figure.get_figwidth() // 1.4))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


FIGURES: dict[str, tuple[str, Callable[[Mapping[str, Any]], Figure]]] = {
    "tools.svg": ("peers.json", tools),
    "sizes.svg": ("multipoint.json", sizes),
}


def main() -> None:
    """Draw all, or compare digests."""
    for name, (source, draw) in FIGURES.items():
        path, text = ROOT / "docs" / "figures" / name, (RESULTS / source).read_bytes()
        stamp = f"<!-- {source} {hashlib.sha256(text).hexdigest()} -->\n"
        if "--check" in sys.argv:
            if not path.exists() or not path.read_text("utf-8").endswith(stamp):
                sys.exit(f"{path.name} is not of {source} as it stands: run python bench/figures.py")
            continue
        path.parent.mkdir(exist_ok=True)
        draw(json.loads(text)).savefig(path, metadata={"Date": None})
        path.write_text(path.read_text("utf-8") + stamp, "utf-8")


if __name__ == "__main__":
    main()
