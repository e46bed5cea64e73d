"""Skip patterns, and reasons of nodes that no pass took."""

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from onnx import parser

from onnxq.errors import UsageError
from onnxq.program import Program, Unit
from onnxq.selection import added_vector, inside_bodies, matching_nodes, note_floats, skipped_nodes


def program(body: str) -> Program:
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": 17]> g {body}')
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return Program.from_model(model)


CHAIN = (
    "(float[N] x, int64[N] i) => (float[N] z, int64[N] j) { a = Relu(x) b = Exp(a) z = Relu(b) j = Neg(i) }"
)


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ((), set()),
        (("Relu",), {"Relu_0", "Relu_2"}),
        (("Relu_0",), {"Relu_0"}),
        (("*_2", "Exp"), {"Relu_2", "Exp_1"}),
        (("Ne?_3",), {"Neg_3"}),
    ],
)
def test_patterns_match_names_and_op_types(patterns: tuple[str, ...], names: set[str]) -> None:
    assert set(skipped_nodes(program(CHAIN), patterns)) == names


def test_a_pattern_matches_behind_any_slash_of_a_path() -> None:
    made = program(CHAIN)
    paths = {
        "Relu_0": "/layer1/layer1.0/conv1/Relu",
        "Exp_1": "/layer1/layer1.10/Exp",
        "Neg_3": "/xlayer1.0/Neg",
    }
    for node in made.graph.nodes:
        node.name = paths.get(node.name, node.name)
    assert matching_nodes(made, "layer1.*", "pattern") == {paths["Relu_0"], paths["Exp_1"]}
    assert matching_nodes(made, "layer1.0/*", "pattern") == {paths["Relu_0"]}
    assert matching_nodes(made, "conv1/Relu", "pattern") == {paths["Relu_0"]}
    assert matching_nodes(made, "/*", "pattern") == set(paths.values())


def test_a_pattern_is_not_matched_against_part_of_an_op_type() -> None:
    with pytest.raises(UsageError, match=r"skip pattern 'Rel\?' matches no node name and no op type"):
        skipped_nodes(program(CHAIN), ("Rel?",))


def test_a_mistyped_pattern_names_its_neighbour() -> None:
    with pytest.raises(UsageError, match="did you mean 'Relu'"):
        skipped_nodes(program(CHAIN), ("Rellu",))


def test_only_float_nodes_of_the_source_without_a_fate_get_a_reason() -> None:
    made = program(CHAIN)
    made.units["Relu_0"] = Unit("Relu", ("Relu_0",), ("x",), ("a",))
    made.floats["Exp_1"] = "known before"
    made.graph.nodes.append(
        gs.Node("Relu", "new", inputs=[made.graph.inputs[0]], outputs=[gs.Variable("n", "float32")])
    )
    note_floats(made, lambda node: f"left: {node.op}")
    assert made.floats == {"Exp_1": "known before", "Relu_2": "left: Relu"}


def test_nodes_inside_bodies_name_their_owner() -> None:
    made = program(
        "(bool c, float[N] x) => (float[N] y) { y = If (c) <then_branch = t () => (float[N] p) { [inner] p = Relu(x) },"
        " else_branch = e () => (float[N] q) { [other] q = Exp(x) } > }"
    )
    assert inside_bodies(made.graph, ("Relu",)) == {"inner": "inside a body of If node 'If_0'"}


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.ones(4, np.float32), True),
        (np.ones(1, np.float32), False),
        (np.ones((1, 4), np.float32), False),
        (np.ones(4), False),
    ],
)
def test_a_bias_is_a_float_vector_of_its_size(values: NDArray[Any], found: bool) -> None:
    data, other = gs.Variable("x", "float32"), gs.Constant("b", values)
    for inputs in ([data, other], [other, data]):
        assert (added_vector(gs.Node("Add", inputs=inputs), data, 4) is other) == found
        assert added_vector(gs.Node("Mul", inputs=inputs), data, 4) is None
