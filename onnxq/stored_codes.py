"""Codes of stored weights by the errors at their layers' outputs, where there are samples to see those on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_graphsurgeon as gs

from onnxq.affine import quantize
from onnxq.graph import float_values, is_constant
from onnxq.moments import Site, moment_parts, second_moments
from onnxq.pipeline import Context
from onnxq.program import Program, QuantDecision
from onnxq.quantizers import weight_params
from onnxq.rounded import LARGEST, WeightRounder
from onnxq.saturation import as_rows, kernel_kind
from onnxq.scheme import BYTE, QuantScheme

Layers = Mapping[str, tuple[Sequence[gs.Node], QuantScheme]]


def fitted_codes(program: Program, ctx: Context, layers: Layers) -> dict[str, QuantDecision]:
    """Steps and codes of convolutions' weights below 8 bits, as `onnxq.rounded` finds them, by weight.

    Weights of other layers, and those that reduce over more than `LARGEST` values, are left out; so are all without samples.

    Args:
        program: its graph is still float.
        ctx: its data are read.
        layers: nodes that read a weight, and its scheme, by weight.

    Raises:
        ModelError: the model cannot be run on the data.
    """
    if ctx.data is None:
        return {}
    sites = [_site(weight, nodes) for weight, (nodes, scheme) in layers.items() if _is_fit(nodes, scheme)]
    found = {}
    for part in moment_parts([site for site in sites if site.shape[2] <= LARGEST]):
        moments = second_moments(program, ctx, part)
        for site in part:
            start = _start(site, layers[site.weight][1])
            rounder = WeightRounder(site, moments[site.weight], limit=0)  # float kernels saturate nothing
            per_channel = start.scheme.granularity == "channel"
            found[site.weight], _ = rounder.refit(start) if per_channel else rounder.round(start)
    return found


def _is_fit(nodes: Sequence[gs.Node], scheme: QuantScheme) -> bool:
    convolutions = all(n.op == "Conv" and not is_constant(n.inputs[0]) for n in nodes)
    return convolutions and scheme.bits < BYTE and len({n.attrs.get("group", 1) for n in nodes}) == 1


def _site(weight: str, nodes: Sequence[gs.Node]) -> Site:
    group, kind = nodes[0].attrs.get("group", 1), min(kernel_kind(node) for node in nodes)
    values = float_values(nodes[0].inputs[1])
    assert values is not None
    rows, size = as_rows(values, kind, 0).shape
    return Site(weight, (), tuple(nodes), kind, 0, (group, rows // group, size))


def _start(site: Site, scheme: QuantScheme) -> QuantDecision:
    """Each weight at the nearest code of the grid of least error."""
    values = float_values(site.nodes[0].inputs[1])
    assert values is not None
    axis = None if scheme.granularity == "tensor" else site.axis
    params = weight_params("mse", values, axis, scheme)
    return QuantDecision(scheme, site.weight, True, site.axis, params, quantize(values, params))
