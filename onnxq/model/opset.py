"""Raising the version of the default operator set, node by node.

Only nodes whose operator changed between the two versions go through onnx's converter, each alone in a model of one
node. The rest of the model, with its names, metadata, weights and types that the converter does not know, is never
touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    ValueInfoProto,
    defs,
    helper,
)
from onnx.shape_inference import InferenceError
from onnx.version_converter import ConvertError, convert_version

from onnxq.errors import ModelError
from onnxq.model.adapters import (
    ALONG_AXIS,
    NoConversionError,
    Scope,
    flattened,
    keep_sampling,
    over_one_axis,
    slopes_by_channel,
)
from onnxq.model.messages import one_sentence
from onnxq.model.names import FreshNames, tensor_names
from onnxq.model.tensors import subgraphs

DEFAULT = ("", "ai.onnx")
BROADCASTING = (
    8  # from here on shapes do not matter to how these are converted, nor do the values of constants
)
ELEMENTWISE = {
    *(
        "Abs",
        "Add",
        "Cast",
        "Ceil",
        "Clip",
        "Div",
        "Equal",
        "Erf",
        "Exp",
        "Floor",
        "Greater",
        "Identity",
        "Less",
        "Log",
        "Max",
        "Min",
    ),
    *("Mul", "Neg", "Pow", "Reciprocal", "Relu", "Sigmoid", "Sqrt", "Sub", "Sum", "Tanh"),
}


def default_opset(model: ModelProto) -> int | None:
    """Version of the default operator set, None when the model does not import it."""
    return next((entry.version for entry in model.opset_import if entry.domain in DEFAULT), None)


def upgrade_opset(model: ModelProto, target: int) -> bool:
    """Raise the default operator set of a model (a skeleton with its types inferred) to `target`, in place.

    Returns:
        Whether anything had to be raised.

    Raises:
        ModelError: a node cannot be converted; it names the node, the operator and both versions.
    """
    current = default_opset(model)
    if current is None:
        model.opset_import.append(helper.make_opsetid("", target))
        return True
    if current >= target:
        return False
    _Upgrade(current, target, FreshNames(tensor_names(model.graph))).graph(model.graph, None)
    for entry in model.opset_import:
        if entry.domain in DEFAULT:
            entry.version = target
    return True


@dataclass(frozen=True)
class _Upgrade:
    current: int
    target: int
    fresh: FreshNames
    known: dict[bytes, ModelProto] = field(default_factory=dict)  # conversions by single-node model

    def graph(self, graph: GraphProto, outer: Scope | None) -> None:
        """Convert the nodes of a graph and of its bodies."""
        scope = Scope.inside(graph, outer)
        nodes: list[NodeProto] = []
        for node in graph.node:
            for body in subgraphs(node):
                self.graph(body, scope)
            try:
                nodes.extend([node] if self._same(node) else self._converted(node, scope))
            except NoConversionError as reason:
                name = f" {node.name!r}" if node.name else ""
                raise ModelError(
                    f"cannot raise the model from opset {self.current} to {self.target}: "
                    f"{node.op_type} node{name} has no conversion ({reason})"
                ) from None
        del graph.node[:]
        graph.node.extend(nodes)

    def _same(self, node: NodeProto) -> bool:
        """Whether the operator did not change, or only in the types that it takes."""
        if node.domain not in DEFAULT:
            return True
        try:
            old = defs.get_schema(node.op_type, self.current)
            new = defs.get_schema(node.op_type, self.target)
        except defs.SchemaError:
            raise NoConversionError("this operator is not known") from None
        if any(True for _ in subgraphs(node)):
            if node.op_type == "Scan" and self.current < 9 <= self.target:
                raise NoConversionError("its batch axis was dropped in version 9")
            return True
        return old.since_version == new.since_version and not new.deprecated

    def _converted(self, node: NodeProto, scope: Scope) -> list[NodeProto]:
        if node.op_type in ALONG_AXIS and self.current < 13 <= self.target:
            return [node] if over_one_axis(node, scope) else flattened(node, self.fresh)
        if node.op_type == "PRelu" and self.current < 7 <= self.target:
            return slopes_by_channel(node, scope, self.fresh)
        single = self._single(node, scope)
        key = single.SerializeToString(deterministic=True)
        if key not in self.known:
            self.known[key] = self._convert(single, node)
        result = ModelProto()
        result.CopyFrom(self.known[key])
        return self._spliced(result.graph, node, scope.graph)

    def _single(self, node: NodeProto, scope: Scope) -> ModelProto:
        """A model of the node alone, its tensors named by position, so that alike nodes give the same model.

        Of elementwise operators it holds no more than element types: most nodes of a network are then alike.
        """
        is_bare = node.op_type in ELEMENTWISE and self.current >= BROADCASTING
        reads = list(dict.fromkeys(name for name in node.input if name))
        alias = {name: f"read{i}" for i, name in enumerate(reads)}
        model = ModelProto(ir_version=10)
        model.opset_import.append(helper.make_opsetid("", self.current))
        only = model.graph.node.add()
        only.CopyFrom(node)
        only.ClearField("domain")
        only.ClearField("name")
        only.ClearField("doc_string")
        del only.metadata_props[:]
        only.input[:] = [alias.get(name, "") for name in node.input]
        only.output[:] = [f"write{i}" for i in range(len(node.output))]
        model.graph.name = "single"
        for name in reads:
            if name in scope.constants and not is_bare:
                model.graph.initializer.add().CopyFrom(scope.constants[name])
                model.graph.initializer[-1].name = alias[name]
            else:
                model.graph.input.append(ValueInfoProto(name=alias[name], type=scope.type(name, is_bare)))
        for index, name in enumerate(node.output):
            if name:
                kind = scope.type(name, is_bare)
                model.graph.output.append(ValueInfoProto(name=f"write{index}", type=kind))
        return model

    def _convert(self, single: ModelProto, node: NodeProto) -> ModelProto:
        try:
            result: ModelProto = convert_version(single, self.target)
        except (ConvertError, InferenceError, RuntimeError, ValueError, IndexError) as error:
            raise NoConversionError(one_sentence(error)) from None
        for made in result.graph.node:
            if made.op_type == "Resize" and self.current < 11 <= self.target:
                keep_sampling(made, node, result.graph)
            if defs.get_schema(made.op_type, self.target).deprecated:
                raise NoConversionError(f"{made.op_type} is no longer part of the operator set")
        return result

    def _spliced(self, single: GraphProto, node: NodeProto, graph: GraphProto) -> list[NodeProto]:
        """The converted nodes under the names of the model; what the conversion added gets fresh names."""
        reads = list(dict.fromkeys(name for name in node.input if name))
        name_of = {f"read{i}": name for i, name in enumerate(reads)}
        name_of |= {f"write{i}": name for i, name in enumerate(node.output)} | {"": ""}
        stem = next(name for name in node.output if name)
        made = list(single.node)
        for name in [*(t.name for t in single.initializer), *(n for m in made for n in m.output)]:
            if name not in name_of:
                name_of[name] = self.fresh(f"{stem}_v{self.target}")
        for tensor in single.initializer:
            if tensor.name not in {f"read{i}" for i in range(len(reads))}:
                tensor.name = name_of[tensor.name]
                graph.initializer.append(tensor)
        for new in made:
            new.input[:] = [name_of[name] for name in new.input]
            new.output[:] = [name_of[name] for name in new.output]
            new.ClearField("name")
        main = next(m for m in reversed(made) if stem in m.output)
        heirs = [m for m in made if m.op_type == node.op_type] or [main]
        heirs[-1].name, heirs[-1].doc_string = node.name, node.doc_string
        heirs[-1].metadata_props.extend(node.metadata_props)
        return made
