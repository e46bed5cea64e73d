"""Tables of the comparison with other tools: the best of each, every row, more images, costs, who is ahead where."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]
OURS = "onnxq"
TOOLS = {
    "onnxq": "onnxq",
    "onnxruntime": "onnxruntime",
    "nncf": "NNCF",
    "aimet": "AIMET",
    "quark": "Quark",
    "onnxsim": "onnxsim",
}
MEASURED = ("onnxruntime", "nncf", "quark", "onnxsim")  # all that a comparison needs; AIMET takes hours
METRICS = {"ncf": "hit rate@10", "minilm": "Spearman"}
LEAST_P = 0.001  # told
SLACK = 0.95  # of a speed-up; medians of the same file differ by as much
FULL = (
    "tool: way | {} | agreement | SQNR dB | kB | speed, batch 1 | batch 32 | layers int / float | cpu s | MB"
)


def metric_name(model: str) -> str:
    """What the test data of a model measures."""
    return next((name for start, name in METRICS.items() if model.startswith(start)), "top-1")


def models(results: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Models with their float row and settings."""
    return ((name, found) for name, found in results.items() if name not in ("versions", "seconds"))


def settings(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Row]]]:
    """Settings of a model with their rows."""
    return ((name, rows) for name, rows in found.items() if name != "float")


def best(rows: dict[str, Row], tool: str) -> tuple[str, Row] | None:
    """The way and row of a tool with the highest metric, then the highest SQNR; None when it has no model that runs."""
    own = {name.partition(": ")[2]: row for name, row in rows.items() if name.startswith(f"{tool}: ")}
    running = {way: row for way, row in own.items() if "failed" not in row}
    return max(running.items(), key=lambda item: (item[1]["metric"], item[1]["sqnr_db"]), default=None)


def asked(rows: dict[str, Row], tool: str) -> bool:
    """Whether there is any row of a tool."""
    return any(name.startswith(f"{tool}: ") for name in rows)


def summary(results: dict[str, Any]) -> str:
    """The best of each tool, a row for each model and setting: metric, file size and speed-up over float for one sample."""
    rows = [_line(("model", "setting", "float", *TOOLS.values())), "|---" * (len(TOOLS) + 3) + "|"]
    for model, found in models(results):
        for setting, ways in settings(found):
            cells = (_short(best(ways, tool)) if asked(ways, tool) else "not measured" for tool in TOOLS)
            rows.append(_line((model, setting, f"{100 * found['float']['metric']:.2f}", *cells)))
    return "\n".join(rows)


def short(results: dict[str, Any]) -> str:
    """The best of onnxq beside the best of all other tools, where both have a file that runs or only onnxq has."""
    rows = [_line(("model", "bits", "float", "onnxq", "best of the others")), "|---" * 5 + "|"]
    for model, found in models(results):
        for setting, ways in settings(found):
            ours = best(ways, OURS)
            theirs = {tool: row[1] for tool in list(TOOLS)[1:] if (row := best(ways, tool)) is not None}
            if setting == "w8a8-tensor" or ours is None or not all(asked(ways, tool) for tool in MEASURED):
                continue
            ahead = max(
                theirs, key=lambda tool: (theirs[tool]["metric"], theirs[tool]["sqnr_db"]), default=None
            )
            other = "no file that runs" if ahead is None else f"{TOOLS[ahead]}: {_alike(theirs[ahead])}"
            rows.append(
                _line((model, setting, f"{100 * found['float']['metric']:.2f}", _alike(ours[1]), other))
            )
    return "\n".join(rows)


def full(results: dict[str, Any]) -> str:
    """A table for each model and setting with all rows, best first, then the reasons of those that have no model."""
    parts = []
    for model, found in models(results):
        plain = found["float"]
        parts.append(f"### {model}\n\nFloat: {100 * plain['metric']:.2f}, {plain['bytes'] / 1e3:,.0f} kB.")
        for setting, ways in settings(found):
            head = FULL.format(metric_name(model))
            table = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
            running = {name: row for name, row in ways.items() if "failed" not in row}
            order = sorted(
                running, key=lambda name: (running[name]["metric"], running[name]["sqnr_db"]), reverse=True
            )
            table += [_line(_long(name, running[name])) for name in order]
            reasons = [f"- {name}: {row['failed']}" for name, row in ways.items() if "failed" in row]
            parts += [f"#### {model}, {setting}", "\n".join(table), "\n".join(reasons)]
    return "\n\n".join(part for part in parts if part)


def behind(results: dict[str, Any]) -> str:
    """Where the best row of another tool beats our best one: in the metric, or with an equal one in size or speed."""
    head = ("model", "setting", "onnxq", "other tool", "ahead in")
    rows = [_line(head), "|---" * len(head) + "|"]
    for model, found in models(results):
        for setting, ways in settings(found):
            ours = best(ways, OURS)
            for tool in list(TOOLS)[1:]:
                theirs = best(ways, tool)
                ahead = lead(ours[1], theirs[1]) if ours and theirs else []
                if ours and theirs and ahead:
                    cells = (
                        f"{ours[0]}: {_worth(ours[1])}",
                        f"{TOOLS[tool]}, {theirs[0]}: {_worth(theirs[1])}",
                    )
                    rows.append(_line((model, setting, *cells, ", ".join(ahead))))
    return "\n".join(rows)


def many(results: dict[str, Any]) -> str:
    """The best of each tool on ten times as many images: metric, agreement, and p that it is as good as the best of onnxq."""
    rows = [_line(("model", "setting", "float", *TOOLS.values())), "|---" * (len(TOOLS) + 3) + "|"]
    for model, found in models(results):
        for setting, ways in settings(found):
            cells = (_luck(best(ways, tool)) for tool in TOOLS)
            rows.append(_line((model, setting, f"{100 * found['float']['metric']:.2f}", *cells)))
    return "\n".join(rows)


def _luck(found: tuple[str, Row] | None) -> str:
    if found is None:
        return "-"
    row = found[1]
    p = "" if "p" not in row else f", p {row['p']:.2g}" if row["p"] >= LEAST_P else f", p < {LEAST_P}"
    return f"{100 * row['metric']:.2f} ({100 * row['agreement']:.1f} %{p})"


def costs(results: dict[str, Any]) -> str:
    """CPU seconds and peak memory of a compile to 8 bits, those of other tools also as multiples of ours."""
    tools = list(next(found for _, found in models(results)))
    rows = [_line(("model", *(TOOLS[tool] for tool in tools))), "|---" * (len(tools) + 1) + "|"]
    for model, found in models(results):
        rows.append(_line((model, *(_cost(tool, found[tool]) for tool in tools))))
    return "\n".join(rows)


def _cost(tool: str, row: Row) -> str:
    if "failed" in row:
        return "fails"
    text = f"{row['cpu_seconds']:.2f} s, {row['peak_mb']:.0f} MB"
    if tool == OURS:
        return text
    return f"{text} ({row['cpu_seconds_over_onnxq']:.2f}x, {row['peak_mb_over_onnxq']:.2f}x)"


def lead(ours: Row, theirs: Row) -> list[str]:
    """What another row has more of: the metric; or, where it is no worse in that, size and speed for one sample and for 32."""
    if theirs["metric"] > ours["metric"]:
        return ["accuracy"]
    if theirs["metric"] < ours["metric"]:
        return []
    found = ["size"] if theirs["bytes"] < ours["bytes"] else []
    for batch, name in (("1", "speed"), ("32", "speed at batch 32")):
        key = f"speedup_batch{batch}"
        if key in ours and ours[key] < SLACK * theirs[key]:
            found.append(name)
    return found


def _short(found: tuple[str, Row] | None) -> str:
    return "-" if found is None else _cell(found[1])


def _cell(row: Row) -> str:
    return f"{100 * row['metric']:.2f}, {_size_and_speed(row)}"


def _worth(row: Row) -> str:
    agreement = "" if row["agreement"] is None else f"{100 * row['agreement']:.1f} %, "
    return f"{100 * row['metric']:.2f} ({agreement}{row['sqnr_db']:.1f} dB), {_size_and_speed(row)}"


def _size_and_speed(row: Row) -> str:
    return f"{row['bytes'] / 1e3:,.0f} kB, {row['speedup_batch1']:.2f}x"


def _alike(row: Row) -> str:
    """Metric in bold, agreement where it is known, size and speed."""
    agreement = "" if row["agreement"] is None else f"{100 * row['agreement']:.1f} %, "
    return f"**{100 * row['metric']:.2f}**, {agreement}{_size_and_speed(row)}"


def _long(name: str, row: Row) -> Iterator[str]:
    yield name + (f" ({row['note']})" if "note" in row else "")
    yield f"{100 * row['metric']:.2f}"
    yield "-" if row["agreement"] is None else f"{100 * row['agreement']:.1f}"
    yield f"{row['sqnr_db']:.1f}"
    yield f"{row['bytes'] / 1e3:,.0f}"
    yield f"{row['speedup_batch1']:.2f}x"
    yield f"{row['speedup_batch32']:.2f}x" if "speedup_batch32" in row else "-"
    yield f"{row.get('integer_kernels', '?')} / {row.get('float_kernels', '?')}"
    yield f"{row['cpu_seconds']:,.1f}"
    yield f"{row['peak_mb']:,.0f}"


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"
