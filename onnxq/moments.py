"""Second moments of what layers with weights multiply, E[x x^T], over random patches of the float layers' inputs.

For a row d of differences of weights, d^T E[x x^T] d is the mean squared error that it makes at the layer's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.calibration.collect import activations
from onnxq.patches import input_patches
from onnxq.pipeline import Context
from onnxq.program import Program, Unit
from onnxq.saturation import as_rows, kernel_kind

SAMPLES = 512  # that the matrices are of
MOMENT_BYTES = 256 << 20  # of the matrices held at once
TOGETHER = 256  # patches

Moment = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Site:
    """A weight with symmetric codes and where it is read.

    Attributes:
        weight: name of the initializer.
        units: that read it.
        nodes: their main nodes.
        kind: as for `onnxq.saturation.as_rows`; Conv where a Depthwise shares the weight.
        axis: output-channel axis.
        shape: (groups, rows, K) in the kernel's order.
    """

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


def weight_sites(program: Program) -> tuple[list[Site], dict[str, str]]:
    """Weights with symmetric codes that layers multiply activations by, and the reasons of the nodes that are left."""
    nodes = {n.name: n for n in program.graph.nodes}
    readers: dict[str, list[Unit]] = {}
    for unit in program.units.values():
        if unit.weight is not None and unit.inputs:
            readers.setdefault(unit.weight, []).append(unit)
    sites: list[Site] = []
    skipped: dict[str, str] = {}
    for weight, units in readers.items():
        site = _site(program, weight, tuple(units), tuple(nodes[u.name] for u in units))
        if isinstance(site, str):
            skipped |= dict.fromkeys((u.name for u in units), site)
        else:
            sites.append(site)
    return sites, skipped


def moment_parts(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Sites whose matrices fit into MOMENT_BYTES together, at least one at a time."""
    part: list[Site] = []
    for site in sites:
        if part and sum(s.moment_bytes for s in (*part, site)) > MOMENT_BYTES:
            yield part
            part = []
        part.append(site)
    if part:
        yield part


def second_moments(
    program: Program, ctx: Context, sites: Sequence[Site], samples: int = SAMPLES, patches: int = 16
) -> dict[str, Moment]:
    """E[x x^T] of each site's inputs, (groups, K, K), by weight.

    Args:
        program: its graph is still float.
        ctx: its data are read.
        samples: calibration samples to look at.
        patches: random inputs of each kernel from one sample.

    Raises:
        DataError: there is no data.
        ModelError: the model cannot be run on the data.
    """
    rng = ctx.rng()
    sums = {site.weight: _Sum(site) for site in sites}
    names = list(dict.fromkeys(node.inputs[0].name for site in sites for node in site.nodes))
    for _, values in activations(program, ctx, names, ctx.up_to(samples), "moments"):
        for site in sites:
            for node in site.nodes:
                sums[site.weight].add(input_patches(node, values[node.inputs[0].name], rng, patches))
    return {weight: total.mean() for weight, total in sums.items()}


class _Sum:
    """Of x x^T, added up many patches at a time: for few of them, going through the matrix takes longest."""

    def __init__(self, site: Site) -> None:
        groups, _, size = site.shape
        self._total = np.zeros((groups, size, size), np.float32)
        self._waiting: list[NDArray[np.float32]] = []
        self._patches = 0

    def add(self, x: NDArray[np.float32]) -> None:
        """Add patches, (groups, patches, K)."""
        self._waiting.append(x)
        if sum(part.shape[1] for part in self._waiting) >= TOGETHER:
            self._flush()

    def mean(self) -> Moment:
        """Over all patches."""
        self._flush()
        self._total /= np.float32(max(self._patches, 1))
        return self._total

    def _flush(self) -> None:
        if not self._waiting:
            return
        x = np.concatenate(self._waiting, axis=1)
        self._total += x.transpose(0, 2, 1) @ x
        self._patches += x.shape[1]
        self._waiting.clear()


def _site(program: Program, weight: str, units: tuple[Unit, ...], nodes: tuple[gs.Node, ...]) -> Site | str:
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
    return Site(weight, units, nodes, kind, axis, (group, rows // group, size))
