"""What runtimes make of the files: onnxruntime, onnx's own evaluator and OpenVINO agree on the codes.

Integer kernels sum products exactly, and float ones nearly; then they multiply by float32 factors, which they round in the last
of 24 bits. So a value next to the middle between two codes may become either of them: one code, for one value in ten thousand.
What follows may carry such a code further, so layers are compared one by one, each from the same codes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, save

import onnxq
from onnxq.measure.codes import Part, coded_tensors, parts
from onnxq.model.load import load_model
from onnxq.model.prepare import prepare
from onnxq.model.session import make_session
from onnxq.program import Program

Array = NDArray[Any]
Arrays = dict[str, Array]
Feeds = Mapping[str, Array]
Run = Callable[[ModelProto, Feeds], Arrays]
OpenVINO = Callable[..., tuple[Arrays, dict[str, str]]]
Shown = Callable[[ModelProto, Feeds], tuple[ModelProto, Arrays, Arrays]]
Residual = Callable[..., tuple[Program, ModelProto]]

RARE = 1e-3  # of the values of a tensor; measured: 2e-4 at most
WIDTHS = [f"w{w}a{a}" for w in (2, 3, 4, 8) for a in (2, 4, 8)]
FEW = ["w8a8", "w4a4", "w3a8", "w2a2"]


def compiled(models_dir: Path, name: str, bits: str, **options: str) -> ModelProto:
    """A model that ships, compiled under an operator set of which onnx's evaluator has QuantizeLinear."""
    data = models_dir / "digits_calib.npz"
    # neither pass changes what a file may hold, and both take time below 8 bits
    pipeline = " ".join(
        step for step in onnxq.preset_pipeline("int8").split() if step not in ("equalize", "round-weights")
    )
    if options.pop("form", "qdq") == "integer":
        pipeline = pipeline.replace("emit-qdq", "emit-integer")
    source = prepare(load_model(models_dir / f"{name}.onnx"), 21)[0]
    return onnxq.compile_model(source, data, pipeline=pipeline, bits=bits, samples=64, **options).model  # type: ignore[arg-type]


def digits(models_dir: Path, count: int = 16) -> Arrays:
    return {"image": np.load(models_dir / "digits_test.npz")["image"][:count]}


def apart(found: Array, expected: Array) -> NDArray[np.int64]:
    """How many codes two tensors are apart."""
    assert found.shape == expected.shape
    return np.abs(found.astype(np.int64) - expected.astype(np.int64))


def assert_layers_agree(model: ModelProto, feeds: Feeds, codes: Arrays, run: Run) -> None:
    """From the same codes each layer gives the same codes, but for rare values half-way between two of them."""
    count = 0
    for part in parts(model):
        found = run(part.model, part_feeds(part, feeds, codes))[part.output]
        distance = apart(found, codes[part.output])
        assert distance.max() <= 1, part.output
        assert np.mean(distance > 0) <= max(RARE, 1 / distance.size), part.output
        count += 1
    assert count == len(coded_tensors(model)) >= 8


def assert_outputs_agree(found: Arrays, expected: Arrays) -> None:
    """The whole file, fused as it is deployed: rare codes that are rounded the other way move outputs by less than a code of
    8 bits, 4e-3 of the largest, on average."""
    for name, values in expected.items():
        assert np.mean(np.abs(found[name] - values)) <= 4e-3 * np.abs(values).max()


def part_feeds(part: Part, feeds: Feeds, codes: Arrays) -> Arrays:
    return {name: np.asarray(feeds[name] if name in feeds else codes[name]) for name in part.inputs}


@pytest.mark.parametrize("form", ["qdq", "integer"])
@pytest.mark.parametrize("bits", FEW)
@pytest.mark.parametrize("name", ["digits_cnn", "digits_transformer"])
def test_portable_models_agree_with_onnx(
    name: str, bits: str, form: str, models_dir: Path, shown: Shown, in_evaluator: Run, in_onnxruntime: Run
) -> None:
    model = compiled(models_dir, name, bits, target="onnx", form=form)
    _, feeds, codes = shown(model, digits(models_dir))
    assert_layers_agree(model, feeds, codes, in_evaluator)
    assert_outputs_agree(in_evaluator(model, feeds), in_onnxruntime(model, feeds))


@pytest.mark.parametrize("bits", FEW)
@pytest.mark.parametrize("name", ["digits_cnn", "digits_transformer"])
def test_portable_models_agree_with_openvino(
    name: str, bits: str, models_dir: Path, shown: Shown, openvino: OpenVINO, in_onnxruntime: Run
) -> None:
    model = compiled(models_dir, name, bits, target="onnx")
    _, feeds, codes = shown(model, digits(models_dir))
    assert_layers_agree(model, feeds, codes, lambda part, given: openvino(part, given)[0])
    found, kernels = openvino(model, feeds)
    assert_outputs_agree(found, in_onnxruntime(model, feeds))
    assert kernels["Convolution"] == "u8"


def test_openvino_reads_operators_on_codes_with_one_scale_for_weights(
    models_dir: Path, shown: Shown, openvino: OpenVINO
) -> None:
    """Its reader takes the scales of a QLinearConv for those of the input's channels: the target takes the format qdq alone."""
    model = compiled(models_dir, "digits_cnn", "w8a8", target="onnx", form="integer", weights="int8:tensor")
    _, feeds, codes = shown(model, digits(models_dir))
    assert_layers_agree(model, feeds, codes, lambda part, given: openvino(part, given)[0])
    with pytest.raises(RuntimeError, match="QLinearConv"):
        openvino(compiled(models_dir, "digits_cnn", "w8a8", target="onnx", form="integer"), feeds)


def test_openvino_would_not_round_a_branch(
    residual: Residual, residual_feeds: Feeds, openvino: OpenVINO
) -> None:
    """Why one branch is left unrounded: OpenVINO adds before it rounds, whatever the file says.

    A newer OpenVINO that honours both roundings fails here; branches may then be codes as in onnxruntime.
    """
    rng = np.random.default_rng(5)
    feeds = {"x": rng.normal(size=residual_feeds["x"].shape).astype(np.float32)}
    exact = {}
    for name in ("ort-cpu", "onnx"):
        _, model = residual(name, "w4a8")
        runtime = openvino(model, feeds)[0]["y"]
        exact[name] = np.abs(runtime - in_floats(model, feeds)).max() / np.abs(runtime).max()
    assert exact["onnx"] < 1e-5 < 1e-3 < exact["ort-cpu"]


def in_floats(model: ModelProto, feeds: Feeds) -> Array:
    """The output as the operators are defined, without a fusion."""
    found: Array = make_session(model, threads=1, optimize=False).run(["y"], dict(feeds))[0]
    return found


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w3a4"])
@pytest.mark.parametrize(
    ("name", "kinds"), [("digits_cnn", ("Convolution",)), ("digits_transformer", ("FullyConnected",))]
)
def test_openvino_models_run_in_integers_and_agree(
    name: str,
    kinds: tuple[str, ...],
    bits: str,
    models_dir: Path,
    openvino: OpenVINO,
    shown: Shown,
    in_evaluator: Run,
) -> None:
    model = compiled(models_dir, name, bits, target="openvino")
    exposed, feeds, _ = shown(model, digits(models_dir))
    codes = in_evaluator(exposed, feeds)  # onnxruntime would round the float biases
    assert_layers_agree(model, feeds, codes, lambda part, given: openvino(part, given)[0])
    kernels = openvino(model, feeds)[1]
    assert all("u8" in kernels[kind] for kind in kinds)
    assert "f32" not in kernels["Convolution"]


@pytest.mark.parametrize("target", ["onnx", "openvino"])
@pytest.mark.parametrize("bits", ["w2", "w3", "w4", "w8"])
def test_weights_alone_mean_the_same_everywhere(
    bits: str, target: str, models_dir: Path, in_evaluator: Run, openvino: OpenVINO
) -> None:
    """OpenVINO and onnxruntime would quantize the inputs of such products when they run, unless told not to."""
    source = prepare(load_model(models_dir / "digits_transformer.onnx"), 21)[0]
    model, feeds = onnxq.compile_model(source, target=target, bits=bits).model, digits(models_dir)
    (output,) = (o.name for o in model.graph.output)
    expected = make_session(model, threads=1, optimize=False).run([output], dict(feeds))[0]
    found = {
        "onnx": in_evaluator(model, feeds)[output],
        "openvino": openvino(model, feeds, DYNAMIC_QUANTIZATION_GROUP_SIZE="0")[0][output],
    }
    for values in found.values():
        np.testing.assert_allclose(
            values, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
        )  # orders of float32 sums


CHILD = """
import sys, numpy as np, openvino
compiled = openvino.Core().compile_model(sys.argv[1], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
np.save(sys.argv[3], compiled(dict(np.load(sys.argv[2])))[0])
print([op.get_rt_info()["primitiveType"].astype(str) for op in compiled.get_runtime_model().get_ordered_ops()])
"""


@pytest.mark.parametrize("saturation", ["safe", "ignore"])
def test_weights_do_not_saturate_in_openvino_without_vnni(
    saturation: str, models_dir: Path, tmp_path: Path, openvino: OpenVINO
) -> None:
    """On AVX2 OpenVINO adds neighbouring products in 16 bits, as onnxruntime does; the weights keep the sums below that."""
    data = models_dir / "digits_calib.npz"
    text = onnxq.preset_pipeline("int8").replace(
        "quantize-weights", f"quantize-weights:saturation={saturation}"
    )
    done = onnxq.compile_model(
        models_dir / "digits_cnn.onnx", data, target="openvino", pipeline=text, samples=64
    )
    save(done.model, tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", **digits(models_dir))  # type: ignore[arg-type]
    found = {}
    for isa in ("AVX2", "ALL"):
        words = [sys.executable, "-c", CHILD, "m.onnx", "x.npz", f"{isa}.npy"]
        ran = subprocess.run(
            words,
            cwd=tmp_path,
            env=os.environ | {"ONEDNN_MAX_CPU_ISA": isa},
            check=True,
            capture_output=True,
            text=True,
        )
        assert ("avx2_I8" in ran.stdout) or isa == "ALL"
        if isa == "ALL" and "avx512" not in ran.stdout and "vnni" not in ran.stdout:
            pytest.skip("this machine has no VNNI to compare with")
        found[isa] = np.load(tmp_path / f"{isa}.npy")
    # integers sum to the same; only float32 factors may round differently
    same = np.abs(found["AVX2"] - found["ALL"]).max() <= 1e-5 * np.abs(found["ALL"]).max()
    assert same == (saturation == "safe")


@pytest.fixture(scope="module")
def cifar10(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared feeds."""
    folder = tmp_path_factory.mktemp("feeds")
    words = [sys.executable, str(data_dir / "prepare.py"), str(folder), "cifar10"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.mark.parametrize("bits", WIDTHS)
def test_resnet20_agrees(
    bits: str,
    data_dir: Path,
    cifar10: Path,
    shown: Shown,
    in_evaluator: Run,
    in_onnxruntime: Run,
    request: pytest.FixtureRequest,
) -> None:
    model = onnxq.compile_model(
        data_dir / "models" / "cifar10_resnet20.onnx",
        cifar10 / "cifar10.calib.npz",
        target="onnx",
        bits=bits,
        samples=64,
    ).model
    images = np.load(cifar10 / "cifar10.test.npz")
    (name,) = (i.name for i in model.graph.input)
    _, feeds, codes = shown(model, {name: images[name][:2]})
    assert_layers_agree(model, feeds, codes, in_evaluator)
    run: OpenVINO = request.getfixturevalue("openvino")
    assert_layers_agree(model, feeds, codes, lambda part, given: run(part, given)[0])
    found, kernels = run(model, feeds)
    assert_outputs_agree(found, in_onnxruntime(model, feeds))
    assert kernels["Convolution"] == "u8"


def test_tensorrt_files_compute_the_same_in_onnx(
    models_dir: Path, shown: Shown, in_evaluator: Run, in_onnxruntime: Run
) -> None:
    """What TensorRT will be given means what onnxruntime and onnx's evaluator make of it."""
    model = compiled(models_dir, "digits_cnn", "w8a8", target="tensorrt")
    exposed, feeds, _ = shown(model, digits(models_dir))
    assert_layers_agree(model, feeds, in_evaluator(exposed, feeds), in_onnxruntime)


def test_products_on_codes_are_standard_and_agree(
    parse_model: Callable[..., ModelProto], shown: Shown, in_evaluator: Run
) -> None:
    """A product whose output is codes becomes a QLinearMatMul; the one behind it writes floats and stays in the QDQ form."""
    rng = np.random.default_rng(2)
    weights = {name: rng.normal(size=(64, 64)).astype(np.float32) for name in ("w", "v")}
    source = parse_model(
        "g (float[n,64] x) => (float[n,64] y) { c = MatMul(x, w) y = MatMul(c, v) }", weights, 21
    )
    feeds = {"x": rng.normal(size=(32, 64)).astype(np.float32)}
    model = onnxq.compile_model(source, feeds, target="onnx", form="integer").model
    assert [n.op_type for n in model.graph.node if "MatMul" in n.op_type] == ["QLinearMatMul", "MatMul"]
    exposed, moved, codes = shown(model, feeds)
    found = in_evaluator(exposed, moved)
    for tensor in coded_tensors(model):
        assert apart(found[tensor], codes[tensor]).max() <= 1
