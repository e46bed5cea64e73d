"""A residual network with both kinds of branches, compiled for a target, and what three runtimes make of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, checker
from onnx.reference import ReferenceEvaluator

from onnxq.choices import Choices
from onnxq.data import input_specs, open_data
from onnxq.measure.codes import coded_tensors, on_grid, with_outputs
from onnxq.model.prepare import prepare
from onnxq.model.session import make_session
from onnxq.pipeline import Context
from onnxq.program import Program
from onnxq.target import find_target

Arrays = dict[str, NDArray[Any]]
Feeds = Mapping[str, NDArray[Any]]

# c2 meets an identity, c4 a shortcut with a convolution of its own. All constants are multiples of powers of two and sparse,
# so that float32 holds every sum exactly and every machine chooses the same scales and codes.
RESIDUAL = """g (float[n,4,8,8] x) => (float[n,6] y) {
    c0 = Conv<pads=[1,1,1,1]>(x, w0, b0)  r0 = Relu(c0)
    c1 = Conv<pads=[1,1,1,1]>(r0, w1, b1) r1 = Relu(c1)
    c2 = Conv<pads=[1,1,1,1]>(r1, w2, b2) [identity] s1 = Add(c2, r0) r2 = Relu(s1)
    c5 = Conv<strides=[2,2]>(r2, w5)
    c3 = Conv<pads=[1,1,1,1], strides=[2,2]>(r2, w3, b3) r3 = Relu(c3)
    c4 = Conv<pads=[1,1,1,1]>(r3, w4) [shortcut] s2 = Add(c5, c4) r4 = Relu(s2)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r4)
    a = GlobalAveragePool(p) f = Flatten(a) y = Gemm<transB=1>(f, v, bv)
}"""
SHAPES = {
    "w0": (4, 4, 3, 3),
    "w1": (4, 4, 3, 3),
    "w2": (4, 4, 3, 3),
    "w3": (8, 4, 3, 3),
    "w4": (8, 8, 3, 3),
    "w5": (8, 4, 1, 1),
    "v": (6, 8),
    "b0": (4,),
    "b1": (4,),
    "b2": (4,),
    "b3": (8,),
    "bv": (6,),
}
STEPS = "annotate:small=0 calibrate choose-ranges:ranges=minmax quantize-weights:method=minmax"


def constants() -> Arrays:
    found = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        index = np.arange(int(np.prod(shape))) + seed
        values = np.where(index % (4 if len(shape) == 4 else 1) == 0, (index * 5 % 7 - 3) / 2, 0.0)
        found[name] = values.astype(np.float32).reshape(shape)
    return found


@pytest.fixture(scope="session")
def residual_feeds() -> Arrays:
    x = (np.arange(2 * 4 * 64) * 5 % 33 - 16) / 8
    return {"x": x.astype(np.float32).reshape(2, 4, 8, 8)}


@pytest.fixture
def residual(
    parse_model: Callable[..., ModelProto], residual_feeds: Arrays
) -> Callable[..., tuple[Program, ModelProto]]:
    """The residual network compiled for a target: `residual("onnx", bits="w4a4", form="integer")`."""

    def compiled(name: str, bits: str | None = None, form: str = "qdq") -> tuple[Program, ModelProto]:
        target, source = find_target(name), parse_model(RESIDUAL, constants(), 17)
        steps = Choices(pipeline=f"{STEPS} emit-{form}", bits=bits, target=name).resolve(has_data=True)
        program = Program.from_model(prepare(source, steps.opset(target))[0])
        data = open_data(residual_feeds, input_specs(source))
        steps.run(program, Context(data=data, threads=1, target=target))
        model = program.to_model()
        checker.check_model(model, full_check=True)
        return program, model

    return compiled


@pytest.fixture(scope="session")
def openvino() -> Callable[..., tuple[Arrays, dict[str, str]]]:
    """Runs a model in OpenVINO: its outputs, and the precision of each kind of kernel that it ran; skips without OpenVINO."""
    package = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    core = package.Core()

    def run(model: ModelProto, feeds: Feeds, **config: str) -> tuple[Arrays, dict[str, str]]:
        read = core.read_model(model.SerializeToString())
        compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32", **config})
        found = compiled({i.any_name: feeds[i.any_name] for i in compiled.inputs})
        infos = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
        kernels: dict[str, set[str]] = {}
        for info in infos:
            kernels.setdefault(info["layerType"].astype(str), set()).add(info["runtimePrecision"].astype(str))
        outputs = {o.name: found[compiled.output(o.name)] for o in model.graph.output}
        return outputs, {kind: "/".join(sorted(types)) for kind, types in kernels.items()}

    return run


@pytest.fixture(scope="session")
def in_onnxruntime() -> Callable[[ModelProto, Feeds], Arrays]:
    def run(model: ModelProto, feeds: Feeds) -> Arrays:
        names = [o.name for o in model.graph.output]
        return dict(zip(names, make_session(model, threads=1).run(names, dict(feeds)), strict=True))

    return run


@pytest.fixture(scope="session")
def in_evaluator() -> Callable[[ModelProto, Feeds], Arrays]:
    """onnx's own evaluator."""

    def run(model: ModelProto, feeds: Feeds) -> Arrays:
        names = [o.name for o in model.graph.output]
        return dict(zip(names, ReferenceEvaluator(model).run(names, dict(feeds)), strict=True))

    return run


@pytest.fixture(scope="session")
def shown(
    in_onnxruntime: Callable[[ModelProto, Feeds], Arrays],
) -> Callable[..., tuple[ModelProto, Arrays, Arrays]]:
    """A model with all its codes as outputs, feeds on the grid of its inputs, and the codes in onnxruntime."""

    def show(model: ModelProto, feeds: Feeds) -> tuple[ModelProto, Arrays, Arrays]:
        exposed = with_outputs(model, coded_tensors(model))
        moved = on_grid(model, feeds, in_onnxruntime(exposed, feeds))
        return exposed, moved, in_onnxruntime(exposed, moved)

    return show
