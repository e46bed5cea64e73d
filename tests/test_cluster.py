"""Losses found by a cluster's workers: those of one process to the bit, whatever becomes of the workers."""

from __future__ import annotations

import importlib.util
import os
import pickle
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxq.choices import Choices
from onnxq.cluster import Cluster, Shard, SpreadLoss, _client, _recipe, spread
from onnxq.data import input_specs, open_data
from onnxq.errors import ModelError, OnnxqError, UsageError
from onnxq.model.disk import Spool
from onnxq.model.load import load_model
from onnxq.model.prepare import prepare
from onnxq.passes.search_norm import SearchNorm
from onnxq.passes.search_steps import SearchSteps
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program
from onnxq.search import Budget, minimize
from onnxq.search.objective import Part
from onnxq.simulate import Evaluator

PLAN = (
    "fold-constants flatten-matmul annotate:weights=int3:channel,activations=uint3 "
    "calibrate:ranges=mse choose-ranges quantize-weights"
)
PARTS: tuple[Part, ...] = ("search", "coarse", "held")
Points = list[NDArray[np.float64]]


@pytest.fixture(scope="module")
def evaluator(models_dir: Path) -> Evaluator:
    return make_evaluator(models_dir)


def make_evaluator(models_dir: Path) -> Evaluator:
    model = prepare(load_model(models_dir / "digits_cnn.onnx"), 21)[0]
    program = Program.from_model(model)
    ctx = Context(data=open_data(models_dir / "digits_calib.npz", input_specs(model)), samples=64, threads=1)
    Pipeline.parse(PLAN).run(program, ctx)
    return Evaluator(program, ctx, "kl", 64)  # kl keeps spreads of all samples, which a shard cannot know


@pytest.fixture(scope="module")
def points(evaluator: Evaluator) -> Points:
    rng = np.random.default_rng(3)
    return [rng.normal(0.0, 0.1, len(evaluator.variables)) for _ in range(3)]


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with _client(Cluster(workers=2)) as client:
        yield client


def test_shards_add_up_to_the_same_bits(evaluator: Evaluator, points: Points, client: Any) -> None:
    far = SpreadLoss(evaluator, client, 1)
    for part in PARTS:
        assert [far.evaluate(p, part) for p in points] == [evaluator.evaluate(p, part) for p in points]
    assert far.validate(points[0]) == evaluator.validate(points[0])
    assert far.costs == evaluator.costs
    plan = evaluator.plan_at(points[1])
    assert far.evaluate_plan(plan) == evaluator.evaluate_plan(plan)
    addresses = client.who_has(far._shards).values()
    assert len({holder for holders in addresses for holder in holders}) == 2  # one shard each


class _Killer:
    """An objective that kills a worker before its third evaluation."""

    def __init__(self, losses: SpreadLoss, client: Any) -> None:
        self.losses, self.client, self.left = losses, client, 3
        self.costs = losses.costs

    def evaluate(
        self, point: NDArray[np.float64], part: Part = "search", changed: int | None = None
    ) -> float:
        self.left -= 1
        if self.left == 0:
            victim = next(iter(self.client.run(os.getpid).values()))
            os.kill(victim, signal.SIGKILL)
        return self.losses.evaluate(point, part)

    def validate(self, point: NDArray[np.float64]) -> float:
        return self.losses.validate(point)


def test_a_search_whose_worker_is_killed_ends_as_the_local_one(evaluator: Evaluator) -> None:
    budget, count = Budget.parse("25"), len(evaluator.variables)
    here = minimize(evaluator, count, budget=budget)
    with _client(Cluster(workers=2)) as client:
        killer = _Killer(SpreadLoss(evaluator, client, 1), client)
        before = set(client.run(os.getpid).values())
        far = minimize(killer, count, budget=budget)
        assert killer.left < 0
        assert set(client.run(os.getpid).values()) != before
    assert far.point.tolist() == here.point.tolist()
    assert far.history == here.history
    assert (far.loss_end, far.held_end) == (here.loss_end, here.held_end)
    assert far.loss_end < far.loss_start


def test_passes_take_the_address_of_a_scheduler(models_dir: Path, client: Any) -> None:
    address = client.scheduler.address
    plans = []
    for cluster in (None, address):
        found = make_evaluator(models_dir)
        SearchNorm(loss="kl", samples=64, points=3, cluster=cluster).run(found.program, found.ctx)
        facts = (
            SearchSteps(loss="kl", samples=64, budget="6", cluster=cluster)
            .run(found.program, found.ctx)
            .facts
        )
        plans.append((facts["lapq"]["history"], facts["lapq"]["factors"]))
    assert plans[0] == plans[1]


def test_a_shard_that_moves_is_built_anew(evaluator: Evaluator, points: Points) -> None:
    samples = {n: evaluator.known.samples[n] for n in (2, 3)}
    shard = Shard(_recipe(evaluator, 1), samples)
    moved = pickle.loads(pickle.dumps(shard))
    assert moved.sums(points[0], "search") == shard.sums(points[0], "search")
    assert [s.number for s in moved.sums(points[0], "search")] == [2]
    assert [s.number for s in moved.sums(points[0], "held")] == [3]
    assert shard.__sizeof__() > sum(a.nbytes for s in samples.values() for a in s.batch.feeds.values())


def test_a_failing_worker_is_one_sentence(evaluator: Evaluator, client: Any) -> None:
    far = SpreadLoss(evaluator, client, 1)
    with pytest.raises(OnnxqError, match=r"^the cluster failed: IndexError: "):
        far.evaluate(np.zeros(1))


def test_without_a_cluster_it_is_the_evaluator(evaluator: Evaluator) -> None:
    with spread(evaluator, None) as losses:
        assert losses is evaluator


@pytest.mark.parametrize(
    "text", ["", "local", "local:0", "local:-1", "tcp://host", "http://host:80", "4", "host:8786"]
)
def test_a_text_that_is_not_understood(text: str) -> None:
    with pytest.raises(
        UsageError, match=r"is not understood; the choices are local:N .* and tcp://HOST:PORT"
    ):
        Cluster.parse(text)


def test_texts() -> None:
    assert Cluster.parse("local:3") == Cluster(workers=3)
    assert Cluster.parse("tcp://10.0.0.1:8786") == Cluster(address="tcp://10.0.0.1:8786")
    assert Cluster(workers=2).threads(5) == 5
    assert Cluster(workers=10**6).threads(0) == 1
    assert Cluster(address="tcp://a:1").threads(0) == 0


def test_without_dask_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'onnxq\[cluster\]'"):
        Cluster.parse("local:2")


def test_only_the_joint_search_takes_a_cluster() -> None:
    with pytest.raises(UsageError, match="cluster is of the joint search; choose it with --ranges lapq"):
        Choices(bits="w4a4", cluster="local:2").resolve(has_data=True)
    with pytest.raises(UsageError, match="cluster 'near' is not understood"):
        Choices(bits="w4a4", ranges="lapq", cluster="near").resolve(has_data=True)
    steps = Choices(bits="w4a4", ranges="lapq", cluster="tcp://h:1").resolve(has_data=True).passes
    assert [p.name for p in steps if getattr(p, "cluster", None) == "tcp://h:1"] == [
        "search-norm",
        "search-steps",
    ]


def test_a_scheduler_that_is_not_there(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxq.cluster.PATIENCE", 0.5)
    with (
        pytest.raises(OnnxqError, match=r"cannot reach the Dask scheduler tcp://127\.0\.0\.1:9"),
        spread(evaluator, "tcp://127.0.0.1:9"),
    ):
        pass


def test_weights_on_disk_are_refused(models_dir: Path, tmp_path: Path) -> None:
    found = make_evaluator(models_dir)
    found.program.spool = Spool(tmp_path)
    with pytest.raises(ModelError, match="weights stay on disk"):
        _recipe(found, 1)


def test_the_provider_travels(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator, "ctx", replace(evaluator.ctx, provider="CUDAExecutionProvide"))
    with pytest.raises(
        UsageError, match=r"unknown execution provider 'CUDAExecutionProvide'; .*CPUExecutionProvider"
    ):
        Shard(_recipe(evaluator, 1), evaluator.known.samples)
