"""Write the plan into the graph as QuantizeLinear and DequantizeLinear around the float nodes (the QDQ form).

Runtimes match DequantizeLinear -> node -> QuantizeLinear and run it as one integer kernel. What onnxruntime needs for that is in
`onnxq.emission`: an explicit zero point on every weight, an int32 bias whose scale is input scale times weight scale, and
nodes that only move values working on the codes themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxq.emission import write_qdq
from onnxq.measure.tensors import tensor_rows
from onnxq.pipeline import Context, Pass, PassResult
from onnxq.program import Program


@dataclass(frozen=True)
class EmitQDQ(Pass):
    """Write the plan as QuantizeLinear/DequantizeLinear pairs, which runtimes fuse into integer kernels."""

    name: ClassVar[str] = "emit-qdq"

    def run(self, program: Program, ctx: Context) -> PassResult:
        tensors = tensor_rows(program)
        write_qdq(program, ctx.target)
        return PassResult(len(program.units), facts={"tensors": tensors})
