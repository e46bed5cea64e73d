"""Write activations that exporters spell out in several nodes as the operators that they are.

    clip(x + 3, 0, 6) / 6             HardSigmoid(x), alpha = 1/6 and beta = 1/2
    x clip(x + 3, 0, 6) / 6           x HardSigmoid(x), as HardSwish is
    x (1 + erf(x / sqrt 2)) / 2       Gelu(x) of com.microsoft, where the target has it

Of four passes over memory two are left, and HardSigmoid and Mul have integer kernels (`onnxq.hard_sigmoid`). onnxruntime finds no
Gelu by itself behind a DequantizeLinear, of which it gives each reader a copy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from onnxq.graph import CONTRIB, NOTHING, Names, Uses, is_standard, number, present, producer, with_number
from onnxq.hard_sigmoid import HARD_SIGMOID
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program

TOLERANCE = 1e-5  # relative, of constants that an exporter has rounded


@dataclass(frozen=True)
class FoldActivations(Pass):
    """Turn HardSwish and what exporters spell out of hard sigmoid, hard swish and GELU into HardSigmoid, Mul and Gelu."""

    name: ClassVar[str] = "fold-activations"

    def run(self, program: Program, ctx: Context) -> PassResult:
        graph, uses, names = program.graph, Uses(program.graph), Names(program.graph)
        folded = 0
        for node in [n for n in graph.nodes if is_standard(n)]:
            if node.op == "HardSwish":
                _spell_out(graph, names, node)
                folded += 1
            elif node.op == "Clip":
                folded += _fold_ramp(uses, node)
            elif node.op == "Erf" and ctx.target.contrib:
                folded += _fold_gelu(uses, node)
        if folded:
            graph.cleanup(remove_unused_graph_inputs=False)
        return PassResult(folded)


def _spell_out(graph: gs.Graph, names: Names, node: gs.Node) -> None:
    """Write a HardSwish as its definition says."""
    x, y = node.inputs[0], node.outputs[0]
    ramp = gs.Variable(names.fresh(f"{y.name}_ramp"), x.dtype, y.shape)
    attrs = {"alpha": 1.0 / 6.0, "beta": 0.5}
    before = gs.Node(HARD_SIGMOID, names.fresh(f"{node.name}_ramp"), attrs, [x], [ramp])
    graph.nodes.insert(graph.nodes.index(node), before)
    node.op, node.inputs = "Mul", [x, ramp]


def _fold_ramp(uses: Uses, clip: gs.Node) -> bool:
    """Make a Clip a HardSigmoid if an Add in front of it and a factor behind it amount to one; whether they do."""
    low, high = (number(present(clip, index)) for index in (1, 2))
    x, shift = with_number(producer(clip.inputs[0]), "Add")
    product, last = _product_behind(uses, clip)
    if low != 0.0 or high is None or high <= 0.0 or x is None:
        return False
    if not _is_close(_scaled(last)[1], 1.0 / high):
        return False
    _hand_over(last, clip if product is None else product)
    clip.op, clip.attrs, clip.inputs = HARD_SIGMOID, {"alpha": 1.0 / high, "beta": shift / high}, [x]
    return True


def _fold_gelu(uses: Uses, erf: gs.Node) -> bool:
    """Make an Erf a Gelu if the nodes around it amount to one; whether they do."""
    x, slope = _scaled(producer(erf.inputs[0]))
    add = uses.only_reader(erf.outputs[0])
    if add is None or x is None or not _is_close(slope, math.sqrt(0.5)):
        return False
    product, last = _product_behind(uses, add)
    if product is None or not _is_close(with_number(add, "Add")[1], 1.0):
        return False
    factor = next(t for t in product.inputs if t is not add.outputs[0])
    half, part = _scaled(producer(factor))  # x / 2, or x with the half behind it
    if factor is not x:
        last, is_whole = product, half is x and _is_close(part, 0.5)
    else:
        is_whole = _is_close(_scaled(last)[1], 0.5)
    if not is_whole:
        return False
    _hand_over(last, erf)
    erf.op, erf.domain, erf.inputs = "Gelu", CONTRIB, [x]
    return True


def _hand_over(last: gs.Node | None, node: gs.Node) -> None:
    """Let a node write what the last one of its group did, which cleaning up then takes out."""
    assert last is not None
    result = last.outputs[0]
    last.outputs.clear()
    node.outputs = [result]


def _product_behind(uses: Uses, node: gs.Node) -> tuple[gs.Node | None, gs.Node | None]:
    """A Mul by another activation that alone reads the node, None without one; and what alone reads the result."""
    reader = uses.only_reader(node.outputs[0])
    if reader is None or reader.op != "Mul" or not is_standard(reader) or _scaled(reader)[0] is not None:
        return None, reader
    return reader, uses.only_reader(reader.outputs[0])


def _scaled(node: gs.Node | None) -> tuple[gs.Tensor | None, float]:
    """What a Mul or Div by a constant number multiplies, and by what; nothing of any other node."""
    if node is not None and node.op == "Div" and is_standard(node):
        divisor = number(node.inputs[1])
        return (node.inputs[0], 1.0 / divisor) if divisor else NOTHING
    return with_number(node, "Mul")


def _is_close(number: float, wanted: float) -> bool:
    return math.isclose(number, wanted, rel_tol=TOLERANCE)
