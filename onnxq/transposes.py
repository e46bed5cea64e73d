"""Weights that stand behind a Transpose, as exporters leave them: MatMul(x, Transpose(W)).

While a pass works on them they are x W^T like a Gemm's: the MatMul reads W itself and has the attribute `transB`, which ONNX does
not give it. What still has it afterwards gets its Transpose back.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxq.graph import NodeWriter, Uses, is_float_constant, is_standard, producer, rank, remove_node

TRANSPOSED = "transB"


def absorb_transposes(graph: gs.Graph) -> None:
    """Let each MatMul read the float32 matrix that a Transpose stands in front of; Transposes that nobody reads go."""
    absorbed: dict[int, gs.Node] = {}
    for node in graph.nodes:
        if node.op != "MatMul" or not is_standard(node):
            continue
        source = producer(node.inputs[1])
        if source is None or not _is_transposed_matrix(source):
            continue
        node.inputs[1] = source.inputs[0]
        node.attrs[TRANSPOSED] = 1
        absorbed[id(source)] = source
    uses = Uses(graph)
    for source in absorbed.values():
        if not uses.readers(source.outputs[0]) and not uses.escapes(source.outputs[0]):
            remove_node(graph, source)


def restore_transposes(graph: gs.Graph, writer: NodeWriter) -> None:
    """Put a Transpose in front of each MatMul that is still marked, one for each matrix."""
    restored: dict[int, gs.Variable] = {}
    for node in list(graph.nodes):
        if node.op != "MatMul" or not node.attrs.pop(TRANSPOSED, 0):
            continue
        matrix = node.inputs[1]
        if id(matrix) not in restored:
            name, shape = f"{matrix.name}_transposed", list(matrix.shape)[::-1]
            restored[id(matrix)] = writer.variable(name, matrix.dtype, shape)
            writer.append("Transpose", matrix.name, [matrix], restored[id(matrix)], {"perm": [1, 0]})
        node.inputs[1] = restored[id(matrix)]


def _is_transposed_matrix(node: gs.Node) -> bool:
    if node.op != "Transpose" or not is_standard(node):
        return False
    matrix = node.inputs[0]
    return is_float_constant(matrix) and rank(matrix) == 2 and node.attrs.get("perm", [1, 0]) == [1, 0]
