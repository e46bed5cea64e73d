"""Where codes and floats meet: QuantizeLinear and DequantizeLinear at the borders of units, shared by the emission passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.affine import QuantParams, quantize
from onnxq.bias import bias_codes, bias_params
from onnxq.expansion import is_expanded, row_bias, row_codes, row_params
from onnxq.graph import Names, constant, float_values, is_constant, producer
from onnxq.packing import Packer
from onnxq.point_rows import PointRows
from onnxq.program import Program, Unit
from onnxq.scheme import QuantScheme
from onnxq.target import Target

FLOAT = np.dtype(np.float32)


def storage(scheme: QuantScheme) -> np.dtype[np.integer]:
    """Type of a code as the kernels read it."""
    return np.dtype(np.int8 if scheme.signed else np.uint8)


@dataclass(frozen=True, eq=False)
class Recipe:
    """How the values of an initializer follow from a plan.

    Attributes:
        reads: tensors of the plan that they depend on.
        make: the values, for a program with any other grids and codes of the same tensors.
    """

    reads: tuple[str, ...]
    make: Callable[[Program], NDArray[Any]]


@dataclass(frozen=True)
class Bounds:
    """Smallest and largest value that an activation lets through; None for no bound."""

    low: np.float32 | None = None
    high: np.float32 | None = None

    def codes(self, params: QuantParams) -> tuple[int, int]:
        """Smallest and largest code.

        Rounding keeps order, so clipping codes at the codes of the bounds gives the codes of the clipped values.
        """
        low, high = (
            None if v is None else int(quantize(np.asarray(v), params)) for v in (self.low, self.high)
        )
        return (
            params.scheme.qmin if low is None else low,
            params.scheme.qmax if high is None else high,
        )


ALL = Bounds()

# (program, unit, bias) -> bias, what a plan adds to a bias (C,) before it becomes codes
Correction = Callable[[Program, Unit, NDArray[np.float32]], NDArray[np.float32]]


def uncorrected(program: Program, unit: Unit, bias: NDArray[np.float32]) -> NDArray[np.float32]:
    """The bias itself."""
    return bias


class Borders:
    """Codes and dequantized values of the tensors of a plan, made when first asked for.

    A tensor that is held as codes keeps its name for the dequantized value, so float readers, graph outputs and control-flow
    bodies read it without being touched. A tensor that is only needed as codes keeps its name for the float value.

    Attributes:
        recipes: how initializers follow from the plan, by name; weights that are stored in 8 bits only.
    """

    def __init__(
        self,
        program: Program,
        target: Target,
        *,
        open_plan: bool = False,
        correction: Correction = uncorrected,
    ) -> None:
        """Nothing is written yet.

        Args:
            correction: of biases.
            open_plan: whether other grids are to be put into what is written: then each limit is an initializer of its own, also
                where it limits nothing by this plan.
        """
        self.program = program
        self.open_plan = open_plan
        self.correction = correction
        self.recipes: dict[str, Recipe] = {}
        self.graph = program.graph
        self.names = Names(program.graph)
        self.target = target
        self.packer = Packer(program.graph, self.names, target.packed)
        self.tensors: dict[str, gs.Tensor] = program.graph.tensors()
        self._codes: dict[str, gs.Variable] = {}
        self._values: dict[str, gs.Tensor] = {}
        self._grids: dict[str, tuple[gs.Constant, gs.Constant]] = {}
        self._zero_points: dict[tuple[np.dtype[np.integer], tuple[int, ...]], gs.Constant] = {}
        self._limits: dict[tuple[np.dtype[np.integer], int, int], tuple[gs.Constant, gs.Constant]] = {}
        self._weights: dict[str, tuple[gs.Tensor, gs.Constant, gs.Constant]] = {}

    def grid(self, tensor: str) -> tuple[gs.Constant, gs.Constant]:
        """Scale () float32 and zero point () of an activation, one pair of initializers for each group."""
        decision = self.program.plan[tensor]
        group, kind = decision.group, storage(decision.scheme)
        if group not in self._grids:
            self._grids[group] = (
                self.parameter(f"{group}_scale", (tensor,), lambda p: p.params(tensor).scale),
                self.parameter(f"{group}_zp", (tensor,), lambda p: p.params(tensor).zero_point.astype(kind)),
            )
        return self._grids[group]

    def weight(self, tensor: str) -> tuple[gs.Tensor, gs.Constant, gs.Constant]:
        """Codes, scale and explicit zero point of a weight, one set for all units that share it."""
        if tensor not in self._weights:
            params, points = self.program.params(tensor), self.program.plan[tensor].points
            if is_expanded(points):
                params = row_params(points, params)
                scale = constant(self.names, f"{tensor}_scale", params.scale)
            else:
                scale = self.parameter(f"{tensor}_scale", (tensor,), lambda p: p.params(tensor).scale)
            self._weights[tensor] = self.weight_codes(tensor), scale, self._zeros(tensor, params)
        return self._weights[tensor]

    def _zeros(self, tensor: str, params: QuantParams) -> gs.Constant:
        """Zero point of a weight; weights of one shape of scales share theirs where it is 0."""
        if self.open_plan:
            kind = storage(params.scheme)
            return self.parameter(
                f"{tensor}_zp", (tensor,), lambda p: p.params(tensor).zero_point.astype(kind)
            )
        zero = params.zero_point.astype(storage(params.scheme))
        key = (zero.dtype, zero.shape)
        if zero.any() or key not in self._zero_points:
            made = constant(self.names, f"{tensor}_zp", zero)
            if zero.any():
                return made
            self._zero_points[key] = made
        return self._zero_points[key]

    def points(self, unit: Unit) -> PointRows | None:
        """Rows of points that the unit's weights are stored as."""
        return None if unit.weight is None else self.program.plan[unit.weight].points

    def weight_codes(self, tensor: str) -> gs.Tensor:
        """Codes of a weight, int8 or uint8, stored at as many bits as they have."""
        decision = self.program.plan[tensor]
        if is_expanded(decision.points):
            return self.packer.tensor(f"{tensor}_q", row_codes(decision.points), decision.scheme.bits)
        if decision.points is not None:
            return self.packer.sums(f"{tensor}_q", decision.points, decision.scheme.bits)
        stored = self.packer.tensor(f"{tensor}_q", stored_codes(self.program, tensor), decision.scheme.bits)
        if is_constant(stored):
            self.recipes[stored.name] = Recipe((tensor,), lambda p: stored_codes(p, tensor))
        return stored

    def bias(self, unit: Unit) -> gs.Constant | None:
        """The unit's bias (C,) as int32 codes at input scale times weight scale, None when it has none."""
        if unit.bias is None:
            return None
        values = float_values(self.tensors[unit.bias])
        assert values is not None
        points = self.row_points(unit)
        if points is not None:
            codes = bias_codes(row_bias(values, points), self.bias_scale(unit, self.program))
            return constant(self.names, f"{unit.bias}_q", codes)
        return self.parameter(
            f"{unit.bias}_q",
            bias_reads(unit),
            lambda p: bias_codes(self.correction(p, unit, values.ravel()), bias_params(unit, p)),
        )

    def bias_scale(self, unit: Unit, program: Program) -> NDArray[np.float32]:
        """Scale of the bias as the layer reads it, () or (C,); of each row where points are computed one by one."""
        points, weight = self.row_points(unit), unit.weight
        if points is None or weight is None:
            return bias_params(unit, program)
        rows = row_params(points, program.params(weight)).scale
        return np.asarray(program.params(unit.inputs[0]).scale * rows, np.float32)

    def row_points(self, unit: Unit) -> PointRows | None:
        """Points that a layer with a bias of its own computes one by one; a MatMul's bias is added to their sums."""
        points = self.points(unit)
        return points if is_expanded(points) and unit.kind != "MatMul" else None

    def float_bias(self, unit: Unit) -> gs.Constant | None:
        """The unit's bias (C,) for a kernel that computes in float, None when it has none."""
        if unit.bias is None:
            return None
        values = float_values(self.tensors[unit.bias])
        assert values is not None
        shape = values.shape
        return self.parameter(
            f"{unit.bias}_f",
            bias_reads(unit),
            lambda p: self.correction(p, unit, values.ravel()).reshape(shape),
        )

    def parameter(
        self, name: str, reads: tuple[str, ...], make: Callable[[Program], NDArray[Any]]
    ) -> gs.Constant:
        """A new initializer whose values follow from the plan; see `Recipe`."""
        made = constant(self.names, name, make(self.program))
        self.recipes[made.name] = Recipe(reads, make)
        return made

    def codes(self, tensor: str) -> gs.Variable:
        """Codes of a tensor; a QuantizeLinear after the float tensor when nobody holds them."""
        if tensor not in self._codes:
            floats, grid = self.tensors[tensor], self.grid(tensor)
            channels = self._pooled_channels(floats)
            if channels is not None:
                grid = self._channel_grid(tensor, channels)
            self._quantize(tensor, floats, self._new_codes(tensor), grid)
        return self._codes[tensor]

    def _pooled_channels(self, floats: gs.Tensor) -> int | None:
        """Channels of what a MaxPool writes in float, None of anything else and where their number is not known.

        onnxruntime moves a QuantizeLinear to the front of such a MaxPool, which takes many times as long on codes that come from
        anywhere but a quantized convolution. It leaves one with equal scales along the channels where it is.
        """
        maker = producer(floats)
        if self.target.guard != "channel" or maker is None or maker.op != "MaxPool" or floats.shape is None:
            return None
        return floats.shape[1] if isinstance(floats.shape[1], int) else None

    def _channel_grid(self, tensor: str, channels: int) -> tuple[gs.Constant, gs.Constant]:
        """Scale and zero point of an activation, repeated for each channel."""
        kind = storage(self.program.plan[tensor].scheme)
        return (
            self.parameter(
                f"{tensor}_scales", (tensor,), lambda p: np.full(channels, p.params(tensor).scale)
            ),
            self.parameter(
                f"{tensor}_zps", (tensor,), lambda p: np.full(channels, p.params(tensor).zero_point, kind)
            ),
        )

    def values(self, tensor: str) -> gs.Tensor:
        """Dequantized values of a tensor."""
        if tensor not in self._values:
            codes = self.codes(tensor)
            floats = gs.Variable(self.names.fresh(f"{tensor}_dq"), FLOAT, self.tensors[tensor].shape)
            self.append("DequantizeLinear", tensor, [codes, *self.grid(tensor)], [floats])
            self._values[tensor] = floats
        return self._values[tensor]

    def guarded_values(self, tensor: str, channels: int, axis: int) -> gs.Tensor:
        """Values of a tensor held as codes for a layer that stays float.

        onnxruntime quantizes the weights of a float layer behind a per-tensor DequantizeLinear by itself. It leaves the layer
        alone behind one with equal scales along an axis, or behind a LeakyRelu of slope 1; the numbers are the same.
        """
        floats = gs.Variable(self.names.fresh(f"{tensor}_dq"), FLOAT, self.tensors[tensor].shape)
        if self.target.guard == "slope":
            self.append("LeakyRelu", tensor, [self.values(tensor)], [floats]).attrs["alpha"] = 1.0
            return floats
        grid = self._channel_grid(tensor, channels)
        self.append("DequantizeLinear", tensor, [self.codes(tensor), *grid], [floats]).attrs["axis"] = axis
        return floats

    def is_held(self, tensor: str) -> bool:
        """Whether only codes of the tensor are written, so far."""
        return self._values.get(tensor) is not None and self._values[tensor] is self.tensors[tensor]

    def hold(self, tensor: str) -> gs.Variable:
        """Codes for a kernel to write; from here on the tensor's own name is their dequantized value."""
        floats = self.tensors[tensor]
        floats.inputs.clear()
        codes = self._new_codes(tensor)
        self.append("DequantizeLinear", tensor, [codes, *self.grid(tensor)], [floats])
        self._values[tensor] = floats
        return codes

    def quantize_output(self, tensor: str, bounds: Bounds = ALL) -> gs.Variable:
        """A float32 variable for a kernel to write, quantized and dequantized again into the tensor.

        Args:
            bounds: of an activation whose work is to be done on codes.
        """
        raw = gs.Variable(self.names.fresh(f"{tensor}_float"), FLOAT, self.tensors[tensor].shape)
        self._quantize(tensor, raw, self.hold(tensor), self.grid(tensor), bounds)
        return raw

    def _quantize(
        self,
        tensor: str,
        floats: gs.Tensor,
        codes: gs.Variable,
        grid: tuple[gs.Constant, gs.Constant],
        bounds: Bounds = ALL,
    ) -> None:
        limits = self.limits(tensor, bounds)
        if limits is None:
            self.append("QuantizeLinear", tensor, [floats, *grid], [codes])
            return
        open_codes = gs.Variable(self.names.fresh(f"{tensor}_raw"), codes.dtype, codes.shape)
        self.append("QuantizeLinear", tensor, [floats, *grid], [open_codes])
        self.append("Clip", tensor, [open_codes, *limits], [codes])

    def limits(self, tensor: str, bounds: Bounds = ALL) -> tuple[gs.Constant, gs.Constant] | None:
        """Smallest and largest code of a tensor as initializers, None where its storage saturates there by itself.

        Args:
            bounds: of an activation whose work is to be done on codes.
        """
        kind = storage(self.program.plan[tensor].scheme)
        if self.open_plan and bounds.high is not None:
            return self._open_limit(tensor, bounds, 0, kind), self._open_limit(tensor, bounds, 1, kind)
        low, high = bounds.codes(self.program.params(tensor))
        if (low, high) == (np.iinfo(kind).min, np.iinfo(kind).max):
            return None
        if (kind, low, high) not in self._limits:
            self._limits[kind, low, high] = (
                constant(self.names, f"{tensor}_low", np.array(low, kind)),
                constant(self.names, f"{tensor}_high", np.array(high, kind)),
            )
        return self._limits[kind, low, high]

    def _open_limit(self, tensor: str, bounds: Bounds, end: int, kind: np.dtype[np.integer]) -> gs.Constant:
        return self.parameter(
            f"{tensor}_{('low', 'high')[end]}",
            (tensor,),
            lambda p: np.array(bounds.codes(p.params(tensor))[end], kind),
        )

    def append(
        self, op: str, name: str, inputs: list[gs.Tensor], outputs: list[gs.Tensor], domain: str = ""
    ) -> gs.Node:
        """A new node named after its output where that is new too, else after a tensor or node."""
        known = self.tensors.get(outputs[0].name) is outputs[0]
        node_name = self.names.fresh(f"{name}_dq") if known else outputs[0].name
        node = gs.Node(op, node_name, inputs=inputs, outputs=outputs, domain=domain)
        self.graph.nodes.append(node)
        return node

    def finish(self) -> None:
        """Drop conversions that nobody reads and restore the order of nodes; the program learns the names of codes."""
        self.program.codes = {tensor: codes.name for tensor, codes in self._codes.items()}
        self.graph.cleanup(remove_unused_graph_inputs=False).toposort()

    def _new_codes(self, tensor: str) -> gs.Variable:
        scheme = self.program.plan[tensor].scheme
        shape = self.tensors[tensor].shape
        self._codes[tensor] = gs.Variable(self.names.fresh(f"{tensor}_q"), storage(scheme), shape)
        return self._codes[tensor]


def stored_codes(program: Program, tensor: str) -> NDArray[Any]:
    """Codes of a weight in the type that kernels read."""
    decision = program.plan[tensor]
    assert decision.codes is not None
    return decision.codes.astype(storage(decision.scheme))


def bias_reads(unit: Unit) -> tuple[str, ...]:
    """Tensors whose grids the codes of a unit's bias depend on."""
    assert unit.weight is not None
    return unit.inputs[0], unit.weight
