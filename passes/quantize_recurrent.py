"""Store the weights of recurrent layers as codes, and run LSTMs in integers where the runtime can.

onnxruntime's DynamicQuantizeLSTM multiplies x and the state, quantized as they come, by int8 weights, and needs no calibration.
On machines without VNNI it adds neighbouring products in 16 bits; codes keep the pair limit (`onnxq.saturation`), so every one
computes the same. GRU and RNN, and all of them on other targets, read codes times scale, which runtimes evaluate at load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.errors import DataError
from onnxq.graph import is_float_constant, is_standard
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.precision import Bits, Ends, Layer, layer_bits, override_bits
from onnxq.program import Program
from onnxq.rules import MATRICES, RECURRENT
from onnxq.scheme import BYTE, QuantScheme
from onnxq.selection import inside_bodies, skipped_nodes
from onnxq.target import Target

if TYPE_CHECKING:
    from onnxq.recurrent import RecurrentWriter


@dataclass(frozen=True)
class QuantizeRecurrent(Pass):
    """Run LSTMs in integers that quantize their inputs as they run, and store the weights of GRUs and RNNs as codes.

    Attributes:
        weights: scheme of weights, e.g. int8:channel, a channel being a unit of a gate; blocks count as channels.
        override: exceptions, GLOB=BITS or GLOB=float by node name or op type, e.g. LSTM=w8a8.
        first_last: the first and last layers get at least `8` bits, the `same` as the others, or stay `float`.
        skip: node names or op types to leave in float; * and ? match as in file names.
        inputs: `integers` where there is a kernel, or `float` to store the weights of all of them alone.
        small: layers of at most so many weights stay float.
    """

    name: ClassVar[str] = "quantize-recurrent"
    weights: QuantScheme = QuantScheme.parse("int8:channel")
    override: tuple[str, ...] = ()
    first_last: Ends = "8"
    skip: tuple[str, ...] = ()
    inputs: Literal["integers", "float"] = "integers"
    small: int = 2048

    def stored_bits(self) -> frozenset[int]:
        return override_bits(self.override) | {self.weights.bits}

    def run(self, program: Program, ctx: Context) -> PassResult:
        if ctx.target.qdq_only:
            return PassResult()  # it has no casts of codes
        ctx.target.check_bits(self.stored_bits())
        program.floats |= inside_bodies(program.graph, RECURRENT)
        skipped, layers = skipped_nodes(program, self.skip), self._layers(program)
        found = [n for n in program.graph.nodes if n.op in RECURRENT and is_standard(n)]
        if not found:
            return PassResult()
        from onnxq.recurrent import RecurrentWriter  # a part that most models do not need

        writer, scheme = RecurrentWriter(program.graph, ctx.target), _channels(self.weights)
        facts, left = {}, {}
        for node in found:
            layer = layers[node.name]
            reason = skipped.get(node.name) or (layer.why if layer.bits is None else self._refusal(node))
            if layer.bits is None or reason is not None:
                left[node.name] = str(reason)
                continue
            bits, how = self._quantize(writer, node, replace(scheme, bits=layer.bits.weights), ctx.target)
            program.stored[node.name] = how
            program.shelve([node])
            facts[node.name] = f"{bits} ({layer.why})" if layer.why else bits
        program.graph.toposort()
        program.floats |= left
        return PassResult(len(facts), left, {"bits": facts})

    def _layers(self, program: Program) -> Mapping[str, Layer]:
        bits = Bits(self.weights.bits, BYTE if self.inputs == "integers" else None)
        return layer_bits(program, bits, self.override, self.first_last)

    def _refusal(self, node: gs.Node) -> str | None:
        """Why the weights stay float32, None when they need not."""
        if not all(is_float_constant(node.inputs[place]) for place in MATRICES):
            return "its weights are no float32 initializers"
        size = sum(int(np.prod(node.inputs[place].shape)) for place in MATRICES)
        return f"its {size} weights are too few to repay codes" if size <= self.small else None

    def _quantize(
        self, writer: RecurrentWriter, node: gs.Node, scheme: QuantScheme, target: Target
    ) -> tuple[str, str]:
        """Let a layer run on codes, or read them as floats: its widths, and what was done."""
        bits = scheme.bits
        try:
            if self.inputs == "integers" and _has_kernel(node, target):
                writer.integers(node, scheme)
                return f"w{bits}a{BYTE}", f"weights are stored as int{bits} and multiplied in integers"
            writer.floats(node, scheme)
        except DataError as error:
            raise DataError(f"{error} ({node.name!r})") from None
        return f"w{bits}", f"weights are stored as int{bits} and computed in float"


def _has_kernel(node: gs.Node, target: Target) -> bool:
    """Whether the runtime runs the layer in integers."""
    return node.op == "LSTM" and target.contrib and not node.attrs.get("layout", 0)


def _channels(scheme: QuantScheme) -> QuantScheme:
    """The scheme of weights that have a scale for each unit of a gate, or one for all."""
    granularity: Literal["tensor", "channel"] = "tensor" if scheme.granularity == "tensor" else "channel"
    return replace(scheme, signed=True, symmetric=True, granularity=granularity, block=0)
