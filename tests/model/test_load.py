"""Files that are damaged, missing or hostile, external data, and the digest."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, external_data_helper, helper, numpy_helper, parser

from onnxq.errors import ModelError
from onnxq.model.disk import file_of
from onnxq.model.load import check_model, load_model, model_digest
from onnxq.model.prepare import prepare
from onnxq.model.skeleton import model_bytes
from onnxq.model.tensors import in_memory, storage_bytes

WEIGHT = np.arange(2048, dtype=np.float32)  # larger than what a skeleton keeps


def small_model() -> ModelProto:
    model: ModelProto = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[2048] x) => (float[2048] y) { y = Add(x, w) }'
    )
    model.graph.initializer.append(numpy_helper.from_array(WEIGHT, "w"))
    return model


def saved(folder: Path, model: ModelProto) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def externalized(folder: Path, *, location: str = "w.bin", offset: str = "0", length: str = "8192") -> Path:
    model = small_model()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=value)
    return saved(folder, model)


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message
    assert not message.endswith(".")
    return message


def test_a_model_is_read(tmp_path: Path) -> None:
    assert load_model(saved(tmp_path, small_model())) == small_model()


def test_files_that_hold_no_model(tmp_path: Path) -> None:
    def written(data: bytes) -> Path:
        (tmp_path / "m.onnx").write_bytes(data)
        return tmp_path / "m.onnx"

    whole = small_model().SerializeToString()
    assert "there is no model file" in refusal(tmp_path / "none.onnx")
    assert "there is no model file" in refusal(tmp_path / "none" / "m.onnx")
    assert "is a directory" in refusal(tmp_path)
    assert "is empty" in refusal(written(b""))
    assert "not an ONNX model" in refusal(written(b"hello, world\n" * 40))
    assert "not an ONNX model" in refusal(written(numpy_helper.from_array(WEIGHT, "w").SerializeToString()))
    assert "truncated" in refusal(written(whole[: len(whole) // 2]))
    assert "not UTF-8" in refusal(written(whole.replace(b"Add", b"A\xffd")))


def test_a_device_is_not_read() -> None:
    assert "not a regular file" in refusal(Path(os.devnull))


def test_a_name_that_no_file_can_have() -> None:
    assert refusal(Path("a\0b"))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda m: m.graph.node[0].__setattr__("op_type", "Foo"), "No Op registered for Foo"),
        (lambda m: m.graph.node[0].input.__setitem__(1, "gone"), "gone"),
        (lambda m: m.graph.node.append(m.graph.node[0]), "'y' has been used"),
        (lambda m: m.opset_import[0].__setattr__("version", 999), "opset 999"),
        (lambda m: m.__setattr__("ir_version", 999), "ir_version 999"),
        (lambda m: m.graph.initializer[0].__setattr__("raw_data", b"123"), "3 bytes"),
        (lambda m: m.graph.initializer[0].__setattr__("data_type", 77), "unknown element type 77"),
        (lambda m: m.graph.initializer[0].dims.__setitem__(0, -1), "negative dimension"),
        (lambda m: m.graph.initializer[0].dims.__setitem__(0, 2**62), "where its shape and type need"),
        (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "w"),
        (lambda m: m.graph.input[0].type.tensor_type.__setattr__("elem_type", 77), "'x' is declared"),
    ],
)
def test_models_that_are_not_valid(
    tmp_path: Path, damage: Callable[[ModelProto], object], expected: str
) -> None:
    model = small_model()
    damage(model)
    assert expected in refusal(saved(tmp_path, model))


def test_models_that_are_odd_but_valid(tmp_path: Path) -> None:
    nameless = small_model()
    nameless.graph.name = ""
    rankless = small_model()
    rankless.graph.output[0].type.tensor_type.ClearField("shape")
    empty = ModelProto(ir_version=8, opset_import=[helper.make_opsetid("", 17)])
    straight: ModelProto = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] x) {}'
    )
    for model in (nameless, rankless, empty, straight):
        assert load_model(saved(tmp_path, model)) == model


def test_data_in_another_file(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(4096) + WEIGHT.tobytes())
    model = load_model(externalized(tmp_path, offset="4096"))
    assert model == small_model()
    assert model_digest(model) == model_digest(small_model())


def test_data_through_a_link_inside_the_directory(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(WEIGHT.tobytes())
    (tmp_path / "w.bin").symlink_to("blob")
    assert load_model(externalized(tmp_path)) == small_model()


def test_data_outside_the_directory_is_refused(tmp_path: Path) -> None:
    outside, inside = tmp_path / "secret", tmp_path / "model"
    inside.mkdir()
    outside.write_bytes(WEIGHT.tobytes())
    (inside / "link").symlink_to(outside)
    (inside / "loop").symlink_to("loop")
    for location in ("../secret", str(outside), "link", "loop", "sub/../../secret", "a\0b"):
        message = refusal(externalized(inside, location=location))
        assert "outside" in message or "missing" in message
        assert "'w'" in message
    assert "outside" in refusal(externalized(inside, location="link"))
    (inside / "w.bin").write_bytes(WEIGHT.tobytes())
    assert "outside" in refusal(externalized(inside, location=str(inside / "w.bin")))


def test_data_that_is_missing_or_does_not_fit(tmp_path: Path) -> None:
    assert "'w.bin'" in refusal(externalized(tmp_path))
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes()[:-1])
    assert "too short" in refusal(externalized(tmp_path))
    assert "too short" in refusal(externalized(tmp_path, offset=str(2**60)))
    assert "need 8192" in refusal(externalized(tmp_path, length="4"))
    for text in ("-1", "x", "1e3", "²", "9" * 50):
        assert "not a number of bytes" in refusal(externalized(tmp_path, offset=text))
    assert "not a regular file" in refusal(externalized(tmp_path, location="."))
    assert refusal(externalized(tmp_path, location=""))


@pytest.fixture
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large external data stays on disk."""
    monkeypatch.setattr("onnxq.model.load.HELD", 0)


def wide_model(folder: Path) -> tuple[ModelProto, Path]:
    """A model with a large and a small initializer and a large one in an attribute, and the file that has it all in another."""
    model: ModelProto = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[30000] x) => (float[30000] y)'
        " { c = Constant<value = float[1] {0.0}>()\n a = Add(x, w)\n b = Add(a, c)\n y = Mul(b, small) }"
    )
    rng = np.random.default_rng(1)
    large, small, inner = (rng.normal(size=n).astype(np.float32) for n in (30000, 1, 30000))
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for v, n in ((large, "w"), (small, "small")))
    model.graph.node[0].attribute[0].t.CopyFrom(numpy_helper.from_array(inner, "c"))
    apart = ModelProto()
    apart.CopyFrom(model)
    external_data_helper.convert_model_to_external_data(apart, location="w.bin", size_threshold=0)
    tensors = [*apart.graph.initializer, apart.graph.node[0].attribute[0].t]
    with (folder / "w.bin").open("wb") as data:
        for tensor in tensors:
            external_data_helper.set_external_data(tensor, "w.bin", data.tell(), len(tensor.raw_data))
            data.write(tensor.raw_data)
            tensor.ClearField("raw_data")
    return model, saved(folder, apart)


def test_little_data_is_read_into_the_model(tmp_path: Path) -> None:
    model, path = wide_model(tmp_path)
    assert load_model(path) == model


@pytest.mark.usefixtures("nothing_held")
def test_of_much_data_large_initializers_stay_on_disk(tmp_path: Path) -> None:
    model, path = wide_model(tmp_path)
    loaded = load_model(path)
    large, small = loaded.graph.initializer
    assert file_of(large) is not None
    assert not large.raw_data
    assert small == model.graph.initializer[1]
    assert loaded.graph.node[0] == model.graph.node[0]  # a Constant's value is part of the graph
    assert in_memory(large) == model.graph.initializer[0]
    assert model_digest(loaded) == model_digest(model)
    assert storage_bytes(loaded) == storage_bytes(model)
    assert abs(model_bytes(loaded) - model.ByteSize()) < 300  # the names of a file and places in it


@pytest.mark.usefixtures("nothing_held")
def test_preparing_leaves_data_on_disk(tmp_path: Path) -> None:
    model, path = wide_model(tmp_path)
    loaded, notes = prepare(load_model(path), 21)
    expected, same_notes = prepare(model, 21)
    kept = next(t for t in loaded.graph.initializer if t.name == "w")
    assert file_of(kept) is not None
    assert notes == same_notes
    assert model_digest(loaded) == model_digest(expected)


@pytest.mark.usefixtures("nothing_held")
def test_what_does_not_fit_is_refused_before_it_is_needed(tmp_path: Path) -> None:
    _, path = wide_model(tmp_path)
    data = tmp_path / "w.bin"
    data.write_bytes(data.read_bytes()[:1000])
    assert "too short" in refusal(path)
    data.unlink()
    assert "'w.bin'" in refusal(path)


def test_the_digest_is_of_what_is_computed() -> None:
    base = model_digest(small_model())
    same = small_model()
    same.graph.initializer[0].CopyFrom(helper.make_tensor("w", TensorProto.FLOAT, [2048], WEIGHT))
    same.producer_name, same.doc_string = "somebody", "something"
    same.metadata_props.add(key="a", value="b")
    assert same.graph.initializer[0].float_data
    assert model_digest(same) == base
    other_weight = small_model()
    other_weight.graph.initializer[0].raw_data = WEIGHT[::-1].tobytes()
    other_node = small_model()
    other_node.graph.node[0].op_type = "Mul"
    other_opset = small_model()
    other_opset.opset_import[0].version = 16
    other_shape = small_model()
    other_shape.graph.initializer[0].dims[:] = [2, 1024]
    digests = {model_digest(m) for m in (other_weight, other_node, other_opset, other_shape)}
    assert len(digests | {base}) == 5


def test_the_digest_reads_data_in_attributes() -> None:
    def constant(tensor: TensorProto) -> ModelProto:
        node = helper.make_node("Constant", [], ["y"], value=tensor)
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
        return helper.make_model(helper.make_graph([node], "g", [], [output]))

    raw = numpy_helper.from_array(np.array([1, 2], np.float32), "v")
    typed = helper.make_tensor("v", TensorProto.FLOAT, [2], [1.0, 2.0])
    other = numpy_helper.from_array(np.array([1, 3], np.float32), "v")
    assert raw != typed
    assert model_digest(constant(raw)) == model_digest(constant(typed)) != model_digest(constant(other))


@pytest.mark.parametrize("equation", [b"ij,j;k->ik", b"ij,j.k->ik", b"i\tj,jk", b"ij,\xa0jk->ik"])
def test_equations_that_type_inference_would_never_finish_are_refused(equation: bytes) -> None:
    model: ModelProto = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[2, 2] x) => (float[2, 2] y)'
        ' { [e] y = Einsum<equation = "...ij, ...jk -> ...ik">(x, x) }'
    )
    check_model(model)
    model.graph.node[0].attribute[0].s = equation
    with pytest.raises(ModelError, match="Einsum node 'e' has the malformed equation"):
        check_model(model)


def test_checking_does_not_change_the_model() -> None:
    model = small_model()
    check_model(model)
    assert model == small_model()


def test_data_that_was_not_loaded_is_named() -> None:
    model = small_model()
    external_data_helper.set_external_data(model.graph.initializer[0], "w.bin")
    with pytest.raises(ModelError, match="'w' is in a file that was not loaded"):
        model_digest(model)


def test_storage_counts_packed_types_packed() -> None:
    model = small_model()
    model.graph.initializer.append(
        TensorProto(name="q", data_type=TensorProto.INT4, dims=[5], raw_data=b"abc")
    )
    model.graph.initializer.append(
        TensorProto(name="s", data_type=TensorProto.STRING, dims=[1], string_data=[b"abcd"])
    )
    node = model.graph.node.add(op_type="Constant", output=["c"])
    node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.array([1, 2], np.int8))))
    assert storage_bytes(model) == {"float32": 8192, "string": 4, "int4": 3, "int8": 2}
