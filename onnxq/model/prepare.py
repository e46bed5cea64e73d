"""Bringing a model into the form that the compiler works on.

One main graph without local functions, a recent operator set, constants as initializers, float32 arithmetic, inferred
types and unique node names. Large weights are set aside meanwhile: onnx's C++ parts see their types only.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError, EncodeError
from onnx import GraphProto, ModelProto, TensorProto, defs, helper
from onnx.inliner import inline_local_functions
from onnx.shape_inference import InferenceError, infer_shapes

from onnxq.errors import ModelError
from onnxq.model.constants import densify, lift_constants
from onnxq.model.floats import half_types, obstacle, only_at_the_border, promote_floats, promote_tensor
from onnxq.model.messages import one_sentence
from onnxq.model.names import name_nodes
from onnxq.model.opset import DEFAULT, default_opset, upgrade_opset
from onnxq.model.session import make_session
from onnxq.model.skeleton import check, declared, set_aside, split, undeclare
from onnxq.model.tensors import all_graphs, infos

OLDEST_IR = 4  # initializers need not be inputs from this version on
LONG_VECTOR = 2**16  # elements; shapes, axes and sizes, whose values are worth following, are far shorter

Interface = list[tuple[str, bytes]]


def prepare(model: ModelProto, min_opset: int) -> tuple[ModelProto, tuple[str, ...]]:
    """A copy of a checked model in the form described above, with notes on what changed or could not be done.

    Names, types and order of the inputs and outputs stay, except inputs that only give an initializer's default. Metadata,
    quantization annotations and nodes of unknown domains stay as they are.

    Raises:
        ModelError: a node cannot be raised to the operator set, or the result would not be valid.
    """
    if not 1 <= min_opset <= defs.onnx_opset_version():
        raise ModelError(
            f"opset {min_opset} is not known; the known ones are 1 to {defs.onnx_opset_version()}"
        )
    bare, weights = split(model)
    notes = _normalise(bare, weights)
    bare, more = _inlined(bare)
    notes += more
    for graph in all_graphs(bare.graph):
        for node in graph.node:
            if node.domain in DEFAULT:
                node.ClearField("domain")
        densify(graph)
        lift_constants(graph)
    weights = [*weights, *set_aside(bare)]
    bare, _ = _inferred(bare, weights)
    interface = _interface(bare)
    if _upgraded(bare, weights, min_opset):
        notes.append(f"raised to opset {default_opset(bare)}")
        for graph in all_graphs(bare.graph):
            lift_constants(graph)  # those that the conversion made
    bare, problem = _inferred(bare, weights)
    if problem:
        notes.append(f"types are not all known: {problem}")
    bare, weights, more = _promoted(bare, weights)
    notes += more
    name_nodes(bare)
    bare.ir_version = max(
        bare.ir_version, helper.find_min_ir_version_for(bare.opset_import, ignore_unknown=True)
    )
    check(bare, weights)
    if _interface(bare) != interface:
        raise ModelError("the names or types of the model's inputs and outputs would change")
    bare.graph.initializer.extend(weights)
    return bare, tuple(notes)


def _interface(bare: ModelProto) -> Interface:
    """Names and types of the graph's inputs and outputs, shapes left out."""
    result = []
    for info in (*bare.graph.input, *bare.graph.output):
        kind = type(info.type)()
        kind.CopyFrom(info.type)
        if kind.HasField("tensor_type"):
            kind.tensor_type.ClearField("shape")
        result.append((info.name, kind.SerializeToString(deterministic=True)))
    return result


def _normalise(bare: ModelProto, weights: list[TensorProto]) -> list[str]:
    """One spelling of the default domain, a named graph, and no initializer among the inputs."""
    versions = {("" if e.domain in DEFAULT else e.domain): e.version for e in bare.opset_import}
    del bare.opset_import[:]
    bare.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in versions.items())
    bare.graph.name = bare.graph.name or "graph"
    stored = {t.name for t in (*weights, *bare.graph.initializer)} | {
        s.values.name for s in bare.graph.sparse_initializer
    }
    defaults = [i.name for i in bare.graph.input if i.name in stored]
    listed, bare.ir_version = bare.ir_version < OLDEST_IR, max(bare.ir_version, OLDEST_IR)
    if not defaults:
        return []
    kept = [i for i in bare.graph.input if i.name not in stored]
    del bare.graph.input[:]
    bare.graph.input.extend(kept)
    if listed:
        return [f"{len(defaults)} initializers are no longer listed as inputs"]
    return [f"{len(defaults)} inputs with default values are constants now"]


def _inlined(bare: ModelProto) -> tuple[ModelProto, list[str]]:
    """The skeleton without local functions; it needs no weights, which are captured by name."""
    if not bare.functions:
        return bare, []
    count = len(bare.functions)
    try:
        result = inline_local_functions(bare)
        if result.functions:  # written for another opset than the model's
            result = inline_local_functions(bare, convert_version=True)
    except (RuntimeError, ValueError, EncodeError, DecodeError) as error:
        raise ModelError(f"the model's local functions cannot be inlined: {one_sentence(error)}") from None
    if result.functions:
        return result, [f"{len(result.functions)} local functions could not be inlined"]
    return result, [f"{count} local functions inlined"]


def _inferred(bare: ModelProto, weights: list[TensorProto]) -> tuple[ModelProto, str]:
    """The skeleton with inferred types, or as it was and the reason why not; declared shapes of the interface stay.

    Declarations of inner tensors help, unless they contradict what follows without them.
    """
    given, problem = _inference(bare, weights)
    chosen = given
    if bare.graph.value_info:
        undeclared = ModelProto()
        undeclared.CopyFrom(bare)
        for graph in all_graphs(undeclared.graph):
            graph.ClearField("value_info")
        fresh, _ = _inference(undeclared, weights)
        if given is None or (fresh is not None and _contradict(given.graph, fresh.graph)):
            chosen = fresh
    if chosen is None:
        return bare, problem
    for new, old in zip(chosen.graph.output, bare.graph.output, strict=True):
        if not old.type.HasField("tensor_type") or old.type.tensor_type.HasField("shape"):
            new.CopyFrom(old)
    return chosen, ""


def _inference(bare: ModelProto, weights: list[TensorProto]) -> tuple[ModelProto | None, str]:
    try:
        result: ModelProto = infer_shapes(declared(bare, weights))
        if not _has_long_vector(result.graph):
            result = infer_shapes(result, data_prop=True)
    except (
        InferenceError,
        RuntimeError,
        ValueError,
        IndexError,
        MemoryError,
        EncodeError,
        DecodeError,
    ) as error:
        return None, one_sentence(error)
    undeclare(result, weights)
    return result, ""


def _has_long_vector(graph: GraphProto) -> bool:
    """Whether a tensor of rank 1 is long: onnx makes a symbol for each of its elements to follow values."""
    shapes = (info.type.tensor_type.shape.dim for part in all_graphs(graph) for info in infos(part))
    return any(len(dims) == 1 and dims[0].dim_value > LONG_VECTOR for dims in shapes)


def _contradict(one: GraphProto, other: GraphProto) -> bool:
    """Whether two graphs declare a tensor with different types, ranks or known dimensions."""
    declarations = {i.name: i.type.tensor_type for i in one.value_info}
    for info in other.value_info:
        a, b = declarations.get(info.name), info.type.tensor_type
        if a is None or not (a.HasField("shape") and b.HasField("shape")):
            continue
        pairs = zip(a.shape.dim, b.shape.dim, strict=False)
        known = (d for d in pairs if d[0].HasField("dim_value") and d[1].HasField("dim_value"))
        if a.elem_type != b.elem_type or len(a.shape.dim) != len(b.shape.dim):
            return True
        if any(m.dim_value != n.dim_value for m, n in known):
            return True
    return False


def _upgraded(bare: ModelProto, weights: list[TensorProto], target: int) -> bool:
    """Raise the operator set of the skeleton in place."""
    raised = False
    bare.graph.input.extend(declared(bare, weights).graph.input[len(bare.graph.input) :])
    try:
        raised = upgrade_opset(bare, target)
    finally:
        undeclare(bare, weights)
    return raised


def _promoted(
    bare: ModelProto, weights: list[TensorProto]
) -> tuple[ModelProto, list[TensorProto], list[str]]:
    """The skeleton and weights in float32 when the model computes in half precision and the result holds together."""
    whole = declared(bare, weights)
    kinds = half_types(whole)
    if not kinds or only_at_the_border(whole):
        return bare, weights, []
    named = " and ".join(kinds)
    problem = obstacle(bare)
    if not problem:
        result = ModelProto()
        result.CopyFrom(bare)
        renamed = promote_floats(result)
        wide = [_wide(w, renamed) for w in weights]
        result, _ = _inferred(result, wide)
        problem = _worse(whole, declared(result, wide))
        if not problem:
            return result, wide, [f"{named} became float32 inside the model"]
    return bare, weights, [f"the model stays in {named}: {problem}"]


def _wide(weight: TensorProto, renamed: dict[str, str]) -> TensorProto:
    tensor = TensorProto()
    tensor.CopyFrom(weight)
    promote_tensor(tensor)
    tensor.name = renamed.get(weight.name, weight.name)
    return tensor


def _worse(before: ModelProto, after: ModelProto) -> str:
    """What is wrong with a rewritten model that was right before, for strict type inference and for the runtime."""
    for complaint in (_type_error, _load_error):
        problem = complaint(after)
        if problem and not complaint(before):
            return problem
    return ""


def _type_error(model: ModelProto) -> str:
    try:
        infer_shapes(model, check_type=True, strict_mode=True)
    except (InferenceError, RuntimeError, ValueError, IndexError) as error:
        return one_sentence(error)
    return ""


def _load_error(model: ModelProto) -> str:
    try:
        make_session(model, threads=1, optimize=False)
    except ModelError as error:
        return str(error)
    return ""
