"""Files for other runtimes: codes of the portable target in onnx's evaluator and OpenVINO, and how OpenVINO runs its own target.

    python bench/portable.py        writes bench/results/portable.json; needs openvino

`layers`: every layer from the same codes. `whole`: all codes of the model, each with the fused model in front of it, from the
same codes of the input. `deployed`: the file as it is, by its outputs, from samples as they are and from samples on the grid of
the input. A value half-way between two codes, of which the digits have many (0.5 of 255), is rounded by OpenVINO the other way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
from onnx.reference import ReferenceEvaluator
from tasks import TASKS

import onnxq
from onnxq.data import input_specs, open_data
from onnxq.measure.codes import coded_tensors, on_grid, parts, with_outputs
from onnxq.model.load import load_model
from onnxq.model.session import make_session

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "portable.json"
WIDTHS = [f"w{w}a{a}" for w in (2, 3, 4, 8) for a in (2, 4, 8)]
NATIVE = (
    "cifar10_resnet20",
    "imagenet_mobilenetv1_025",
    "imagenet_squeezenet1_1",
    "kws_dscnn",
    "minilm_l6_v2",
)
SAMPLES, DEPLOYED, ROUNDS = {"cifar10_resnet20": 4}, 256, 60
LAYERS = ("Convolution", "FullyConnected", "MatMul")
ROUNDED = ("quantize-weights", "round-weights")
PLAIN = {"INFERENCE_PRECISION_HINT": "f32"}
CORE = ov.Core()

Arrays = Mapping[str, Any]
Run = Callable[[onnx.ModelProto, Arrays], dict[str, np.ndarray]]


def sources() -> dict[str, tuple[Path, Path, Path]]:
    """Model, calibration and test data by name: the models that ship, and those that the benchmarks know."""
    digits = [ROOT / "models" / f"digits_{part}.npz" for part in ("calib", "test")]
    found = {
        name: (ROOT / "models" / f"{name}.onnx", *digits) for name in ("digits_cnn", "digits_transformer")
    }
    return found | {task.model: (task.path, task.calib, task.test) for task in TASKS if task.model in NATIVE}


def in_onnxruntime(model: onnx.ModelProto, feeds: Arrays) -> dict[str, np.ndarray]:
    names = [o.name for o in model.graph.output]
    return dict(zip(names, make_session(model).run(names, dict(feeds)), strict=True))


def in_evaluator(model: onnx.ModelProto, feeds: Arrays) -> dict[str, np.ndarray]:
    names = [o.name for o in model.graph.output]
    return dict(zip(names, ReferenceEvaluator(model).run(names, dict(feeds)), strict=True))


def in_openvino(model: onnx.ModelProto, feeds: Arrays) -> dict[str, np.ndarray]:
    compiled = CORE.compile_model(CORE.read_model(model.SerializeToString()), "CPU", PLAIN)
    found = compiled({i.any_name: feeds[i.any_name] for i in compiled.inputs})
    return {o.name: found[compiled.output(o.name)] for o in model.graph.output}


RUNTIMES: dict[str, Run] = {"onnx": in_evaluator, "openvino": in_openvino}


def samples(test: Path, model: onnx.ModelProto, count: int) -> dict[str, np.ndarray]:
    return dict(next(open_data(test, input_specs(model)).batches(count, count)).feeds)


def distances(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Largest difference in codes, and shares of the values that differ at all and by more than one."""
    apart = [np.abs(a.astype(np.int64) - b.astype(np.int64)).ravel() for a, b in pairs]
    every = np.concatenate(apart)
    return {
        "largest": int(every.max()),
        "differ": float(np.mean(every > 0)),
        "by_more_than_one": float(np.mean(every > 1)),
    }


def outputs(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Root mean square of the difference over that of the outputs, and how often the largest is the same."""
    noise = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    return {
        "relative_rms": float(noise),
        "top1_agreement": float(np.mean(found.argmax(-1) == expected.argmax(-1))),
    }


def compare(
    model: onnx.ModelProto, source: onnx.ModelProto, test: Path, count: int, runs: Mapping[str, Run]
) -> dict[str, Any]:
    """A portable model in onnxruntime and in other runtimes."""
    coded = coded_tensors(model)
    shown = with_outputs(model, coded)
    feeds = samples(test, source, count)
    feeds = on_grid(model, feeds, in_onnxruntime(shown, feeds))
    codes = in_onnxruntime(shown, feeds)
    result: dict[str, Any] = {"bytes": len(model.SerializeToString())}
    for name, run in runs.items():
        pairs = [
            (
                run(p.model, {k: feeds[k] if k in feeds else codes[k] for k in p.inputs})[p.output],
                codes[p.output],
            )
            for p in parts(model)
        ]
        everywhere = run(shown, feeds)
        result[name] = {
            "layers": distances(pairs),
            "whole": distances([(everywhere[t], codes[t]) for t in coded]),
        }
    if "openvino" not in runs:
        return result
    raw = samples(test, source, DEPLOYED)
    many = {"deployed": raw, "deployed_on_grid": on_grid(model, raw, in_onnxruntime(shown, raw))}
    (output,) = (o.name for o in model.graph.output)
    for key, given in many.items():
        exact = in_onnxruntime(model, given)[output]
        result["openvino"][key] = outputs(in_openvino(model, given)[output], exact)
    result["against_float"] = outputs(exact, in_onnxruntime(source, given)[output])
    return result


def portable(directory: Path) -> dict[str, Any]:
    """The portable target at several widths."""
    rows: dict[str, Any] = {}
    for name, (path, calib, test) in sources().items():
        if name not in ("digits_cnn", "digits_transformer", "cifar10_resnet20"):
            continue
        rows[name] = {}
        for bits in WIDTHS:
            for form in ("qdq", "integer") if bits in ("w8a8", "w4a4") else ("qdq",):
                model = onnxq.compile_model(
                    path, calib, target="onnx", bits=bits, form=form, speed=False
                ).model
                runs = RUNTIMES if form == "qdq" else {"onnx": in_evaluator}
                row = compare(model, load_model(path), test, SAMPLES.get(name, 32), runs)
                rows[name][f"{bits} {form}"] = row
                print(name, bits, form, json.dumps(row), flush=True)
    return rows


CHILD = """
import json, sys, numpy as np, openvino as ov
compiled = ov.Core().compile_model(sys.argv[1], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
np.save(sys.argv[3], compiled(dict(np.load(sys.argv[2])))[0])
infos = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
print(json.dumps([[i[k].astype(str) for k in ("layerType", "runtimePrecision", "primitiveType")] for i in infos]))
"""


def under(isa: str, model: Path, feeds: Path, directory: Path) -> tuple[np.ndarray, list[list[str]]]:
    """The first output under an instruction set, with kind, precision and kernel of each operator."""
    out = directory / f"{isa}.npy"
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, model, feeds, out],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": isa},
        check=True,
        capture_output=True,
        text=True,
    )
    return np.load(out), json.loads(ran.stdout)


def speeds(paths: Mapping[str, Path], feeds: Arrays) -> dict[str, float]:
    """Milliseconds of one sample on one thread, medians; the files take turns."""
    config = {**PLAIN, "INFERENCE_NUM_THREADS": "1"}
    requests = {k: CORE.compile_model(str(p), "CPU", config).create_infer_request() for k, p in paths.items()}
    times: dict[str, list[float]] = {k: [] for k in paths}
    for _ in range(ROUNDS):
        for name, request in requests.items():
            start = time.perf_counter()
            request.infer(dict(feeds))
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


def native(directory: Path) -> dict[str, Any]:
    """The target openvino in OpenVINO: what runs in integers, the same answer without VNNI, and speed."""
    rows: dict[str, Any] = {}
    for name, (path, calib, test) in sources().items():
        source, paths, row = load_model(path), {"float": path}, {}
        pipeline = onnxq.preset_pipeline("int8")
        loose = " ".join(f"{p}:saturation=ignore" if p in ROUNDED else p for p in pipeline.split())
        files = {"openvino": pipeline, "full range": loose, "ort-cpu": pipeline}
        for label, steps in files.items():
            paths[label] = directory / f"{name}.{label}.onnx"
            target = label if label == "ort-cpu" else "openvino"
            onnxq.compile_model(path, calib, output=paths[label], target=target, pipeline=steps, speed=False)
        feeds = directory / f"{name}.npz"
        np.savez(feeds, **samples(test, source, 32))
        found = {
            (label, isa): under(isa, paths[label], feeds, directory)
            for label in ("openvino", "full range")
            for isa in ("ALL", "AVX2")
        }
        kernels = [(kind, precision) for kind, precision, _ in found["openvino", "ALL"][1] if kind in LAYERS]
        row["layers"] = len(kernels)
        row["layers_in_integers"] = sum(precision in ("u8", "i8") for _, precision in kernels)
        for label in ("openvino", "full range"):
            a, b = (found[label, isa][0] for isa in ("AVX2", "ALL"))
            row[f"avx2_relative_rms {label}"] = float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))
        row["ms_batch1"] = speeds(paths, samples(test, source, 1))
        row["bytes"] = {label: p.stat().st_size for label, p in paths.items()}
        rows[name] = row
        print(name, json.dumps(row), flush=True)
    return rows


def main() -> None:
    versions = {
        "openvino": ov.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": ort.__version__,
        "numpy": np.__version__,
    }
    results: dict[str, Any] = {"versions": versions}
    with tempfile.TemporaryDirectory() as directory:
        for section, measure in (("portable", portable), ("openvino", native)):
            results[section] = measure(Path(directory))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
