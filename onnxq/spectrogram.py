"""Spectrograms in front of a network that listens.

A Fourier transform, as a convolution or product by its waves, perhaps a product by a filter bank, and a logarithm, behind which
the network begins. What is quiet is far below a step of the largest value, and the logarithm makes it matter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs

from onnxq.graph import is_constant, is_standard

LAYERS = ("Conv", "Gemm", "MatMul")
FRONT = 2  # layers one behind the other; logarithms deep in a network, as of boxes, have more


@dataclass(frozen=True)
class _Path:
    """What a tensor has come through.

    Attributes:
        depth: layers one behind the other.
        layers: all of them by name.
        heard: those of them whose result went through a logarithm on the way.
    """

    depth: int = 0
    layers: frozenset[str] = frozenset()
    heard: frozenset[str] = frozenset()

    def then(self, layer: str) -> _Path:
        """The path through one more layer, for which logarithms begin anew."""
        return _Path(self.depth + 1, self.layers | {layer})


def spectrogram_layers(graph: gs.Graph) -> set[str]:
    """Names of the first layers whose result goes through a logarithm before it gets to further layers; nodes are in order."""
    paths: dict[str, _Path] = {}
    found: set[str] = set()
    for node in graph.nodes:
        path = _joined(paths.get(tensor.name, _Path()) for tensor in node.inputs)
        if node.op in LAYERS and is_standard(node) and any(map(is_constant, node.inputs)):
            found |= path.heard
            path = path.then(node.name)
        elif node.op == "Log" and is_standard(node):
            path = replace(path, heard=path.heard | path.layers)
        paths |= {tensor.name: path for tensor in node.outputs}
    return found


def _joined(paths: Iterable[_Path]) -> _Path:
    """The path of what is computed from several tensors; its layers are forgotten once more than FRONT are in a row."""
    result = _Path()
    for path in paths:
        depth = max(result.depth, path.depth)
        layers = result.layers | path.layers if depth <= FRONT else frozenset[str]()
        result = _Path(depth, layers, result.heard | path.heard)
    return result
