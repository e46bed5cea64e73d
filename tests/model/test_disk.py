"""Data that stays on disk is found, mapped, refused when it is not what was checked, and gone when it is not needed."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from onnxq.errors import ModelError
from onnxq.model.disk import PAGE, SourceFile, Spool, file_of, put_on_disk, retype
from onnxq.model.tensors import in_memory, tensor_array, tensor_bytes

VALUES = np.arange(3000, dtype=np.float32)

WAITING = """
import sys, time
from onnxq.model.disk import Spool
spool = Spool(sys.argv[1])
spool.append(b"x" * 100_000)
print("ready", flush=True)
time.sleep(60)
"""


def on_disk(folder: Path, *, offset: int = 0) -> TensorProto:
    """A tensor whose data lies behind so many other bytes of a file."""
    path = folder / "w.bin"
    path.write_bytes(bytes(offset) + VALUES.tobytes() + bytes(7))
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[30, 100])
    put_on_disk(tensor, SourceFile.at(path), offset, VALUES.nbytes)
    return tensor


@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, 70_001])  # mappings start on pages, floats on fours
def test_values_are_those_of_the_file(tmp_path: Path, offset: int) -> None:
    tensor = on_disk(tmp_path, offset=offset)
    assert bytes(tensor_bytes(tensor)) == VALUES.tobytes()
    found = tensor_array(tensor)
    assert found.flags.aligned
    np.testing.assert_array_equal(found, VALUES.reshape(30, 100))
    assert in_memory(tensor) == numpy_helper.from_array(VALUES.reshape(30, 100), "w")


def test_mapped_values_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        tensor_array(on_disk(tmp_path))[0, 0] = 1


def test_a_location_that_a_model_brings_along_is_not_read(tmp_path: Path) -> None:
    tensor = on_disk(tmp_path)
    assert file_of(tensor) is not None
    for location in ("w.bin", str(tmp_path / "w.bin"), "onnxq-" + "0" * 32, ""):
        tensor.external_data[0].value = location
        assert file_of(tensor) is None
        with pytest.raises(ModelError, match="'w' is in a file that was not loaded"):
            tensor_bytes(tensor)


def test_a_file_that_was_changed_or_taken_away_is_refused(tmp_path: Path) -> None:
    tensor = on_disk(tmp_path)
    path = tmp_path / "w.bin"
    os.utime(path, ns=(1, 1))
    with pytest.raises(ModelError, match=r"w\.bin was changed"):
        tensor_bytes(tensor)
    path.unlink()
    with pytest.raises(ModelError, match=r"cannot read the data file .*w\.bin: no such file"):
        tensor_bytes(tensor)
    again = on_disk(tmp_path)  # what is there now is another file
    assert bytes(tensor_bytes(again)) == VALUES.tobytes()


@pytest.mark.parametrize("half", [np.float16, ml_dtypes.bfloat16])
def test_halves_become_floats_when_they_are_read(tmp_path: Path, half: type) -> None:
    stored: NDArray[Any] = VALUES.astype(half)
    tensor = numpy_helper.from_array(stored, "w")
    spool = Spool(tmp_path)
    put_on_disk(tensor, spool, spool.append(stored.tobytes()), stored.nbytes)
    retype(tensor, TensorProto.FLOAT)
    found = tensor_array(tensor)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, stored.astype(np.float32))
    assert in_memory(tensor) == numpy_helper.from_array(stored.astype(np.float32), "w")


def test_a_spool_holds_pieces_on_pages(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    places = [spool.append(piece) for piece in (b"a", b"b" * PAGE, b"c")]
    assert places == [0, PAGE, 2 * PAGE]
    assert bytes(spool.map(PAGE, PAGE)) == b"b" * PAGE
    assert bytes(spool.map(2 * PAGE, 1)) == b"c"


def test_a_spool_goes_with_its_object_and_mappings_stay(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3000])
    put_on_disk(tensor, spool, spool.append(VALUES.tobytes()), VALUES.nbytes)
    found = tensor_array(tensor)
    assert len(list(tmp_path.iterdir())) == 1
    del spool
    gc.collect()
    assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(found, VALUES)
    with pytest.raises(ModelError, match="not loaded"):
        tensor_bytes(tensor)


def test_an_interrupted_process_leaves_no_spool(tmp_path: Path) -> None:
    words = [sys.executable, "-c", WAITING, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0
    assert not list(tmp_path.iterdir())


def test_a_place_that_takes_no_spool_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot make a temporary file in .*none: no such file"):
        Spool(tmp_path / "none")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
def test_a_full_disk_is_an_error_of_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path)
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(spool, "_file", full)
        with pytest.raises(
            ModelError, match=f"cannot write to a temporary file in {tmp_path}: no space left"
        ):
            spool.append(b"x" * 100_000)
