"""The state that passes work on: a graph, a quantization plan, and what is known about the activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.affine import QuantParams, dequantize
from onnxq.calibration.statistics import TensorStatistics
from onnxq.model.disk import Spool
from onnxq.model.surgeon import shelve, to_graph, to_model
from onnxq.point_rows import PointRows
from onnxq.scheme import QuantScheme


@dataclass(frozen=True)
class Unit:
    """One quantized kernel in the making: a main node and the nodes that the runtime absorbs into it.

    Attributes:
        kind: op of the main node; the target's rule of that name says how it runs.
        nodes: names of the main node, then of what it absorbs in order: a bias Add or an Add of another activation, and an
            activation.
        inputs: activation tensors that the unit reads as codes: what it multiplies, then what it adds.
        outputs: tensors after the last absorbed node; only a Split has more than one.
        weight: initializer holding the weights, if any.
        bias: initializer holding the bias, if any.
        channel_axis: output-channel axis of the weight.
        float_output: the kernel may write float32, so its output needs no codes.
        is_layout: the node only moves codes.
    """

    kind: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weight: str | None = None
    bias: str | None = None
    channel_axis: int = 0
    float_output: bool = False
    is_layout: bool = False

    @property
    def name(self) -> str:
        """Name of the main node."""
        return self.nodes[0]

    @property
    def is_table(self) -> bool:
        """Whether the unit looks codes up in a table."""
        return self.weight is not None and not self.inputs

    @property
    def moves_codes(self) -> bool:
        """Whether the unit only moves or looks up codes, so that it needs no integer kernel of its own."""
        return self.is_layout or self.is_table

    @property
    def multiplied(self) -> tuple[str, ...]:
        """Inputs that are multiplied, by weights or by each other."""
        return self.inputs if self.weight is None else self.inputs[:1]

    @property
    def output(self) -> str:
        """The first output."""
        return self.outputs[0]


@dataclass(frozen=True, eq=False)
class QuantDecision:
    """What becomes of one tensor.

    Attributes:
        scheme: the grid it is to have.
        group: tensors of one group share their parameters; the group is named after its first tensor.
        is_weight: whether the tensor is an initializer that gets codes.
        axis: channel axis of a weight.
        params: scale and zero point, None until a pass has chosen them.
        codes: quantized weights, int8 or uint8 in the weight's shape; None for activations.
        points: the rows whose sums the codes are, where they are stored so.
    """

    scheme: QuantScheme
    group: str
    is_weight: bool = False
    axis: int | None = None
    params: QuantParams | None = None
    codes: NDArray[np.integer[Any]] | None = None
    points: PointRows | None = None

    @property
    def values(self) -> NDArray[np.float32]:
        """What the codes stand for, float32, in their shape; there must be codes and parameters."""
        assert self.codes is not None
        assert self.params is not None
        return dequantize(self.codes, self.params)


Sides = Literal["both", "weights", "activations"]


@dataclass
class Program:
    """A model on its way through the pipeline.

    Attributes:
        graph: the graphsurgeon graph; passes change it in place.
        source: the prepared model that the graph came from (its weights, metadata, opset imports).
        plan: decision of each tensor that gets codes; a tensor that stays float is absent.
        units: the quantized kernels, by the name of their main node.
        floats: reason of each node that stays float, by node name; a pass may write one before annotate runs to keep a node out.
        stored: nodes whose weights are stored as codes but computed in float, by node name, with the reason.
        spool: takes large initializers as passes make them, where the model's own weights stay on disk too.
        folded: factors (C,) by which output channels were multiplied when normalizations were folded, by weight; emptied where
            scales are to have no such pattern.
        sides: what is written as codes; the other side keeps its float values, though it has a plan.
        statistics: of activations, filled by calibration; a pass with its own puts its name and a slash before the tensor's.
        reference: the program as it was when the plan was made, its graph float; kept where layers are to be measured. Its own
            plan and biases hold what layers would have if they did not make up for the noise of others.
        biases: what passes made of biases (C,) to make up for quantized weights, by the name of the unit.
        searched: biases (C,) with which a search of steps ended, by the name of the unit; for correct-bias to take or to better.
        codes: names of the activations' codes in the emitted graph, by tensor.
        deployed: losses to evaluate on the emitted model, by the name of the pass that asks for it.
    """

    graph: gs.Graph
    source: onnx.ModelProto
    plan: dict[str, QuantDecision] = field(default_factory=dict)
    units: dict[str, Unit] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    statistics: dict[str, TensorStatistics] = field(default_factory=dict)
    deployed: dict[str, Callable[[onnx.ModelProto], float]] = field(default_factory=dict)
    spool: Spool | None = None
    sides: Sides = "both"
    folded: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    reference: Program | None = None
    biases: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    searched: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_model(cls, model: onnx.ModelProto) -> Program:
        """A program without a plan. The model should have passed `onnxq.model.prepare`.

        Raises:
            ModelError: graphsurgeon cannot represent the model.
        """
        return cls(to_graph(model), model)

    def to_model(self) -> onnx.ModelProto:
        """The graph as a model, with the metadata of the source."""
        return to_model(self.graph, self.source)

    def shelve(self, nodes: Iterable[gs.Node]) -> None:
        """Move large initializers that the nodes read out of memory, where the weights of the model stay on disk.

        A pass that rewrites weights one by one calls it after each.

        Raises:
            ModelError: they cannot be written.
        """
        if self.spool is None:
            return
        for tensor in (t for node in nodes for t in node.inputs if isinstance(t, gs.Constant)):
            shelve(tensor, self.spool)

    def params(self, tensor: str) -> QuantParams:
        """Chosen parameters of a tensor of the plan.

        Raises:
            KeyError: the tensor is not in the plan.
            ValueError: no pass has chosen its parameters.
        """
        chosen = self.plan[tensor].params
        if chosen is None:
            raise ValueError(f"the plan holds no scale for tensor {tensor!r}; a range pass must run first")
        return chosen
