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


def run(session: ort.InferenceSession, feeds: dict[str, Any]) -> list[Any]:
    names = {i.name for i in session.get_inputs()}
    found: list[Any] = session.run(None, {name: fed for name, fed in feeds.items() if name in names})
    return found


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}-{case.name}")
def test_the_model_computes_the_same(case: Path, opset: int) -> None:
    model = load_model(case / "model.onnx")
    prepared, _ = prepare(model, opset)
    again: ModelProto = to_model(to_graph(prepared), prepared)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        original = ort.InferenceSession(str(case / "model.onnx"), options, providers=["CPUExecutionProvider"])
    except Exception:  # noqa: BLE001 - onnxruntime's errors have no common class
        pytest.skip("onnxruntime has no kernels for this model")
    stored = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in stored]
    feeds = {i.name: value(case / "test_data_set_0" / f"input_{k}.pb", i) for k, i in enumerate(inputs)}
    expected = run(original, feeds)
    for other in (prepared, again):
        for e, f in zip(expected, run(make_session(other, threads=1), feeds), strict=True):
            np.testing.assert_equal(f, e)  # the same kernels on the same numbers: the same bits


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    """Each model cut short at several places is refused, or is a model."""
    for case in CASES[:: max(1, len(CASES) // 20)]:
        data = (case / "model.onnx").read_bytes()
        for part in range(1, 10):
            (tmp_path / "m.onnx").write_bytes(data[: len(data) * part // 10])
            try:
                load_model(tmp_path / "m.onnx")
            except ModelError as error:
                assert "\n" not in str(error)
