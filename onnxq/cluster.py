"""A network's loss evaluated by many workers: each keeps a shard of the samples, and only points and sums travel.

The loss is a mean over samples, so its evaluation is a map. It runs on a Dask cluster (Rocklin, "Dask: Parallel computation with
blocked algorithms and task scheduling", SciPy 2015). A shard is the result of a task: when its worker is lost, the scheduler has
another one do the task again. Sums come back by batch and are added in the order of the batches, so the losses are the bits that
one process finds, wherever the same onnxruntime runs.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto

from onnxq.errors import ModelError, OnnxqError, UsageError
from onnxq.model.messages import one_sentence
from onnxq.pipeline import Context
from onnxq.program import Program
from onnxq.search.objective import Part, Vector
from onnxq.simulate.emitted import Plan
from onnxq.simulate.evaluator import BatchSum, Evaluator, Known, Sample, mean

if TYPE_CHECKING:
    from distributed import Client, Future

CHOICES = "the choices are local:N for N workers on this machine, and tcp://HOST:PORT or tls://HOST:PORT of a Dask scheduler"
PROTOCOLS = ("tcp", "tls")
PATIENCE = 30  # seconds for a scheduler to answer and to have a worker


@dataclass(frozen=True)
class Cluster:
    """Where workers are.

    Attributes:
        address: of a Dask scheduler; empty for this machine.
        workers: on this machine, 0 with an address.
    """

    address: str = ""
    workers: int = 0

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """Read `local:2` or `tcp://scheduler:8786`.

        Raises:
            UsageError: it is neither, or Dask is not installed.
        """
        kind, _, rest = text.partition(":")
        if kind == "local" and rest.isdecimal() and int(rest) > 0:
            found = cls(workers=int(rest))
        elif kind in PROTOCOLS and rest.startswith("//") and rest.rpartition(":")[2].isdecimal():
            found = cls(address=text)
        else:
            raise UsageError(f"cluster {text!r} is not understood; {CHOICES}")
        if importlib.util.find_spec("distributed") is None:
            raise UsageError(
                "a cluster needs Dask's package distributed; install it with: pip install 'onnxq[cluster]'"
            )
        return found

    def threads(self, asked: int) -> int:
        """Threads of a worker's sessions: workers on one machine share its cores."""
        return asked if asked or not self.workers else max(1, (os.cpu_count() or 1) // self.workers)


@contextmanager
def spread(evaluator: Evaluator, cluster: str | None) -> Iterator[Evaluator | SpreadLoss]:
    """The losses of an evaluator, found on a cluster; without one it is the evaluator itself.

    Raises:
        UsageError: the text of the cluster is not understood, or Dask is not installed.
        OnnxqError: the scheduler cannot be reached, or has no workers.
    """
    if cluster is None:
        yield evaluator
        return
    place = Cluster.parse(cluster)
    with _client(place) as client:
        yield SpreadLoss(evaluator, client, place.threads(evaluator.ctx.threads))


@contextmanager
def _client(cluster: Cluster) -> Iterator[Client]:
    """A connection to a scheduler with at least one worker; workers started here end with it."""
    from distributed import Client, LocalCluster

    if cluster.workers:
        with (
            LocalCluster(
                n_workers=cluster.workers,
                threads_per_worker=1,
                memory_limit=None,
                dashboard_address="127.0.0.1:0",  # any free port
                silence_logs=logging.CRITICAL,
            ) as started,
            Client(started, set_as_default=False) as client,
        ):
            yield client
        return
    try:
        client = Client(cluster.address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        raise OnnxqError(
            f"cannot reach the Dask scheduler {cluster.address}: {one_sentence(error)}"
        ) from None
    with client:
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError:
            raise OnnxqError(
                f"the Dask scheduler {cluster.address} has no workers; start some with: dask worker"
            ) from None
        yield client


class SpreadLoss:
    """The losses of an evaluator, found by the workers of a cluster; an objective of a search."""

    def __init__(self, evaluator: Evaluator, client: Client, threads: int) -> None:
        """Send every worker its shard: as many as there are workers now, each of neighbouring batches.

        Raises:
            ModelError: the model is too large to be sent.
        """
        self._evaluator, self._client = evaluator, client
        known = evaluator.known
        workers = list(client.scheduler_info(n_workers=-1)["workers"])
        shards = [s.tolist() for s in np.array_split(list(known.samples), len(workers)) if len(s)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sending large graph", UserWarning)
            recipe = client.submit(bytes, _recipe(evaluator, threads), pure=False)
            self._shards: list[Future] = [
                client.submit(
                    Shard,
                    recipe,
                    {number: known.samples[number] for number in numbers},
                    workers=[worker],
                    allow_other_workers=True,
                    pure=False,
                )
                for worker, numbers in zip(workers, shards, strict=False)
            ]

    @property
    def costs(self) -> Mapping[Part, float]:
        """Samples of each part, relative to those searched on."""
        return self._evaluator.costs

    def evaluate(self, point: Vector, part: Part = "search", changed: int | None = None) -> float:
        """The mean loss over a part of the samples."""
        return mean(self._sums(np.asarray(point, np.float64), part))

    def validate(self, point: Vector) -> float:
        """The mean loss over the samples held back."""
        return self.evaluate(point, "held")

    def evaluate_plan(self, plan: Plan, part: Part = "search") -> float:
        """The mean loss of any plan of the same tensors; all of it travels."""
        return mean(self._sums(dict(plan), part))

    def _sums(self, at: Vector | Plan, part: Part) -> list[BatchSum]:
        """Of all shards.

        Raises:
            OnnxqError: workers failed, or were lost time after time.
        """
        found = [self._client.submit(_sums, shard, at, part, pure=False) for shard in self._shards]
        try:
            return [s for sums in self._client.gather(found) for s in sums]
        except OnnxqError:
            raise
        except (Exception, CancelledError) as error:  # a worker may raise anything
            raise OnnxqError(f"the cluster failed: {type(error).__name__}: {one_sentence(error)}") from error


class Shard:
    """An evaluator of some batches in a worker's memory. Sent to another worker, it is built anew there."""

    def __init__(self, recipe: bytes, samples: Mapping[int, Sample]) -> None:
        """By what `_recipe` wrote."""
        self._made_of, self._lock = (recipe, samples), Lock()
        found: _Recipe = pickle.loads(recipe)
        self._evaluator = found.evaluator(samples)

    def __reduce__(self) -> tuple[type[Shard], tuple[bytes, Mapping[int, Sample]]]:
        return Shard, self._made_of

    def __sizeof__(self) -> int:
        """Bytes: by them the scheduler decides that a point travels and not the shard."""
        recipe, samples = self._made_of
        feeds = sum(a.nbytes for s in samples.values() for a in s.batch.feeds.values())
        return len(recipe) + feeds + self._evaluator.kept_bytes

    def sums(self, at: Vector | Plan, part: Part) -> list[BatchSum]:
        """The loss of each of its batches in a part, at a point or of a plan."""
        with self._lock:  # an evaluation that was interrupted may still run
            plan = self._evaluator.plan_at(at) if isinstance(at, np.ndarray) else at
            return self._evaluator.sums(plan, part)


def _sums(shard: Shard, at: Vector | Plan, part: Part) -> list[BatchSum]:
    return shard.sums(at, part)


@dataclass(frozen=True, eq=False)
class _Recipe:
    """How an evaluator is built without its samples.

    Attributes:
        model: the program's graph, serialized: graphsurgeon's does not pickle.
        fields: of the program, but for the graph.
        context: without data.
        known: without samples.
        correct: as the evaluator's.
    """

    model: bytes
    fields: Mapping[str, Any]
    context: Mapping[str, Any]
    known: Known
    correct: bool

    def evaluator(self, samples: Mapping[int, Sample]) -> Evaluator:
        """With these samples."""
        program = Program.from_model(ModelProto.FromString(self.model))
        for name, value in self.fields.items():
            setattr(program, name, value)
        known = replace(self.known, samples=samples)
        return Evaluator(program, Context(**self.context), correct=self.correct, known=known)


FIELDS = ("plan", "units", "floats", "stored", "statistics", "sides")


def _recipe(evaluator: Evaluator, threads: int) -> bytes:
    """An evaluator without its samples, pickled by value where functions are local.

    Raises:
        ModelError: the weights are on disk.
    """
    import cloudpickle

    program, ctx = evaluator.program, evaluator.ctx
    if program.spool is not None:
        raise ModelError("a model whose weights stay on disk cannot be sent to a cluster")
    recipe = _Recipe(
        program.to_model().SerializeToString(),
        {name: getattr(program, name) for name in FIELDS},
        {"target": ctx.target, "threads": threads, "provider": ctx.provider, "seed": ctx.seed},
        replace(evaluator.known, samples={}),
        evaluator.correct,
    )
    found: bytes = cloudpickle.dumps(recipe)
    return found
