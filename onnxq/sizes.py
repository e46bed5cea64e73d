"""Sizes of files: as users write them, and of a program before it is emitted."""

from __future__ import annotations

import re

from onnxq.emission import write_qdq
from onnxq.errors import UsageError
from onnxq.model.skeleton import model_bytes
from onnxq.model.surgeon import to_graph
from onnxq.program import Program, Unit
from onnxq.target import Target

SIZE = re.compile(r"(\d+(?:\.\d*)?)\s*(k|M|G)?B?", re.IGNORECASE)
UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3}
ROOM = 3000  # bytes that later passes and the metadata of a compile add
BIAS = 250, 8  # of the nodes and names of a bias that is corrected into being, and for each channel


def parse_bytes(text: str) -> int:
    """Read a size in decimal units.

    Raises:
        UsageError: the text does not follow the grammar.

    >>> parse_bytes("400KB"), parse_bytes("1.5 MB"), parse_bytes("12000")
    (400000, 1500000, 12000)
    """
    found = SIZE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"cannot read the size {text!r}; it is a number of bytes, kB, MB or GB, as 400kB")
    return int(float(found[1]) * UNITS[(found[2] or "").lower()])


def emitted_bytes(program: Program, target: Target) -> int:
    """About the size of the file that the program becomes, rather too much than too little; the program is not changed."""
    model = program.to_model()
    copy = Program(to_graph(model), model, dict(program.plan), dict(program.units), dict(program.floats))
    write_qdq(copy, target)
    emitted = copy.to_model()
    named = {node.name for node in program.source.graph.node}
    del emitted.graph.value_info[:]
    for node in emitted.graph.node:
        if node.name not in named:
            node.ClearField("name")
    return model_bytes(emitted) + ROOM + sum(_bias_bytes(program, unit) for unit in program.units.values())


def _bias_bytes(program: Program, unit: Unit) -> int:
    """What the bias takes that a layer without one may get."""
    if unit.weight is None or unit.bias is not None or unit.is_table:
        return 0
    codes = program.plan[unit.weight].codes
    assert codes is not None
    return BIAS[0] + BIAS[1] * int(codes.shape[unit.channel_axis])
