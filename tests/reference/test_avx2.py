"""The AVX2 arithmetic against onnxruntime's own AVX2 kernels, on a processor without VNNI that QEMU emulates."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, helper

from onnxq.compiler import compile_model
from onnxq.presets import preset_pipeline
from onnxq.reference.run import Reference

Array = NDArray[Any]
QEMU = shutil.which("qemu-x86_64")
SCRIPT = """
import sys
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
for path in sys.argv[1:]:
    session = ort.InferenceSession(path + ".onnx", options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    np.savez(path + ".out.npz", **dict(zip(names, session.run(names, dict(np.load(path + ".npz"))))))
"""
pytestmark = pytest.mark.skipif(
    QEMU is None, reason="there is no qemu-x86_64 to emulate a processor without VNNI"
)


def on_haswell(
    folder: Path, cases: dict[str, tuple[ModelProto, dict[str, Array]]]
) -> dict[str, dict[str, Array]]:
    """Outputs of models in onnxruntime on a processor that has AVX2 and no VNNI."""
    assert QEMU is not None
    for name, (model, feeds) in cases.items():
        onnx.save(model, folder / f"{name}.onnx")
        np.savez(folder / f"{name}.npz", **feeds)  # type: ignore[arg-type]
    words = [QEMU, "-cpu", "Haswell", sys.executable, "-c", SCRIPT, *(str(folder / name) for name in cases)]
    subprocess.run(
        words, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    return {name: dict(np.load(folder / f"{name}.out.npz")) for name in cases}


def test_kernels(tmp_path: Path, build_model: Callable[..., ModelProto]) -> None:
    """Full-range weights: convolutions of several reductions, groups and paddings, and matrix products."""
    rng, cases = np.random.default_rng(1), {}
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
        "wide": ((1, 16, 6, 6), (24, 16, 3, 3), {"pads": [1, 1, 1, 1]}),
        "odd": ((1, 5, 6, 6), (7, 5, 3, 3), {}),
        "colours": ((1, 3, 6, 6), (16, 3, 3, 3), {"pads": [1, 1, 1, 1]}),
        "four": ((1, 4, 6, 6), (16, 4, 3, 3), {"pads": [1, 1, 1, 1]}),
        "one": ((1, 1, 6, 6), (16, 1, 3, 3), {}),
        "pointwise": ((1, 33, 4, 4), (16, 33, 1, 1), {}),
        "groups": ((1, 12, 5, 5), (8, 3, 3, 3), {"group": 4}),
        "depthwise": ((1, 16, 5, 5), (16, 1, 3, 3), {"group": 16}),
        "multiplier": ((1, 8, 5, 5), (16, 1, 3, 3), {"group": 8}),
        "line": ((1, 6, 12), (9, 6, 5), {"pads": [2, 2]}),
    }
    names = ["x", "s", "z", "w", "s", "o", "y_s", "z"]
    for name, (shape, kernel, given) in shapes.items():
        constants = {"s": np.float32(0.02), "z": np.array(70, np.uint8), "o": np.zeros((), np.int8)}
        constants["y_s"] = np.float32(0.002 * np.sqrt(np.prod(kernel[1:])) * 20)
        constants["w"] = rng.integers(-128, 128, kernel).astype(np.int8)
        feeds = {"x": rng.integers(0, 256, shape).astype(np.uint8)}
        cases[name] = (
            build_model([helper.make_node("QLinearConv", names, ["y"], **given)], feeds, constants),
            feeds,
        )
    for rows in (1, 9):
        feeds = {"x": rng.integers(0, 256, (rows, 75)).astype(np.uint8)}
        node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
        weights = rng.integers(-128, 128, (75, 33)).astype(np.int8)
        cases[f"rows{rows}"] = (build_model([node], feeds, {"w": weights}), feeds)
    found = on_haswell(tmp_path, cases)
    for name, (model, feeds) in cases.items():
        exact = Reference(model)
        np.testing.assert_array_equal(exact.using("avx2").run(feeds)["y"], found[name]["y"], err_msg=name)
        assert np.array_equal(exact.run(feeds)["y"], found[name]["y"]) == (name == "depthwise")


def test_a_whole_model_with_full_range_weights(tmp_path: Path, models_dir: Path) -> None:
    text = preset_pipeline("int8").replace("quantize-weights", "quantize-weights:saturation=ignore")
    text = text.replace(" round-weights", "")
    done = compile_model(
        models_dir / "digits_cnn.onnx",
        models_dir / "digits_calib.npz",
        pipeline=text,
        samples=32,
        threads=1,
        speed=False,
    )
    with np.load(models_dir / "digits_test.npz") as file:
        feeds = {"image": file["image"][:4]}
    exact = Reference(done.model)
    model = ModelProto()
    model.CopyFrom(done.model)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in exact.code_names)
    found = on_haswell(tmp_path, {"cnn": (model, feeds)})["cnn"]
    mine = exact.using("avx2").tensors(feeds, list(found))
    for name, value in found.items():
        np.testing.assert_array_equal(mine[name], value, err_msg=name)
    assert not np.array_equal(exact.run(feeds)["logits"], found["logits"])


@pytest.mark.parametrize("bits", ["w2a8", "w4a8"])
def test_channels_of_several_points(tmp_path: Path, models_dir: Path, bits: str) -> None:
    """The sums of their rows are the same at load and saturate no kernel: every code of the model is that of 32-bit sums."""
    done = compile_model(
        models_dir / "digits_cnn.onnx",
        models_dir / "digits_calib.npz",
        bits=bits,
        multipoint=0.3,
        samples=32,
        threads=1,
        speed=False,
    )
    with np.load(models_dir / "digits_test.npz") as file:
        feeds = {"image": file["image"][:4]}
    exact = Reference(done.model)
    model = ModelProto()
    model.CopyFrom(done.model)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in exact.code_names)
    found = on_haswell(tmp_path, {"cnn": (model, feeds)})["cnn"]
    expected = exact.tensors(feeds, list(found))
    for name, value in found.items():
        np.testing.assert_array_equal(expected[name], value, err_msg=name)
