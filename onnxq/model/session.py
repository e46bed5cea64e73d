"""onnxruntime sessions from models, and the graph that the runtime makes of a model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnxruntime as ort
from google.protobuf.message import EncodeError
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto
from onnxruntime.capi import onnxruntime_pybind11_state as state

from onnxq.errors import ModelError, unknown
from onnxq.model.disk import as_written, file_of, is_converted
from onnxq.model.load import load_model, parse_model
from onnxq.model.messages import one_sentence
from onnxq.model.skeleton import split
from onnxq.model.tensors import ELEMENTS, all_tensors, in_memory, tensor_array, tensor_nbytes

PASSED = (
    2**14
)  # bytes; larger initializers reach the runtime as arrays instead of inside the serialized model
APART = (
    2**27
)  # bytes; beyond, folding 2-bit codes to floats may take an optimized graph past the 2 GB of one file

CPU = "CPUExecutionProvider"
NO_CONFIG: Mapping[str, str] = MappingProxyType({})
NATIVE = {
    "float32",
    "float64",
    "float16",
    "bool",
    *(f"{u}int{b}" for u in ("", "u") for b in (8, 16, 32, 64)),
}
PASSABLE = {number for number, (name, _) in ELEMENTS.items() if name in NATIVE}

# onnxruntime's own exceptions share no base class.
RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    *(
        value
        for value in vars(state).values()
        if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == state.__name__
    ),
    RuntimeError,
    ValueError,
    TypeError,
    OSError,
    MemoryError,
)


def make_session(
    model: ModelProto | Path,
    *,
    threads: int = 0,
    provider: str = CPU,
    optimize: bool = True,
    extra_outputs: Sequence[str] = (),
    config: Mapping[str, str] = NO_CONFIG,
) -> ort.InferenceSession:
    """A session over a model; idle threads sleep instead of spinning, so that several sessions can live in one process.

    Args:
        threads: threads inside one operator, 0 for one per core.
        provider: execution provider.
        optimize: let the runtime rewrite the graph.
        extra_outputs: inner tensors to return after the model's own outputs.
        config: further session configuration entries.

    Raises:
        UsageError: the provider is not available.
        ModelError: the model has no such tensor, or the runtime refuses it.
    """
    options = _options(threads, provider, optimize, config)
    if isinstance(model, Path) and not extra_outputs:
        return _start(str(model), [], options, provider)
    loaded = load_model(model) if isinstance(model, Path) else model
    return _start(*_passed(loaded, extra_outputs, options), options=options, provider=provider)


def optimized_model(
    model: ModelProto | Path, *, threads: int = 0, provider: str = CPU, config: Mapping[str, str] = NO_CONFIG
) -> ModelProto:
    """The graph that the runtime runs after all its rewrites, with its kernels as nodes.

    Kernels are made but do not rearrange their weights, so what is on disk is not read.

    Raises:
        UsageError: the provider is not available.
        ModelError: the runtime refuses the model.
    """
    light = {"session.disable_prepacking": "1", **config}
    return session_and_optimized(model, threads=threads, provider=provider, config=light)[1]


def session_and_optimized(
    model: ModelProto | Path, *, threads: int = 0, provider: str = CPU, config: Mapping[str, str] = NO_CONFIG
) -> tuple[ort.InferenceSession, ModelProto]:
    """A session and the graph that it runs, from loading the model once; see `make_session` and `optimized_model`.

    Large initializers come without their data where the model has more than `APART` bytes of them.
    """
    options = _options(threads, provider, True, config)
    loaded = load_model(model) if isinstance(model, Path) else model
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "optimized.onnx")
        options.optimized_model_filepath = str(path)
        if sum(tensor_nbytes(t) for t in all_tensors(loaded)) > APART:
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", "weights"
            )
            Path(directory, "weights").symlink_to(os.devnull)
        session = _start(*_passed(loaded, (), options), options=options, provider=provider)
        return session, parse_model(path)


def _options(threads: int, provider: str, optimize: bool, config: Mapping[str, str]) -> ort.SessionOptions:
    if provider not in ort.get_available_providers():
        raise unknown("execution provider", provider, ort.get_available_providers())
    options = ort.SessionOptions()
    options.log_severity_level = 4  # fatal ones; every error is raised as well
    options.intra_op_num_threads = threads
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    for key, value in {"session.intra_op.allow_spinning": "0", **config}.items():
        options.add_session_config_entry(key, value)
    return options


def _passed(
    model: ModelProto, extra_outputs: Sequence[str], options: ort.SessionOptions
) -> tuple[bytes, list[NDArray[Any]]]:
    """The serialized model without its large initializers, and those in memory, which the options refer to."""
    bare, weights = split(model, PASSED)
    _expose(bare, weights, extra_outputs)
    names: list[str] = []
    arrays: list[NDArray[Any]] = []
    folder = _data_folder(weights)
    for tensor in weights:
        if folder is not None and _is_mapped(tensor):
            bare.graph.initializer.append(as_written(tensor, folder))
            continue
        if tensor.data_type not in PASSABLE:
            bare.graph.initializer.append(in_memory(tensor))
            continue
        stub = bare.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        stub.data_location = TensorProto.EXTERNAL
        stub.external_data.add(key="location", value="passed")
        names.append(tensor.name)
        arrays.append(tensor_array(tensor))
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if names:
        options.add_external_initializers(names, [ort.OrtValue.ortvalue_from_numpy(a) for a in arrays])
    try:
        return bare.SerializeToString(), arrays
    except (EncodeError, ValueError):
        raise ModelError(
            "the model holds more than 2 GB outside the initializers of its main graph"
        ) from None


def _data_folder(weights: Sequence[TensorProto]) -> Path | None:
    """The folder below which all files lie that the runtime maps itself, None when there are none."""
    files = {file_of(tensor) for tensor in weights if _is_mapped(tensor)}
    folders = [file.path.parent for file in files if file is not None]
    return Path(os.path.commonpath(folders)) if folders else None


def _is_mapped(tensor: TensorProto) -> bool:
    """Whether a file holds the tensor as the runtime is to read it."""
    return file_of(tensor) is not None and not is_converted(tensor)


def _expose(bare: ModelProto, weights: Sequence[TensorProto], names: Sequence[str]) -> None:
    graph = bare.graph
    infos = {i.name: i for i in (*graph.value_info, *graph.input)}
    known = {name for node in graph.node for name in node.output if name} | set(infos)
    known |= {t.name for t in (*graph.initializer, *weights)}
    present = {o.name for o in graph.output}
    for name in dict.fromkeys(names):
        if name not in known:
            raise ModelError(f"the model has no tensor {name!r} to return")
        if name not in present:
            graph.output.append(infos.get(name, ValueInfoProto(name=name)))


def _start(
    model: str | bytes, weights: list[NDArray[Any]], options: ort.SessionOptions, provider: str
) -> ort.InferenceSession:
    try:
        session = ort.InferenceSession(model, options, providers=[provider], enable_fallback=0)
        session.passed_weights = weights  # the session reads their memory as long as it lives
        return session
    except RUNTIME_ERRORS as error:
        source = f" {model}" if isinstance(model, str) else " the model"
        raise ModelError(f"onnxruntime cannot load{source}: {one_sentence(error)}") from None
