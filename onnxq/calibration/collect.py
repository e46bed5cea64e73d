"""Run the float graph over calibration samples and gather statistics of its tensors, one batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from onnxq.calibration.parts import find_parts
from onnxq.calibration.statistics import Needs, TensorStatistics
from onnxq.data import Batch, Dataset
from onnxq.errors import DataError
from onnxq.measure.compare import run
from onnxq.model.session import make_session
from onnxq.pipeline import Context
from onnxq.program import Program

ACTIVATION_BYTES = 8 << 20
LARGEST_BATCH = 8
RUN_BYTES = (
    64 << 20
)  # of activations in a run for outputs alone; a session keeps the memory of its largest run


def collect(
    program: Program, ctx: Context, needs: Mapping[str, Needs], label: str
) -> dict[str, TensorStatistics]:
    """Statistics of the named tensors over the context's samples; of a Concat there may be more than is needed.

    Memory holds the activations of one batch, at most about 8 MB unless a single sample
    has more, and the statistics.

    Raises:
        DataError: there is no data, or a tensor holds NaN or infinity.
        ModelError: the model cannot be run on the data.
    """
    gathered, parts = find_parts(program.graph, needs)
    statistics = {name: TensorStatistics(name, need) for name, need in gathered.items()}
    for _, values in activations(program, ctx, list(gathered), ctx.calibrated, label):
        for name, statistic in statistics.items():
            statistic.update(values[name])
    for name, part in parts.items():
        statistics[name] = statistics[part.whole].part(name, needs[name], part.channels)
    return {name: statistics[name] for name in needs}


def activations(
    program: Program, ctx: Context, names: Sequence[str], samples: int, label: str
) -> Iterator[tuple[Batch, dict[str, NDArray[Any]]]]:
    """Values of the named tensors of the float graph, batch by batch.

    Args:
        program: its graph is still float.
        ctx: its data are read.
        names: of inputs and inner tensors.
        samples: how many to run, spread evenly over the data where their number is known.
        label: for the progress.

    Yields:
        A batch, and the values by tensor name.

    Raises:
        DataError: there is no data.
        ModelError: the model cannot be run on the data.
    """
    if ctx.data is None:
        raise DataError("there is no calibration data; give some with --calib")
    fed = {t.name for t in program.graph.inputs}
    inner = [name for name in names if name not in fed]
    session = make_session(
        program.to_model(),
        threads=ctx.threads,
        provider=ctx.provider,
        extra_outputs=_unexposed(program, inner),
    )
    total = ctx.data.count()
    expected = min(total, samples) if total is not None else None
    done = 0
    # the digest of a calibration table is that of its samples
    digested = samples == ctx.calibrated
    for batch in _batches(ctx.data, samples, session, inner, digested):
        yield batch, {**batch.feeds, **run(session, batch.feeds, inner)}
        done += batch.size
        ctx.progress(label, done, expected)


def at_once(program: Program, ctx: Context) -> int:
    """Samples to run together where the network's outputs alone are looked at: 8, or fewer that keep activations within 64 MB.

    Args:
        program: its statistics tell how many values a sample has; without them it is 8.
        ctx: how many samples they are of.
    """
    if ctx.data is None:
        return LARGEST_BATCH
    count = ctx.data.count()
    samples = ctx.calibrated if count is None else min(count, ctx.calibrated)
    values = sum(statistics.count for statistics in program.statistics.values())
    of_one = 4 * values // max(samples, 1)
    return max(1, min(LARGEST_BATCH, RUN_BYTES // max(of_one, 1)))


def _unexposed(program: Program, names: list[str]) -> list[str]:
    outputs = {t.name for t in program.graph.outputs}
    return [name for name in names if name not in outputs]


def _batches(
    data: Dataset, samples: int, session: ort.InferenceSession, names: list[str], digested: bool
) -> Iterator[Batch]:
    """Batches of as many samples as keep the tensors within ACTIVATION_BYTES, judged by the first sample."""
    first = next(data.batches(1), None)  # without a limit, which may be less than a fixed batch
    if first is None:
        raise DataError(f"{data.source} has no samples")
    held = sum(v.nbytes for v in run(session, first.feeds, names).values())
    size = max(1, min(LARGEST_BATCH, first.size * ACTIVATION_BYTES // max(held, 1)))
    return data.batches(size, samples, digested=digested)
