"""What the commands find, against figures got another way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, parser

from onnxq.choices import Choices
from onnxq.commands.compiling import compile_file
from onnxq.commands.hazards import model_hazards
from onnxq.commands.inspecting import inspect_file
from onnxq.commands.listing import list_passes
from onnxq.commands.measuring import bench_files, compare_files, evaluate_file, random_feeds
from onnxq.data import InputSpec
from onnxq.errors import DataError, ModelError, OnnxqError, UsageError
from onnxq.pipeline import Pipeline

MODELS = Path(__file__).parents[1] / "models"
CNN = MODELS / "digits_cnn.onnx"
TRANSFORMER = MODELS / "digits_transformer.onnx"
CALIB = str(MODELS / "digits_calib.npz")
TEST = str(MODELS / "digits_test.npz")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The compiled CNN and its report."""
    path = tmp_path_factory.mktemp("compiled") / "q.onnx"
    report = compile_file(CNN, path, Choices(), calibration=CALIB, samples=64, threads=1)
    return path, report.as_json()


def logits(path: Path, images: NDArray[np.float32]) -> NDArray[np.float64]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"image": images})
    return np.asarray(outputs[0], np.float64)


def test_evaluate_is_what_numpy_counts(quantized: tuple[Path, dict[str, Any]]) -> None:
    with np.load(TEST) as archive:
        images, labels = archive["image"], archive["label"]
    right = int((logits(quantized[0], images).argmax(1) == labels).sum())
    found = evaluate_file(quantized[0], TEST, "top1", threads=1)
    assert found == {"metric": "top1", "value": right / len(labels), "samples": len(labels)}


def test_outputs_whose_shapes_are_never_the_same_cannot_be_compared(tmp_path: Path) -> None:
    for name, wide in (("a", 3), ("b", 4)):
        text = f"g (float[N,5] x) => (float[N,{wide}] y) {{ y = MatMul(x, w) }}"
        model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
        model.graph.initializer.append(numpy_helper.from_array(np.ones((5, wide), np.float32), "w"))
        onnx.save(model, tmp_path / f"{name}.onnx")
    np.save(tmp_path / "x.npy", np.ones((6, 5), np.float32))
    with pytest.raises(ModelError, match="output 'y' has different shapes in the two models in all samples"):
        compare_files(tmp_path / "a.onnx", tmp_path / "b.onnx", str(tmp_path / "x.npy"), threads=1)


def test_compile_measures_what_evaluate_does(tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"
    done = compile_file(CNN, path, Choices(bits="w2a2"), calibration=CALIB, samples=64, test=TEST, threads=1)
    found = done.as_json()["quality"]["metric"]
    before, after = (evaluate_file(model, TEST, threads=1) for model in (CNN, path))
    assert after["value"] < before["value"]
    assert found == {
        "metric": "top1",
        "float": before["value"],
        "quantized": after["value"],
        "samples": before["samples"],
        "source": TEST,
    }


def test_compile_without_test_samples_has_no_metric(quantized: tuple[Path, dict[str, Any]]) -> None:
    assert quantized[1]["quality"]["metric"] is None  # though the calibration data hold labels


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"image": np.zeros((2, 1, 8, 8), np.float32)}, "metric 'top1' needs labels"),
        (
            {"image": np.zeros((2, 1, 8, 8), np.float32), "label": np.array([0, 11])},
            "they range from 0 to 11",
        ),
        ({"image": np.zeros((2, 1, 9, 9), np.float32), "label": np.zeros(2)}, "the model's input takes"),
        ({"imago": np.zeros((2, 1, 8, 8), np.float32), "label": np.zeros(2)}, "image"),
    ],
)
def test_test_samples_that_do_not_fit_are_found_before_the_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrays: dict[str, NDArray[Any]], said: str
) -> None:
    monkeypatch.setattr(Pipeline, "run", lambda *_: pytest.fail("the passes ran"))
    np.savez(tmp_path / "t.npz", allow_pickle=False, **arrays)
    with pytest.raises(DataError, match=said):
        compile_file(
            CNN, tmp_path / "q.onnx", Choices(), calibration=CALIB, test=str(tmp_path / "t.npz"), threads=1
        )
    assert not (tmp_path / "q.onnx").exists()


def test_evaluate_with_a_function(tmp_path: Path) -> None:
    (tmp_path / "my.py").write_text("def zeros(outputs, labels):\n    return (labels == 0).sum()\n")
    with np.load(TEST) as archive:
        zeros = float((archive["label"] == 0).sum())
    assert evaluate_file(CNN, TEST, f"{tmp_path}/my.py:zeros", threads=1)["value"] == zeros


def test_compare_is_what_numpy_measures(quantized: tuple[Path, dict[str, Any]]) -> None:
    with np.load(TEST) as archive:
        images = archive["image"]
    a, b = logits(CNN, images), logits(quantized[0], images)
    found = compare_files(CNN, quantized[0], TEST, threads=1, batch=100)
    assert found["samples"] == len(images)
    # Batches of another size may round float sums otherwise: a relative 1e-4 is far above that, and far below the figures.
    assert found["sqnr_db"] == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()), rel=1e-4)
    assert found["max_abs"] == pytest.approx(np.abs(a - b).max(), rel=1e-4)
    assert found["agreement"] == (a.argmax(1) == b.argmax(1)).mean()
    assert found["outputs"]["logits"]["sqnr_db"] == found["sqnr_db"]


def test_models_that_cannot_be_compared(tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    onnx.save(
        parser.parse_model(
            '<ir_version: 8, opset_import: ["":17]> g (float[N] x) => (float[N] y) {y = Neg(x)}'
        ),
        other,
    )
    with pytest.raises(
        ModelError, match="only the first model has an input 'image'; both must take the same inputs"
    ):
        compare_files(CNN, other, TEST)
    with pytest.raises(ModelError, match="only the first model has an input 'image'"):
        bench_files(CNN, other)


def spec(*shape: int | str | None, dtype: str = "float32", name: str = "x") -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


def feeds(*specs: InputSpec, batch: int = 1, shapes: tuple[str, ...] = ()) -> dict[str, NDArray[Any]]:
    return random_feeds(specs, batch, shapes, np.random.default_rng(0))


def test_random_feeds_fit_the_inputs() -> None:
    found = feeds(
        spec("N", 3, 5), spec(2, 7, dtype="int64", name="ids"), spec("N", dtype="bool", name="m"), batch=4
    )
    assert {k: (v.shape, v.dtype.name) for k, v in found.items()} == {
        "x": ((4, 3, 5), "float32"),
        "ids": ((2, 7), "int64"),
        "m": ((4,), "bool"),
    }
    assert set(np.unique(found["ids"])) == {0, 1}
    assert feeds(spec("N", "S"), shapes=("x=2x9",))["x"].shape == (2, 9)


@pytest.mark.parametrize(
    ("given", "batch", "shapes", "said"),
    [
        (spec("N", "S"), 1, (), r"input 'x' is float32 \(N, S\); give its shape with --shape x=1x128"),
        (InputSpec("x", np.dtype("float32"), None), 1, (), "give its shape with --shape x=1x3x224x224"),
        (spec(2, 3), 4, (), "the model fixes its batch at 2; leave --batch out"),
        (spec("N", "S"), 1, ("x=1xa",), "cannot read the shape 'x=1xa'; write NAME=1x3x224x224"),
        (spec("N", "S"), 1, ("x=0x1",), "cannot read the shape 'x=0x1'"),
        (spec("N", "S"), 1, ("y=1x1",), "unknown input 'y'; the choices are: x"),
        (spec("N", 3), 1, ("x=1x4",), r"has shape \(1, 4\), but the model's input takes \(N, 3\)"),
    ],
)
def test_shapes_that_are_missing_or_do_not_fit(
    given: InputSpec, batch: int, shapes: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        feeds(given, batch=batch, shapes=shapes)


def test_inspect_foresees_what_compile_does(quantized: tuple[Path, dict[str, Any]]) -> None:
    found = inspect_file(CNN)
    assert (found["opset"], found["ir_version"], found["domains"]) == (17, 8, {})
    assert found["inputs"] == [{"name": "image", "dtype": "float32", "shape": ["N", 1, 8, 8]}]
    assert found["outputs"] == [{"name": "logits", "dtype": "float32", "shape": ["N", 10]}]
    assert (found["ops"]["Conv"], found["ops"]["BatchNormalization"]) == (16, 16)
    weights = [numpy_helper.to_array(t) for t in onnx.load(CNN).graph.initializer]
    assert sum(found["parameters"].values()) == sum(w.nbytes for w in weights)
    planned = {node["name"]: node["status"] for node in found["nodes"]}
    assert planned == {node["name"]: node["status"] for node in quantized[1]["nodes"]}
    assert found["hazards"] == []
    json.dumps(found)


def test_inspect_gives_reasons() -> None:
    found = inspect_file(TRANSFORMER)
    left = {node["op"]: node["reason"] for node in found["nodes"] if node["status"] == "float"}
    assert left["Erf"] == "ort-cpu has no integer kernel for Gelu"
    assert all(left.values())


def test_inspect_a_quantized_model(quantized: tuple[Path, dict[str, Any]]) -> None:
    found = inspect_file(quantized[0])
    assert found["kernels"]["QLinearConv"] == 15  # and the first one, over one channel, in float
    assert found["hazards"] == ["it is quantized already: compile the float model it was made from"]


def save(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "m.onnx"
    onnx.save(parser.parse_model(text), path)
    return path


def test_hazards_of_types_versions_and_control_flow(tmp_path: Path) -> None:
    path = save(
        tmp_path,
        """<ir_version: 7, opset_import: ["":11]>
        g (int64[N] ids, bool c, float16[N] h) => (float16[N] y, int64[N] z) {
            y = Neg(h)
            z = If (c) <then_branch = t () => (int64[N] a) {a = Abs(ids)},
                        else_branch = e () => (int64[N] b) {b = Neg(ids)}>
        }""",
    )
    hazards = inspect_file(path)["hazards"]
    said = [
        "raised to opset 13",
        "float16 became float32",
        "input 'ids' is int64",
        "input 'c' is bool",
        "bodies of If node 'z' stay as they are",
        "ort-cpu would run no node of it in integers",
    ]
    assert [part for part in said if not any(part in hazard for hazard in hazards)] == []
    assert not any("'h'" in hazard for hazard in hazards)


def test_a_model_that_cannot_be_compiled_is_inspected_all_the_same(tmp_path: Path) -> None:
    path = save(
        tmp_path,
        '<ir_version: 8, opset_import: ["":17, "my":1]> g (float[N] x) => (float[N] y) {y = my.Op(x)}',
    )
    found = inspect_file(path)
    assert found["ops"] == {"my:Op": 1}
    assert found["kernels"] is None
    assert any("my" in hazard and "Op" in hazard for hazard in found["hazards"])


def quantized_product(op: str, codes: NDArray[np.int8]) -> onnx.ModelProto:
    """A product by constant int8 weights in one of the forms that quantizers emit."""
    weights = numpy_helper.from_array(codes, "w")
    scalars = [
        numpy_helper.from_array(np.array(1, np.float32), "s"),
        numpy_helper.from_array(np.array(0, np.uint8), "z"),
        numpy_helper.from_array(np.array(0, np.int8), "wz"),
    ]
    decode = [
        helper.make_node("DequantizeLinear", ["x", "s", "z"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "s", "wz"], ["wf"]),
    ]
    forms = {
        "MatMulInteger": [helper.make_node("MatMulInteger", ["x", "w", "z", "wz"], ["y"], "node")],
        "QLinearMatMul": [
            helper.make_node("QLinearMatMul", ["x", "s", "z", "w", "s", "wz", "s", "z"], ["y"], "node")
        ],
        "QLinearConv": [
            helper.make_node("QLinearConv", ["x", "s", "z", "w", "s", "wz", "s", "z"], ["y"], "node")
        ],
        "Gemm by columns": [*decode, helper.make_node("Gemm", ["xf", "wf"], ["y"], "node")],
        "Gemm": [*decode, helper.make_node("Gemm", ["xf", "wf"], ["y"], "node", transB=1)],
        "Conv": [*decode, helper.make_node("Conv", ["xf", "wf"], ["y"], "node")],
        "depthwise": [*decode, helper.make_node("Conv", ["xf", "wf"], ["y"], "node", group=len(codes))],
        "stored": [decode[1], helper.make_node("MatMul", ["x", "wf"], ["y"], "node")],
    }
    rank = [None] * codes.ndim
    graph = helper.make_graph(
        forms[op],
        "g",
        [
            helper.make_tensor_value_info(
                "x", TensorProto.FLOAT if op == "stored" else TensorProto.UINT8, rank
            )
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, rank)],
        [weights, *scalars],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def saturating(op: str, *rows: list[int]) -> list[str]:
    """Saturation hazards of a product whose output channels have these weights along the reduction."""
    codes = np.array(rows, np.int8)
    if op in ("MatMulInteger", "QLinearMatMul", "Gemm by columns", "stored"):
        codes = codes.T
    if "Conv" in op:
        codes = codes[:, :, None, None]
    if op == "depthwise":
        codes = codes[:, None, None, :]
    return [hazard for hazard in model_hazards(quantized_product(op, codes)) if "saturate" in hazard]


@pytest.mark.parametrize(
    "op", ["MatMulInteger", "QLinearMatMul", "QLinearConv", "Gemm", "Gemm by columns", "Conv"]
)
def test_weights_that_saturate(op: str) -> None:
    # 255 * (64 + 65) = 32895 passes 32767; 255 * 128 = 32640 does not. Codes of different pairs do not meet.
    found = saturating(op, [64, 65, 0, 0], [64, 64, 127, 1], [-64, -65, 0, 0], [0, 127, 127, 0])
    assert len(found) == 1
    assert found[0].startswith("8-bit weights of 'node' (2 channels) can saturate")
    assert saturating(op, [64, 64, 127, 1], [127, -128, -127, 1]) == []


def test_weights_that_meet_no_integer_kernel_do_not_saturate() -> None:
    assert saturating("stored", [127, 127, 127, 127]) == []
    assert saturating("depthwise", [127, 127], [127, 127]) == []  # sums of 32 bits


def test_passes_are_described_from_their_docstrings() -> None:
    found = list_passes()
    for entry in found["passes"]:
        assert entry["help"].endswith("."), entry["name"]
        for option in entry["options"]:
            assert option["help"], (entry["name"], option["name"])
    annotate = next(entry for entry in found["passes"] if entry["name"] == "annotate")
    weights = next(option for option in annotate["options"] if option["name"] == "weights")
    assert (weights["type"], weights["default"]) == ("scheme", "int8:channel")
    known = {entry["name"] for entry in found["passes"]}
    for text in found["presets"].values():
        assert {step.name for step in Pipeline.parse(text).passes} <= known
    json.dumps(found)


def test_the_calibration_table_must_fit_the_model(tmp_path: Path) -> None:
    table = tmp_path / "t.npz"
    compile_file(
        CNN, tmp_path / "a", Choices(), calibration=CALIB, samples=16, threads=1, save_calibration=table
    )
    with pytest.raises(OnnxqError, match="the calibration table is of other model"):
        compile_file(TRANSFORMER, tmp_path / "b", Choices(), load_calibration=table, threads=1)
    with pytest.raises(OnnxqError, match="the calibration table is of other data"):
        compile_file(
            CNN, tmp_path / "b", Choices(), calibration=TEST, samples=16, load_calibration=table, threads=1
        )
    assert not (tmp_path / "b").exists()
