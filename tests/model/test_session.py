"""Sessions, tensors inside them, and the runtime's own graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

from onnxq.errors import ModelError, UsageError
from onnxq.model.disk import SourceFile, Spool, put_on_disk, retype
from onnxq.model.session import make_session, optimized_model, session_and_optimized
from onnxq.model.tensors import storage_bytes, tensor_bytes
from onnxq.model.write import write_model

X = np.random.default_rng(5).normal(size=(2, 64)).astype(np.float32)
W = np.random.default_rng(6).normal(size=(64, 64)).astype(np.float32)  # 16 KiB, passed beside the model
BIAS = np.arange(20_000, dtype=np.float32)


def sample(dtype: int = TensorProto.FLOAT) -> ModelProto:
    model: ModelProto = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[N, 64] x) => (float[N, 64] y)'
        " { c = Cast<to = 1>(w)\n h = MatMul(x, c)\n r = Relu(h)\n y = Identity(r) }"
    )
    values = (W * 2).astype(helper.tensor_dtype_to_np_dtype(dtype))
    model.graph.initializer.append(numpy_helper.from_array(values, "w"))
    return model


ELEMENTS = [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT8, TensorProto.INT4]


@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("optimize", [False, True])
def test_large_initializers_of_any_type_arrive(
    monkeypatch: pytest.MonkeyPatch, dtype: int, optimize: bool
) -> None:
    monkeypatch.setattr("onnxq.model.session.PASSED", 1024)
    model = sample(dtype)
    weight = numpy_helper.to_array(model.graph.initializer[0]).astype(np.float32)
    (y,) = make_session(model, threads=1, optimize=optimize).run(None, {"x": X})
    # a dot product of 64 terms rounds by less than 64 * 6e-8 of the sum of magnitudes
    np.testing.assert_allclose(
        y, np.maximum(X @ weight, 0), atol=4e-6 * float((np.abs(X) @ np.abs(weight)).max())
    )
    assert len(model.graph.initializer) == 1


@pytest.mark.parametrize("dtype", [*ELEMENTS, TensorProto.BFLOAT16])
@pytest.mark.parametrize("optimize", [False, True])
def test_initializers_on_disk_are_read_by_the_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: int, optimize: bool
) -> None:
    monkeypatch.setattr("onnxq.model.session.PASSED", 1024)  # what is on disk is never smaller
    model = sample(dtype)
    expected = make_session(model, threads=1, optimize=optimize).run(None, {"x": X})[0]
    (tmp_path / "deep" / "er").mkdir(parents=True)
    spools = Spool(tmp_path / "deep" / "er"), Spool(tmp_path)
    add_bias(model)
    for tensor, spool in zip(model.graph.initializer, spools, strict=True):
        data = tensor_bytes(tensor)
        put_on_disk(tensor, spool, spool.append(data), len(data))
    session = make_session(model, threads=1, optimize=optimize, extra_outputs=["b"])
    before = model.SerializeToString()
    y, b = session.run(None, {"x": X})
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(b, BIAS)
    assert model.SerializeToString() == before
    assert [n.op_type for n in optimized_model(model).graph.node]


def add_bias(model: ModelProto) -> None:
    """A second output that is a large initializer of its own."""
    model.graph.initializer.append(numpy_helper.from_array(BIAS, "bias"))
    model.graph.node.append(helper.make_node("Identity", ["bias"], ["b"]))


def test_halves_on_disk_arrive_as_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxq.model.session.PASSED", 1024)
    model, spool = sample(TensorProto.FLOAT16), Spool(tmp_path)
    (tensor,) = model.graph.initializer
    expected = make_session(model, threads=1).run(None, {"x": X})[0]
    put_on_disk(tensor, spool, spool.append(tensor_bytes(tensor)), 2 * W.size)
    retype(tensor, TensorProto.FLOAT)
    np.testing.assert_array_equal(make_session(model, threads=1).run(None, {"x": X})[0], expected)


def test_a_changed_file_is_not_handed_to_the_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxq.model.session.PASSED", 1024)
    model, path = sample(), tmp_path / "w.bin"
    path.write_bytes(bytes(tensor_bytes(model.graph.initializer[0])))
    put_on_disk(model.graph.initializer[0], SourceFile.at(path), 0, W.nbytes)
    path.write_bytes(bytes(W.nbytes + 1))
    with pytest.raises(ModelError, match=r"w\.bin was changed"):
        make_session(model)


def test_inner_tensors_come_after_the_outputs() -> None:
    session = make_session(sample(), threads=1, extra_outputs=["h", "y", "x", "h", "w"])
    assert [o.name for o in session.get_outputs()] == ["y", "h", "x", "w"]
    y, h, x, w = session.run(None, {"x": X})
    np.testing.assert_array_equal(y, np.maximum(h, 0))
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(w, W * 2)


def test_a_tensor_that_is_not_there() -> None:
    with pytest.raises(ModelError, match="no tensor 'nope'"):
        make_session(sample(), extra_outputs=["nope"])


def test_an_unknown_provider_is_named_with_the_choices() -> None:
    with pytest.raises(UsageError, match=r"'CPUExecution'.*did you mean 'CPUExecutionProvider'"):
        make_session(sample(), provider="CPUExecution")


def test_models_that_the_runtime_refuses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    foreign = sample()
    foreign.graph.node[2].domain = "elsewhere"
    foreign.opset_import.append(helper.make_opsetid("elsewhere", 1))
    mistyped = sample(TensorProto.INT8)
    mistyped.graph.node[1].input[1] = "w"
    (tmp_path / "bad.onnx").write_bytes(b"bad")
    unfit: ModelProto = parser.parse_model(  # the runtime would log what its kernel throws
        '<ir_version: 8, opset_import: ["" : 17]> g (float[1, 1, 2] x, float[1, 6, 2] w, float[1, 6, 2] r) => (y)'
        " { y = GRU<layout = 1, hidden_size = 2>(x, w, r) }"
    )
    for model in (foreign, mistyped, unfit, tmp_path / "bad.onnx", tmp_path / "none.onnx"):
        with pytest.raises(ModelError) as caught:
            make_session(model)
        message = str(caught.value)
        assert "\n" not in message
        assert "onnxruntime_src" not in message
        assert "ONNXRuntimeError" not in message
    with pytest.raises(ModelError, match="elsewhere:Relu"):
        make_session(foreign)
    assert capfd.readouterr() == ("", "")


def test_a_path_is_the_same_as_the_model(tmp_path: Path) -> None:
    path, _ = write_model(sample(), tmp_path / "m.onnx", external=True)
    expected = make_session(sample(), threads=1).run(None, {"x": X})
    found = make_session(path, threads=1).run(None, {"x": X})
    np.testing.assert_array_equal(found[0], expected[0])
    inner = make_session(path, threads=1, extra_outputs=["h"]).run(["h"], {"x": X})
    np.testing.assert_array_equal(np.maximum(inner[0], 0), expected[0])


def test_settings_reach_the_runtime() -> None:
    options = make_session(
        sample(), threads=1, config={"session.x64quantprecision": "1"}
    ).get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.get_session_config_entry("session.x64quantprecision") == "1"


def test_the_optimized_graph_is_the_one_that_runs() -> None:
    session, graph = session_and_optimized(sample(TensorProto.INT8), threads=1)
    assert [n.op_type for n in sample().graph.node] == ["Cast", "MatMul", "Relu", "Identity"]
    assert "Cast" not in [n.op_type for n in graph.graph.node]
    assert storage_bytes(graph)["float32"] == W.size * 4
    np.testing.assert_array_equal(
        make_session(graph, threads=1).run(None, {"x": X})[0], session.run(None, {"x": X})[0]
    )


def test_an_optimized_graph_with_much_data_comes_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    inline = optimized_model(sample(), threads=1)
    monkeypatch.setattr("onnxq.model.session.APART", 1000)
    apart = optimized_model(sample(), threads=1)
    assert storage_bytes(apart) == storage_bytes(inline)
    assert [n.op_type for n in apart.graph.node] == [n.op_type for n in inline.graph.node]
    assert any(t.data_location == TensorProto.EXTERNAL for t in apart.graph.initializer)


def test_the_model_is_not_changed() -> None:
    model = sample()
    make_session(model, extra_outputs=["h"])
    optimized_model(model)
    assert model == sample()
