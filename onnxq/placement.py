"""Which nodes of a graph become quantized kernels of a target, and which tensors are codes.

1. Every node that multiplies by weights (`compute` in the target's rules) becomes a unit unless the target refuses it; the bias
   Add, an Add of another activation (a residual branch) and the activation behind it are absorbed where the kernel does that.
   Its inputs are *needed* as codes.
2. In graph order, kernels between coded tensors (Add, Concat, pooling …) become units where that saves a conversion, and
   layout nodes (Reshape, MaxPool …) hand codes on unchanged, sharing one scale with their input.

A tensor is *held* as codes when its producer writes codes and nothing else. A needed tensor that no unit writes exists in float
as well, so nodes that stay float read it unharmed; one that a unit writes is emitted as codes, and they read those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.branches import Branch, branch, depths
from onnxq.graph import Uses, float_values, is_constant, present, producer
from onnxq.program import Unit
from onnxq.rules import RELU, Rule, refusal, takes_number
from onnxq.selection import added_vector, kept_in_float, writes_float32
from onnxq.target import Target

SAME_VALUES = {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Pad"}
SMALL_TABLE = 4096
TINY = 256


@dataclass
class Placement:
    """Units and coded tensors of one graph, found by `place`.

    Attributes:
        graph, target: what is placed on what.
        skipped: reasons of nodes that must stay float.
        all_products: whether products of two float activations become units.
        small: products of at most this many weights become units only behind codes.
        units: found units by main node name, in no particular order.
        floats: reason of each node that stays float.
        needed: tensors read as codes.
        held: tensors written as codes and nothing else.
    """

    graph: gs.Graph
    target: Target
    skipped: Mapping[str, str]
    all_products: bool = False
    small: int = 0
    floats: dict[str, str] = field(default_factory=dict)
    units: dict[str, Unit] = field(default_factory=dict)
    needed: set[str] = field(default_factory=set)
    held: set[str] = field(default_factory=set)
    _absorbed: set[str] = field(default_factory=set)
    _parent: dict[str, str] = field(default_factory=dict)
    _weights: dict[str, tuple[str, int]] = field(default_factory=dict)
    _hoisted: set[str] = field(default_factory=set)
    _deferred: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.uses = Uses(self.graph)
        self._tensors: dict[str, gs.Tensor] = self.graph.tensors()
        self._depths = depths(self.graph)

    def place(self) -> Placement:
        """Find all units."""
        self._find_compute()
        self._need_layout_inputs()
        self._find_rest()
        self._explain_activations()
        return self

    def group(self, tensor: str) -> str:
        """Name of the group of tensors that share this tensor's scale."""
        while tensor in self._parent:
            tensor = self._parent[tensor]
        return tensor

    def _tie(self, one: str, other: str) -> None:
        """Let two tensors share one scale."""
        a, b = self.group(one), self.group(other)
        if a != b:
            self._parent[b] = a

    def _rule(self, node: gs.Node) -> Rule | None:
        """The target's rule for the node, None when it must stay float; the reason is noted."""
        if node.name in self._absorbed:
            return None
        if node.name in self.skipped:
            self.floats[node.name] = self.skipped[node.name]
            return None
        rule = self.target.rule(node)
        if rule is None:
            if writes_float32(node):
                lacks = "takes no conversions around" if self.target.qdq_only else "has no integer kernel for"
                self.floats[node.name] = f"{self.target.name} {lacks} {node.op}"
            return None
        reason = None if rule.numbers and takes_number(node) else refusal(node)
        reason = reason or self._not_float32(node)
        if reason is None:
            return rule
        if writes_float32(node) or rule.role == "compute":
            self.floats[node.name] = reason
        return None

    def _not_float32(self, node: gs.Node) -> str | None:
        tensor = next((t for t in node.inputs[:1] if t.dtype is not None and t.dtype != np.float32), None)
        return f"its input is {np.dtype(tensor.dtype).name}, not float32" if tensor is not None else None

    def _find_compute(self) -> None:
        """Make units of the nodes that multiply by weights, and of embedding lookups."""
        for node in self.graph.nodes:
            rule = self._rule(node)
            if rule is None or rule.role not in ("compute", "table"):
                continue
            weight, axis = _weight(node)
            if weight is None or self._is_small(node, rule):
                self._deferred.add(node.name)
            elif (reason := kept_in_float(self.uses, self._tensors[weight])) is not None:
                self.floats[node.name] = reason
            elif not self._shares_weights(node, weight, axis):
                self._add_compute(node, rule, weight, axis)
        for unit in self.units.values():
            if not unit.float_output or self._read_as_codes_only(unit.output):
                self.held.add(unit.output)

    def _add_compute(self, node: gs.Node, rule: Rule, weight: str | None, axis: int) -> Unit:
        inputs = () if rule.role == "table" else tuple(t.name for t in node.inputs[: 1 if weight else 2])
        unit = self._add(node, rule, inputs, weight, axis)
        self.needed.update(unit.inputs)
        if rule.role == "table" and weight is not None:
            self._tie(weight, unit.output)
        return unit

    def _is_small(self, node: gs.Node, rule: Rule) -> bool:
        size = math.prod(node.inputs[0 if rule.role == "table" else 1].shape)
        return (node.op in ("Gemm", "MatMul") and size <= self.small) or (
            rule.role == "table" and size <= SMALL_TABLE
        )

    def _is_tiny(self, node: gs.Node) -> bool:
        """Whether a small product would not even pay behind codes: a few weights, or an activation that makes it write codes."""
        after = self.uses.only_reader(node.outputs[0])
        return math.prod(node.inputs[1].shape) < TINY or (after is not None and after.op in RELU)

    def _shares_weights(self, node: gs.Node, weight: str, axis: int) -> bool:
        """Whether the weights already belong to a node of another kind; the reason is noted."""
        if self._weights.setdefault(weight, (node.op, axis)) == (node.op, axis):
            return False
        self.floats[node.name] = f"its weights {weight!r} are shared with a node of another kind"
        return True

    def _try_deferred(self, node: gs.Node, rule: Rule) -> None:
        """Decide on a product that pays only where its operands are codes anyway."""
        weight, axis = _weight(node)
        inputs = [t.name for t in node.inputs[: 1 if weight else 2]]
        if rule.role == "table":
            self.floats[node.name] = "its table is small"
        elif weight is not None and (inputs[0] not in self.held or self._is_tiny(node)):
            self.floats[node.name] = "so small that conversions cost more than integers save"
        elif weight is None and not self.all_products and not all(name in self.held for name in inputs):
            self.floats[node.name] = (
                "it multiplies two activations that are float; integers would add conversions (products=all)"
            )
        elif weight is None or not self._shares_weights(node, weight, axis):
            unit = self._add_compute(node, rule, weight, axis)
            if not unit.float_output:
                self.held.add(unit.output)

    def _read_as_codes_only(self, tensor: str) -> bool:
        if tensor not in self.needed:
            return False
        found = self._tensors[tensor]
        return not self.uses.escapes(found) and all(n.name in self.units for n in self.uses.readers(found))

    def _add(
        self, node: gs.Node, rule: Rule, inputs: tuple[str, ...], weight: str | None = None, axis: int = 0
    ) -> Unit:
        nodes, bias = [node], present(node, 2) if weight else None
        end = node
        if node.op == "MatMul" and weight:
            add = self.uses.only_reader(node.outputs[0])
            vector = added_vector(add, node.outputs[0], node.inputs[1].shape[1]) if add is not None else None
            if add is not None and vector is not None and add.name not in self.skipped:
                nodes.append(add)
                bias, end = vector, add
        if node.op == "Mul" and len(inputs) == 1 and (add := self._number_behind(node)) is not None:
            nodes.append(add)
            end = add
        summed = self._summed(end) if rule.sums else None
        if summed is not None:
            nodes += summed.nodes
            inputs, end = (*inputs, summed.other.name), summed.add
        after = self._activation(end, rule)
        if after is not None:
            nodes.append(after)
            end = after
        unit = Unit(
            kind=node.op,
            nodes=tuple(n.name for n in nodes),
            inputs=inputs,
            outputs=tuple(t.name for t in end.outputs),
            weight=weight,
            bias=bias.name if bias is not None else None,
            channel_axis=axis,
            float_output=rule.float_output and (end is not after or self.target.qdq_only),
            is_layout=rule.role == "layout",
        )
        self.units[node.name] = unit
        self._absorbed.update(n.name for n in nodes[1:])
        for name in unit.nodes:
            self.floats.pop(name, None)
        return unit

    def _activation(self, node: gs.Node, rule: Rule) -> gs.Node | None:
        """The Relu or Clip behind the node that its kernel absorbs."""
        after = self.uses.only_reader(node.outputs[0]) if len(node.outputs) == 1 else None
        if after is None or after.op not in rule.absorbs or after.name in self.skipped:
            return None
        return after if _starts_at_zero(after) else None

    def _number_behind(self, node: gs.Node) -> gs.Node | None:
        """The Add of a number behind a Mul by one: one kernel does both."""
        add = self.uses.only_reader(node.outputs[0])
        takes = add is not None and add.op == "Add" and add.name not in self.skipped and takes_number(add)
        return add if takes else None

    def _summed(self, node: gs.Node) -> Branch | None:
        """The Add that becomes part of a convolution, None when there is none or another convolution has it."""
        found = branch(self.uses, node)
        if found is None or any(n.name in self.skipped or n.name in self._absorbed for n in found.nodes):
            return None
        rival = found.rival
        if rival is None or self._depths[rival.name] <= self._depths[node.name]:
            return found
        theirs, rule = branch(self.uses, rival), self._rule(rival)
        takes = rule is not None and rule.sums and theirs is not None and theirs.add is found.add
        return None if takes else found

    def _need_layout_inputs(self) -> None:
        """Let codes be made before a Reshape or Transpose whose only use is to feed a kernel: fewer bytes move."""
        makers = {u.output for u in self.units.values()}
        for node in reversed(self.graph.nodes):
            if node.op not in SAME_VALUES or not self._is_needed_only(node.outputs[0]):
                continue
            source = node.inputs[0]
            if self.uses.only_reader(source) is None or is_constant(source) or self._rule(node) is None:
                continue
            self._hoisted.add(node.name)
            self.needed.add(source.name)
            if source.name in makers:
                self.held.add(source.name)

    def _is_needed_only(self, tensor: gs.Tensor) -> bool:
        """Whether every reader of the tensor, and there is one, reads codes; what stays float would lose by them."""
        readers = self.uses.readers(tensor)
        coded = all(n.name in self.units or n.name in self._hoisted for n in readers)
        return tensor.name in self.needed and not self.uses.escapes(tensor) and coded

    def _find_rest(self) -> None:
        """Make units of kernels between coded tensors and of layout nodes that hand codes on."""
        for node in self.graph.nodes:
            if node.name in self.units:
                continue
            rule = self._rule(node)
            if rule is not None and node.name in self._deferred:
                self._try_deferred(node, rule)
            if rule is None or rule.role in ("compute", "table"):
                continue
            inputs = _activations(node, rule)
            reason = self._not_worth(node, rule, inputs)
            if reason is not None:
                if writes_float32(node):
                    self.floats[node.name] = reason
                continue
            unit = self._add(node, rule, inputs)
            self.needed.update(inputs)
            self.held.update(unit.outputs)
            if rule.role == "layout":
                for output in node.outputs:
                    self._tie(inputs[0], output.name)

    def _explain_activations(self) -> None:
        """Say of activations that would vanish into a layer that the layer is float."""
        for node in self.graph.nodes:
            maker = producer(node.inputs[0]) if node.op in RELU and node.name in self.floats else None
            if maker is not None and maker.name in self.floats and node.name not in self.skipped:
                self.floats[node.name] = f"the {maker.op} in front of it stays float"

    def _not_worth(self, node: gs.Node, rule: Rule, inputs: tuple[str, ...]) -> str | None:
        """Why a node that could run on codes should not, None when it should."""
        held = [t for t in inputs if t in self.held]
        coded = [t for t in inputs if t in self.held or t in self.needed]
        outputs_needed = all(t.name in self.needed for t in node.outputs)
        if node.name in self._hoisted:
            return None
        if not held and not (rule.role == "kernel" and len(coded) == len(inputs) and outputs_needed):
            return "no quantized kernel feeds it, so integers would only add conversions"
        if rule.role == "layout":
            return None
        if rule.role == "curve":
            readers = self.uses.readers(node.outputs[0])
            reads_codes = readers and all(
                r.op in self.target.rules and r.name not in self.floats for r in readers
            )
            return (
                None if reads_codes else "its output leaves in float, where 8 bits would only cost accuracy"
            )
        if len(coded) < len(inputs) and not outputs_needed:
            return "not all of its inputs come from quantized kernels"
        return None


def _weight(node: gs.Node) -> tuple[str | None, int]:
    """The weight initializer's name and its output-channel axis; None for a product of two activations."""
    tensor = node.inputs[0 if node.op == "Gather" else 1]
    if not is_constant(tensor):
        return None, 0
    if node.op in ("Conv", "Gather") or (node.op == "Gemm" and node.attrs.get("transB", 0)):
        return tensor.name, 0
    return tensor.name, 1


def _activations(node: gs.Node, rule: Rule) -> tuple[str, ...]:
    """Names of the inputs that are activations."""
    if rule.activations is not None:
        return tuple(node.inputs[i].name for i in rule.activations)
    return tuple(t.name for t in node.inputs if not (rule.numbers and is_constant(t)))


def _starts_at_zero(node: gs.Node) -> bool:
    """Whether an activation's range starts at 0, so that it vanishes into a zero point at the smallest code."""
    if node.op == "Relu":
        return True
    low, high = present(node, 1), present(node, 2)
    floor = float_values(low) if low is not None else None
    return (
        floor is not None
        and floor.size == 1
        and float(floor.ravel()[0]) == 0.0
        and (high is None or float_values(high) is not None)
    )
