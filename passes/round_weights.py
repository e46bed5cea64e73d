"""Round quantized weights anew, each so that it makes up for the rounding of the others on the calibration samples.

See `onnxq.rounding` for the method. E[x x^T] is taken over random patches of the float layers' inputs. A channel
keeps the codes of least expected error at its output, E[((w - s q) x)^2], so none gets worse than rounded to nearest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.affine import dequantize
from onnxq.calibration.collect import activations
from onnxq.graph import float_values
from onnxq.patches import input_patches
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program, QuantDecision, Unit
from onnxq.rounding import feed_back, output_error
from onnxq.saturation import as_rows, from_rows, kernel_kind, partners
from onnxq.weights import code_limit, typical_sqnr_db

MOMENT_BYTES = 256 << 20  # of the matrices held at once
TINY = 1e-12
ENOUGH_DB = 25.0

Moment = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class _Site:
    """A weight and its reader nodes: (groups, rows, K) in the kernel's order."""

    weight: str
    units: tuple[Unit, ...]
    nodes: tuple[gs.Node, ...]
    kind: str
    axis: int
    shape: tuple[int, int, int]

    @property
    def moment_bytes(self) -> int:
        """Size of its matrices in float32."""
        groups, _, size = self.shape
        return 4 * groups * size * size


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Round weights with error feedback, so that the outputs of each layer stay close on the calibration samples.

    Attributes:
        when: `needed` leaves networks in whose layers half of the channels keep 25 dB on their grid; `always` rounds all.
        largest: layers that reduce over more values than this are left; the work grows with the cube.
        samples: calibration samples to look at.
        patches: random inputs of each kernel from one sample.
        saturation: `safe` keeps neighbouring codes within what 16 bits hold on machines without VNNI; `ignore`
            does not.
    """

    name: ClassVar[str] = "round-weights"
    when: Literal["needed", "always"] = "needed"
    largest: int = 1152
    samples: int = 128
    patches: int = 16
    saturation: str = "safe"

    def run(self, program: Program, ctx: Context) -> PassResult:
        sites, skipped = self._sites(program)
        if self.when == "needed" and all(_keeps_enough(program, site) for site in sites):
            reason = f"half of its channels keep {ENOUGH_DB:.0f} dB as they are"
            return PassResult(0, skipped | {node.name: reason for site in sites for node in site.nodes})
        if ctx.data is None:
            reason = "there are no calibration samples to round by"
            return PassResult(0, skipped | {node.name: reason for site in sites for node in site.nodes})
        tensors, lowered = program.graph.tensors(), {}
        for part in _parts(sites):
            moments = self._moments(program, ctx, part)
            for site in part:
                values = float_values(tensors[site.weight])
                assert values is not None
                old, weight = program.plan[site.weight], site.weight
                limit = code_limit(program, site.units, ctx.target) if self.saturation == "safe" else 0
                program.plan[weight], lowered[weight] = _rounded(old, site, values, moments[weight], limit)
        return PassResult(len(sites), skipped, {"noise_db": lowered})

    def _sites(self, program: Program) -> tuple[list[_Site], dict[str, str]]:
        """Weights to round, and the reasons of the nodes that are left."""
        nodes = {n.name: n for n in program.graph.nodes}
        readers: dict[str, list[Unit]] = {}
        for unit in program.units.values():
            if unit.weight is not None and unit.inputs:
                readers.setdefault(unit.weight, []).append(unit)
        sites: list[_Site] = []
        skipped: dict[str, str] = {}
        for weight, units in readers.items():
            users = tuple(nodes[u.name] for u in units)
            site = _site(program, weight, tuple(units), users)
            reason = site if isinstance(site, str) else self._too_large(site)
            if reason is not None:
                skipped |= dict.fromkeys((u.name for u in units), reason)
            elif isinstance(site, _Site):
                sites.append(site)
        return sites, skipped

    def _too_large(self, site: _Site) -> str | None:
        size = site.shape[2]
        return (
            f"it reduces over {size} values, more than largest={self.largest}"
            if size > self.largest
            else None
        )

    def _moments(self, program: Program, ctx: Context, sites: Sequence[_Site]) -> dict[str, Moment]:
        """E[x x^T] of each site's inputs, (groups, K, K), by weight."""
        rng = ctx.rng()
        sums = {s.weight: np.zeros((s.shape[0], s.shape[2], s.shape[2]), np.float32) for s in sites}
        counts = dict.fromkeys(sums, 0)
        names = list(dict.fromkeys(node.inputs[0].name for site in sites for node in site.nodes))
        assert ctx.data is not None
        samples = max(min(self.samples, ctx.samples), ctx.data.least)
        for _, values in activations(program, ctx, names, samples, "rounding"):
            for site in sites:
                for node in site.nodes:
                    x = input_patches(node, values[node.inputs[0].name], rng, self.patches)
                    sums[site.weight] += x.transpose(0, 2, 1) @ x
                    counts[site.weight] += x.shape[1]
        return {weight: total / np.float32(max(counts[weight], 1)) for weight, total in sums.items()}


def _keeps_enough(program: Program, site: _Site) -> bool:
    """Whether half of the output channels keep ENOUGH_DB with the codes that they have."""
    decision = program.plan[site.weight]
    values = float_values(site.nodes[0].inputs[1])
    assert values is not None
    assert decision.codes is not None
    assert decision.params is not None
    return typical_sqnr_db(values, dequantize(decision.codes, decision.params), site.axis) >= ENOUGH_DB


def _site(program: Program, weight: str, units: tuple[Unit, ...], nodes: tuple[gs.Node, ...]) -> _Site | str:
    """The weight as rows, or why it is left."""
    decision = program.plan[weight]
    if decision.codes is None or decision.params is None:
        return "its weights have no codes yet"
    if decision.scheme.midpoint:
        return f"its weights are {decision.scheme}, not symmetric about a zero point of 0"
    groups = {node.attrs.get("group", 1) if node.op == "Conv" else 1 for node in nodes}
    if len(groups) > 1:
        return f"its weights {weight!r} are shared with a node of another kind"
    group = groups.pop()
    axis = units[0].channel_axis
    rows, size = as_rows(decision.codes, nodes[0].op, axis).shape
    kind = min(kernel_kind(node) for node in nodes)  # Conv, the stricter, before Depthwise
    return _Site(weight, units, nodes, kind, axis, (group, rows // group, size))


def _parts(sites: Sequence[_Site]) -> Iterator[list[_Site]]:
    """Sites whose matrices fit into MOMENT_BYTES together, at least one at a time."""
    part: list[_Site] = []
    for site in sites:
        if part and sum(s.moment_bytes for s in (*part, site)) > MOMENT_BYTES:
            yield part
            part = []
        part.append(site)
    if part:
        yield part


def _rounded(
    decision: QuantDecision, site: _Site, values: NDArray[np.float32], moment: Moment, limit: int
) -> tuple[QuantDecision, float]:
    """The decision with the better codes of each channel, and by how many dB they lower the expected error."""
    params, codes = decision.params, decision.codes
    assert params is not None
    assert codes is not None
    rows, nearest = (
        as_rows(w.astype(np.float64), site.kind, site.axis).reshape(site.shape) for w in (values, codes)
    )
    scale = np.broadcast_to(params.scale.astype(np.float64), codes.shape[site.axis]).reshape(site.shape[:2])
    scheme = decision.scheme
    least = -scheme.qmax if scheme.bits == 8 else scheme.qmin  # with few codes, each counts
    order = partners(codes.shape, site.kind, site.axis)
    fed = feed_back(rows, scale, moment, order, limit, (least, scheme.qmax))
    before, after = (output_error(rows - trial * scale[:, :, None], moment) for trial in (nearest, fed))
    best = np.where((after < before)[:, :, None], fed, nearest)
    flat = best.reshape(-1, site.shape[2]).astype(codes.dtype)
    left = float(np.minimum(after, before).sum() / max(before.sum(), TINY))
    new = from_rows(flat, codes.shape, site.kind, site.axis)
    return replace(decision, codes=new), 10.0 * math.log10(max(left, TINY))
