"""Weight-only compression of a model larger than protobuf's limit: peak memory, and wall time against a copy of the file.

    python bench/streaming.py [GIGABYTES]        writes bench/results/streaming.json

The model, made in a temporary directory, is a chain of 4096 x 8192 and 8192 x 4096 products with random weights in external data,
4 GB by default. The copy and the compile, each a process of its own, follow one another on the same files, twice; the second
round is quoted, so both read from the page cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from onnx import TensorProto, external_data_helper, helper

RESULTS = Path(__file__).parent / "results" / "streaming.json"
ROWS, COLUMNS = 4096, 8192
CHILD = "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); " + (
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
)


def make_model(folder: Path, gigabytes: float) -> Path:
    """A model of so many GB of weights and its data file; one tensor at a time is held."""
    count = max(1, round(gigabytes * 2**30 / (4 * ROWS * COLUMNS)))
    rng, nodes, weights = np.random.default_rng(0), [], []
    size = 4 * ROWS * COLUMNS
    with (folder / "model.onnx.data").open("wb") as data:
        for i in range(count):
            shape = (ROWS, COLUMNS) if i % 2 == 0 else (COLUMNS, ROWS)
            rng.standard_normal(shape, dtype=np.float32).tofile(data)
            tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=shape, raw_data=b"")
            external_data_helper.set_external_data(tensor, "model.onnx.data", i * size, size)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            weights.append(tensor)
            nodes.append(helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"], f"product{i}"))
    width = ROWS if count % 2 == 0 else COLUMNS
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, ["n", ROWS])],
        [helper.make_tensor_value_info(f"x{count}", TensorProto.FLOAT, ["n", width])],
        weights,
    )
    path = folder / "model.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def timed(words: list[str]) -> tuple[float, float, int]:
    """Wall and CPU seconds of a process, and its peak resident memory in bytes."""
    before, start = os.times(), time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True)
    seconds, after = time.perf_counter() - start, os.times()
    if done.returncode:
        sys.exit(done.stderr.strip())
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, cpu, int(done.stdout.splitlines()[-1]) * 1024


def main(gigabytes: float) -> None:
    """Measure and write the results."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder, gigabytes)
        out, copy = folder / "small.onnx", folder / "copy.data"
        compiling = [sys.executable, "-m", "onnxq", "compile", str(model), "-o", str(out), "--bits", "w4"]
        for _ in range(2):
            copied = timed(["cp", f"{model}.data", str(copy)])
            copy.unlink()
            compiled = timed(compiling)
        written = sum(path.stat().st_size for path in folder.glob("small.onnx*"))
        results = {
            "bytes": Path(f"{model}.data").stat().st_size,
            "bytes_written": written,
            "copy_seconds": copied[0],
            "compile_seconds": compiled[0],
            "compile_cpu_seconds": compiled[1],
            "compile_over_copy": compiled[0] / copied[0],
            "peak_rss_bytes": compiled[2],
        }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 4.0)
