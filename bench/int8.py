"""INT8 on every model: accuracy, SQNR, size, speed and compile time against float and onnxruntime's own quantizer.

    python bench/int8.py [MODEL ...]        writes bench/results/int8.json

Each compile runs in a process of its own, so that its CPU time is its own. Speed is interleaved: the float model,
ours and each of the others take turns on one thread.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tasks import TASKS, Task, batch_one, metric_name

from onnxq.data import input_specs, open_data
from onnxq.measure.compare import compare_sessions
from onnxq.measure.metrics import evaluate_session
from onnxq.model.load import load_model
from onnxq.model.session import make_session

RESULTS = Path(__file__).parent / "results" / "int8.json"
SAMPLES = 512
OURS = {
    "onnxq channel": {},
    "onnxq tensor": {"weights": "int8:tensor"},
    "onnxq accurate": {"preset": "int8-accurate"},
}
THEIRS = {
    "quantize_static channel": {"per_channel": True},
    "quantize_static channel 7 bits": {"per_channel": True, "reduce_range": True},
    "quantize_static tensor": {},
}
ROUNDS = 60


def compile_ours(task: Task, out: str, options: dict[str, str]) -> None:
    """One compile with onnxq, in a process that does nothing else."""
    import onnxq

    onnxq.compile_model(task.path, task.calib, output=out, samples=SAMPLES, threads=1, speed=False, **options)


def compile_theirs(task: Task, out: str, options: dict[str, bool]) -> None:
    """One compile with onnxruntime.quantization."""
    from onnxq.data import open_data as opened

    data = opened(task.calib, input_specs(load_model(task.path)))
    quantize_with_onnxruntime(task.path, (b.feeds for b in data.batches(1, SAMPLES)), out, options)


def quantize_with_onnxruntime(
    model: Path, samples: Iterable[dict[str, np.ndarray]], out: str | Path, options: dict[str, bool]
) -> None:
    """onnxruntime.quantization: unsigned activations, min-max, QDQ, its pre-processing first."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.samples = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.samples, None)

    prepared = f"{out}.prepared.onnx"
    quant_pre_process(str(model), prepared, skip_symbolic_shape=True)
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(prepared, out, Reader(), **types, **options)


def timed_compile(task: Task, kind: str, out: Path, options: dict) -> dict[str, float]:
    """Run a compile in its own process; CPU seconds of that process."""
    request = json.dumps([task.model, kind, str(out), options])
    done = subprocess.run([sys.executable, __file__, "--one", request], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "failed")
    return json.loads(done.stdout.splitlines()[-1])


def one(request: str) -> None:
    """The process of one compile."""
    model, kind, out, options = json.loads(request)
    task = next(t for t in TASKS if t.model == model)
    (compile_ours if kind == "ours" else compile_theirs)(task, out, options)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"cpu_seconds": usage.ru_utime + usage.ru_stime}))


def quality(task: Task, path: Path) -> dict[str, float | None]:
    """Metric and SQNR on the test data."""
    reference, session = make_session(task.path, threads=2), make_session(path, threads=2)
    data = open_data(task.test, input_specs(load_model(task.path)))
    difference = compare_sessions(reference, session, data, batch=task.batch).main
    value = evaluate_session(session, data, metric_name(task), batch=task.batch).value
    assert difference is not None
    return {"metric": value, "sqnr_db": difference.sqnr_db, "agreement": difference.agreement}


def speeds(task: Task, paths: dict[str, Path], batch: int) -> dict[str, float]:
    """Median milliseconds of each model at one thread, all in turn."""
    sessions = {name: make_session(path, threads=1) for name, path in paths.items()}
    feeds = {k: np.repeat(v, batch, axis=0) for k, v in batch_one(task.test).items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        session.run(None, feeds)
    end = time.perf_counter() + 12
    rng = np.random.default_rng(0)
    while len(next(iter(times.values()))) < ROUNDS and time.perf_counter() < end:
        for name in rng.permutation(list(sessions)):
            start = time.thread_time()
            sessions[name].run(None, feeds)
            times[name].append(time.thread_time() - start)
    return {name: float(np.median(t)) * 1e3 for name, t in times.items()}


def measure(task: Task, directory: Path) -> dict:
    """All rows of one model."""
    rows: dict[str, dict] = {"float": {"bytes": task.path.stat().st_size, **quality(task, task.path)}}
    paths = {"float": task.path}
    for kind, table in (("ours", OURS), ("theirs", THEIRS)):
        for name, options in table.items():
            out = directory / f"{task.model}.{name.replace(' ', '_')}.onnx"
            try:
                costs = timed_compile(task, kind, out, options)
                rows[name] = {"bytes": out.stat().st_size, **quality(task, out), **costs}
                paths[name] = out
            except Exception as error:  # a peer that fails is a result
                rows[name] = {"failed": str(error)[:200]}
    for batch in (1,) if task.batch == 1 else (1, 32):
        for name, ms in speeds(task, paths, batch).items():
            rows[name][f"ms_batch{batch}"] = ms
    for row in rows.values():
        if "ms_batch1" in row:
            row["speedup_batch1"] = rows["float"]["ms_batch1"] / row["ms_batch1"]
        if "ms_batch32" in row:
            row["speedup_batch32"] = rows["float"]["ms_batch32"] / row["ms_batch32"]
    return rows


def main(names: list[str]) -> None:
    """Measure and write the results of the named models, all without names; other models keep theirs."""
    known = {task.model: task for task in TASKS}
    for name in names:
        if name not in known:
            sys.exit(f"no model {name!r}; there are: {', '.join(known)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["versions"] = {"onnxruntime": ort.__version__, "numpy": np.__version__}
    with tempfile.TemporaryDirectory() as directory:
        for name in names or known:
            results[name] = measure(known[name], Path(directory))
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            for row, figures in results[name].items():
                shown = {k: round(v, 3) for k, v in figures.items() if isinstance(v, float)}
                print(f"{name:28} {row:32} {figures.get('failed', shown)}", flush=True)


if __name__ == "__main__":
    one(sys.argv[2]) if sys.argv[1:2] == ["--one"] else main(sys.argv[1:])
