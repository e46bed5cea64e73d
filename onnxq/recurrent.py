"""Weights of recurrent layers as codes, for a kernel that multiplies by them and for kernels that compute in float.

ONNX stores them as W (D, G H, I) and R (D, G H, H): D directions, G gates of H units, I inputs. onnxruntime's DynamicQuantizeLSTM
takes them transposed, with a scale for each unit of each gate, and quantizes x and the state as it runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.graph import CONTRIB, float_values, present
from onnxq.quantizers import method_for
from onnxq.rules import MATRICES
from onnxq.saturation import pair_limit
from onnxq.scheme import QuantScheme
from onnxq.target import Target
from onnxq.weight_storage import WeightWriter
from onnxq.weights import quantized_weight

KERNEL_INPUTS = 8  # of an LSTM: X, W, R, B, lengths, both states, peepholes; then come scales and zero points

Codes = NDArray[np.integer[Any]]


class RecurrentWriter(WeightWriter):
    """Writes the weights of recurrent layers into a graph as codes; those that several layers share are stored once."""

    def __init__(self, graph: gs.Graph, target: Target) -> None:
        super().__init__(graph, target)
        self._limit = pair_limit() if target.pair_limit else 0
        self._stored: dict[tuple[str, int], tuple[gs.Tensor, gs.Tensor]] = {}

    def integers(self, node: gs.Node, scheme: QuantScheme) -> None:
        """Turn an LSTM into onnxruntime's DynamicQuantizeLSTM.

        Raises:
            DataError: a weight is NaN or infinite.
        """
        inputs = [present(node, i) or gs.Variable.empty() for i in range(KERNEL_INPUTS)]
        for place in MATRICES:
            codes, scale = self._transposed(inputs[place], scheme)
            zeros = self.constant(f"{scale.name}_zero_point", np.zeros(scale.shape, np.int8))
            inputs[place] = codes
            inputs += [scale, zeros]
        node.op, node.domain, node.inputs = "DynamicQuantizeLSTM", CONTRIB, inputs
        node.attrs.pop("layout", None)  # 0, the only one that the kernel has

    def floats(self, node: gs.Node, scheme: QuantScheme) -> None:
        """Let a recurrent layer read codes times scale.

        Raises:
            DataError: a weight is NaN or infinite.
        """
        for place in MATRICES:
            weight = node.inputs[place]
            codes, scale = _codes(weight, scheme, 0)
            self.folded([node], weight, codes, scale[..., None], scheme.bits)

    def _transposed(self, weight: gs.Tensor, scheme: QuantScheme) -> tuple[gs.Tensor, gs.Tensor]:
        """Codes (D, I, G H) and scales (D, G H)."""
        key = weight.name, scheme.bits
        if key not in self._stored:
            codes, scale = _codes(weight, scheme, self._limit)
            turned = np.ascontiguousarray(codes.transpose(0, 2, 1))
            self._stored[key] = (
                self.packer.tensor(f"{weight.name}_quantized", turned, scheme.bits),
                self.constant(f"{weight.name}_scale", scale),
            )
        return self._stored[key]


def _codes(weight: gs.Tensor, scheme: QuantScheme, limit: int) -> tuple[Codes, NDArray[np.float32]]:
    """Codes int8 (D, G H, I) and scales (D, G H) of W or R; pairs of codes stay within the limit, 0 for none."""
    values = float_values(weight)
    assert values is not None
    rows = values.reshape(-1, values.shape[-1])
    params, codes, _ = quantized_weight(rows, "Gemm", 0, scheme, limit, method_for("auto", scheme))
    scale = np.broadcast_to(params.scale, len(rows)).reshape(values.shape[:2])
    return codes.reshape(values.shape), np.ascontiguousarray(scale)
