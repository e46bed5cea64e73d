"""A fourth channel of zeros changes no bit, and stands only in front of convolutions that gain by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from onnxq.data import input_specs, open_data
from onnxq.model.session import make_session, session_and_optimized
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program
from onnxq.target import ORT_CPU

Array = NDArray[Any]
ParseProgram = Callable[..., Program]


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


W = normal(1, 16, 3, 3, 3)
X = {"x": normal(0, 10, 3, 9, 8) + np.float32(0.3)}


def emitted(
    program: Program,
    feeds: Mapping[str, Array] = X,
    *,
    pad: bool = True,
    form: str = "emit-qdq",
    context: Context = Context(),  # noqa: B008
) -> tuple[ModelProto, int]:
    """The model with or without the pass, and the number of convolutions that it changed."""
    data = open_data(feeds, input_specs(program.source))
    passes = f"annotate:small=0 calibrate choose-ranges quantize-weights correct-bias {'pad-channels ' if pad else ''}{form}"
    steps = Pipeline.parse(passes).run(program, replace(context, data=data, threads=1))
    model = program.to_model()
    onnx.checker.check_model(model, full_check=True)
    return model, sum(s.result.changed for s in steps if s.name == "pad-channels")


def outputs(model: ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    found: list[Array] = make_session(model, threads=1).run(None, dict(feeds))
    return found


CASES: dict[str, tuple[str, dict[str, Array]]] = {
    "Conv": ("y = Conv(x, w)", {"w": W}),
    "with bias, pads and strides": (
        "c = Conv<pads=[1,1,1,1],strides=[2,2]>(x, w, b) y = Relu(c)",
        {"w": W, "b": normal(2, 16)},
    ),
    "auto_pad": ('y = Conv<auto_pad="SAME_UPPER">(x, w)', {"w": W}),
    "kernel_shape and dilations": ("y = Conv<kernel_shape=[3,3],dilations=[2,2]>(x, w)", {"w": W}),
    "second reader of the input": ("y = Conv(x, w) z = Tanh(x)", {"w": W}),
    "behind codes": ("c = Conv(x, v) y = Conv(c, w)", {"w": W, "v": normal(2, 3, 3, 3, 3)}),
    "two readers": ("y = Conv(x, w) z = Conv(x, v)", {"w": W, "v": normal(2, 17, 3, 5, 5)}),
}


@pytest.mark.parametrize("form", ["emit-qdq", "emit-integer"])
@pytest.mark.parametrize("case", CASES)
def test_the_result_is_the_same_to_the_bit(case: str, form: str, parse_program: ParseProgram) -> None:
    body, weights = CASES[case]
    more = ", float[N,s,t,u] z" if " z = " in body else ""
    text = f"g (float[N,3,9,8] x) => (float[N,o,p,q] y{more}) {{ {body} }}"
    plain, none = emitted(parse_program(text, weights, 17), pad=False, form=form)
    padded, count = emitted(parse_program(text, weights, 17), form=form)
    assert none == 0
    assert count == (2 if case == "two readers" else 1)
    for before, after in zip(outputs(plain, X), outputs(padded, X), strict=True):
        np.testing.assert_array_equal(after, before)
    found = session_and_optimized(padded, threads=1)[1]
    kinds = [n.op_type for n in found.graph.node]
    assert kinds.count("QLinearConv") == len([n for n in body.split() if n.startswith("Conv")])
    stored = [numpy_helper.to_array(t) for t in padded.graph.initializer]
    wide = [v for v in stored if v.dtype == np.int8 and v.ndim == 4 and v.shape[1] == 4]
    assert len(wide) == count
    assert not any(v[:, 3].any() for v in wide)  # a word of them must not fill 16 bits


@pytest.mark.parametrize(
    ("shape", "kernel"), [((10, 3, 30), (16, 3, 5)), ((4, 3, 6, 7, 5), (16, 3, 3, 3, 3))]
)
def test_convolutions_of_other_ranks(
    shape: tuple[int, ...], kernel: tuple[int, ...], parse_program: ParseProgram
) -> None:
    dims = ",".join(map(str, shape[1:]))
    text = f"g (float[N,{dims}] x) => (float[N,{','.join('opqr'[: len(shape) - 1])}] y) {{ y = Conv(x, w) }}"
    feeds, weights = {"x": normal(0, *shape)}, {"w": normal(1, *kernel)}
    plain, _ = emitted(parse_program(text, weights, 17), feeds, pad=False)
    padded, count = emitted(parse_program(text, weights, 17), feeds)
    assert count == 1
    np.testing.assert_array_equal(outputs(padded, feeds)[0], outputs(plain, feeds)[0])


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("y = Conv(x, w) z = Conv(x, w)", {"w": W}),  # shared weights, which would be stored twice
        ("y = Conv(x, w)", {"w": normal(1, 15, 3, 3, 3)}),  # few outputs
        ("y = Conv<group=3>(x, w)", {"w": normal(1, 18, 1, 3, 3)}),
        ("c = Conv(x, v) y = Conv(c, w)", {"v": normal(1, 4, 3, 1, 1), "w": normal(2, 16, 4, 3, 3)}),
        ("y = MatMul(x, w)", {"w": normal(1, 8, 16)}),
    ],
)
def test_convolutions_that_would_not_gain_are_left(
    body: str, weights: Mapping[str, Array], parse_program: ParseProgram
) -> None:
    more = ", float[N,s,t,u] z" if " z = " in body else ""
    text = f"g (float[N,3,9,8] x) => (float[N,o,p,q] y{more}) {{ {body} }}"
    plain, _ = emitted(parse_program(text, weights, 17), pad=False)
    padded, count = emitted(parse_program(text, weights, 17))
    assert count == 0
    assert padded == plain


def test_a_convolution_that_stays_float_is_left(parse_program: ParseProgram) -> None:
    program = parse_program(
        "g (float[N,3,9,8] x) => (float[N,16,7,6] y) { [here] y = Conv(x, w) }", {"w": W}, 17
    )
    program.floats["here"] = "it is to stay"
    assert emitted(program)[1] == 0


def test_a_target_that_does_not_gain_pads_nothing(parse_program: ParseProgram) -> None:
    program = parse_program("g (float[N,3,9,8] x) => (float[N,16,7,6] y) { y = Conv(x, w) }", {"w": W}, 17)
    assert emitted(program, context=Context(target=replace(ORT_CPU, pads_channels=False)))[1] == 0
