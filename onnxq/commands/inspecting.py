"""`onnxq inspect`: what a model holds, and what a target would make of it, without data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from onnx import ModelProto, ValueInfoProto

from onnxq.choices import Choices
from onnxq.commands.hazards import model_hazards
from onnxq.errors import ModelError, OnnxqError
from onnxq.model.load import load_model
from onnxq.model.opset import DEFAULT, default_opset
from onnxq.model.prepare import prepare
from onnxq.model.quantized import is_quantized
from onnxq.model.session import optimized_model
from onnxq.model.tensors import ELEMENTS, all_graphs, storage_bytes
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program
from onnxq.report.model import NodeRow
from onnxq.target import Target, find_target

CONVERSIONS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
PRESET = "int8"
LAST = "annotate"  # the pass that decides; what follows needs data


def inspect_file(path: Path, target: str = "ort-cpu") -> dict[str, Any]:
    """What a model holds and what the target would make of it.

    Returns:
        {"model", "target", "opset", "domains", "ir_version", "inputs", "outputs", "ops", "kernels" (ops of
        onnxruntime's optimized graph), "parameters" (bytes by storage type), "nodes" (name, op, status,
        reason), "hazards"}. A node's status is `integer` or `float`. `kernels` or `nodes` is None when the
        model cannot be loaded or prepared, and a hazard says why.

    Raises:
        UsageError: there is no such target.
        ModelError: the model cannot be read.
    """
    goal = find_target(target)
    model = load_model(path)
    hazards: list[str] = []
    nodes: list[NodeRow] | None = None
    try:
        nodes, notes = planned_nodes(model, goal)
        hazards += [f"before quantization: {note}" for note in notes]
    except OnnxqError as error:
        hazards.append(f"it cannot be compiled: {error}")
    kernels = None
    try:
        kernels = _ranked(node.op_type for node in optimized_model(model, threads=1).graph.node)
    except ModelError as error:
        hazards.append(str(error))
    hazards += model_hazards(model)
    if nodes is not None and not is_quantized(model) and not any(row.status == "integer" for row in nodes):
        hazards.append(f"{goal.name} would run no node of it in integers")
    return {
        "model": str(path),
        "target": goal.name,
        "opset": default_opset(model),
        "domains": {e.domain: e.version for e in model.opset_import if e.domain not in DEFAULT},
        "ir_version": model.ir_version,
        "inputs": _values(_fed(model)),
        "outputs": _values(model.graph.output),
        "ops": count_ops(model),
        "kernels": kernels,
        "parameters": storage_bytes(model),
        "nodes": None if nodes is None else [row.as_json() for row in nodes],
        "hazards": hazards,
    }


def planned_nodes(model: ModelProto, target: Target) -> tuple[list[NodeRow], tuple[str, ...]]:
    """What the target would quantize, what not and why; and notes on what preparing the model changes.

    Raises:
        OnnxqError: the model cannot be prepared, or a pass fails on it.
    """
    prepared, notes = prepare(model, target.min_opset)
    program = Program.from_model(prepared)
    deciding_passes(target).run(program, Context(target=target))
    planned = {name: unit for unit in program.units.values() for name in unit.nodes}
    rows = []
    for node in prepared.graph.node:
        if node.name in planned:
            rows.append(NodeRow(node.name, node.op_type, "integer"))
        elif node.name in program.floats and node.op_type not in CONVERSIONS:
            rows.append(NodeRow(node.name, node.op_type, "float", program.floats[node.name]))
    ops = {node.name: node.op_type for graph in all_graphs(prepared.graph) for node in graph.node}
    top = {node.name for node in prepared.graph.node}
    rows += [
        NodeRow(n, ops[n], "float", why) for n, why in program.floats.items() if n in ops and n not in top
    ]
    return rows, notes


def deciding_passes(target: Target) -> Pipeline:
    """The part of the preset that needs no data: everything up to the choice of nodes."""
    passes = Choices(preset=PRESET, target=target.name).resolve(has_data=True).passes
    names = [step.name for step in passes]
    return Pipeline(passes[: names.index(LAST) + 1])


def count_ops(model: ModelProto) -> dict[str, int]:
    """Number of nodes by op, local functions included, most frequent first; other domains as `domain:Op`."""
    nodes = [node for graph in all_graphs(model.graph) for node in graph.node]
    nodes += [node for function in model.functions for node in function.node]
    return _ranked(n.op_type if n.domain in DEFAULT else f"{n.domain}:{n.op_type}" for n in nodes)


def _ranked(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _fed(model: ModelProto) -> list[ValueInfoProto]:
    constants = {t.name for t in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in constants]


def _values(infos: Iterable[ValueInfoProto]) -> list[dict[str, Any]]:
    return [{"name": info.name, **_type(info)} for info in infos]


def _type(info: ValueInfoProto) -> dict[str, Any]:
    """Element type and shape with numbers, names or None; kind and no shape of what is no tensor."""
    if not info.type.HasField("tensor_type"):
        kind = info.type.WhichOneof("value")
        return {"dtype": kind.removesuffix("_type") if kind else "unknown", "shape": None}
    tensor = info.type.tensor_type
    dtype = ELEMENTS[tensor.elem_type][0] if tensor.elem_type in ELEMENTS else "unknown"
    if not tensor.HasField("shape"):
        return {"dtype": dtype, "shape": None}
    sizes = [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim]
    return {"dtype": dtype, "shape": sizes}
