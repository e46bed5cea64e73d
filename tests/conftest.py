"""Models from ONNX text, what they compute in two runtimes, golden graphs, and where real models lie."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import settings
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper, parser, printer
from onnx.reference import ReferenceEvaluator

from onnxq.model.prepare import prepare
from onnxq.model.session import make_session
from onnxq.program import Program
from onnxq.target import ORT_CPU

ROOT = Path(__file__).parent.parent
settings.register_profile("steady", derandomize=True, deadline=None)  # the same examples on every machine
settings.load_profile("steady")
# a shell's background jobs start with Ctrl-C ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
Arrays = Mapping[str, NDArray[Any]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regen", action="store_true", help="write the golden graphs anew instead of comparing")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real models and data sets."""
    folder = os.environ.get("ONNXQ_DATA")
    if not folder:
        pytest.skip("ONNXQ_DATA names no folder with real models")
    return Path(folder)


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """The models that ship with the project."""
    return ROOT / "models"


@pytest.fixture(scope="session")
def parse_model() -> Callable[..., ModelProto]:
    return _parse_model


@pytest.fixture(scope="session")
def parse_program() -> Callable[..., Program]:
    return _parse_program


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    return _assert_same


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, ModelProto], None]:
    """Compares a graph with `tests/golden/NAME.txt`, or writes that file under --regen."""

    def compare(name: str, model: ModelProto) -> None:
        path, text = ROOT / "tests" / "golden" / f"{name}.txt", graph_text(model)
        if request.config.getoption("--regen"):
            path.write_text(text, "utf-8")
        assert text == path.read_text("utf-8"), f"the graph differs from {path.name}; see --regen"

    return compare


def _parse_model(text: str, weights: Arrays | None = None, opset: int = 21) -> ModelProto:
    """A checked model from a graph in ONNX text, e.g. `g (float[2] x) => (float[2] y) { y = Relu(x) }`.

    Args:
        weights: initializers that the text names and does not define.
        opset: of the default domain.
    """
    domains = ', "other" : 1' if "other." in text else ""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}{domains}]> {text}')
    for name, values in (weights or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
    onnx.checker.check_model(model)
    return model


def _parse_program(text: str, weights: Arrays | None = None, opset: int = 21) -> Program:
    """The same as a program, prepared as the compiler prepares models."""
    return Program.from_model(prepare(_parse_model(text, weights, opset), ORT_CPU.min_opset)[0])


def _assert_same(
    before: ModelProto, after: ModelProto, *, tolerance: float = 1e-5, reference: bool = True
) -> None:
    """Both models agree on random inputs, in onnxruntime without rewrites and in ONNX's reference evaluator.

    Args:
        tolerance: largest difference, as a part of an output's largest magnitude. Folding moves float32 roundings
            (6e-8 each) in sums of at most some hundred terms.
        reference: False where ONNX's evaluator is known to be wrong.
    """
    onnx.checker.check_model(after, full_check=True)
    feeds = random_feeds(before)
    for run in (_run_ort, _run_reference) if reference else (_run_ort,):
        expected, found = run(before, feeds), run(after, feeds)
        assert len(expected) == len(found)
        for e, f in zip(expected, found, strict=True):
            assert (e.shape, e.dtype) == (f.shape, f.dtype)
            if e.dtype.kind != "f":
                np.testing.assert_array_equal(f, e)
                continue
            np.testing.assert_allclose(f, e, rtol=0, atol=tolerance * np.abs(e).max(initial=1e-30))


def random_feeds(model: ModelProto) -> dict[str, NDArray[Any]]:
    """Normal values for the inputs, open dimensions being 2; booleans are True."""
    rng, feeds = np.random.default_rng(11), {}
    for info in model.graph.input:
        shape = [d.dim_value or 2 for d in info.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        feeds[info.name] = np.ones(shape, bool) if dtype == np.bool_ else rng.normal(size=shape).astype(dtype)
    return feeds


def _run_ort(model: ModelProto, feeds: Arrays) -> list[NDArray[Any]]:
    found: list[NDArray[Any]] = make_session(model, threads=1, optimize=False).run(None, dict(feeds))
    return found


def _run_reference(model: ModelProto, feeds: Arrays) -> list[NDArray[Any]]:
    return [np.asarray(value) for value in ReferenceEvaluator(model).run(None, dict(feeds))]


def graph_text(model: ModelProto) -> str:
    """The graph as ONNX text, then one line for each initializer with its first values."""
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    graph.ClearField("initializer")
    graph.ClearField("value_info")
    lines = [line.rstrip() for line in printer.to_text(graph).splitlines()]
    return "\n".join([*lines, "", *(_constant_text(t) for t in model.graph.initializer)]) + "\n"


def _constant_text(tensor: onnx.TensorProto) -> str:
    values = numpy_helper.to_array(tensor)
    shown = " ".join(f"{v:.5g}" for v in values.ravel()[:8])
    return f"{values.dtype.name}{list(values.shape)} {tensor.name} = {shown}{' …' if values.size > 8 else ''}"
