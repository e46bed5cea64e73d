"""Rows of embedding tables that have several points.

Codes of a table are looked up and multiplied as they are, so all of its rows lie on the grid of the activation that they become.
Here that grid is made finer, by a factor at which the old codes are codes still: with b bits to a point and at most n points,

    code = sum_i r^(n-i) q_i,     r = 2^min(b, 8-b),

so a row of one point is a multiple of r^(n-1), what it was before, and each further point fills up the levels in between. Points
are stored in b bits and add up when the model is loaded; only the rows that have them take space for them.

Multipoint quantization: Liu et al., "Post-training Quantization with Multiple Points", arXiv 2002.09049. A row's error counts as
often as the row is looked up on the calibration samples, and once more: those that were not seen can be asked for too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.affine import QuantParams, dequantize
from onnxq.bias import least_scales
from onnxq.calibration.collect import activations
from onnxq.graph import float_values
from onnxq.multipoint import Counts, PointLayer
from onnxq.pipeline import Context
from onnxq.point_rows import PointRows
from onnxq.points import Candidates, Folded
from onnxq.program import Program, QuantDecision, Unit
from onnxq.saturation import excess, kernel_kind
from onnxq.scheme import BYTE
from onnxq.target import Target
from onnxq.weights import code_limit

OPSET = 16  # ScatterND that adds

Plan = dict[str, QuantDecision]


@dataclass(frozen=True, eq=False)
class Table:
    """An embedding table of few bits, and the grid on which its rows can have further points.

    Attributes:
        weight: name of the initializer.
        nodes: that look rows up.
        ratio: of neighbouring points.
        most: points of a row.
        before: decisions of the table and of the activations that it becomes.
        plan: the same on the finer grid, with the same values.
    """

    weight: str
    nodes: tuple[gs.Node, ...]
    ratio: int
    most: int
    before: Plan
    plan: Plan

    @property
    def values(self) -> NDArray[np.float32]:
        """The float table, (rows, width)."""
        found = float_values(self.nodes[0].inputs[0])
        assert found is not None
        return found

    def rows(self, count: Counts) -> PointRows:
        """Storage of rows with so many points each, of codes of 0."""
        codes = self.plan[self.weight].codes
        assert codes is not None
        level = np.arange(self.most)  # (most,)
        used = level < count[:, None]  # (rows, most)
        further = np.cumsum(used[:, 1:].T.ravel()).reshape(self.most - 1, -1).T + len(codes) - 1
        first = np.arange(len(codes))[:, None]
        places = np.where(used, np.concatenate([first, further], axis=1), first)
        factors = np.where(used, self.ratio ** (self.most - 1 - level), 0).astype(np.uint8)
        shape = (len(codes) + int(used[:, 1:].sum()), codes.shape[1])
        return PointRows(np.zeros(shape, np.uint8), places, factors, 0)


@dataclass(frozen=True, eq=False)
class TablePoints(PointLayer):
    """A table with what its rows can become.

    Attributes:
        table: where it is looked up.
    """

    table: Table

    def decision(self, decision: QuantDecision, count: Counts) -> QuantDecision:
        assert decision.codes is not None
        codes = decision.codes.copy()
        for each, folded in enumerate(self.folded, 2):
            codes[count == each] = folded.codes[count == each]
        points = self.table.rows(count).with_codes(codes, _ends(decision))
        return replace(decision, codes=codes, points=points)


def narrow_tables(
    program: Program, target: Target, most: int, safe: bool
) -> tuple[list[Table], dict[str, str]]:
    """Tables of fewer than 8 bits, and the reasons of the nodes that are left.

    Args:
        program: with codes of all weights.
        most: points of one row.
        safe: whether kernels without VNNI must not saturate.
    """
    readers: dict[str, list[Unit]] = {}
    for unit in program.units.values():
        if unit.is_table:
            assert unit.weight is not None
            readers.setdefault(unit.weight, []).append(unit)
    nodes = {n.name: n for n in program.graph.nodes}
    tables: list[Table] = []
    skipped: dict[str, str] = {}
    for weight, units in readers.items():
        found = _table(program, weight, tuple(nodes[u.name] for u in units), most)
        if isinstance(found, Table):
            found = _unfit(program, target, found, safe) or found
        if isinstance(found, str):
            skipped |= dict.fromkeys((u.name for u in units), found)
        else:
            tables.append(found)
    return tables, skipped


def _table(program: Program, weight: str, nodes: tuple[gs.Node, ...], most: int) -> Table | str:
    decision = program.plan[weight]
    bits = decision.scheme.bits
    if decision.codes is None or decision.params is None:
        return "its table has no codes yet"
    if bits >= BYTE:
        return "its table has 8 bits, which fill its codes"
    if decision.scheme.qmin < 0:
        return "its table has signed codes"
    if program.graph.opset < OPSET:
        return f"its rows need operator set {OPSET}, and the model has {program.graph.opset}"
    group = {t: d for t, d in program.plan.items() if d.group == decision.group}
    if sum(d.is_weight for d in group.values()) > 1:
        return "it shares its grid with another table"
    ratio = 1 << min(bits, BYTE - bits)
    count = min(most, max(BYTE // bits, 2))
    unit = ratio ** (count - 1)
    return Table(weight, nodes, ratio, count, group, {t: _finer(d, unit) for t, d in group.items()})


def _finer(decision: QuantDecision, unit: int) -> QuantDecision:
    """The same values on a grid whose steps are as many times smaller."""
    old = decision.params
    assert old is not None
    scheme = replace(old.scheme, bits=BYTE)
    params = QuantParams(scheme, np.asarray(old.scale / np.float32(unit)), old.zero_point * unit)
    if not decision.is_weight:
        return replace(decision, scheme=scheme, params=params)
    assert decision.codes is not None
    places = np.arange(len(decision.codes))[:, None]
    points = PointRows(decision.codes.astype(np.uint8), places, np.full(places.shape, unit, np.uint8), 0)
    return replace(decision, params=params, codes=points.codes(), points=points)


def _unfit(program: Program, target: Target, table: Table, safe: bool) -> str:
    """Why layers that read the table's rows cannot do with codes of 8 bits, empty where they can."""
    view = replace(program, plan=program.plan | table.plan)
    nodes = {n.name: n for n in program.graph.nodes}
    for unit in program.units.values():
        if unit.weight is None or not unit.inputs or unit.inputs[0] not in table.plan:
            continue
        decision = program.plan[unit.weight]
        assert decision.codes is not None
        assert decision.params is not None
        limit = code_limit(view, [unit], target) if safe else 0
        kind = kernel_kind(nodes[unit.name])
        if limit and excess(decision.codes, kind, unit.channel_axis, limit).any():
            return f"{unit.name} would saturate on codes of 8 bits (saturation=safe)"
        if target.bias == "int32" and (least_scales(view, [unit]) > decision.params.scale).any():
            return f"the bias of {unit.name} would not fit into int32 on a finer grid"
    return ""


def lookups(
    program: Program, ctx: Context, tables: Sequence[Table], samples: int
) -> dict[str, NDArray[np.int64]]:
    """How often each row is looked up on calibration samples, (rows,), by weight.

    Raises:
        DataError: there is no data.
        ModelError: the model cannot be run on the data.
    """
    seen = {t.weight: np.zeros(len(t.values), np.int64) for t in tables}
    names = list(dict.fromkeys(node.inputs[1].name for table in tables for node in table.nodes))
    if not names:
        return seen
    for _, values in activations(program, ctx, names, ctx.up_to(samples), "lookups"):
        for table in tables:
            counts = seen[table.weight]
            for node in table.nodes:
                found = values[node.inputs[1].name].ravel().astype(np.int64)
                counts += np.bincount(found % len(counts), minlength=len(counts))  # -1 is the last row
    return seen


def table_points(table: Table, seen: NDArray[np.int64]) -> TablePoints:
    """A table with all of its rows at 2 to `most` points.

    Args:
        seen: how often each row is looked up, (rows,).
    """
    decision, values = table.plan[table.weight], table.values
    params = decision.params
    assert params is not None
    assert decision.codes is not None
    often = (seen + 1.0) / (seen + 1.0).mean()
    signal = max(float((often * _power(values)).mean()), np.finfo(np.float32).tiny)

    def error(codes: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = often * _power(values - dequantize(codes, params))
        return found

    folded = []
    for each in range(2, table.most + 1):
        finest = table.ratio ** (table.most - each)
        count = np.full(len(values), each)
        rows = table.rows(count)
        codes = nearest(values, params, rows, _ends(decision))
        points = rows.with_codes(codes, _ends(decision)).rows[rows.places.T]
        step, ratio = np.full(len(values), params.scale * finest), np.full(len(values), table.ratio)
        folded.append(Folded(codes, step, ratio, points, error(codes)))
    errors = np.stack([error(decision.codes), *(f.error for f in folded)], axis=1) / signal
    candidates = Candidates(errors, cost=values.shape[1], weight=1.0 / len(values))
    return TablePoints(table.weight, folded, candidates, table)


def recoded(decision: QuantDecision, values: NDArray[np.float32], params: QuantParams) -> QuantDecision:
    """The decision of a table with the nearest codes on another grid; each row keeps its points.

    Args:
        decision: with points.
        values: the float table, (rows, width).
        params: the other grid, one scale and zero point.
    """
    assert decision.points is not None
    codes = nearest(values, params, decision.points, _ends(decision))
    return replace(
        decision, params=params, codes=codes, points=decision.points.with_codes(codes, _ends(decision))
    )


def nearest(
    values: NDArray[np.float32], params: QuantParams, rows: PointRows, ends: tuple[int, int]
) -> NDArray[np.uint8]:
    """The codes nearest to the values that rows of points reach, uint8, (rows, width).

    Args:
        values: the float table, (rows, width).
        params: the grid of the codes, one scale and zero point.
        rows: which say how many points a row has.
        ends: smallest and largest code of a point.
    """
    unit = rows.finest[:, None]
    low, high = (end[:, None] // unit for end in rows.reach(ends))
    wanted = values / params.scale + np.float32(params.zero_point)
    return (np.clip(np.rint(wanted / unit), low, high) * unit).astype(np.uint8)


def _power(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.einsum("rk,rk->r", rows, rows, dtype=np.float64)
    return found


def _ends(decision: QuantDecision) -> tuple[int, int]:
    """Smallest and largest code of a point."""
    return decision.scheme.qmin, decision.scheme.qmax
