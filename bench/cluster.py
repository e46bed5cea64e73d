"""A joint search on two Dask workers of this machine: the same losses as here, what an evaluation costs more, a worker killed.

    python bench/cluster.py        writes bench/results/cluster.json

ResNet-20 at W4A4, 512 samples. `round_trip_ms` is an empty task. `overhead_ms` is what an evaluation in which nothing has changed
takes more than here by half: the way of a point and its sums, the least of 30 each. `here_ms` and `cluster_ms` are medians at
points that differ in all steps; every worker makes the codes of all weights anew, so that part does not get faster.
`load` is the load of the machine at the start; above its cores, times are those of a busy machine.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tasks import TASKS

from onnxq.cluster import Cluster, SpreadLoss, _client
from onnxq.data import input_specs, open_data
from onnxq.model.load import load_model
from onnxq.model.prepare import prepare
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program
from onnxq.search import Budget, minimize
from onnxq.simulate import Evaluator

RESULTS = Path(__file__).parent / "results" / "cluster.json"
PLAN = (
    "fold-constants fold-batchnorm fold-pad flatten-matmul annotate:weights=int4:channel,activations=uint4 "
    "calibrate:ranges=mse choose-ranges:ranges=mse quantize-weights"
)
SAMPLES, WORKERS, KILL_AT, BUDGET = 512, 2, 8, "20"


def evaluator() -> Evaluator:
    """Of ResNet-20."""
    task = TASKS[0]
    model = prepare(load_model(task.path), 21)[0]
    program = Program.from_model(model)
    ctx = Context(data=open_data(task.calib, input_specs(model)), samples=SAMPLES, threads=1)
    Pipeline.parse(PLAN).run(program, ctx)
    return Evaluator(program, ctx, "kl", SAMPLES)


def timed(
    evaluate: Callable[[np.ndarray], float], points: list[np.ndarray]
) -> tuple[list[float], list[float]]:
    """Losses, and milliseconds of each."""
    losses, times = [], []
    for point in points:
        start = time.perf_counter()
        losses.append(evaluate(point))
        times.append(1e3 * (time.perf_counter() - start))
    return losses, times


def median(times: list[float]) -> float:
    """Rounded."""
    return round(statistics.median(times), 1)


class Killer:
    """An objective that kills a worker once."""

    def __init__(self, losses: SpreadLoss, client: object) -> None:
        self.losses, self.client, self.costs, self.calls = losses, client, losses.costs, 0

    def evaluate(self, point: np.ndarray, part: str = "search", changed: int | None = None) -> float:
        """The loss; before one of them a worker is killed."""
        self.calls += 1
        if self.calls == KILL_AT:
            os.kill(next(iter(self.client.run(os.getpid).values())), signal.SIGKILL)
        return self.losses.evaluate(point, part)

    def validate(self, point: np.ndarray) -> float:
        """The loss of held-back samples."""
        return self.losses.validate(point)


def main() -> None:
    """Measure and write."""
    here = evaluator()
    rng, count = np.random.default_rng(0), len(here.variables)
    points = [rng.normal(0.0, 0.05, count) for _ in range(8)]
    same = [points[-1]] * 30
    found: dict[str, object] = {"model": TASKS[0].model, "samples": SAMPLES, "variables": count}
    found |= {"workers": WORKERS, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    wanted, times = timed(here.evaluate, points)
    found["here_ms"] = median(times)
    _, unchanged = timed(here.evaluate, same)
    budget = Budget.parse(BUDGET)
    local = minimize(here, count, budget=budget)
    with _client(Cluster(workers=WORKERS)) as client:
        start = time.perf_counter()
        far = SpreadLoss(here, client, 1)
        far.evaluate(points[0] * 0)
        found["sent_and_built_s"] = round(time.perf_counter() - start, 2)
        losses, times = timed(far.evaluate, points)
        found["cluster_ms"] = median(times)
        found["losses_equal_to_the_bit"] = losses == wanted
        _, idle = timed(far.evaluate, same)
        found["overhead_ms"] = round(min(idle) - min(unchanged) / WORKERS, 1)
        _, times = timed(lambda point: client.submit(float, 0, pure=False).result(), same)
        found["round_trip_ms"] = median(times)
        killed = minimize(Killer(far, client), count, budget=budget)
    search = {"evaluations": local.evaluations, "loss_start": local.loss_start, "loss_end": local.loss_end}
    search |= {"seconds_here": round(local.seconds, 1), "seconds_cluster": round(killed.seconds, 1)}
    search["equal_to_the_bit"] = (
        killed.point.tolist() == local.point.tolist() and killed.history == local.history
    )
    found["search_with_a_worker_killed"] = search
    found["versions"] = {"onnxruntime": ort.__version__, "numpy": np.__version__}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
