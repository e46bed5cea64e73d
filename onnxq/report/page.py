"""The report as one HTML page that needs nothing else: no network, no other file. What it shows is what the JSON report holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import PurePath
from typing import Any

from jinja2 import Environment, StrictUndefined, Template, UndefinedError

from onnxq.errors import DataError
from onnxq.report.figures import convergence, distribution, error_by_budget, noise_by_layer, norm_losses
from onnxq.report.terminal import SHARES, human_bytes, kept, matching, metric_value

NEEDED = (
    "model",
    "output",
    "target",
    "pipeline",
    "nodes",
    "size",
    "quality",
    "seconds",
    "passes",
    "versions",
)
OPTIONAL: dict[str, Any] = {
    "speed": None,
    "coverage": None,
    "calibration": None,
    "lapq": None,
    "multipoint": None,
    "outputs": None,
    "floor": None,
    "bits": {},
    "kernels": {},
    "tensors": [],
    "layers": None,
    "notes": [],
    "warnings": [],
    "peak_rss_bytes": 0,
}
Json = Mapping[str, Any]


def page(report: Json) -> str:
    """The page of a report, from what `Report.as_json` gives.

    Raises:
        DataError: it is no such report, or a damaged one.
    """
    missing = [key for key in NEEDED if key not in report] if isinstance(report, Mapping) else list(NEEDED)
    if missing:
        raise DataError(f"it is no report of `onnxq compile --report`: it lacks {missing[0]!r}")
    report = {**OPTIONAL, **report}
    try:
        report["quality"] = {"metric": None, **report["quality"]}
        return _template().render(
            report=report,
            title=PurePath(report["output"] or report["model"] or "model in memory").name,
            tiles=_tiles(report),
            layers=_layers(report),
            reasons=_reasons(report["nodes"]),
            noise=noise_by_layer(report["tensors"], (report["layers"] or {}).get("deployed_db") or {}),
            alone=_alone(report["layers"]),
            matching=matching(report["outputs"]) if report["outputs"] else "",
            kept=kept(report["floor"]) if report["floor"] else "",
            norm=norm_losses(report["lapq"] or {}),
            search=convergence(report["lapq"] or {}),
            points=error_by_budget(report["multipoint"] or {}),
            distributions=_distributions(report["tensors"]),
        )
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        ArithmeticError,
        UndefinedError,
    ) as error:
        raise DataError(f"the report is damaged: {type(error).__name__}: {error}") from error


def _template() -> Template:
    text = resources.files("onnxq.report").joinpath("page.html.jinja").read_text("utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "bytes": human_bytes,
        "percent": lambda share: f"{share:.1%}",
        "figure": _figure,
        "db": lambda value: "" if value is None else f"{value:.1f}",
    }
    return environment.from_string(text)


def _figure(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _tiles(report: Json) -> list[tuple[str, str, str]]:
    """Title, figure and explanation of what matters most; what was not measured is left out."""
    size, quality, speed = report["size"], report["quality"], report["speed"]
    before, after = size["float_bytes"], size["quantized_bytes"]
    sizes = f"{human_bytes(before)} → {human_bytes(after)}"
    tiles = [("Size", f"{before / after:.2f}x" if after else "", sizes)]
    if speed is not None:
        times = f"{speed['ms_a']:.3g} ms → {speed['ms_b']:.3g} ms, batch 1, one thread"
        tiles.append(("Speed", f"{speed['speedup']:.2f}x", times))
    if quality["metric"] is not None:
        tiles.append(_accuracy(quality["metric"]))
    samples = f"{quality['samples']} calibration samples against float"
    if quality["agreement"] is not None:
        tiles.append(("Top-1 agreement", f"{quality['agreement']:.1%}", samples))
    if quality["sqnr_db"] is not None:
        tiles.append(("Output SQNR", f"{quality['sqnr_db']:.1f} dB", samples))
    if report["coverage"] is not None:
        tiles.append(("In integers", f"{report['coverage']:.1%}", "of multiply-adds"))
    return tiles


def _accuracy(found: Json) -> tuple[str, str, str]:
    name = found["metric"]
    before, after = (metric_value(name, found[key]) for key in ("float", "quantized"))
    title = SHARES.get(name, name.rpartition(":")[2])
    return title, after, f"{before} in float, {found['samples']:,} test samples"


def _layers(report: Json) -> list[dict[str, Any]]:
    """Each node with its widths, the noise of its weight and output, and what it costs alone; of several outputs the worst."""
    noise: dict[str, dict[str, float]] = {}
    measured = report["layers"] or {"deployed_db": {}, "alone_db": {}}
    for row in report["tensors"]:
        deployed = measured["deployed_db"].get(row["tensor"]) if row["kind"] == "output" else None
        for column, value in ((row["kind"], row["sqnr_db"]), ("deployed", deployed)):
            if value is not None:
                found = noise.setdefault(row["layer"], {})
                found[column] = min(value, found.get(column, value))
    columns = ("weight", "output", "deployed")
    return [
        {
            **node,
            "bits": report["bits"].get(node["name"], ""),
            **{column: noise.get(node["name"], {}).get(column) for column in columns},
            "alone": measured["alone_db"].get(node["name"]),
        }
        for node in report["nodes"]
    ]


def _alone(layers: Json | None) -> str:
    """How the cost of layers alone was measured; empty where it was not."""
    if not layers or not layers["count"]:
        return ""
    found = (
        f"the SQNR of the network's output when that layer alone is quantized ({layers['samples']} samples"
    )
    done = len(layers["alone_db"])
    return found + (")" if done == layers["count"] else f"; time for {done} of {layers['count']} layers)")


def _reasons(nodes: Sequence[Json]) -> list[dict[str, Any]]:
    """Why nodes are not in integers: the most frequent reason first, with its operators."""
    groups: dict[str, list[Json]] = {}
    for node in nodes:
        if node["status"] != "integer":
            groups.setdefault(node["reason"], []).append(node)
    ranked = sorted(groups.items(), key=lambda group: -len(group[1]))
    return [
        {"reason": reason, "count": len(members), "ops": Counter(m["op"] for m in members).most_common()}
        for reason, members in ranked
    ]


def _distributions(tensors: Sequence[Json]) -> dict[str, list[tuple[Json, Any]]]:
    """Tensors with a histogram and its picture, by kind."""
    shown = [(tensor, distribution(tensor)) for tensor in tensors if tensor["histogram"]]
    return {
        "Weights": [pair for pair in shown if pair[0]["kind"] == "weight"],
        "Activations": [pair for pair in shown if pair[0]["kind"] != "weight"],
    }
