"""A detector that picks boxes itself: how many there are follows from values, in float otherwise than in integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

import onnxq
from onnxq.errors import ModelError
from onnxq.model.session import make_session

DETECTOR = """g (float[1,3,32,32] x) => (int64[K,3] picked, float[K,4] chosen, float[1,64,4] boxes) {
    a = Conv<pads=[1,1,1,1],strides=[2,2]>(x, first) b = Relu(a)
    c = Conv<pads=[1,1,1,1],strides=[2,2]>(b, second) d = Relu(c)
    place = Conv(d, third) flat = Reshape(place, of_places) corner = Transpose<perm=[0,2,1]>(flat)
    other = Add(corner, size) boxes = Concat<axis=2>(corner, other)
    raw = Conv(d, fourth) sure = Sigmoid(raw) scores = Reshape(sure, of_scores)
    picked = NonMaxSuppression(boxes, scores, most, overlap, least)
    rows = Gather<axis=1>(picked, last) list = Reshape(boxes, of_boxes) chosen = Gather(list, rows) }"""


@pytest.fixture(scope="module")
def detector(parse_model: Callable[..., ModelProto]) -> ModelProto:
    rng = np.random.default_rng(0)
    shapes = {
        "first": (16, 3, 3, 3),
        "second": (32, 16, 3, 3),
        "third": (2, 32, 1, 1),
        "fourth": (2, 32, 1, 1),
    }
    weights: dict[str, Any] = {
        name: (rng.standard_normal(shape) * (1.5 / np.prod(shape[1:])) ** 0.5).astype(np.float32)
        for name, shape in shapes.items()
    }
    weights |= {
        "of_places": np.array([1, 2, 64]),
        "of_scores": np.array([1, 2, 64]),
        "of_boxes": np.array([64, 4]),
    }
    weights |= {"most": np.array([20]), "last": np.int64(2), "size": np.float32(1)}
    weights |= {"overlap": np.array([0.5], np.float32), "least": np.array([0.55], np.float32)}
    return parse_model(DETECTOR, weights, 17)


@pytest.fixture(scope="module")
def samples() -> Mapping[str, NDArray[np.float32]]:
    return {"x": np.random.default_rng(1).standard_normal((48, 3, 32, 32)).astype(np.float32)}


@pytest.mark.parametrize(
    (
        "options",
        "least_db",
    ),  # dB of the boxes among which it picks: a few below what was measured, as kernels round otherwise
    [
        ({}, 30.0),
        ({"bits": "w4a8"}, 20.0),
        ({"layers": True}, 30.0),
        ({"min_sqnr": 20.0}, 20.0),
        ({"bits": "w4a4", "ranges": "lapq", "search_budget": "20"}, 18.0),
    ],
    ids=str,
)
def test_it_compiles_and_says_what_was_not_compared(
    options: dict[str, Any],
    least_db: float,
    detector: ModelProto,
    samples: Mapping[str, NDArray[np.float32]],
) -> None:
    done = onnxq.compile_model(detector, samples, speed=False, threads=1, **options)
    pair = [make_session(model, threads=1) for model in (detector, done.model)]
    counts = [[len(s.run(["picked"], {"x": x[None]})[0]) for x in samples["x"]] for s in pair]
    apart = sum(a != b for a, b in zip(*counts, strict=True))
    assert apart > 0  # else the test shows nothing
    notes = [w for w in done.report.warnings if "follows from values" in w]
    assert len(notes) == 2
    assert all(f"differs in {apart} of 48 samples" in note for note in notes)
    difference = done.report.difference
    assert difference is not None
    assert difference.main is not None
    assert (difference.main.sqnr_db or 0.0) > least_db


@dataclass(frozen=True)
class Halve(onnxq.Pass):
    """Leaves out every other entry of an output, which a pass must not."""

    name: ClassVar[str] = "halve"

    def run(self, program: onnxq.Program, ctx: onnxq.Context) -> onnxq.PassResult:
        (relu,) = (node for node in program.graph.nodes if node.op == "Relu")
        whole = gs.Variable("whole", np.float32, relu.outputs[0].shape)
        bounds = [gs.Constant(f"bound{i}", np.array([v])) for i, v in enumerate((0, 9, 1, 2))]
        half = gs.Node("Slice", inputs=[whole, *bounds], outputs=list(relu.outputs))
        relu.outputs = [whole]
        program.graph.nodes.append(half)
        return onnxq.PassResult(1)


def test_a_shape_that_follows_from_the_inputs_must_stay(parse_model: Callable[..., ModelProto]) -> None:
    model = parse_model("g (float[N,8] x) => (float[N,8] y) { y = Relu(x) }", {}, 17)
    steps = onnxq.Pipeline((Halve(),))
    with pytest.raises(ModelError, match="output 'y' of the compiled model has another shape than in float"):
        onnxq.compile_model(model, {"x": np.ones((4, 8), np.float32)}, pipeline=steps, speed=False)
