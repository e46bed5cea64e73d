"""Decide which nodes run in integers and give their tensors a scheme. How the nodes are found: `onnxq.placement`.

The width of activations is that of what layers multiply: a tensor has the largest width among the layers that read it, and so
have the tensors that share its scale. Tensors that only additions, concatenations or pooling read keep 8 bits, as in the papers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from onnxq.model.surgeon import to_graph
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.placement import Placement
from onnxq.precision import Bits, Ends, Layer, layer_bits, override_bits
from onnxq.program import Program, QuantDecision, Sides, Unit
from onnxq.rules import RECURRENT
from onnxq.scheme import BYTE, QuantScheme
from onnxq.selection import inside_bodies, skipped_nodes
from onnxq.target import Target


@dataclass(frozen=True)
class Annotate(Pass):
    """Choose the nodes that run in integers and give their tensors a scheme.

    Attributes:
        weights: scheme of weights, e.g. int8:channel or int4:tensor.
        activations: scheme of what layers multiply, e.g. uint8 or uint4.
        override: exceptions, GLOB=BITS or GLOB=float by node name or op type, e.g. layer1.*=w8a8.
        raised: further exceptions, NAME=BITS or NAME=float with a node's whole name, which count before all others; what
            min-sqnr found.
        first_last: the first and last layers get at least `8` bits, the `same` as the others, or stay `float`.
        elementwise: activations that only additions, concatenations or pooling read get `8` bits, or the `same` as the others.
        sides: what is quantized: `both`, or only the `weights` or the `activations`, to see what each of them costs.
        skip: node names or op types to leave in float; * and ? match as in file names.
        products: which matrix products run in integers: those with `weights`, or `all`, with products of two activations too; the
            default takes those only where both operands are codes anyway.
        small: products of at most this many weights stay float where their input is not held as codes.
    """

    name: ClassVar[str] = "annotate"
    weights: QuantScheme = QuantScheme.parse("int8:channel")
    activations: QuantScheme = QuantScheme.parse("uint8")
    override: tuple[str, ...] = ()
    raised: tuple[str, ...] = ()
    first_last: Ends = "8"
    elementwise: Literal["8", "same"] = "8"
    sides: Sides = "both"
    skip: tuple[str, ...] = ()
    products: Literal["weights", "all"] = "weights"
    small: int = 2048

    def stored_bits(self) -> frozenset[int]:
        return override_bits((*self.override, *self.raised)) | {self.weights.bits}

    def run(self, program: Program, ctx: Context) -> PassResult:
        ctx.target.check_weights(self.weights)
        activations = ctx.target.activation_scheme(self.activations)
        default = Bits(self.weights.bits, activations.bits)
        layers = layer_bits(program, default, self.override, self.first_last, self.raised)
        for layer in layers.values():
            ctx.target.check_bits([layer.bits.weights, layer.bits.activations] if layer.bits else [])
        floats = {name: layer.why for name, layer in layers.items() if layer.bits is None}
        skipped = program.floats | floats | skipped_nodes(program, self.skip)
        placed = Placement(program.graph, ctx.target, skipped, self.products == "all", self.small).place()
        program.units = _in_order(program, placed.units)
        program.sides = self.sides
        program.floats = placed.floats | inside_bodies(program.graph, {*_compute_ops(ctx.target), *RECURRENT})
        self._fill_plan(program, placed, layers, activations)
        if ctx.layers:
            model = program.to_model()
            program.reference = Program(to_graph(model), model, units=dict(program.units))
        return PassResult(len(program.units), dict(program.floats), {"bits": _facts(program, layers)})

    def _fill_plan(
        self, program: Program, placed: Placement, layers: Mapping[str, Layer], activations: QuantScheme
    ) -> None:
        other = activations.bits if self.elementwise == "same" else max(activations.bits, BYTE)
        widths = _group_widths(program, placed, layers)
        for unit in program.units.values():
            for tensor in (*unit.inputs, *unit.outputs):
                if tensor in placed.needed or tensor in placed.held:
                    group = placed.group(tensor)
                    scheme = replace(activations, bits=widths.get(group, other))
                    program.plan[tensor] = QuantDecision(scheme, group)
            if unit.weight is not None:
                group, bits = placed.group(unit.weight), layers[unit.name].bits
                assert bits is not None
                scheme = replace(
                    activations if unit.is_table else self.weights,
                    bits=widths[group] if unit.is_table else max(bits.weights, _shared(program, unit.weight)),
                )
                program.plan[unit.weight] = QuantDecision(
                    scheme, group, is_weight=True, axis=unit.channel_axis
                )


def _in_order(program: Program, units: Mapping[str, Unit]) -> dict[str, Unit]:
    """Units in graph order, each behind those that write what it reads: one with a residual branch stands where that comes in."""
    nodes = {n.name: (place, n) for place, n in enumerate(program.graph.nodes)}

    def place(unit: Unit) -> int:
        found = (nodes[name] for name in unit.nodes)
        return max(p for p, n in found if n.name == unit.name or any(t.name in unit.inputs for t in n.inputs))

    return {unit.name: unit for unit in sorted(units.values(), key=place)}


def _shared(program: Program, weight: str) -> int:
    """Width that another unit has given the weight already, 0 when none has."""
    return program.plan[weight].scheme.bits if weight in program.plan else 0


def _group_widths(program: Program, placed: Placement, layers: Mapping[str, Layer]) -> dict[str, int]:
    """Width of each group of tensors that a layer multiplies: the largest any of them asks for.

    Codes of a table are looked up and then multiplied as they are, so the width of the table's weights decides.
    """
    widths: dict[str, int] = {}
    tables: dict[str, int] = {}
    for unit in program.units.values():
        bits = layers[unit.name].bits if unit.name in layers else None
        if bits is None:
            continue
        if unit.is_table:
            assert unit.weight is not None
            group = placed.group(unit.weight)
            tables[group] = max(tables.get(group, 0), bits.weights)
        for tensor in unit.multiplied if not unit.is_layout else ():
            group = placed.group(tensor)
            widths[group] = max(widths.get(group, 0), bits.activations or BYTE)
    return widths | tables


def _facts(program: Program, layers: Mapping[str, Layer]) -> dict[str, Any]:
    """Widths of the layers that run in integers, with the reason where it is not the rule."""
    found = {}
    for name, unit in program.units.items():
        if name in layers and not unit.is_layout:
            bits = layers[name].bits
            found[name] = f"{bits} ({layers[name].why})" if layers[name].why else str(bits)
    return found


def _compute_ops(target: Target) -> set[str]:
    return {op for op, rule in target.rules.items() if rule.role == "compute"}
