"""The reference on whole models: compiled ones in both forms, packed weights, float parts, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from onnxq.compiler import compile_model
from onnxq.errors import ModelError, UsageError
from onnxq.model.session import make_session, optimized_model
from onnxq.reference.run import Reference

Array = NDArray[Any]
Build = Callable[..., ModelProto]
Check = Callable[..., dict[str, Array]]


@pytest.fixture(scope="module")
def digits(models_dir: Path) -> dict[str, Array]:
    with np.load(models_dir / "digits_test.npz") as file:
        return {"image": file["image"][:32]}


@pytest.mark.parametrize("form", ["qdq", "integer"])
@pytest.mark.parametrize("bits", [None, "w4a4", "w3a2"])
@pytest.mark.parametrize("name", ["digits_cnn", "digits_transformer"])
def test_models_that_ship(
    name: str,
    bits: str | None,
    form: str,
    models_dir: Path,
    digits: dict[str, Array],
    assert_exact: Check,
) -> None:
    done = compile_model(
        models_dir / f"{name}.onnx",
        models_dir / "digits_calib.npz",
        form=form,
        bits=bits,
        samples=32,
        threads=1,
        speed=False,
    )
    found = assert_exact(done.model, digits)
    assert len(Reference(done.model).code_names) >= 18
    assert found["logits"].shape == (32, 10)
    opened, closed = (
        [
            n.op_type
            for n in optimized_model(m, threads=1).graph.node
            if n.op_type.startswith(("Q", "MatMulI"))
        ]
        for m in (exposed(done.model), done.model)
    )
    assert sorted(opened) == sorted(closed)  # reading codes leaves the deployed kernels as they are


def exposed(model: ModelProto) -> ModelProto:
    """The model with all its codes as outputs."""
    copy = ModelProto()
    copy.CopyFrom(model)
    present = {o.name for o in model.graph.output}
    names = [name for name in Reference(model).code_names if name not in present]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return copy


@pytest.mark.parametrize("name", ["digits_cnn", "digits_transformer"])
def test_models_quantized_as_they_run(
    name: str, models_dir: Path, digits: dict[str, Array], assert_exact: Check
) -> None:
    done = compile_model(models_dir / f"{name}.onnx", threads=1, speed=False)
    assert_exact(done.model, digits)


REAL = [
    ("cifar10_resnet20", "cifar10", {"form": "qdq"}),
    ("cifar10_resnet20", "cifar10", {"form": "integer"}),
    ("cifar10_resnet20", "cifar10", {"bits": "w4a4"}),
    ("kws_dscnn", "kws", {"form": "qdq"}),
    ("kws_dscnn", "kws", {"form": "integer"}),
    ("ncf_ml1m_mlp", "ncf", {}),
    ("minilm_l6_v2", "stsb", {}),
    ("minilm_l6_v2", "stsb", None),
]


@pytest.mark.parametrize(("model", "task", "options"), REAL, ids=str)
def test_real_models(
    model: str, task: str, options: dict[str, Any] | None, data_dir: Path, tmp_path: Path, assert_exact: Check
) -> None:
    """With the options given, on calibration data; without any, quantized as they run."""
    words = [sys.executable, str(data_dir / "prepare.py"), str(tmp_path), task]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    calib = None if options is None else tmp_path / f"{task}.calib.npz"
    source = data_dir / "models" / f"{model}.onnx"
    done = compile_model(source, calib, samples=32, speed=False, **(options or {}))
    with np.load(tmp_path / f"{task}.test.npz") as file:
        feeds = {i.name: file[i.name][:16] for i in done.model.graph.input}
    assert_exact(done.model, feeds)


@pytest.mark.parametrize(("kind", "low"), [("INT4", -8), ("UINT4", 0), ("INT2", -2), ("UINT2", 0)])
def test_packed_weights_are_unpacked_once(
    kind: str, low: int, build_model: Build, assert_exact: Check
) -> None:
    rng = np.random.default_rng(1)
    bits = int(kind[-1])
    values = rng.integers(low, low + 2**bits, (32, 8))
    feeds = {"a": rng.integers(0, 256, (4, 32)).astype(np.uint8)}
    nodes = [
        helper.make_node("Cast", ["packed"], ["w"], to=TensorProto.INT8),
        helper.make_node("MatMulInteger", ["a", "w"], ["y"]),
    ]
    model = build_model(nodes, feeds, {}, opset=25)
    element = getattr(TensorProto, kind)
    model.graph.initializer.append(helper.make_tensor("packed", element, values.shape, values.ravel()))
    assert_exact(model, feeds)
    reference = Reference(model)
    np.testing.assert_array_equal(reference.lowered.constants["w"], values)
    assert len(reference.lowered.work) == 1


def test_a_float_stem_and_head_are_left_to_the_runtime(build_model: Build, assert_exact: Check) -> None:
    rng = np.random.default_rng(1)
    constants = {
        "v": rng.normal(size=(8, 3, 3, 3)).astype(np.float32),
        "s": np.float32(0.05),
        "z": np.array(0, np.uint8),
        "g": rng.normal(size=8).astype(np.float32),
        "b": rng.normal(size=8).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "s", "z"], ["q"]),
        helper.make_node("MaxPool", ["q"], ["m"], kernel_shape=[2, 2]),
        helper.make_node("DequantizeLinear", ["m", "s", "z"], ["d"]),
        helper.make_node("GlobalAveragePool", ["d"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("LayerNormalization", ["f", "g", "b"], ["y"]),
    ]
    feeds = {"x": rng.normal(size=(4, 3, 9, 9)).astype(np.float32)}
    model = build_model(nodes, feeds, constants)
    assert_exact(model, feeds, 1e-5)  # a normalization subtracts means, which loses a digit or two of seven
    reference = Reference(model)
    assert (reference.code_names, reference.float_operators) == (["q", "m"], 5)


def test_bodies_of_control_flow_are_left_to_the_runtime(build_model: Build, assert_exact: Check) -> None:
    """They may read values from outside; what they give is quantized as any other float tensor."""
    then, other = (
        helper.make_graph(
            [helper.make_node(op, ["d", "d"], ["o"])], op, [], [helper.make_tensor_value_info("o", 1, None)]
        )
        for op in ("Add", "Mul")
    )
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("If", ["c"], ["i"], then_branch=then, else_branch=other),
        helper.make_node("QuantizeLinear", ["i", "s", "z"], ["y"]),
    ]
    constants = {"s": np.float32(0.05), "z": np.array(9, np.uint8)}
    for flag in (True, False):
        feeds = {"x": np.linspace(-1, 3, 30, dtype=np.float32), "c": np.array(flag)}
        assert_exact(build_model(nodes, feeds, constants), feeds)


def test_only_what_is_asked_for_is_computed(build_model: Build) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["y"]),
        helper.make_node("QuantizeLinear", ["b", "s", "z"], ["w"]),
    ]
    both = {name: np.ones((2, 2), np.float32) for name in "ab"}
    model = build_model(nodes, both, {"s": np.float32(0.5), "z": np.array(9, np.uint8)}, ("y", "w"))
    reference = Reference(model)
    assert reference.tensors({"a": both["a"]}, ["y"])["y"].tolist() == [[11, 11], [11, 11]]
    with pytest.raises(ModelError, match="takes an input 'b' that is not given"):
        reference.run({"a": both["a"]})
    with pytest.raises(ModelError, match="no tensor 'nothing'"):
        reference.tensors(both, ["nothing"])
    assert list(reference.run({**both, "unknown": both["a"]})) == ["y", "w"]


def test_feeds_that_do_not_fit(build_model: Build) -> None:
    rng = np.random.default_rng(1)
    feeds = {"a": rng.integers(0, 256, (4, 32)).astype(np.uint8)}
    node = helper.make_node("MatMulInteger", ["a", "w"], ["y"])
    model = build_model([node], feeds, {"w": rng.integers(-9, 9, (32, 8)).astype(np.int8)})
    with pytest.raises(
        ModelError, match=r"MatMulInteger that writes 'y' cannot take inputs of shapes \(4, 31\)"
    ):
        Reference(model).run({"a": feeds["a"][:, :31]})


def test_an_unknown_arithmetic(build_model: Build) -> None:
    feeds = {"x": np.ones(2, np.float32)}
    model = build_model([helper.make_node("Neg", ["x"], ["y"])], feeds, {})
    with pytest.raises(UsageError, match="unknown arithmetic 'avx'; the choices are: exact, avx2"):
        Reference(model, "avx")  # type: ignore[arg-type]


def test_which_kernels_can_saturate(build_model: Build) -> None:
    """Products of bytes beyond the limit; not depthwise kernels, small weights, uint8 weights."""
    rng = np.random.default_rng(1)
    grid = {"s": np.float32(0.1), "z": np.array(0, np.uint8), "o": np.zeros((), np.int8)}
    large, small = np.full((4, 4, 3, 3), 127, np.int8), np.full((4, 4, 3, 3), 64, np.int8)
    cases = {
        "large": (large, 1),
        "small": (small, 1),
        "deep": (large[:, :1], 4),
        "bytes": (large.view(np.uint8), 1),
    }
    feeds = {"x": rng.integers(0, 256, (1, 4, 5, 5)).astype(np.uint8)}
    for name, (weights, group) in cases.items():
        inputs = ["x", "s", "z", "w", "s", "o" if weights.dtype == np.int8 else "z", "s", "z"]
        node = helper.make_node("QLinearConv", inputs, ["y"], group=group)
        model = build_model([node], feeds, grid | {"w": weights})
        assert Reference(model).saturating() == (["y"] if name == "large" else [])
        exact, pairs = (Reference(model, kind).run(feeds)["y"] for kind in ("exact", "avx2"))
        if name != "large":
            np.testing.assert_array_equal(exact, pairs)


def test_the_same_model_in_another_arithmetic(build_model: Build) -> None:
    feeds = {"a": np.full((2, 2), 255, np.uint8)}
    model = build_model(
        [helper.make_node("MatMulInteger", ["a", "w"], ["y"])], feeds, {"w": np.full((2, 1), 127, np.int8)}
    )
    exact = Reference(model)
    assert exact.using("avx2").run(feeds)["y"].tolist() == [[32767], [32767]]
    assert exact.run(feeds)["y"].tolist() == [[64770], [64770]]
    assert make_session(model).run(None, feeds)[0].tolist() in ([[32767], [32767]], [[64770], [64770]])
