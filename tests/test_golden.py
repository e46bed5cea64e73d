"""The graph that the whole chain makes of a tiny network: what passes hand to each other, and the emitted form."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import ModelProto

from onnxq.data import input_specs, open_data
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program

TEXT = """g (float[n,4,6,6] x) => (float[n,4,6,6] y) {
    c = Conv<pads=[1,1,1,1]>(x, w, b)
    r = Relu(c)
    d = Conv<pads=[1,1,1,1]>(r, v)
    s = Add(d, r)
    y = Relu(s)
}"""


def test_int8_chain(parse_program: Callable[..., Program], golden: Callable[[str, ModelProto], None]) -> None:
    """All numbers are multiples of powers of two, so that every machine chooses the same scales and codes."""
    taps = np.arange(4 * 4 * 9).reshape(4, 4, 3, 3)
    weights = {"w": (taps % 7 - 3) / 8, "v": (taps % 5 - 2) / 4, "b": np.array([0.5, -0.5, 0.0, 1.0])}
    program = parse_program(TEXT, {name: values.astype(np.float32) for name, values in weights.items()})
    x = ((np.arange(2 * 4 * 36) * 5 % 33 - 16) / 8).astype(np.float32).reshape(2, 4, 6, 6)
    data = open_data({"x": x}, input_specs(program.to_model()))
    text = "annotate:small=0 calibrate choose-ranges quantize-weights emit-qdq"
    Pipeline.parse(text).run(program, Context(data=data, threads=1))
    golden("int8_chain", program.to_model())
