"""Whether a quantized model gives the same codes with 32-bit sums, with AVX2's 16-bit pairs, and in onnxruntime here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from onnxq.data import Dataset
from onnxq.measure.compare import Difference, run
from onnxq.model.session import CPU, make_session
from onnxq.reference.run import Reference

Array = NDArray[Any]
Arrays = Mapping[str, Array]


@dataclass
class CodeDifference:
    """Running difference of one quantized tensor.

    Attributes:
        values: codes compared.
        differing: those that differ.
        largest: by how many steps at most.
    """

    values: int = 0
    differing: int = 0
    largest: int = 0

    def update(self, reference: Array, other: Array) -> None:
        """Add a batch; integer arrays of the same shape."""
        steps = np.abs(reference.astype(np.int16) - other.astype(np.int16))
        self.values += steps.size
        self.differing += int(np.count_nonzero(steps))
        self.largest = max(self.largest, int(steps.max(initial=0)))


@dataclass
class Side:
    """How one way to compute differs from another: every quantized tensor in the order of execution, and the outputs."""

    codes: dict[str, CodeDifference] = field(default_factory=dict)
    outputs: Difference = field(default_factory=Difference)

    def update(self, reference: Arrays, other: Arrays, names: list[str], size: int) -> None:
        """Add a batch; the names are those of outputs, all others are codes."""
        for name, value in reference.items():
            if name not in names and name in other:
                self.codes.setdefault(name, CodeDifference()).update(value, other[name])
        self.outputs.update({n: reference[n] for n in names}, {n: other[n] for n in names}, size)

    @property
    def differing(self) -> dict[str, CodeDifference]:
        """Tensors with other codes."""
        return {name: found for name, found in self.codes.items() if found.differing}

    @property
    def is_same(self) -> bool:
        """Whether all codes and all outputs are equal."""
        return not self.differing and all(o.noise == 0.0 for o in self.outputs.outputs.values())


@dataclass
class Agreement:
    """What `agreement` found.

    Attributes:
        saturating: first outputs of the kernels whose weights can saturate.
        float_operators: nodes that stay float; codes behind them may differ where float sums are ordered otherwise.
        avx2: 16-bit pairs against 32-bit sums.
        runtime: onnxruntime on this machine against 32-bit sums.
        runtime_avx2: the same against 16-bit pairs.
        unseen: quantized tensors that cannot be read from the runtime without changing its kernels.
        is_undisturbed: whether reading codes from the runtime has left its outputs as they are.
    """

    saturating: list[str]
    float_operators: int
    avx2: Side = field(default_factory=Side)
    runtime: Side = field(default_factory=Side)
    runtime_avx2: Side = field(default_factory=Side)
    unseen: list[str] = field(default_factory=list)
    is_undisturbed: bool = True


def agreement(
    model: ModelProto | Reference,
    data: Dataset,
    *,
    limit: int | None = None,
    batch: int = 32,
    threads: int = 0,
    provider: str = CPU,
    progress: Callable[[int], None] = lambda done: None,
) -> Agreement:
    """Run a model over the samples in both arithmetics and in onnxruntime.

    Args:
        model: a model, or its reference in exact arithmetic.

    Raises:
        ModelError: the model cannot be run.
        DataError: the samples cannot be read.
    """
    exact = model if isinstance(model, Reference) else Reference(model, threads=threads)
    avx2, unseen = exact.using("avx2"), unreadable(exact.model)
    hidden = [name for name in exact.code_names if name in unseen]
    result = Agreement(exact.saturating(), exact.float_operators, unseen=hidden)
    seen = [name for name in exact.code_names if name not in unseen]
    deployed = make_session(exact.model, threads=threads, provider=provider)
    opened = make_session(exact.model, threads=threads, provider=provider, extra_outputs=seen)
    names, wanted = exact.outputs, [*exact.code_names, *exact.outputs]
    done = 0
    for part in data.batches(batch, limit):
        sums = exact.tensors(part.feeds, wanted)
        pairs = avx2.tensors(part.feeds, wanted) if result.saturating else sums
        here = run(deployed, part.feeds)
        found = run(opened, part.feeds)
        result.is_undisturbed &= all(np.array_equal(here[n], found[n], equal_nan=True) for n in names)
        result.avx2.update(sums, pairs, names, part.size)
        result.runtime.update(sums, found | here, names, part.size)
        result.runtime_avx2.update(pairs, found | here, names, part.size)
        done += part.size
        progress(done)
    return result


def unreadable(model: ModelProto) -> set[str]:
    """int8 codes between QuantizeLinear and DequantizeLinear: the runtime moves them to uint8 unless they are read."""
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    return {
        node.output[0]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
        and len(node.input) > 2
        and kinds.get(node.input[2]) == TensorProto.INT8
    }
