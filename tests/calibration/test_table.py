"""The calibration table on disk: round trip, damage, digests, shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxq.calibration.statistics import Needs, TensorStatistics
from onnxq.calibration.table import CalibrationTable
from onnxq.errors import DataError


def table(seed: int = 0, samples: int = 4, data: str = "data-1") -> CalibrationTable:
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, needs in (
        ("conv/out:0", Needs(histogram=True)),
        ("größe", Needs(channels=1)),
        ("idle", Needs()),
    ):
        tensors[name] = TensorStatistics(name, needs)
        if name != "idle":
            tensors[name].update(np.maximum(rng.normal(size=(samples, 3)), 0.0))
    return CalibrationTable("model-1", data, samples, tensors)


def contents(found: CalibrationTable) -> dict[str, Any]:
    tensors = {
        name: {key: array.tolist() for key, array in statistics.to_arrays().items()}
        for name, statistics in found.tensors.items()
    }
    return {"head": (found.model_digest, found.data_digest, found.samples), "tensors": tensors}


def test_round_trip_and_stable_bytes(tmp_path: Path) -> None:
    for name in ("a.table", "b.table"):
        table().save(tmp_path / name)
    assert contents(CalibrationTable.load(tmp_path / "a.table")) == contents(table())
    assert (tmp_path / "a.table").read_bytes() == (tmp_path / "b.table").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.table", "b.table"]  # no temporary file is left


def test_an_empty_table(tmp_path: Path) -> None:
    CalibrationTable("m", "d", 0).save(tmp_path / "t")
    assert contents(CalibrationTable.load(tmp_path / "t")) == contents(CalibrationTable("m", "d", 0))


def test_a_failed_write_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.npz"
    table().save(path)

    def full(file: Any, **arrays: Any) -> None:
        file.write(b"PK half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(
        DataError, match=r"cannot write the calibration table '.*t\.npz': No space left on device"
    ):
        table(seed=1).save(path)
    assert contents(CalibrationTable.load(path)) == contents(table())
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot write the calibration table"):
        table().save(tmp_path / "nowhere" / "t.npz")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write the calibration table"):
        table().save(tmp_path / "file" / "t.npz")
    with pytest.raises(DataError, match=r"the calibration table '.*t\.npz' does not exist$"):
        CalibrationTable.load(tmp_path / "t.npz")
    with pytest.raises(DataError, match="cannot read the calibration table"):
        CalibrationTable.load(tmp_path)


def test_not_a_table(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("scale: 1.0")
    with pytest.raises(DataError, match=r"is not one: the file is not an \.npz archive"):
        CalibrationTable.load(tmp_path / "text")
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    with pytest.raises(DataError, match="is not one: it has no header of a calibration table"):
        CalibrationTable.load(tmp_path / "other.npz")


def test_truncated_anywhere(tmp_path: Path) -> None:
    table().save(tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    for size in range(0, len(data), 97):
        (tmp_path / "part").write_bytes(data[:size])
        with pytest.raises(DataError, match=r"truncated or damaged|is not one"):
            CalibrationTable.load(tmp_path / "part")


def test_a_damaged_byte_is_an_error_or_harmless(tmp_path: Path) -> None:
    table().save(tmp_path / "whole")
    data = bytearray((tmp_path / "whole").read_bytes())
    failed = 0
    for position in range(0, len(data), 5):
        damaged = data.copy()
        damaged[position] ^= 0x55
        (tmp_path / "part").write_bytes(damaged)
        try:
            found = CalibrationTable.load(tmp_path / "part")
        except DataError:
            failed += 1
        else:
            assert contents(found) == contents(table())  # the byte was a time stamp or an attribute
    assert failed > len(data) // 5 // 3


def test_another_version(tmp_path: Path) -> None:
    header: dict[str, Any] = {"format": "onnxq calibration table", "version": 99}
    np.savez(tmp_path / "t.npz", header=np.frombuffer(json.dumps(header).encode(), np.uint8))
    with pytest.raises(DataError, match="has version 99; this onnxq reads version 1"):
        CalibrationTable.load(tmp_path / "t.npz")
    header |= {"version": 1, "arrays": 0}
    np.savez(tmp_path / "t.npz", header=np.frombuffer(json.dumps(header).encode(), np.uint8))
    with pytest.raises(DataError, match="damaged: its header lacks 'tensors'"):
        CalibrationTable.load(tmp_path / "t.npz")


def test_lost_arrays(tmp_path: Path) -> None:
    table().save(tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz") as archive:
        kept = {key: array for key, array in archive.items() if not key.startswith("1.")}
    np.savez(tmp_path / "t.npz", **kept)
    with pytest.raises(DataError, match="is damaged: it lost arrays"):
        CalibrationTable.load(tmp_path / "t.npz")


def test_digests() -> None:
    table().check("model-1")
    table().check("model-1", "data-1")
    with pytest.raises(DataError, match="is of other model: its model digest is model-1, not model-2"):
        table().check("model-2", "data-1")
    with pytest.raises(DataError, match="is of other data: its data digest is data-1, not data-2"):
        table().check("model-1", "data-2")


def test_shards() -> None:
    merged = table(0, 4).merge(table(1, 6))
    assert merged.samples == 10
    assert merged["größe"].count == 30
    rng = [np.random.default_rng(seed) for seed in (0, 1)]
    draws = [r.normal(size=(2, n, 3)) for r, n in zip(rng, (4, 6), strict=True)]
    values = np.maximum(np.concatenate([d[0] for d in draws]), 0.0).astype(np.float32)
    assert merged["conv/out:0"].maximum == values.max()
    histogram = merged["conv/out:0"].histogram
    assert histogram is not None
    np.testing.assert_array_equal(histogram.counts, np.histogram(values[values > 0], histogram.edges)[0])


def test_shards_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="is of other data"):
        table().merge(table(data="data-2"))
    lacking = table()
    del lacking.tensors["größe"]
    with pytest.raises(DataError, match="only one of them has tensor 'größe'"):
        table().merge(lacking)
    with pytest.raises(DataError, match="the calibration table has no tensor 'größe'; it has 2 tensors"):
        lacking["größe"]
