"""Weight-only compression: accuracy, size and speed of 2 to 8 bits against float and onnxruntime's own 4-bit quantizer.

    python bench/weight_only.py [MODEL ...]        writes bench/results/weight_only.json

Speed is interleaved at one thread, as in int8.py. `rounding` holds what the ways to choose a scale are worth on the weights of
MiniLM, and how many megabytes of float weights a core turns into codes in a second.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from int8 import speeds
from onnx import numpy_helper
from tasks import TASKS, Task, metric_name

import onnxq
from onnxq.affine import sqnr_db
from onnxq.blocks import quantize_blocks
from onnxq.data import input_specs, open_data
from onnxq.measure.compare import compare_sessions
from onnxq.measure.metrics import evaluate_session
from onnxq.model.load import load_model
from onnxq.model.session import make_session
from onnxq.model.tensors import tensor_nbytes
from onnxq.nbits import nbits_layout

RESULTS = Path(__file__).parent / "results" / "weight_only.json"
WIDTHS = {f"w{b}": {"bits": f"w{b}"} for b in (8, 4, 3, 2)}
SAME = {f"w{b} everywhere": {"bits": f"w{b}", "first_last": "same"} for b in (4, 3, 2)}
PASS = "fold-constants fold-batchnorm fold-pad store-weights:"
MODELS = {
    "minilm_l6_v2": {
        **WIDTHS,
        "w4 everywhere": SAME["w4 everywhere"],
        "w4 zero points": {"bits": "w4", "weights": "uint4:block=32"},
        "w4 blocks of 128": {"bits": "w4", "weights": "int4:block=128"},
        "w2 blocks of 64": {"bits": "w2", "weights": "int2:block=64"},
        "w4 per channel": {"bits": "w4", "weights": "int4:channel"},
        "w4 float inputs": {"pipeline": f"{PASS}weights=int4:block=32,accuracy=1"},
        "w4 for target onnx": {"bits": "w4", "target": "onnx"},
    },
    "ncf_ml1m_mlp": {
        **WIDTHS,
        **SAME,
        "w4 everywhere, target onnx": {**SAME["w4 everywhere"], "target": "onnx"},
    },
    "ncf_ml1m_gmf": {**WIDTHS, **SAME},
    "cifar10_resnet20": {**WIDTHS, **SAME},
    "imagenet_mobilenetv1_025": {**WIDTHS},
}
THEIRS = ("minilm_l6_v2",)
COMPARED = 200  # samples


def compile_theirs(task: Task, out: Path) -> None:
    """4 bits in blocks of 32 with onnxruntime.quantization, which stores products alone."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.disable(logging.INFO)  # it names every node
    quantizer = MatMulNBitsQuantizer(onnx.load(task.path), block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    onnx.save(quantizer.model.model, out)


def quality(task: Task, path: Path) -> dict[str, float | None]:
    """Metric on all test data, SQNR on some."""
    data, session = open_data(task.test, input_specs(load_model(task.path))), make_session(path, threads=1)
    value = evaluate_session(session, data, metric_name(task), batch=task.batch).value
    found = compare_sessions(make_session(task.path, threads=1), session, data, limit=COMPARED, batch=50).main
    assert found is not None
    return {"metric": value, "sqnr_db": found.sqnr_db}


def weight_bytes(task: Task, path: Path) -> dict[str, int]:
    """Bytes of what the products, convolutions and tables of the float model are stored as, scales included."""
    source = onnx.load(task.path).graph
    held = {t.name for t in source.initializer}
    kinds = {"products": ("MatMul", "Gemm"), "convolutions": ("Conv",), "tables": ("Gather",)}
    stored = onnx.load(path).graph.initializer
    sizes = {}
    for kind, ops in kinds.items():
        weights = {
            name
            for node in source.node
            if node.op_type in ops
            for name in (node.input[0 if kind == "tables" else 1],)
            if name in held
        }
        parts = [
            t for t in stored if any(t.name == w or t.name.startswith((f"{w}_", f"{w}_Q")) for w in weights)
        ]
        if weights:
            sizes[f"{kind}_bytes"] = sum(map(tensor_nbytes, parts))
    return sizes


def measure(task: Task, directory: Path, keep: Callable[[dict], None]) -> None:
    """All rows of one model, each kept as soon as it is there."""
    rows: dict[str, dict] = {"float": row(task, task.path)}
    paths = {"float": task.path}
    for name, options in MODELS[task.model].items():
        out = directory / f"{task.model}.{name.replace(' ', '_')}.onnx"
        start = time.process_time()
        onnxq.compile_model(task.path, output=out, threads=1, speed=False, **options)
        seconds = time.process_time() - start
        rows[name] = {**row(task, out), "cpu_seconds": seconds}
        paths[name] = out
        keep(rows)
    if task.model in THEIRS:
        out = directory / f"{task.model}.theirs.onnx"
        try:
            compile_theirs(task, out)
            rows["MatMulNBitsQuantizer"], paths["MatMulNBitsQuantizer"] = row(task, out), out
        except Exception as error:  # a peer that fails is a result
            rows["MatMulNBitsQuantizer"] = {"failed": str(error)[:200]}
    for batch in (1, 32):
        for name, ms in speeds(task, paths, batch).items():
            rows[name][f"ms_batch{batch}"] = ms
            rows[name][f"speedup_batch{batch}"] = rows["float"][f"ms_batch{batch}"] / ms
        keep(rows)


def row(task: Task, path: Path) -> dict:
    """What can be said of one file by itself."""
    return {"bytes": path.stat().st_size, **weight_bytes(task, path), **quality(task, path)}


def rounding(task: Task) -> dict:
    """Signal to noise in dB of ways to choose scales on the matrices of a model, and throughput on one core."""
    tensors = {t.name: t for t in onnx.load(task.path).graph.initializer}
    names = [
        n.input[1] for n in onnx.load(task.path).graph.node if n.op_type == "MatMul" and n.input[1] in tensors
    ]
    matrices = [numpy_helper.to_array(tensors[name]) for name in names]
    x = np.concatenate(
        [m.reshape(-1, 32, m.shape[1]).transpose(1, 0, 2).reshape(32, -1) for m in matrices], 1
    )
    rows: dict[str, dict[str, float]] = {}
    for bits in (2, 3, 4, 8):
        steps = (1 << (bits - 1)) - 1
        scale = np.abs(x).max(0) / np.float32(steps)
        rows[f"{bits} bits, blocks of 32, dB"] = {
            "largest magnitude": sqnr_db(x, np.clip(np.rint(x / scale), -steps, steps) * scale),
            "whole grid": sqnr_db(x, quantize_blocks(x, 0, bits, 32, search=False).values()),
            "whole grid, search": sqnr_db(x, quantize_blocks(x, 0, bits, 32).values()),
            "zero points": sqnr_db(
                x, quantize_blocks(x, 0, bits, 32, symmetric=False, search=False).values()
            ),
            "zero points, search": sqnr_db(x, quantize_blocks(x, 0, bits, 32, symmetric=False).values()),
        }
    w = np.random.default_rng(0).standard_normal((4096, 8192)).astype(np.float32)
    rows["int4:block=32 for MatMulNBits, MB of float weights per CPU second"] = {
        f"{layout}, {'search' if search else 'no search'}": max(throughput(w, axis, search) for _ in range(5))
        for axis, layout in ((0, "(K, N)"), (1, "(N, K)"))
        for search in (False, True)
    }
    return rows


def throughput(w: np.ndarray, axis: int, search: bool) -> float:
    """Megabytes of float weights in a second of one core, to codes in the layout of the kernel."""
    start = time.thread_time()
    nbits_layout(quantize_blocks(w, axis, 4, 32, search=search), 32)
    return w.nbytes / 1e6 / (time.thread_time() - start)


def main(names: list[str]) -> None:
    """Measure and write the results of the named models, all without names; other models keep theirs."""
    known = {task.model: task for task in TASKS if task.model in MODELS}
    for name in names:
        if name not in (*known, "rounding"):
            sys.exit(f"no model {name!r}; there are: {', '.join(known)}, rounding")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["versions"] = {"onnxruntime": ort.__version__, "numpy": np.__version__}

    def keep(name: str, rows: dict) -> None:
        results[name] = rows
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as directory:
        for name in names or (*known, "rounding"):
            if name == "rounding":
                keep(name, rounding(known["minilm_l6_v2"]))
            else:
                measure(known[name], Path(directory), partial(keep, name))
            for title, figures in results[name].items():
                shown = {k: round(v, 3) for k, v in figures.items() if isinstance(v, float | int)}
                print(f"{name:24} {title:28} {figures.get('failed', shown)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
