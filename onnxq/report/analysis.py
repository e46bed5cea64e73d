"""An analysis as a table for the terminal."""

from __future__ import annotations

import numpy as np
from rich.table import Table
from rich.text import Text

from onnxq.analysis import Analysis

SHOWN = 10


def sensitivity_table(analysis: Analysis) -> Table:
    """The tensors whose steps matter most."""
    title = f"{analysis.loss} loss {analysis.loss_start:.4g}, of the float model {analysis.loss_float:.4g}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("step of")
    for heading in ("a step 10 % off", "better step alone"):
        table.add_column(heading, justify="right")
    whole = max(abs(analysis.loss_start), 1e-300)
    for place in np.argsort(analysis.rise)[::-1][:SHOWN]:
        name = Text(analysis.names[place])
        table.add_row(name, f"{analysis.rise[place] / whole:+.1%}", f"{-analysis.gain[place] / whole:.1%}")
    left = len(analysis.names) - SHOWN
    if left > 0:
        table.add_row(Text(f"and {left} more"), "", "")
    return table
