"""How nodes use their weights: axes of outputs and of sums, and products that are nothing else."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxq.graph import float_values, present, rank

PRODUCTS = ("MatMul", "Gemm")


def output_axis(node: gs.Node) -> int | None:
    """Output-channel axis of the weight; None where it has no axis of its own."""
    if node.op == "ConvTranspose":
        return 1 if node.attrs.get("group", 1) == 1 else None
    if node.op in PRODUCTS:
        return len(node.inputs[1].shape) - 1 - is_transposed(node)
    return 0


def summed_axes(node: gs.Node) -> tuple[int, ...]:
    """Axes of the weight over which rounding errors should cancel: a convolution's kernel, else the inputs."""
    dims = len(node.inputs[1].shape)
    if node.op in PRODUCTS:
        return (dims - 2 + is_transposed(node),)
    is_pointwise = node.op == "Conv" and all(size == 1 for size in node.inputs[1].shape[2:])
    return (1,) if is_pointwise else tuple(range(2, dims))


def is_transposed(node: gs.Node) -> bool:
    """Whether a product multiplies by its matrix transposed; a MatMul does while `onnxq.transposes` says so."""
    return bool(node.attrs.get("transB", 0))


def is_plain_product(node: gs.Node) -> bool:
    """Whether the node is x W, or x W + b with a constant vector b, of a matrix W."""
    if rank(node.inputs[1]) != 2:
        return False
    if node.op == "MatMul":
        return True
    if node.op != "Gemm" or node.attrs.get("transA", 0):
        return False
    if node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("beta", 1.0) != 1.0:
        return False
    bias = present(node, 2)
    if bias is None:
        return True
    values = float_values(bias)
    columns = node.inputs[1].shape[output_axis(node) or 0]
    return values is not None and (values.size == 1 or values.shape in ((columns,), (1, columns)))
