"""Raising the version of the default operator set, node by node.

Only nodes whose operator changed between the two versions go through onnx's converter, each alone in a model of one
node. The rest of the model, with its names, metadata, weights and types that the converter does not know, is never
touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TypeProto,
    ValueInfoProto,
    defs,
    helper,
    numpy_helper,
)
from onnx.shape_inference import InferenceError
from onnx.version_converter import ConvertError, convert_version

from onnxq.errors import ModelError
from onnxq.model.messages import one_sentence
from onnxq.model.names import FreshNames, tensor_names
from onnxq.model.tensors import subgraphs

DEFAULT = ("", "ai.onnx")
ALONG_AXIS = {"Softmax", "LogSoftmax", "Hardmax"}


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
    _Upgrade(current, target, FreshNames(tensor_names(model.graph))).graph(model.graph, {}, {})
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

    def graph(
        self, graph: GraphProto, types: Mapping[str, TypeProto], constants: Mapping[str, TensorProto]
    ) -> None:
        """Convert the nodes of a graph and of its bodies; the mappings hold what the graph may capture."""
        infos = (*graph.value_info, *graph.input, *graph.output)
        types = {**types, **{i.name: i.type for i in infos if i.HasField("type")}}
        constants = {**constants, **{t.name: t for t in graph.initializer}}
        nodes: list[NodeProto] = []
        for node in graph.node:
            for body in subgraphs(node):
                self.graph(body, types, constants)
            nodes.extend(
                [node] if self._same(node, types) else self._converted(node, graph, types, constants)
            )
        del graph.node[:]
        graph.node.extend(nodes)

    def _same(self, node: NodeProto, types: Mapping[str, TypeProto]) -> bool:
        """Whether the node means the same in both versions as it stands."""
        if node.domain not in DEFAULT:
            return True
        try:
            old = defs.get_schema(node.op_type, self.current)
            new = defs.get_schema(node.op_type, self.target)
        except defs.SchemaError:
            raise self._refused(node, "this operator is not known") from None
        if old.since_version == new.since_version and not new.deprecated:
            return True
        if any(True for _ in subgraphs(node)):
            if node.op_type == "Scan" and self.current < 9:
                raise self._refused(node, "its batch axis was dropped in version 9")
            return True
        return self._one_axis(node, types)

    def _one_axis(self, node: NodeProto, types: Mapping[str, TypeProto]) -> bool:
        """Softmax up to version 12 runs over all axes from `axis` on, later over one; the same when the rest are 1."""
        if node.op_type not in ALONG_AXIS or not self.current < 13 <= self.target:
            return False
        shape = _shape(types.get(node.input[0]))
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if shape is None or not -len(shape) <= axis < len(shape) or any(n != 1 for n in shape[axis:][1:]):
            return False
        if not node.attribute:
            node.attribute.append(helper.make_attribute("axis", 1))
        return True

    def _converted(
        self,
        node: NodeProto,
        graph: GraphProto,
        types: Mapping[str, TypeProto],
        constants: Mapping[str, TensorProto],
    ) -> list[NodeProto]:
        single = self._single(node, types, constants)
        key = single.SerializeToString(deterministic=True)
        if key not in self.known:
            self.known[key] = self._convert(single, node)
        result = ModelProto()
        result.CopyFrom(self.known[key])
        return self._spliced(result.graph, node, graph)

    def _single(
        self, node: NodeProto, types: Mapping[str, TypeProto], constants: Mapping[str, TensorProto]
    ) -> ModelProto:
        """A model of the node alone, its tensors named by position, so that alike nodes give the same model."""
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
            if name in constants:
                model.graph.initializer.add().CopyFrom(constants[name])
                model.graph.initializer[-1].name = alias[name]
            else:
                model.graph.input.append(ValueInfoProto(name=alias[name], type=types.get(name)))
        for index, name in enumerate(node.output):
            if name:
                model.graph.output.append(ValueInfoProto(name=f"write{index}", type=types.get(name)))
        return model

    def _convert(self, single: ModelProto, node: NodeProto) -> ModelProto:
        try:
            result: ModelProto = convert_version(single, self.target)
        except (ConvertError, InferenceError, RuntimeError, ValueError, IndexError) as error:
            raise self._refused(node, one_sentence(error)) from None
        for made in result.graph.node:
            if made.op_type == "Resize" and self.current < 11 <= self.target:
                self._keep_sampling(made, node, result.graph)
            if defs.get_schema(made.op_type, self.target).deprecated:
                raise self._refused(node, f"{made.op_type} is no longer part of the operator set")
        return result

    def _keep_sampling(self, resize: NodeProto, node: NodeProto, graph: GraphProto) -> None:
        """Up to version 10 samples lie at index/scale; later that is one of several modes, and not the default."""
        present = {a.name: a for a in resize.attribute}
        resize.attribute.append(helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
        if "mode" in present and present["mode"].s != b"nearest":
            return
        if node.op_type == "Upsample":  # whose scales are at least 1
            resize.attribute.append(helper.make_attribute("nearest_mode", "floor"))
            return
        stored = {t.name: t for t in graph.initializer}
        stored |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant"}
        if resize.input[2] not in stored:
            raise self._refused(
                node, "the rounding of nearest samples is unknown when the scales are not constant"
            )
        scales = numpy_helper.to_array(stored[resize.input[2]])
        if (scales < 1).any() and (scales > 1).any():
            raise self._refused(
                node, "nearest samples were rounded up where it shrinks and down where it grows"
            )
        resize.attribute.append(
            helper.make_attribute("nearest_mode", "ceil" if (scales < 1).any() else "floor")
        )

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

    def _refused(self, node: NodeProto, reason: str) -> ModelError:
        name = f" {node.name!r}" if node.name else ""
        return ModelError(
            f"cannot raise the model from opset {self.current} to {self.target}: "
            f"{node.op_type} node{name} has no conversion ({reason})"
        )


def _shape(tensor_type: TypeProto | None) -> list[int | None] | None:
    if tensor_type is None or not tensor_type.tensor_type.HasField("shape"):
        return None
    return [d.dim_value if d.HasField("dim_value") else None for d in tensor_type.tensor_type.shape.dim]
