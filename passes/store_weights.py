"""Store weights as codes of 2 to 8 bits and compute in float.

- Products with matrices hold them in blocks, each with its own scale, and run as MatMulNBits, which reads 2, 4 or 8 bits as they
  are; its accuracy level is pinned. A target without onnxruntime's own operators gets DequantizeLinear in blocks.
- Other widths, convolutions, and products with a scale for each channel get `Cast(codes) * scale`, which onnxruntime turns into
  floats when it loads the model (it does not fold DequantizeLinear, which would run with every inference).
- Embedding tables are looked up as codes of 8 or 4 bits, and only the rows found become float.

Where a scale belongs to a channel, rounding errors are made to cancel within each kernel: without data no bias correction
undoes the shift of the mean that they cause. With data, convolutions below 8 bits are rounded by the errors at their outputs,
unless they reduce over too many values (`onnxq.stored_codes`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.affine import quantize
from onnxq.blocks import quantize_blocks
from onnxq.errors import DataError, UsageError
from onnxq.graph import Uses, float_values, is_constant, is_float_constant, is_standard
from onnxq.nbits import ACCURACIES, INT8, has_kernel, kernel_block
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.precision import Bits, Ends, Layer, layer_bits, override_bits
from onnxq.program import Program, QuantDecision
from onnxq.quantizers import weight_params
from onnxq.rules import RECURRENT, WEIGHTED
from onnxq.scheme import BYTE, QuantScheme
from onnxq.selection import note_floats, skipped_nodes, writes_float32
from onnxq.stored_codes import fitted_codes
from onnxq.table_storage import TableWriter
from onnxq.target import Target
from onnxq.transposes import absorb_transposes, restore_transposes
from onnxq.weight_axes import is_plain_product, is_transposed, output_axis, summed_axes
from onnxq.weights import balanced_codes, peak_params

NO_DATA = "there is no calibration data"
NO_WEIGHTS = "only weights are stored as integers"
TABLE_BITS = 4  # the fewest that a table takes
BALANCED = 1 << 23  # weights; sorting the rounding errors of more would take seconds

Kind = tuple[str, int | None]
Sites = dict[tuple[str, Kind], list[gs.Node]]  # by name of the weight and by form


@dataclass(frozen=True)
class StoreWeights(Pass):
    """Store weights of layers that compute in float as codes of 2 to 8 bits, and embedding tables in 4 or 8 bits.

    Attributes:
        weights: scheme, e.g. int8:channel or int4:block=32. Blocks are those of products; convolutions then have a scale for each
            output channel, tables one for each block of a row.
        override: exceptions, GLOB=BITS or GLOB=float by node name or op type, e.g. lm_head=w8.
        first_last: the first and last layers get at least `8` bits, the `same` as the others, or stay `float`.
        skip: node names or op types to leave in float; * and ? match as in file names.
        accuracy: accuracy level of MatMulNBits: 4 computes with int8 inputs, 1 and 0 with float ones, which only 4 bits do fast.
        search: try a few grids on each block instead of the one that its largest value asks for.
        few: layers of at most so many weights get at least 8 bits, unless an override names them, and no blocks.
        small: weights of fewer elements than this stay float32.
        small_table: the same for tables.
    """

    name: ClassVar[str] = "store-weights"
    weights: QuantScheme = QuantScheme.parse("int8:channel")
    override: tuple[str, ...] = ()
    first_last: Ends = "8"
    skip: tuple[str, ...] = ()
    accuracy: int = INT8
    search: bool = True
    few: int = 2048
    small: int = 256
    small_table: int = 4096

    def stored_bits(self) -> frozenset[int]:
        widths = override_bits(self.override) | {self.weights.bits}
        return widths | {TABLE_BITS} if min(widths) < TABLE_BITS else widths

    def run(self, program: Program, ctx: Context) -> PassResult:
        self._check(ctx.target)
        absorb_transposes(program.graph)
        layers = self._layers(program)
        sites = self._sites(program, layers)
        fitted = self._fitted(program, ctx, sites, layers)
        uses, writer = Uses(program.graph), TableWriter(program.graph, ctx.target, self.search)
        facts = {}
        for done, ((weight, kind), nodes) in enumerate(sites.items()):
            ctx.progress("storing weights", done, len(sites))
            reason = _conflict(uses, nodes, sites)
            if reason is not None:
                program.floats |= {n.name: reason for n in nodes}
                continue
            before = len(program.graph.nodes)
            scheme = self._scheme(nodes, layers)
            try:
                how, bits = self._store(writer, nodes, kind, scheme, fitted.get(weight))
            except DataError as error:
                raise DataError(f"{error} ({weight!r})") from None
            program.shelve([*nodes, *program.graph.nodes[before:]])
            for node in nodes:
                program.stored[node.name] = _because(how, program.floats.pop(node.name, None))
                facts[node.name] = f"w{bits} ({why})" if (why := layers[node.name].why) else f"w{bits}"
        restore_transposes(program.graph, writer)
        program.graph.toposort()
        note_floats(program, lambda node: NO_WEIGHTS)
        return PassResult(len(program.stored), dict(program.floats), {"bits": facts})

    def _scheme(self, nodes: Sequence[gs.Node], layers: Mapping[str, Layer]) -> QuantScheme:
        """Of a weight that the nodes read: the widest that any of them asks for."""
        bits = max(b.weights for n in nodes if (b := layers[n.name].bits) is not None)
        return replace(self.weights, bits=bits)

    def _fitted(
        self, program: Program, ctx: Context, sites: Sites, layers: Mapping[str, Layer]
    ) -> dict[str, QuantDecision]:
        """Codes that calibration samples choose, by weight."""
        found = {
            weight: (nodes, _channels(nodes[0], self._scheme(nodes, layers)))
            for (weight, (form, _)), nodes in sites.items()
            if form == "layer"
        }
        return fitted_codes(program, ctx, found)

    def _layers(self, program: Program) -> dict[str, Layer]:
        """Widths by node name; layers of few weights are little of the file, and rounding those costs as much as others' does."""
        layers = layer_bits(program, Bits(self.weights.bits), self.override, self.first_last)
        for node in program.graph.nodes:
            if not _has_form(node) or not is_float_constant(_weight(node)):
                continue
            bits, size = layers[node.name].bits, _size(node)
            if layers[node.name].why or bits is None or node.op == "Gather" or size > self.few:
                continue
            if bits.weights < BYTE:
                layers[node.name] = Layer(bits.at_least(BYTE), f"it has only {size} weights")
        return layers

    def _check(self, target: Target) -> None:
        target.check_without_ranges()
        if self.weights.granularity != "block":
            target.check_weights(self.weights)
        target.check_bits(self.stored_bits())
        if self.accuracy not in ACCURACIES:
            raise UsageError(
                f"MatMulNBits has the accuracy levels {', '.join(map(str, ACCURACIES))}, not {self.accuracy}"
            )

    def _sites(self, program: Program, layers: dict[str, Layer]) -> Sites:
        """Nodes whose weights can be stored; the reasons of the others are noted."""
        skipped = skipped_nodes(program, self.skip)
        sites: Sites = {}
        for node in program.graph.nodes:
            if not _has_form(node):
                continue
            layer = layers[node.name]
            reason = skipped.get(node.name) or (layer.why if layer.bits is None else self._refusal(node))
            if reason is None:
                sites.setdefault((_weight(node).name, _kind(node)), []).append(node)
            elif program.floats.get(node.name, NO_DATA) == NO_DATA and writes_float32(node):
                program.floats[node.name] = reason
        return sites

    def _refusal(self, node: gs.Node) -> str | None:
        """Why the node's weights stay float32, None when they need not."""
        weight = _weight(node)
        if not is_float_constant(weight):
            return "its weights are no float32 initializer"
        if len(weight.shape) < 2:
            return "its weights are a vector"
        size = _size(node)
        if node.op != "Gather":
            few = size < self.small
            return f"its {size} weights are too few to repay the extra nodes" if few else None
        if size < self.small_table:
            return f"its table of {size} values is too small to repay the conversion of its rows"
        is_lookup = (
            len(weight.shape) == 2 and node.attrs.get("axis", 0) == 0 and not is_constant(node.inputs[1])
        )
        return None if is_lookup else "it is no embedding lookup (rows of a matrix)"

    def _store(
        self,
        writer: TableWriter,
        nodes: list[gs.Node],
        kind: Kind,
        scheme: QuantScheme,
        fitted: QuantDecision | None,
    ) -> tuple[str, int]:
        """Let the nodes read codes, the fitted ones if there are; what was done and the bits of a code."""
        form, axis = kind
        if form == "table":
            bits = writer.store_table(nodes, scheme)
            return f"its table is stored in {bits} bits and the rows that are looked up become float", bits
        if form == "product" and scheme.granularity == "block" and _size(nodes[0]) > self.few:
            assert axis is not None
            return self._store_blocks(writer, nodes, axis, scheme), scheme.bits
        self._store_channels(writer, nodes, scheme, fitted)
        return f"weights are stored as int{scheme.bits} and computed in float", scheme.bits

    def _store_blocks(self, writer: TableWriter, nodes: list[gs.Node], axis: int, scheme: QuantScheme) -> str:
        """Codes in blocks along the inputs of products."""
        weight, bits = _weight(nodes[0]), scheme.bits
        values = float_values(weight)
        assert values is not None
        contrib = writer.target.contrib
        block = kernel_block(scheme.block, values.shape[axis]) if contrib else scheme.block
        codes = quantize_blocks(values, axis, bits, block, symmetric=scheme.symmetric, search=self.search)
        stored = f"weights are stored as {scheme}"
        if contrib and has_kernel(bits, block, self.accuracy):
            writer.kernel(nodes, weight, codes, block, self.accuracy)
            inputs = "inputs quantized to int8 as it runs" if self.accuracy == INT8 else "float inputs"
            return f"{stored} and multiplied by MatMulNBits with {inputs}"
        is_whole = values.shape[axis] % block == 0  # OpenVINO takes no others
        if not contrib and is_whole and writer.takes_blocked(bits):
            writer.blocked(nodes, weight, codes)
            return f"{stored} and become float as the model runs"
        writer.folded_blocks(nodes, weight, codes)
        return f"{stored} and computed in float"

    def _store_channels(
        self, writer: TableWriter, nodes: list[gs.Node], scheme: QuantScheme, fitted: QuantDecision | None
    ) -> None:
        """Codes with a scale for each output channel, or one for all."""
        weight, plain = _weight(nodes[0]), _channels(nodes[0], scheme)
        axis = None if plain.granularity == "tensor" else output_axis(nodes[0])
        values = float_values(weight)
        assert values is not None
        if fitted is not None and fitted.params is not None and fitted.codes is not None:
            params, codes = fitted.params, fitted.codes
        else:
            is_byte = plain.bits == BYTE
            params = (
                weight_params("minmax", values, axis, plain) if is_byte else peak_params(values, axis, plain)
            )
            few = values.size <= BALANCED
            codes = balanced_codes(values, params, summed_axes(nodes[0])) if few else quantize(values, params)
        writer.folded(nodes, weight, codes, params.broadcast(params.scale, values.ndim), plain.bits)


def _has_form(node: gs.Node) -> bool:
    """Whether the node's weights are for this pass; recurrent layers have one of their own."""
    return node.op in WEIGHTED and node.op not in RECURRENT and is_standard(node)


def _channels(node: gs.Node, scheme: QuantScheme) -> QuantScheme:
    """The scheme of weights that have a scale for each output channel, or one for all."""
    whole = scheme.granularity == "tensor" or output_axis(node) is None
    return replace(scheme, signed=True, symmetric=True, granularity="tensor" if whole else "channel", block=0)


def _weight(node: gs.Node) -> gs.Tensor:
    return node.inputs[WEIGHTED[node.op]]


def _size(node: gs.Node) -> int:
    """Number of weights of a node whose weights are an initializer."""
    return int(np.prod(_weight(node).shape))


def _kind(node: gs.Node) -> Kind:
    """What decides how a weight can be stored, with the axis of its blocks or channels."""
    if node.op == "Gather":
        return "table", None
    if is_plain_product(node):
        return "product", int(is_transposed(node))
    return "layer", output_axis(node)


def _conflict(uses: Uses, nodes: Sequence[gs.Node], sites: Sites) -> str | None:
    """Why weights that these nodes read must stay float32, None when they need not: a form for each of its readers will do."""
    weight = _weight(nodes[0])
    storable = [node for (name, _), found in sites.items() if name == weight.name for node in found]
    others = [n.name for n in uses.readers(weight) if not any(n is known for known in storable)]
    if not others and not uses.escapes(weight):
        return None
    where = f"by node {others[0]!r}" if others else "outside the graph's own nodes"
    return f"its weights {weight.name!r} are needed in float32 {where}"


def _because(how: str, reason: str | None) -> str:
    return how if reason is None else f"{how}: {reason}"
