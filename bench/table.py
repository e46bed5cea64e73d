"""Write the table of README.md from bench/results/int8.json; `--check` only says whether it is up to date."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"(<!-- table: .*? -->\n).*?(<!-- /table -->)", re.DOTALL)
HEAD = "| model | metric | float | onnxq | `quantize_static`, channel | SQNR dB | size | speed, batch 1 | cpu s to compile |"
RULE = "|---|---|---|---|---|---|---|---|---|"
METRICS = {"ncf": "hit rate@10", "minilm": "Spearman"}


def table(results: dict) -> str:
    """The rows as Markdown; a pair of figures is onnxq / quantize_static, speeds are relative to float."""
    rows = [HEAD, RULE]
    for model, figures in results.items():
        if model == "versions":
            continue
        ours, theirs, plain = figures["onnxq channel"], figures["quantize_static channel"], figures["float"]
        metric = next((m for k, m in METRICS.items() if model.startswith(k)), "top-1")
        cells = (
            model,
            metric,
            f"{100 * plain['metric']:.2f}",
            f"**{100 * ours['metric']:.2f}**",
            f"{100 * theirs['metric']:.2f}" if "metric" in theirs else "fails",
            _pair(ours, theirs, "sqnr_db", ".1f"),
            f"{plain['bytes'] / 1e3:,.0f} -> {ours['bytes'] / 1e3:,.0f} kB",
            _pair(ours, theirs, "speedup_batch1", ".2f", "x"),
            _pair(ours, theirs, "cpu_seconds", ".1f"),
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _pair(ours: dict, theirs: dict, key: str, form: str, unit: str = "") -> str:
    return " / ".join(
        f"{row[key]:{form}}{unit}" if row.get(key) is not None else "-" for row in (ours, theirs)
    )


def main() -> None:
    """Rewrite README.md, or compare with it."""
    readme = ROOT / "README.md"
    old = readme.read_text("utf-8")
    results = json.loads((ROOT / "bench" / "results" / "int8.json").read_text("utf-8"))
    new = MARK.sub(lambda m: f"{m[1]}{table(results)}\n{m[2]}", old)
    if "--check" in sys.argv:
        sys.exit(
            0 if new == old else "README.md differs from bench/results/int8.json: run python bench/table.py"
        )
    readme.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
