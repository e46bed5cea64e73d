"""What a file is worth in plain onnxruntime, all rows alike."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from peers.jobs import one_line
from tasks import Task, batch_one, metric_name

from onnxq.data import input_specs, open_data
from onnxq.errors import ModelError
from onnxq.measure.compare import Difference, run
from onnxq.measure.coverage import INTEGER_KERNELS
from onnxq.measure.metrics import find_metric
from onnxq.model.load import load_model
from onnxq.model.session import make_session, optimized_model

LAYERS = {"Conv", "ConvTranspose", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}
ENOUGH, LONGEST = 0.5, 8.0  # CPU seconds of a race, and the most where rounds are slow
ROUNDS = 25  # of such a race
STORED = {"MatMulNBits", "GatherBlockQuantized"}


def judge(task: Task, path: Path) -> dict[str, Any]:
    """The row of a model: whether it loads, quality on the test data, bytes, kernels, and speed against float in turn.

    Returns:
        `loads`, and if so `metric`, `sqnr_db`, `agreement`, `bytes`, `integer_kernels`, `float_kernels`, and for each batch
        size `ms_batchN` and `speedup_batchN`; else `failed`.
    """
    size = {"bytes": path.stat().st_size}
    try:
        make_session(path, threads=1)
    except ModelError as error:
        return {"loads": False, "failed": one_line(f"the file does not load: {error}", path.parent), **size}
    row = {"loads": True, **size}
    try:
        worth = quality(task, path)
    except ModelError as error:
        return row | {"failed": one_line(f"the file does not run: {error}", path.parent)}
    if worth["sqnr_db"] is None:
        return row | {"failed": "it leaves this model as it is: the outputs equal those of float"}
    if not math.isfinite(worth["sqnr_db"]):
        return row | {"failed": "the outputs are not finite"}
    return row | worth | kernels(path) | speeds(task, path)


def speeds(task: Task, path: Path) -> dict[str, float]:
    """Median milliseconds of one thread and how many times faster than float that is, for one sample and for 32."""
    found: dict[str, float] = {}
    for batch in (1,) if task.batch == 1 else (1, 32):
        feeds = {name: np.repeat(value, batch, axis=0) for name, value in batch_one(task.test).items()}
        plain, ms = race(make_session(task.path, threads=1), make_session(path, threads=1), feeds)
        found |= {f"ms_batch{batch}": ms, f"speedup_batch{batch}": plain / ms}
    return found


def race(
    a: ort.InferenceSession, b: ort.InferenceSession, feeds: Mapping[str, np.ndarray]
) -> tuple[float, float]:
    """Median milliseconds of this thread's CPU time in two sessions that take turns: other processes may be busy."""
    times: tuple[list[float], list[float]] = ([], [])
    pair = (a, b)
    for session in pair:
        session.run(None, dict(feeds))
    start = time.thread_time()
    while (past := time.thread_time() - start) < ENOUGH or (len(times[0]) < ROUNDS and past < LONGEST):
        for which in (0, 1) if len(times[0]) % 2 else (1, 0):
            before = time.thread_time()
            pair[which].run(None, dict(feeds))
            times[which].append(time.thread_time() - before)
    return float(np.median(times[0])) * 1e3, float(np.median(times[1])) * 1e3


def judge_float(task: Task) -> dict[str, Any]:
    """The row of the float model."""
    found, labels = outputs(task, task.path)
    return {"bytes": task.path.stat().st_size, "metric": find_metric(metric_name(task))(found, labels)}


def quality(task: Task, path: Path) -> dict[str, float | None]:
    """Metric on the test data, and SQNR in dB and agreement of the first output against float."""
    return worth(task, *outputs(task, path))


def worth(task: Task, found: dict[str, np.ndarray], labels: np.ndarray | None) -> dict[str, float | None]:
    """The same of outputs on all test samples."""
    value = float(find_metric(metric_name(task))(found, labels))
    difference = Difference()
    difference.update(float_outputs(task), found, 1)
    assert difference.main is not None
    return {"metric": value, "sqnr_db": difference.main.sqnr_db, "agreement": difference.main.agreement}


@cache
def float_outputs(task: Task) -> dict[str, np.ndarray]:
    """Outputs of the float model on the test data, computed once for all rows."""
    return outputs(task, task.path)[0]


def outputs(task: Task, path: Path) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Outputs by name on all test samples, and their labels.

    Only as many as the float model has: behind them Quark's bias correction leaves all activations, more than memory holds.
    """
    model = load_model(task.path)
    data, session = open_data(task.test, input_specs(model)), make_session(path, threads=1)
    names = [output.name for output in session.get_outputs()][: len(model.graph.output)]
    parts = [(run(session, batch.feeds, names), batch.labels) for batch in data.batches(task.batch)]
    labels = None if parts[0][1] is None else np.concatenate([label for _, label in parts])
    return {name: np.concatenate([found[name] for found, _ in parts]) for name in parts[0][0]}, labels


def kernels(path: Path) -> dict[str, int]:
    """Integer kernels, and layers computed in float, in the graph as onnxruntime runs it; nothing where that cannot be read."""
    try:
        optimized = optimized_model(path, threads=1)
    except ModelError:
        return {}
    found = Counter(node.op_type for node in optimized.graph.node)
    return {
        "integer_kernels": sum(count for op, count in found.items() if op in INTEGER_KERNELS),
        "float_kernels": sum(count for op, count in found.items() if op in LAYERS | STORED),
    }
