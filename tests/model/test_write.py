"""Whole files or none, the same bytes for the same model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, numpy_helper, parser

from onnxq.errors import ModelError
from onnxq.model import write
from onnxq.model.disk import file_of
from onnxq.model.load import load_model, model_digest
from onnxq.model.write import write_model

TOO_LARGE = """
import resource, signal, sys
from pathlib import Path
from onnxq.errors import ModelError
from onnxq.model.load import load_model
from onnxq.model.write import write_model
model = load_model(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for external in (False, True):
    try:
        write_model(model, sys.argv[2], external=external)
    except ModelError as error:
        sys.stdout.write(f"{error}\\n")
"""


def sample(value: float = 1.0) -> ModelProto:
    model: ModelProto = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[4097] x) => (float[4097] y)'
        " <float[1] small = {3.0}> { a = Add(x, w)\n b = Add(a, v)\n y = Mul(b, small) }"
    )
    for name in ("w", "v"):
        weight = np.full(4097, value, np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    return model


def output(path: Path) -> float:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return float(session.run(None, {"x": np.ones(4097, np.float32)})[0][0])


@pytest.mark.parametrize("external", [None, False, True])
def test_what_is_written_is_read_and_run(tmp_path: Path, external: bool | None) -> None:
    path = tmp_path / "m.onnx"
    files = write_model(sample(), path, external=external)
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert [f.name for f in files] == (["m.onnx", "m.onnx.data"] if external else ["m.onnx"])
    assert model_digest(load_model(path)) == model_digest(sample())
    assert output(path) == (1 + 1 + 1) * 3


def test_large_data_starts_on_pages_and_small_data_stays(tmp_path: Path) -> None:
    path, data = write_model(sample(), tmp_path / "m.onnx", external=True)
    stored = ModelProto.FromString(path.read_bytes()).graph.initializer
    offsets = [int(e.value) for t in stored for e in t.external_data if e.key == "offset"]
    assert offsets == [0, 5 * 4096]  # each weight is 4 bytes longer than four pages
    assert data.stat().st_size == 5 * 4096 + 4 * 4097
    assert [t.name for t in stored if t.data_location != TensorProto.EXTERNAL] == ["small"]


@pytest.mark.parametrize("external", [False, True])
def test_the_same_model_gives_the_same_bytes(tmp_path: Path, external: bool) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = write_model(sample(), tmp_path / "a" / "m.onnx", external=external)
    second = write_model(sample(), tmp_path / "b" / "m.onnx", external=external)
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in second]


def test_a_model_past_the_limit_goes_into_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "INLINE_LIMIT", 1000)
    assert len(write_model(sample(), tmp_path / "m.onnx")) == 2


def test_writing_does_not_change_the_model(tmp_path: Path) -> None:
    model = sample()
    write_model(model, tmp_path / "m.onnx", external=True)
    assert model == sample()


def test_a_link_stays_a_link_and_permissions_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real.onnx", tmp_path / "link.onnx"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_model(sample(), link)
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert load_model(real) == sample()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none/m.onnx", "there is no directory"),
        (".", "is a directory"),
        ("x" * 300, "too long"),
        ("a\0b", "null"),
    ],
)
def test_places_where_nothing_can_be_written(tmp_path: Path, name: str, expected: str) -> None:
    with pytest.raises(ModelError, match=expected) as caught:
        write_model(sample(), tmp_path / name)
    assert str(caught.value).startswith("cannot write ")
    assert not list(tmp_path.iterdir())


def test_a_device_is_not_replaced() -> None:
    with pytest.raises(ModelError, match="not a regular file"):
        write_model(sample(), os.devnull)


@pytest.mark.parametrize("external", [False, True])
def test_no_room_leaves_the_old_file(tmp_path: Path, external: bool) -> None:
    (source,) = write_model(sample(), tmp_path / "source.onnx")
    target = tmp_path / "m.onnx"
    write_model(sample(2.0), target, external=external)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    ran = subprocess.run(
        [sys.executable, "-c", TOO_LARGE, source, target],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert ran.stdout.splitlines() == [f"cannot write {target}: file too large"] * 2
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existed", [False, True])
def test_a_failed_move_leaves_the_old_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, error: BaseException, existed: bool
) -> None:
    target = tmp_path / "m.onnx"
    if existed:
        write_model(sample(2.0), target, external=True)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    moves, real_move = [], os.replace

    def move(source: Path, destination: Path) -> None:
        moves.append(destination)
        if len(moves) == failing + 1:
            raise error
        real_move(source, destination)

    monkeypatch.setattr(os, "replace", move)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ModelError):
        write_model(sample(), target, external=True)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_interrupt_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: int) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_model(sample(), tmp_path / "m.onnx", external=True)
    assert not list(tmp_path.iterdir())


def large_sample() -> ModelProto:
    model = sample()
    for index, tensor in enumerate(model.graph.initializer[1:]):
        tensor.CopyFrom(numpy_helper.from_array(np.arange(20_000, dtype=np.float32) + index, tensor.name))
    for info in (model.graph.input[0], model.graph.output[0]):
        info.type.tensor_type.shape.dim[0].dim_value = 20_000
    return model


@pytest.fixture
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelProto:
    """A model whose large initializers lie in `source/m.onnx.data`."""
    (tmp_path / "source").mkdir()
    path, _ = write_model(large_sample(), tmp_path / "source" / "m.onnx", external=True)
    monkeypatch.setattr("onnxq.model.load.HELD", 0)
    model = load_model(path)
    assert [file_of(t) is not None for t in model.graph.initializer] == [False, True, True]
    return model


def test_data_on_disk_goes_from_file_to_file(tmp_path: Path, on_disk: ModelProto) -> None:
    seen: list[tuple[int, int]] = []
    written = write_model(
        on_disk, tmp_path / "m.onnx", progress=lambda done, total: seen.append((done, total))
    )
    assert [f.name for f in written] == ["m.onnx", "m.onnx.data"]
    assert seen == [(80_000, 160_000), (160_000, 160_000)]
    for file in written:
        assert file.read_bytes() == (tmp_path / "source" / file.name).read_bytes()


def test_data_on_disk_can_be_put_into_one_file(tmp_path: Path, on_disk: ModelProto) -> None:
    (written,) = write_model(on_disk, tmp_path / "m.onnx", external=False)
    assert ModelProto.FromString(written.read_bytes()) == large_sample()


@pytest.mark.parametrize("name", ["m.onnx", "m.onnx.data"])
def test_a_model_does_not_replace_what_it_is_read_from(
    tmp_path: Path, on_disk: ModelProto, name: str
) -> None:
    before = {p: p.read_bytes() for p in (tmp_path / "source").iterdir()}
    with pytest.raises(ModelError, match=r"m\.onnx\.data holds weights of the model that is compiled"):
        write_model(on_disk, tmp_path / "source" / name)
    assert {p: p.read_bytes() for p in (tmp_path / "source").iterdir()} == before


@pytest.mark.parametrize("error", [ModelError("gone"), KeyboardInterrupt()])
def test_a_failure_between_two_tensors_leaves_the_old_pair(
    tmp_path: Path, on_disk: ModelProto, error: BaseException
) -> None:
    target = tmp_path / "m.onnx"
    write_model(sample(2.0), target, external=True)
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}

    def fail(done: int, total: int) -> None:
        if done < total:
            raise error

    with pytest.raises(type(error)):
        write_model(on_disk, target, progress=fail)
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_data_that_was_not_loaded_is_not_written(tmp_path: Path) -> None:
    model = sample()
    model.graph.initializer[-1].data_location = TensorProto.EXTERNAL
    with pytest.raises(ModelError, match="'v' is in a file that was not loaded"):
        write_model(model, tmp_path / "m.onnx")
