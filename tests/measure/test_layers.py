"""Noise by layer against numpy and onnxruntime on the models themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

import onnxq
from onnxq import compiler
from onnxq.data import Part, input_specs, open_data
from onnxq.measure.layers import LayerNoise, layer_noise
from onnxq.model.prepare import prepare
from onnxq.pipeline import Context, Pipeline
from onnxq.presets import preset_pipeline
from onnxq.program import Program
from onnxq.target import ORT_CPU

MODELS = Path(__file__).parents[2] / "models"
CNN, CALIB = MODELS / "digits_cnn.onnx", MODELS / "digits_calib.npz"
Array = NDArray[Any]
ParseModel = Callable[..., onnx.ModelProto]


def measured(**options: Any) -> tuple[onnxq.CompiledModel, LayerNoise]:
    done = onnxq.compile_model(CNN, CALIB, speed=False, threads=1, layers=True, samples=128, **options)
    assert done.report.layers is not None
    return done, done.report.layers


def sqnr(wanted: Array, found: Array) -> float:
    a, b = wanted.astype(np.float64), found.astype(np.float64)
    return float(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()))


def inner(model: onnx.ModelProto, name: str, feeds: dict[str, Array]) -> Array:
    """A tensor of a model, made an output by hand."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = ort.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run([name], feeds)[0])


def test_deployed_noise_is_that_of_the_tensors_of_both_files() -> None:
    narrow = "annotate:weights=int4:channel,activations=uint4"
    done, found = measured(
        pipeline=f"fold-batchnorm {narrow} calibrate choose-ranges quantize-weights emit-qdq"
    )
    float_model = onnx.load(CNN)
    names = {name for node in float_model.graph.node for name in node.output}
    shared = [t for t in found.deployed if t in names and t != "logits"]
    assert len(shared) > 12
    data = open_data(CALIB, input_specs(float_model))
    (batch,) = data.batches(64, 64)
    for tensor in shared[::4]:
        wanted = inner(float_model, tensor, batch.feeds)
        # the tensor keeps its name for the dequantized value
        assert found.deployed[tensor] == pytest.approx(
            sqnr(wanted, inner(done.model, tensor, batch.feeds)), abs=0.1
        )


def test_noise_grows_on_its_way_and_both_forms_have_the_same() -> None:
    (qdq, found), (_, other) = measured(bits="w4a4"), measured(bits="w4a4", form="integer")
    assert found.deployed.keys() == other.deployed.keys()
    # batches that the runtime fuses otherwise may round a code to its neighbour
    assert all(other.deployed[t] == pytest.approx(ratio, abs=0.2) for t, ratio in found.deployed.items())
    own = {row["tensor"]: row["sqnr_db"] for row in qdq.report.tensors if row["sqnr_db"] is not None}
    both = found.deployed.keys() & own.keys()
    assert np.mean([found.deployed[t] for t in both]) < np.mean([own[t] for t in both]) - 3.0


def test_scaled_channels_are_compared_with_scaled_ones() -> None:
    quantized = "annotate calibrate choose-ranges quantize-weights emit-qdq"
    done, found = measured(pipeline=f"fold-batchnorm equalize:when=always {quantized}")
    outputs = [row["tensor"] for row in done.report.tensors if row["kind"] == "output"]
    assert any("equalized" in tensor for tensor in outputs)
    assert min(found.deployed[tensor] for tensor in outputs if tensor in found.deployed) > 20.0
    assert len(found.deployed) >= len(outputs) - 1


PLAIN = "annotate:weights=int4:tensor,activations=uint4,first_last=same calibrate choose-ranges quantize-weights:method=minmax"


def products(parse_model: ParseModel) -> tuple[onnx.ModelProto, dict[str, Array], Array]:
    rng = np.random.default_rng(0)
    weights = {
        "a": rng.normal(size=(64, 48)).astype(np.float32),
        "b": rng.normal(size=(48, 64)).astype(np.float32),
    }
    text = "g (float[N,64] x) => (float[N,64] y) { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }"
    return parse_model(text, weights), weights, rng.normal(size=(32, 64)).astype(np.float32)


def rounded(values: Array, row: dict[str, Any]) -> Array:
    """Values on the grid of a row of the report."""
    step = row["scales"][0]
    return np.asarray(np.clip(np.rint(values / step) * step, *row["clip"]))


@pytest.mark.parametrize("sides", ["both", "weights", "activations"])
def test_a_layer_alone_is_its_input_weights_and_output_rounded(parse_model: ParseModel, sides: str) -> None:
    model, weights, x = products(parse_model)
    text = f"{PLAIN} emit-qdq".replace("annotate:", f"annotate:sides={sides},")
    done = onnxq.compile_model(model, {"x": x}, pipeline=text, speed=False, threads=1, layers=True)
    rows = {row["tensor"]: row for row in done.report.tensors}
    found = done.report.layers
    assert found is not None
    hidden, wanted = np.maximum(x @ weights["a"], 0), np.maximum(x @ weights["a"], 0) @ weights["b"]
    rows = {
        t: row for t, row in rows.items() if sides in ("both", "weights" if t in weights else "activations")
    }
    a, b = (rounded(weights[name], rows[name]) if name in rows else weights[name] for name in weights)
    first = np.maximum((rounded(x, rows["x"]) if "x" in rows else x) @ a, 0)
    first = (rounded(first, rows["r"]) if "r" in rows else first) @ weights["b"]
    second = rounded(hidden @ b, rows["y"]) if "y" in rows else hidden @ b
    nodes = [row.name for row in done.report.nodes if row.op == "MatMul"]
    assert list(found.alone) == nodes
    for name, output in zip(nodes, (first, second), strict=True):
        ratio = found.alone[name]
        if np.array_equal(output, wanted):
            assert ratio is None or ratio > 120.0
        else:  # a value in the middle of two codes may go either way
            assert ratio == pytest.approx(sqnr(wanted, output), abs=0.1)
    assert (found.layers, found.samples) == (2, 32)


def test_what_makes_up_for_the_weights_counts(parse_model: ParseModel) -> None:
    model, _, x = products(parse_model)
    feeds = {"x": x + 2.0}  # means are what the biases put right
    alone = []
    for correction in ("none", "output"):
        text = f"{PLAIN} correct-bias:correction={correction} emit-qdq"
        done = onnxq.compile_model(biased(model), feeds, pipeline=text, speed=False, threads=1, layers=True)
        assert done.report.layers is not None
        alone.append(next(iter(done.report.layers.alone.values())) or 0.0)
    assert alone[1] > alone[0] + 0.5


def biased(model: onnx.ModelProto) -> onnx.ModelProto:
    """The products with a bias of zeros on the first."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(48, np.float32), "zeros"))
    copy.graph.node[0].output[0] = "product"
    copy.graph.node.insert(1, onnx.helper.make_node("Add", ["product", "zeros"], ["h"], "add"))
    return copy


def test_padded_channels_are_cut_off_again(parse_model: ParseModel) -> None:
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(16, 3, 3, 3)).astype(np.float32)}
    model = parse_model("g (float[N,3,8,8] x) => (float[N,16,6,6] y) { y = Conv(x, w) }", weights)
    x = rng.normal(size=(16, 3, 8, 8)).astype(np.float32)
    done = onnxq.compile_model(model, {"x": x}, speed=False, threads=1, layers=True)
    assert any(node.op_type == "Pad" for node in done.model.graph.node)
    assert done.report.layers is not None
    (ratio,) = done.report.layers.alone.values()
    assert ratio is not None
    assert 30.0 < ratio < 60.0  # 8 bits


def test_time_that_runs_out_leaves_layers_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "Context", partial(Context, alone_seconds=-1.0))
    _, found = measured()
    assert found.alone == {}
    assert found.layers >= 17
    assert found.deployed


def test_samples_held_back_tell_the_noise() -> None:
    prepared, _ = prepare(onnx.load(CNN), ORT_CPU.min_opset)
    data = open_data(CALIB, input_specs(prepared))
    seen, held = (Part(data, 128, 2, held=held) for held in (False, True))
    program, ctx = Program.from_model(prepared), Context(seen, samples=128, threads=1, layers=True)
    Pipeline.parse(preset_pipeline("int8")).run(program, ctx)
    by_seen, by_held, by_others = (
        layer_noise(program, program.to_model(), c)
        for c in (ctx, replace(ctx, held=held), replace(ctx, data=held))
    )
    assert by_held == by_others
    assert by_held != by_seen


def test_nothing_is_measured_unless_asked_for() -> None:
    done = onnxq.compile_model(CNN, CALIB, samples=16, speed=False, threads=1)
    assert done.report.layers is None
    assert done.report.as_json()["layers"] is None


@pytest.mark.parametrize("options", [{"bits": "w4"}, {"preset": "int8-dynamic"}])
def test_without_quantized_activations_there_is_nothing_to_measure(options: dict[str, str]) -> None:
    done = onnxq.compile_model(CNN, speed=False, threads=1, layers=True, **options)  # type: ignore[arg-type]
    assert done.report.layers is None


def test_a_layer_alone_does_not_make_up_for_the_noise_of_others() -> None:
    """Matched scales and biases answer to errors that arrive from other layers, which a single quantized layer does not have."""
    (done, found), (_, unmatched) = measured(bits="w2a8"), measured(bits="w2a8", bias_correction="output")
    assert done.report.outputs is not None
    assert done.report.outputs["matched"]
    assert found.alone == unmatched.alone


def test_a_table_alone_is_looked_up_as_codes(parse_model: ParseModel) -> None:
    rng = np.random.default_rng(3)
    table, w = rng.normal(size=(500, 16)).astype(np.float32), rng.normal(size=(16, 8)).astype(np.float32)
    model = parse_model(
        "g (int64[N,4] ids) => (float[N,4,8] y) { [lookup] e = Gather(table, ids) [head] y = MatMul(e, w) }",
        {"table": table, "w": w},
    )
    ids = rng.integers(0, 500, (32, 4))
    pipeline = "annotate:small=0 calibrate choose-ranges quantize-weights emit-qdq"
    done = onnxq.compile_model(model, {"ids": ids}, pipeline=pipeline, layers=True, threads=1, speed=False)
    assert done.report.layers is not None
    found = inner(done.model, "e", {"ids": ids})
    expected = sqnr(table[ids] @ w, found @ w)
    assert done.report.layers.alone["lookup"] == pytest.approx(expected, abs=0.01)
