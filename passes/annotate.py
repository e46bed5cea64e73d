"""Decide which nodes run in integers and give their tensors a scheme. How that is decided: `onnxq.placement`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from onnxq.pipeline import Context, Pass, PassResult
from onnxq.placement import Placement
from onnxq.program import Program, QuantDecision
from onnxq.scheme import QuantScheme
from onnxq.selection import inside_bodies, skipped_nodes
from onnxq.target import Target


@dataclass(frozen=True)
class Annotate(Pass):
    """Choose the nodes that run in integers and give their tensors a scheme.

    Attributes:
        weights: scheme of weights, e.g. int8:channel or int8:tensor.
        activations: scheme of activations, e.g. uint8.
        skip: node names or op types to leave in float; * and ? match as in file names.
        products: which matrix products run in integers: those with `weights`, or `all`, with products of two activations too; the
            default takes those only where both operands are codes anyway.
        small: products of at most this many weights stay float where their input is not held as codes.
    """

    name: ClassVar[str] = "annotate"
    weights: QuantScheme = QuantScheme.parse("int8:channel")
    activations: QuantScheme = QuantScheme.parse("uint8")
    skip: tuple[str, ...] = ()
    products: Literal["weights", "all"] = "weights"
    small: int = 2048

    def run(self, program: Program, ctx: Context) -> PassResult:
        ctx.target.check_schemes(self.weights, self.activations)
        skipped = program.floats | skipped_nodes(program, self.skip)
        placed = Placement(program.graph, ctx.target, skipped, self.products == "all", self.small).place()
        program.units = {n.name: placed.units[n.name] for n in program.graph.nodes if n.name in placed.units}
        program.floats = placed.floats | inside_bodies(program.graph, _compute_ops(ctx.target))
        self._fill_plan(program, placed)
        return PassResult(len(program.units), dict(program.floats))

    def _fill_plan(self, program: Program, placed: Placement) -> None:
        for unit in program.units.values():
            for tensor in (*unit.inputs, *unit.outputs):
                if tensor in placed.needed or tensor in placed.held:
                    program.plan[tensor] = QuantDecision(self.activations, placed.group(tensor))
            if unit.weight is not None:
                scheme = self.activations if unit.is_table else self.weights
                program.plan[unit.weight] = QuantDecision(
                    scheme, placed.group(unit.weight), is_weight=True, axis=unit.channel_axis
                )


def _compute_ops(target: Target) -> set[str]:
    return {op for op, rule in target.rules.items() if rule.role == "compute"}
