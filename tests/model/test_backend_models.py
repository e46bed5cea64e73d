"""Every model that ships with onnx and its test data: prepared, and through graphsurgeon, it computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, OptionalProto, SequenceProto, TensorProto, ValueInfoProto, numpy_helper

from onnxq.errors import ModelError
from onnxq.model.load import load_model
from onnxq.model.prepare import prepare
from onnxq.model.session import make_session
from onnxq.model.surgeon import to_graph, to_model

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
CASES = sorted(p.parent for kind in ("simple", "pytorch-*") for p in DATA.glob(f"{kind}/*/model.onnx"))

pytestmark = pytest.mark.skipif(not CASES, reason="this onnx comes without its test data")


def value(path: Path, info: ValueInfoProto) -> Any:
    data = path.read_bytes()
    if info.type.HasField("sequence_type"):
        return numpy_helper.to_list(SequenceProto.FromString(data))
    if info.type.HasField("optional_type"):
        return numpy_helper.to_optional(OptionalProto.FromString(data))
    return numpy_helper.to_array(TensorProto.FromString(data))


def session(model: ModelProto) -> ort.InferenceSession | None:
    """None where the runtime lacks a kernel, as it does for some float64 operators."""
    try:
        return make_session(model, threads=1)
    except ModelError:
        return None


def run(made: ort.InferenceSession, feeds: dict[str, Any]) -> list[Any]:
    names = {i.name for i in made.get_inputs()}
    found: list[Any] = made.run(None, {name: fed for name, fed in feeds.items() if name in names})
    return found


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}-{case.name}")
def test_the_model_computes_the_same(case: Path, opset: int) -> None:
    model = load_model(case / "model.onnx")
    prepared, _ = prepare(model, opset)
    again = to_model(to_graph(prepared), prepared)
    original, ours, theirs = session(model), session(prepared), session(again)
    assert (ours is None) == (theirs is None)
    if ours is None or theirs is None:
        assert original is None
        return
    stored = {t.name for t in model.graph.initializer}
    data, inputs = case / "test_data_set_0", [i for i in model.graph.input if i.name not in stored]
    feeds = {info.name: value(data / f"input_{i}.pb", info) for i, info in enumerate(inputs)}
    found = run(ours, feeds)
    np.testing.assert_equal(run(theirs, feeds), found)  # the same kernels on the same numbers: the same bits
    if original is not None:
        np.testing.assert_equal(found, run(original, feeds))
    for i, info in enumerate(model.graph.output):
        expected = value(data / f"output_{i}.pb", info)
        if info.type.HasField("tensor_type") and expected.dtype.kind == "f":
            np.testing.assert_allclose(
                found[i], expected, rtol=1e-3, atol=1e-5
            )  # as onnx's own runner, for float32
        else:
            np.testing.assert_equal(found[i], expected)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("case", CASES[::8], ids=lambda case: f"{case.parent.name}-{case.name}")
def test_a_model_cut_short_is_refused(case: Path, part: float, tmp_path: Path) -> None:
    data = (case / "model.onnx").read_bytes()
    (tmp_path / "m.onnx").write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ModelError, match=r"\A[^\n]+\Z"):
        load_model(tmp_path / "m.onnx")
