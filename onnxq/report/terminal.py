"""The report as tables for the terminal. Texts from models are printed as they are, never read as markup."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from onnxq.measure.compare import OutputDifference
from onnxq.measure.metrics import Accuracy
from onnxq.report.model import NodeRow, Report

SHOWN_OPS = 12
SHOWN_SHARE = 0.001  # types of parameters that take less than this are left out


def human_bytes(count: float) -> str:
    """Bytes in decimal units.

    >>> human_bytes(1_092_290), human_bytes(999_999), human_bytes(12)
    ('1.09 MB', '1 MB', '12 B')
    """
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.5 or unit == "GB":
            break
    return f"{count:.0f} {unit}" if count >= 100 else f"{count:.3g} {unit}"


SHARES = {"top1": "Top-1", "top5": "Top-5"}  # metrics that are shares of samples


def metric_value(metric: str, value: float | None) -> str:
    """A metric's value: shares in per cent.

    >>> metric_value("top1", 0.915), metric_value("mse", 0.0123456), metric_value("mse", None)
    ('91.50%', '0.01235', 'not finite')
    """
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:.2%}" if metric in SHARES else f"{value:.4g}"


def summary(report: Report) -> Table:
    """A few lines: size, coverage, quality, accuracy, speed, time."""
    table = _facts()
    ratio = report.float_bytes / report.quantized_bytes if report.quantized_bytes else 0.0
    sizes = f"{human_bytes(report.float_bytes)} -> {human_bytes(report.quantized_bytes)}"
    table.add_row("size", f"{sizes}, {ratio:.2f}x smaller" if ratio >= 1 else f"{sizes}, larger than before")
    counts = f"{_integer(report.nodes)} of {len(report.nodes)} nodes"
    if report.coverage is None:
        table.add_row("integer", f"{counts} by the rules of {report.target}, on which it was not run")
    else:
        share = report.coverage.share
        table.add_row("integer", counts if share is None else f"{share:.1%} of multiply-adds, {counts}")
    if report.bits:
        table.add_row("bits", Text(widths(report.bits)))
    if report.difference is not None and report.difference.main is not None:
        main, samples = report.difference.main, report.difference.samples
        agreement = "" if main.agreement is None else f", top-1 agreement {main.agreement:.1%}"
        where = "" if report.coverage else " in onnxruntime"
        table.add_row("quality", f"{_figure(main)}{agreement} ({samples} samples against float{where})")
    if report.floor is not None:
        table.add_row("floor", kept(report.floor.as_json()))
    if report.accuracy is not None:
        table.add_row("accuracy", Text(_accuracy(report.accuracy)))
    if report.lapq is not None:
        table.add_row("steps", Text(_search(report.lapq)))
    if report.outputs is not None:
        table.add_row("layers", Text(matching(report.outputs)))
    if report.multipoint is not None:
        table.add_row("points", Text(_points(report.multipoint)))
    if report.speed is not None:
        times = f"{_ms(report.speed.ms_a)} -> {_ms(report.speed.ms_b)}"
        slow = "" if report.speed.speedup >= 1 else ", slower than float here"
        table.add_row("speed", f"{times}, {report.speed.speedup:.2f}x{slow} (batch 1, one thread)")
    seconds, peak = sum(report.seconds.values()), human_bytes(report.peak_rss_bytes)
    table.add_row("time", f"{seconds:.1f} s, peak memory {peak}")
    return table


def widths(bits: Mapping[str, str]) -> str:
    """How many layers have which widths, the most frequent first, with the reasons of exceptions.

    >>> widths({"a": "w8a8 (first layer)", "b": "w4a4", "c": "w4a4"})
    'w4a4 in 2 layers, w8a8 in 1 (first layer)'
    """
    layers: dict[str, list[str]] = {}
    for text in bits.values():
        width, _, why = text.partition(" ")
        layers.setdefault(width, []).append(why.strip("()"))
    said: list[str] = []
    for width, whys in sorted(layers.items(), key=lambda item: -len(item[1])):
        reason = ", ".join(dict.fromkeys(filter(None, whys)))
        count = f"{len(whys)} layers" if not said else str(len(whys))
        said.append(f"{width} in {count}" + (f" ({reason})" if reason else ""))
    return ", ".join(said)


def kept(floor: Mapping[str, Any]) -> str:
    """What it took to keep an SQNR, attempt by attempt.

    >>> tries = [{"sqnr_db": 13.2, "bytes": 9000}, {"sqnr_db": 25.4, "bytes": 12000}]
    >>> kept({"min_sqnr_db": 25.0, "tries": tries, "raised": {"a": "w6a8", "b": "float"}})
    '25 dB kept by more bits in 1 layer and 1 layer in float (13.2 dB in 9 kB, 25.4 dB in 12 kB)'
    >>> kept({"min_sqnr_db": 10.0, "tries": tries[:1], "raised": {}})
    '10 dB kept without more bits'
    """
    wanted, widths = f"{floor['min_sqnr_db']:g} dB kept", list(floor["raised"].values())
    floats = widths.count("float")
    more = len(widths) - floats
    parts = [f"more bits in {_layers(more)}"] if more else []
    parts += [f"{_layers(floats)} in float"] if floats else []
    tries = ", ".join(f"{_db(t['sqnr_db'])} in {human_bytes(t['bytes'])}" for t in floor["tries"])
    return f"{wanted} by {' and '.join(parts)} ({tries})" if parts else f"{wanted} without more bits"


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"


def _db(value: float | None) -> str:
    return "none" if value is None or not math.isfinite(value) else f"{value:.1f} dB"


def _accuracy(found: Accuracy) -> str:
    before, after = (metric_value(found.metric, value) for value in (found.before, found.after))
    return f"{found.metric} {before} -> {after} ({found.samples:,} test samples)"


def matching(found: Mapping[str, Any]) -> str:
    """Whether outputs of layers were matched with float, and what that does to the noise of the network's output.

    >>> matching({"matched": True, "sqnr_db": [13.4, 16.12]})
    'outputs matched with float (SQNR 16.1 dB, without that 13.4 dB)'
    >>> matching({"matched": False, "sqnr_db": [8.0, None]})
    'outputs not matched with float (SQNR 8.0 dB, with that none)'
    """
    start = f"outputs {'' if found['matched'] else 'not '}matched with float"
    if found["sqnr_db"] is None:
        return start
    without, with_it = ("none" if value is None else f"{value:.1f} dB" for value in found["sqnr_db"])
    if found["matched"]:
        return f"{start} (SQNR {with_it}, without that {without})"
    return f"{start} (SQNR {without}, with that {with_it})"


def _points(found: Mapping[str, Any]) -> str:
    """How many channels have further points, and what those cost."""
    tensors = {channel["tensor"] for channel in found["channels"]}
    weights = f"{found['extra_weights']:,} more weights ({found['budget']:.1%})"
    where = f"{len(found['channels'])} channels of {len(tensors)} layers have several"
    return f"{where}: {weights}, {found['bits_mean']:.2f} bits a weight on average"


def point_table(report: Report, most: int = 10) -> Table | None:
    """Layers with channels of several points, those with the most further weights first; None without any."""
    layers = {n: v for n, v in (report.multipoint or {}).get("layers", {}).items() if v["with_points"]}
    if not layers:
        return None
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("further points", overflow="fold")
    for title in ("channels", "weights", "output SQNR"):
        table.add_column(title, justify="right", no_wrap=True)
    ranked = sorted(layers.items(), key=lambda item: -item[1]["extra_weights"])
    for name, row in ranked[:most]:
        sqnr = f"{row['sqnr_db_before']:.1f} -> {row['sqnr_db_after']:.1f} dB"
        channels = f"{row['with_points']} of {row['channels']}"
        table.add_row(Text(name), channels, f"{row['extra_weights']:,}", sqnr)
    if len(ranked) > most:
        table.add_row(f"{len(ranked) - most} more layers with --report or --json")
    return table


def _search(found: Mapping[str, Any]) -> str:
    """What the joint search of steps did to the loss."""
    start = found.get("loss_before", found.get("loss_start"))
    ends = f"{found['loss']} {start:.4g} -> {found['loss_end']:.4g}" if "loss_end" in found else found["loss"]
    deployed = f", {found['loss_deployed']:.4g} deployed" if "loss_deployed" in found else ""
    cost = (
        f" ({found['evaluations']:.0f} evaluations, {found['seconds']:.0f} s)"
        if "evaluations" in found
        else ""
    )
    return f"{ends}{deployed}{cost}"


def reasons(rows: Sequence[NodeRow], most: int = 10) -> Table | None:
    """Nodes that are not in integers, grouped by reason; None when there are none."""
    groups: dict[str, list[NodeRow]] = {}
    for row in rows:
        if row.status != "integer":
            groups.setdefault(row.reason, []).append(row)
    if not groups:
        return None
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("", Text("not in integers", style="bold"))
    ranked = sorted(groups.items(), key=lambda item: -len(item[1]))
    for reason, members in ranked[:most]:
        table.add_row(str(len(members)), Text(f"{reason}\n").append(_members(members), style="dim"))
    if len(ranked) > most:
        table.add_row("", f"{len(ranked) - most} more reasons with --report or --json")
    return table


def comparison(result: Mapping[str, Any]) -> Table:
    """Outputs of two models side by side, from what `compare_files` returns."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("output", overflow="fold")
    for title in ("SQNR", "top-1 agreement", "largest difference"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, figures in result["outputs"].items():
        ratio = figures["sqnr_db"]
        sqnr = "equal" if figures["equal"] else "none" if ratio is None else f"{ratio:.2f} dB"
        agreement = "" if figures["agreement"] is None else f"{figures['agreement']:.2%}"
        largest = "not finite" if figures["max_abs"] is None else f"{figures['max_abs']:.4g}"
        table.add_row(Text(name), sqnr, agreement, largest)
    return table


def inspection(result: Mapping[str, Any]) -> list[Table | Text]:
    """What `inspect_file` found: the model, what stays float and why, hazards."""
    table = _facts()
    opset = "none" if result["opset"] is None else str(result["opset"])
    domains = "".join(f", {domain} {version}" for domain, version in result["domains"].items())
    table.add_row("opset", Text(f"{opset}{domains} (IR version {result['ir_version']})"))
    for kind in ("inputs", "outputs"):
        table.add_row(kind, Text("\n".join(_value(value) for value in result[kind])))
    for kind in ("ops", "kernels"):
        if result[kind] is not None:
            table.add_row(kind, Text(_counts(result[kind])))
    table.add_row("parameters", _storage(result["parameters"]))
    rows = [NodeRow(**row) for row in result["nodes"] or ()]
    if result["nodes"] is not None:
        table.add_row(result["target"], f"{_integer(rows)} of {len(rows)} nodes would run in integers")
    parts: list[Table | Text] = [table]
    left = reasons(rows)
    if left is not None:
        parts += [Text(), left]
    if result["hazards"]:
        parts += [Text(), _bullets("hazards", result["hazards"])]
    return parts


def pass_table(result: Mapping[str, Any]) -> Table:
    """Passes with their options, from what `list_passes` returns."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for index, entry in enumerate(result["passes"]):
        if index:
            table.add_row()
        table.add_row(Text(entry["name"], style="bold"), Text(entry["help"]))
        for option in entry["options"]:
            kind = f"({option['type']}, default {_default(option['default'])})"
            table.add_row(
                Text(f"  {option['name']}"), Text(f"{option['help']} ".lstrip()).append(kind, style="dim")
            )
    return table


def _default(value: Any) -> str:
    """A default as pipeline text has it."""
    text = "|".join(map(str, value)) if isinstance(value, list) else str(value)
    return {"None": "none", "True": "true", "False": "false", "": "nothing"}.get(text, text)


def _facts() -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _bullets(title: str, sentences: Sequence[str]) -> Table:
    table = Table(title, box=None, padding=(0, 2, 0, 0), header_style="bold yellow")
    for sentence in sentences:
        table.add_row(Text(sentence))
    return table


def _integer(rows: Sequence[NodeRow]) -> int:
    return Counter(row.status for row in rows)["integer"]


def _figure(main: OutputDifference) -> str:
    if main.noise == 0.0:
        return "equal outputs"
    return "the float output is all zero" if main.sqnr_db is None else f"SQNR {main.sqnr_db:.1f} dB"


def _ms(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _value(value: Mapping[str, Any]) -> str:
    if value["shape"] is None:
        return f"{value['name']}  {value['dtype']}"
    sizes = ", ".join("?" if size is None else str(size) for size in value["shape"])
    return f"{value['name']}  {value['dtype']} ({sizes})"


def _counts(counts: Mapping[str, int]) -> str:
    shown = [f"{op}({count})" for op, count in counts.items()]
    more = f" and {len(shown) - SHOWN_OPS} more" if len(shown) > SHOWN_OPS else ""
    return (", ".join(shown[:SHOWN_OPS]) + more) or "none"


def _storage(sizes: Mapping[str, int]) -> str:
    total = sum(sizes.values())
    shown = [f"{name} {human_bytes(size)}" for name, size in sizes.items() if size > SHOWN_SHARE * total]
    return ", ".join(shown) or "none"


def _members(rows: Sequence[NodeRow]) -> str:
    """Nodes of one kind by name, of several kinds by their numbers."""
    ops = Counter(row.op for row in rows)
    if len(ops) > 1:
        return ", ".join(f"{op}({count})" for op, count in ops.most_common())
    more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    return f"{rows[0].op} {rows[0].name}{more}"
