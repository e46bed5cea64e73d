"""One file, one answer: compiled models run on this CPU and on an emulated one without VNNI (qemu's Haswell).

python bench/saturation.py        writes bench/results/saturation.json; needs qemu-x86_64 (Debian: qemu-user)
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from int8 import compile_ours, compile_theirs
from tasks import TASKS, Task

RESULTS = Path(__file__).parent / "results" / "saturation.json"
MODELS = ("cifar10_resnet20", "imagenet_mobilenetv1_025", "kws_dscnn")
IMAGES = 8

CHILD = """
import sys
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
np.save(sys.argv[3], session.run(None, dict(np.load(sys.argv[2])))[0])
"""


def output(model: Path, feeds: Path, out: Path, emulator: list[str]) -> np.ndarray:
    """First output of a model, run in a process of its own, through an emulator if given."""
    subprocess.run(
        [*emulator, sys.executable, "-c", CHILD, model, feeds, out], check=True, capture_output=True
    )
    return np.load(out)


def differences(task: Task, directory: Path) -> dict[str, float]:
    """Relative difference of the outputs on the two CPUs, per compiler."""
    with np.load(task.test) as arrays:
        np.savez(directory / "feeds.npz", **{k: arrays[k][:IMAGES] for k in arrays.files if k != "label"})
    found = {}
    for name, make, options in (
        ("onnxq", compile_ours, {}),
        ("quantize_static", compile_theirs, {"per_channel": True}),
    ):
        model = directory / f"{name}.onnx"
        make(task, str(model), options)
        here = output(model, directory / "feeds.npz", directory / "here.npy", [])
        there = output(
            model, directory / "feeds.npz", directory / "there.npy", ["qemu-x86_64", "-cpu", "Haswell"]
        )
        found[name] = float(np.linalg.norm(here - there) / np.linalg.norm(here))
    return found


def main() -> None:
    """Measure and write."""
    if shutil.which("qemu-x86_64") is None:
        sys.exit("qemu-x86_64 is not installed (Debian package qemu-user)")
    flags = Path("/proc/cpuinfo").read_text()
    results: dict = {"vnni_here": "vnni" in flags, "emulated": "Haswell (AVX2, no VNNI)", "images": IMAGES}
    for task in TASKS:
        if task.model in MODELS:
            with tempfile.TemporaryDirectory() as directory:
                results[task.model] = differences(task, Path(directory))
            print(task.model, results[task.model], flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
