"""What `onnxq compare --exact` found, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

SHOWN = 20  # differing tensors of one file


def exactness(result: Mapping[str, Any]) -> list[Table | Text]:
    """One block for each file: the verdict, then the tensors that differ, in the order of execution."""
    parts: list[Table | Text] = []
    for found in result["models"]:
        parts += [Text(), _verdict(found)] if parts else [_verdict(found)]
        differing = list(dict.fromkeys((*found["avx2"]["differences"], *found["runtime"]["differences"])))
        if differing:
            parts += [Text(), _tensors(found, differing)]
    return parts


def _verdict(found: Mapping[str, Any]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("file", Text(found["model"]))
    table.add_row("quantized", f"{found['tensors']} tensors, {found['codes']} codes")
    table.add_row("32-bit sums and AVX2", _sentence(found["avx2"], found["codes"]))
    runtime = found["runtime"]
    near = f"as {runtime['nearest']}: " if not found["same_everywhere"] else ""
    table.add_row("onnxruntime here", Text(near).append_text(_sentence(runtime, found["codes"])))
    if found["unseen"]:
        table.add_row("not compared here", f"{len(found['unseen'])} int8 tensors that only the outputs show")
    if not runtime["same"] and found["float_operators"]:
        table.add_row(
            "float", f"{found['float_operators']} operators stay float, whose sums runtimes order differently"
        )
    return table


def _sentence(side: Mapping[str, Any], codes: int) -> Text:
    """How much differs."""
    if side["same"]:
        return Text("the same codes and outputs", style="green")
    largest = max((o["max_abs"] for o in side["outputs"].values() if o["max_abs"] is not None), default=0.0)
    moved = f"outputs by up to {largest:.4g}"
    if not side["tensors"]:
        return Text(f"the same codes; {moved}", style="yellow")
    share = side["codes"] / codes
    return Text(
        f"{side['codes']} codes ({share:.3%}) in {side['tensors']} tensors differ, first in {side['first']}; {moved}",
        style="yellow",
    )


def _tensors(found: Mapping[str, Any], names: list[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("tensor", overflow="fold")
    for title in ("codes", "AVX2 differs", "by up to", "here differs", "by up to"):
        table.add_column(title, justify="right", no_wrap=True)
    for name in names[:SHOWN]:
        pairs = [found[side]["differences"].get(name) for side in ("avx2", "runtime")]
        values = next(p["values"] for p in pairs if p)
        cells = [str(p[key]) if p else "" for p in pairs for key in ("differing", "largest")]
        table.add_row(Text(name), str(values), *cells)
    if len(names) > SHOWN:
        table.add_row(f"{len(names) - SHOWN} more with --json")
    return table
