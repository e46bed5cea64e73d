"""The integer reference: runs a quantized model with the arithmetic of integer kernels, stated in numpy.

It executes what is deployed. Codes are equal to those that onnxruntime computes; where operators stay float, up to the
order of float sums (see `onnxq.reference.regions`).

Products, convolutions and lookups are the same on every machine that adds in 32 bits. The rounding of additions and averages is
that of x86; the kernels for ARM scale those in fixed point, and give the neighbouring code where a value lies close to a tie.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxq.errors import ModelError, UsageError
from onnxq.model.load import load_model
from onnxq.model.messages import one_sentence
from onnxq.reference.kernels import FACTORS, Step
from onnxq.reference.lowering import lower
from onnxq.reference.products import reduction
from onnxq.reference.regions import Region, schedule
from onnxq.reference.sums import Arithmetic
from onnxq.saturation import excess, pair_limit

Array = NDArray[Any]
ARITHMETICS: tuple[Arithmetic, ...] = ("exact", "avx2")


class Reference:
    """A quantized model, in the QDQ form or as integer operators, that can be run.

    Args:
        model: a model or its file.
        arithmetic: `exact` sums products in 32 bits; `avx2` saturates pairs of them at 16 bits, as x86 machines
            without VNNI do.
        threads: threads of onnxruntime for operators that stay float, 0 for one per core.

    Raises:
        UsageError: there is no such arithmetic.
        ModelError: the model cannot be read.
    """

    def __init__(
        self, model: ModelProto | Path, arithmetic: Arithmetic = "exact", *, threads: int = 0
    ) -> None:
        if arithmetic not in ARITHMETICS:
            raise UsageError(f"unknown arithmetic {arithmetic!r}; the choices are: {', '.join(ARITHMETICS)}")
        self.model = load_model(model) if isinstance(model, Path) else model
        self.arithmetic: Arithmetic = arithmetic
        self.threads = threads
        self.lowered = lower(self.model)
        self.outputs = [o.name for o in self.model.graph.output]
        self._plans: dict[tuple[str, ...], list[Step | Region]] = {}

    def using(self, arithmetic: Arithmetic) -> Reference:
        """The same model in another arithmetic, without preparing it again."""
        other = copy.copy(self)
        other.arithmetic = arithmetic
        return other

    @property
    def code_names(self) -> list[str]:
        """Names of the 8-bit tensors that the model computes, in that order."""
        return list(self.lowered.codes)

    @property
    def float_operators(self) -> int:
        """Nodes that stay float."""
        plan = self._plan((*self.code_names, *self.outputs))
        return sum(len(item.nodes) for item in plan if isinstance(item, Region))

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs of the model by name; feeds that it does not take are left out.

        Raises:
            ModelError: an input is missing, or an operator that stays float cannot be run.
        """
        return self.tensors(feeds, self.outputs)

    def codes(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Codes, uint8 or int8, of every quantized tensor by name.

        Raises:
            ModelError: see `run`.
        """
        return self.tensors(feeds, self.code_names)

    def tensors(self, feeds: Mapping[str, Array], names: Iterable[str]) -> dict[str, Array]:
        """Any tensors of the model by name.

        Raises:
            ModelError: see `run`.
        """
        wanted = tuple(dict.fromkeys(names))
        known = dict(self.lowered.constants)
        known |= {n: np.asarray(x) for n, x in feeds.items() if n not in known}
        plan = self._plan(wanted)
        last = _last_readers(plan)
        for index, item in enumerate(plan):
            missing = next((n for n in item.inputs if n and n not in known), None)
            if missing is not None:
                raise ModelError(f"the model takes an input {missing!r} that is not given")
            known |= self._outputs_of(item, known)
            for name in last.get(index, ()):
                if name not in wanted:
                    del known[name]
        absent = next((name for name in wanted if name not in known), None)
        if absent is not None:
            raise ModelError(f"the model has no tensor {absent!r}")
        return {name: known[name] for name in wanted}

    def saturating(self) -> list[str]:
        """First outputs of the kernels whose weights can saturate in pairs of products, in order."""
        found = []
        for step in self._plan(tuple(self.code_names)):
            if isinstance(step, Step) and self._can_saturate(step):
                found.append(step.outputs[0])
        return found

    def _can_saturate(self, step: Step) -> bool:
        name = step.inputs[FACTORS[step.op][0]] if step.op in FACTORS else ""
        weights = self.lowered.constants.get(name)
        if weights is None:
            return step.op in FACTORS
        if weights.dtype != np.int8 or weights.ndim < 2:
            return False
        kind, axis = reduction(step.op, step.attributes, weights)
        rows = weights if kind in ("Conv", "Depthwise") or weights.ndim == 2 else _stacked(weights)
        return bool(excess(rows, kind, axis, pair_limit()).any())

    def _plan(self, wanted: tuple[str, ...]) -> list[Step | Region]:
        if wanted not in self._plans:
            self._plans[wanted] = schedule(self.lowered, wanted, self.model, self.threads)
        return self._plans[wanted]

    def _outputs_of(self, item: Step | Region, known: Mapping[str, Array]) -> dict[str, Array]:
        if isinstance(item, Region):
            return item.run(known)
        inputs = [known[name] if name else None for name in item.inputs]
        try:
            found = item.kernel(item.attributes, inputs, self.arithmetic)
        except (ValueError, IndexError, TypeError) as error:
            shapes = ", ".join(str(x.shape) for x in inputs if x is not None)
            what = f"{item.op} that writes {item.outputs[0]!r} cannot take inputs of shapes {shapes}"
            raise ModelError(f"{what}: {one_sentence(error)}") from error
        return {n: x for n, x in zip(item.outputs, found, strict=False) if n}


def _stacked(weights: Array) -> Array:
    """Matrices (..., K, N) side by side, (K, ... N)."""
    return np.moveaxis(weights, -2, 0).reshape(weights.shape[-2], -1)


def _last_readers(plan: list[Step | Region]) -> dict[int, list[str]]:
    """Tensors that nobody reads after an item, by its place; constants and inputs too."""
    last: dict[str, int] = {}
    for index, item in enumerate(plan):
        last |= dict.fromkeys((n for n in item.inputs if n), index)
    places: dict[int, list[str]] = {}
    for name, index in last.items():
        places.setdefault(index, []).append(name)
    return places
