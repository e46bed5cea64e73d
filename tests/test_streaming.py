"""Models whose weights stay on disk: the same result as in memory, little memory, nothing left behind."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxq
from onnxq.model.disk import file_of
from onnxq.model.load import load_model, model_digest
from onnxq.model.session import make_session
from onnxq.model.write import write_model

LAYERS, INNER, OUTER = 6, 256, 512  # 512 KiB of float32 weights in each layer
PIPELINE = "fold-constants fold-batchnorm fold-pad store-weights:weights=int4:block=32"

FRUGAL = """
import sys
import numpy as np
import onnxq, onnxq.model.load, onnxq.verify

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

onnxq.model.load.HELD = onnxq.verify.RUN_LIMIT = 2**20
pipeline = "fold-constants:limit_mb=16 fold-batchnorm fold-pad store-weights:weights=int4:block=32"
onnxq.compile_model(sys.argv[1], output=sys.argv[3], pipeline=pipeline)  # what is imported and allocated at first
before = peak()
onnxq.compile_model(sys.argv[2], output=sys.argv[4], pipeline=pipeline)
print(peak() - before)
"""


def perceptron(layers: int = LAYERS, inner: int = INNER, outer: int = OUTER) -> ModelProto:
    """x W0 W1 …, each W preceded by a Transpose that folds and followed by a bias; float32."""
    rng, nodes, weights, name = np.random.default_rng(3), [], [], "x"
    for i in range(layers):
        shape = (outer, inner) if i % 2 == 0 else (inner, outer)
        weight = rng.normal(size=shape).astype(np.float32) / np.float32(np.sqrt(shape[1]))
        weights.append(numpy_helper.from_array(weight, f"w{i}"))
        weights.append(numpy_helper.from_array(rng.normal(size=shape[0]).astype(np.float32), f"b{i}"))
        nodes.append(helper.make_node("Transpose", [f"w{i}"], [f"t{i}"], f"transpose{i}"))
        nodes.append(helper.make_node("MatMul", [name, f"t{i}"], [f"m{i}"], f"matmul{i}"))
        name = f"a{i}"
        nodes.append(helper.make_node("Add", [f"m{i}", f"b{i}"], [name], f"add{i}"))
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", inner]) for n in ("x", name)]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.fixture
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model file whose weights are not read into memory; its folder must hold nothing else in the end."""
    (tmp_path / "source").mkdir()
    path, data = write_model(perceptron(), tmp_path / "source" / "m.onnx", external=True)
    monkeypatch.setattr("onnxq.model.load.HELD", 2**20)
    yield path
    assert sorted(path.parent.iterdir()) == [path, data]


def outputs(model: Path) -> np.ndarray:
    x = np.random.default_rng(4).normal(size=(5, INNER)).astype(np.float32)
    found: np.ndarray = make_session(model, threads=1).run(None, {"x": x})[0]
    return found


def test_the_files_are_those_of_a_compile_in_memory(tmp_path: Path, on_disk: Path) -> None:
    held = onnxq.compile_model(perceptron(), pipeline=PIPELINE, speed=False)
    assert not held.files
    expected = write_model(held.model, tmp_path / "held.onnx", external=True)
    streamed = onnxq.compile_model(on_disk, pipeline=PIPELINE, speed=False, output=tmp_path / "held2.onnx")
    assert any(file_of(t) in streamed.files for t in streamed.model.graph.initializer)
    files = [tmp_path / "held2.onnx", tmp_path / "held2.onnx.data"]
    assert files[1].read_bytes() == expected[1].read_bytes()
    assert model_digest(load_model(files[0])) == model_digest(held.model)
    np.testing.assert_array_equal(outputs(files[0]), outputs(expected[0]))
    assert {r.name: (r.status, r.reason) for r in streamed.report.nodes} == {
        r.name: (r.status, r.reason) for r in held.report.nodes
    }
    assert streamed.report.float_bytes == pytest.approx(held.report.float_bytes, rel=1e-3)
    assert streamed.report.quantized_bytes == pytest.approx(held.report.quantized_bytes, rel=1e-2)


def test_halves_on_disk_compile_as_those_in_memory(tmp_path: Path, on_disk: Path) -> None:
    model = perceptron()
    for tensor in model.graph.initializer:
        tensor.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
        )
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.elem_type = TensorProto.FLOAT16
    path, _ = write_model(model, tmp_path / "half.onnx", external=True)
    held = onnxq.compile_model(model, pipeline=PIPELINE, speed=False)
    streamed = onnxq.compile_model(path, pipeline=PIPELINE, speed=False)
    assert streamed.files
    assert model_digest(streamed.model) == model_digest(held.model)


def test_weights_that_nothing_changes_are_copied(tmp_path: Path, on_disk: Path) -> None:
    onnxq.compile_model(on_disk, pipeline="fold-batchnorm", speed=False, output=tmp_path / "same.onnx")
    assert (tmp_path / "same.onnx.data").read_bytes() == on_disk.with_name("m.onnx.data").read_bytes()
    np.testing.assert_array_equal(outputs(tmp_path / "same.onnx"), outputs(on_disk))


def test_data_and_comparison_work_with_weights_on_disk(on_disk: Path) -> None:
    samples = {"x": np.random.default_rng(5).normal(size=(64, INNER)).astype(np.float32)}
    held = onnxq.compile_model(perceptron(), samples, speed=False)
    streamed = onnxq.compile_model(on_disk, samples, speed=False)
    assert streamed.table is not None
    assert held.table is not None
    assert streamed.table.model_digest == held.table.model_digest
    assert model_digest(streamed.model) == model_digest(held.model)
    assert streamed.report.difference is not None
    assert held.report.difference is not None
    assert streamed.report.difference.main == held.report.difference.main


def test_too_large_to_run_is_said(on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxq.verify.RUN_LIMIT", 2**21)
    samples = {"x": np.zeros((8, INNER), np.float32)}
    report = onnxq.compile_model(on_disk, samples, pipeline=PIPELINE).report
    (sentence,) = (s for s in report.warnings if "up to which" in s)
    assert sentence.startswith("the model has 0.0 GB of weights, more than the 0.0 GB")
    assert sentence.endswith(
        "checked and loaded, but not optimized by onnxruntime, compared with it or timed"
    )
    assert report.difference is None
    assert report.speed is None
    assert report.coverage is None
    held = onnxq.compile_model(perceptron(), samples, pipeline=PIPELINE).report  # in memory anyway
    assert held.difference is not None
    assert held.speed is not None


@pytest.mark.parametrize("label", ["loading", "storing weights", "verifying", "writing (MB)"])
@pytest.mark.parametrize("existed", [False, True])
def test_an_interrupt_leaves_what_was_there(tmp_path: Path, on_disk: Path, label: str, existed: bool) -> None:
    place = tmp_path / "place"
    place.mkdir()
    if existed:
        write_model(perceptron(2), place / "q.onnx", external=True)
    before = {p: p.read_bytes() for p in place.iterdir()}

    def interrupt(now: str, done: int, total: int | None) -> None:
        if now == label and (total is None or done >= total // 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        onnxq.compile_model(on_disk, pipeline=PIPELINE, output=place / "q.onnx", progress=interrupt)
    gc.collect()  # the traceback held what was being made
    assert {p: p.read_bytes() for p in place.iterdir()} == before


def test_the_result_can_be_saved_as_long_as_it_is_kept(tmp_path: Path, on_disk: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    done = onnxq.compile_model(on_disk, pipeline=PIPELINE, speed=False, scratch=scratch)
    assert len(list(scratch.iterdir())) == 1
    done.save(tmp_path / "a.onnx")
    done.save(tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx.data").read_bytes() == (tmp_path / "b.onnx.data").read_bytes()
    model = done.model
    del done
    gc.collect()
    assert not list(scratch.iterdir())
    with pytest.raises(onnxq.ModelError, match="in a file that was not loaded"):
        write_model(model, tmp_path / "c.onnx")


@pytest.mark.parametrize("name", ["m.onnx", "m.onnx.data"])
def test_a_model_is_not_written_over_its_own_weights(on_disk: Path, name: str) -> None:
    target = on_disk.with_name(name)
    with pytest.raises(onnxq.ModelError, match=r"m\.onnx\.data holds weights of the model that is compiled"):
        onnxq.compile_model(on_disk, pipeline=PIPELINE, speed=False, output=target)
    done = onnxq.compile_model(on_disk, pipeline=PIPELINE, speed=False)
    with pytest.raises(onnxq.ModelError, match=r"m\.onnx\.data holds weights of the model that is compiled"):
        done.save(target)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory from /proc")
def test_memory_is_near_the_largest_tensor(tmp_path: Path) -> None:
    """96 MB of weights, 8 MB each: compiling holds a few of them, in floats and in codes."""
    small, _ = write_model(perceptron(), tmp_path / "small.onnx", external=True)
    large, data = write_model(perceptron(12, 1024, 2048), tmp_path / "large.onnx", external=True)
    assert data.stat().st_size > 96e6
    paths = [str(p) for p in (small, large, tmp_path / "a.onnx", tmp_path / "b.onnx")]
    words = [sys.executable, "-c", FRUGAL, *paths]
    ran = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    assert float(ran.stdout) < 48
    assert onnx.load(tmp_path / "b.onnx", load_external_data=False).graph.initializer
