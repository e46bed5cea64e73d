"""Streamed reading of .npy and .npz against numpy.load."""

import io
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onnxq.data import npy
from onnxq.data.npy import ArrayFile, open_npy, open_npz
from onnxq.errors import DataError


def write(path: Path, array: NDArray[Any], kind: str) -> ArrayFile:
    if kind == "npy":
        np.save(path.with_suffix(".npy"), array)
        return open_npy(path.with_suffix(".npy"))
    save = np.savez if kind == "stored" else np.savez_compressed
    save(path.with_suffix(".npz"), other=np.arange(5), x=array)
    return open_npz(path.with_suffix(".npz"))["x"]


def samples(dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    return np.random.default_rng(1).integers(0, 100, shape).astype(dtype)


@pytest.mark.parametrize("kind", ["npy", "stored", "compressed"])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("<f4", (37, 3, 5)),
        (">f4", (37, 2)),
        ("<i8", (40,)),
        ("u1", (33, 0)),
        ("<f2", (30, 1, 1)),
        ("?", (31, 4)),
    ],
)
def test_chunks_equal_numpy_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(npy, "CHUNK", 64)  # bytes: several reads per call, and rows larger than a chunk
    array = samples(dtype, shape)
    file = write(tmp_path / "x", array, kind)
    assert file.shape == shape
    assert file.dtype == array.dtype.newbyteorder("=")
    rows = np.sort(np.random.default_rng(2).choice(shape[0], 20, replace=False))
    for picked in (np.arange(shape[0]), rows, rows[-1:]):
        with file.open() as reader:
            parts = [reader.take(part) for part in np.array_split(picked, 3)]
        read = np.concatenate(parts)
        assert read.dtype == file.dtype
        np.testing.assert_array_equal(read, array[picked])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.sets(st.integers(0, 299)), split=st.integers(0, 300), compressed=st.booleans())
def test_any_ascending_rows(tmp_path: Path, rows: set[int], split: int, compressed: bool) -> None:
    array = samples("<f4", (300, 7))
    file = write(tmp_path / f"x{compressed}", array, "compressed" if compressed else "stored")
    wanted = np.array(sorted(rows), np.int64)
    with file.open() as reader:
        read = np.concatenate([reader.take(wanted[:split]), reader.take(wanted[split:])])
    np.testing.assert_array_equal(read, array[wanted])


@pytest.mark.parametrize("kind", ["npy", "stored", "compressed"])
def test_memory_is_the_rows_and_a_chunk(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path / "x", np.zeros((4000, 1024), np.float32), kind)  # 16 MB
    rows = np.array([10, 3990])
    with file.open() as reader:
        tracemalloc.start()
        reader.take(rows)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 * npy.CHUNK  # compressed input, its decompressed chunk, the joined chunk, and the rows


def test_rows_are_writable_and_native(tmp_path: Path) -> None:
    with write(tmp_path / "x", samples(">f4", (4, 2)), "npy").open() as reader:
        read = reader.take(np.arange(4))
    assert read.flags.writeable
    assert read.dtype.isnative


def test_version_2_headers(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    with path.open("wb") as stream:
        np.lib.format.write_array(stream, np.arange(6.0).reshape(3, 2), version=(2, 0))
    with open_npy(path).open() as reader:
        np.testing.assert_array_equal(reader.take(np.arange(3)), np.arange(6.0).reshape(3, 2))


def refused(path: Path) -> str:
    with pytest.raises(DataError) as error:
        open_npy(path)
    return str(error.value)


def test_arrays_that_cannot_be_streamed_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.asfortranarray(np.ones((3, 2))))
    assert refused(path) == (
        f"'{path}' is in Fortran order, which cannot be streamed; save numpy.ascontiguousarray(array)"
    )
    np.save(path, np.array([{}, 1], object), allow_pickle=True)
    assert refused(path) == f"'{path}' holds Python objects or records; save a plain array of numbers"
    np.save(path, np.zeros(3, [("a", "f4"), ("b", "i4")]))
    assert refused(path) == f"'{path}' holds Python objects or records; save a plain array of numbers"
    np.save(path, np.float32(1))
    assert refused(path) == f"'{path}' is a single number; its leading axis must be the samples"
    with path.open("wb") as stream:
        np.lib.format.write_array(stream, np.ones(2), version=(3, 0))
    assert refused(path) == f"'{path}' is of npy version 3.0; 1.0 and 2.0 can be read"


def test_a_negative_size_in_the_header(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.ones((12, 2)))
    path.write_bytes(path.read_bytes().replace(b"(12, 2)", b"(-1, 2)"))
    assert refused(path) == f"'{path}' cannot be read: its shape has a negative size"


def test_truncated_npy(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.ones((10, 4)))
    path.write_bytes(path.read_bytes()[:-1])
    assert refused(path) == f"'{path}' ends early: its shape (10, 4) needs more bytes than the file has"
    path.write_bytes(path.read_bytes()[:20])
    assert refused(path).startswith(f"'{path}' cannot be read: ")
    path.write_bytes(b"text")
    assert refused(path).startswith(f"'{path}' cannot be read: ")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "x", np.ones((10, 4)), "npy")
    file.path.write_bytes(file.path.read_bytes()[:-1])
    with file.open() as reader, pytest.raises(DataError) as error:
        reader.take(np.arange(10))
    assert str(error.value) == f"'{file.path}' cannot be read: the file ends early"


def test_a_damaged_member_is_found_by_its_checksum(tmp_path: Path) -> None:
    file = write(tmp_path / "x", samples("<f4", (50, 40)), "stored")
    data = bytearray(file.path.read_bytes())
    data[data.rindex(b"x.npy", 0, len(data) // 2) + 600] ^= 1  # within the values
    file.path.write_bytes(data)
    with file.open() as reader, pytest.raises(DataError) as error:
        reader.take(np.arange(50))
    assert str(error.value) == f"'{file.path}': array 'x' cannot be read: Bad CRC-32 for file 'x.npy'"


def test_rows_of_an_uncompressed_archive_are_passed_over_unread(tmp_path: Path) -> None:
    array = samples("<f4", (50, 40))
    file = write(tmp_path / "x", array, "stored")
    data = bytearray(file.path.read_bytes())
    place = bytes(data).index(array[20].tobytes())  # of what was read, only a checksum tells
    data[place] ^= 1
    file.path.write_bytes(data)
    with file.open() as reader:
        np.testing.assert_array_equal(reader.take(np.array([3, 49])), array[[3, 49]])
    with file.open() as reader:
        assert (reader.take(np.array([20, 49])) != array[[20, 49]]).sum() == 1


def test_an_archive_behind_other_bytes(tmp_path: Path) -> None:
    array = samples("<f4", (50, 40))
    file = write(tmp_path / "x", array, "stored")
    file.path.write_bytes(b"#!/bin/sh and a script" + file.path.read_bytes())
    with open_npz(file.path)["x"].open() as reader:
        np.testing.assert_array_equal(reader.take(np.arange(50)), array)


def test_truncated_npz(tmp_path: Path) -> None:
    file = write(tmp_path / "x", np.ones((10, 4)), "stored")
    file.path.write_bytes(file.path.read_bytes()[:-30])
    with pytest.raises(DataError) as error:
        open_npz(file.path)
    assert str(error.value) == f"'{file.path}' cannot be read: File is not a zip file"


def archive(save: Any) -> bytes:
    stream = io.BytesIO()
    save(stream, x=samples("<f4", (6, 3)))
    return stream.getvalue()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    base=st.sampled_from([archive(np.savez), archive(np.savez_compressed)]),
    place=st.integers(0),
    value=st.integers(1, 255),
)
def test_a_changed_byte_gives_values_or_a_data_error(
    tmp_path: Path, base: bytes, place: int, value: int
) -> None:
    data = bytearray(base)
    data[place % len(data)] ^= value
    path = tmp_path / "x.npz"
    path.write_bytes(data)
    try:
        for file in open_npz(path).values():
            with file.open() as reader:
                assert len(reader.take(np.arange(file.shape[0]))) == file.shape[0]
    except DataError as error:
        sentence = str(error)
    else:
        return
    assert sentence.startswith(f"'{path}'")
    assert "\n" not in sentence
