"""The calibration table: the statistics of every activation tensor of one model on one data set, as one file.

The file is a compressed NumPy archive (.npz): `header` is JSON in uint8, `<i>.<key>` an array of tensor i.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.calibration.statistics import Arrays, TensorStatistics
from onnxq.errors import DataError
from onnxq.files import replacing

FORMAT = "onnxq calibration table"
VERSION = 1


@dataclass(frozen=True)
class CalibrationTable:
    """Statistics with where they come from.

    Attributes:
        model_digest: digest of the model that ran.
        data_digest: digest of the whole data set, also when this table has seen one shard of it.
        samples: number of samples seen.
        tensors: statistics by tensor name.
    """

    model_digest: str
    data_digest: str
    samples: int
    tensors: dict[str, TensorStatistics] = field(default_factory=dict)

    def __getitem__(self, name: str) -> TensorStatistics:
        """Statistics of one tensor; DataError when it was not gathered."""
        if name not in self.tensors:
            raise DataError(
                f"the calibration table has no tensor {name!r}; it has {len(self.tensors)} tensors"
            )
        return self.tensors[name]

    def check(self, model_digest: str, data_digest: str | None = None) -> None:
        """Make sure that the table belongs to this model and, unless None, to this data.

        Raises:
            DataError: a digest differs; the message says which.
        """
        for kind, mine, wanted in (
            ("model", self.model_digest, model_digest),
            ("data", self.data_digest, data_digest),
        ):
            if wanted is not None and mine != wanted:
                raise DataError(
                    f"the calibration table is of other {kind}: its {kind} digest is {mine}, not {wanted}"
                )

    def merge(self, shard: CalibrationTable) -> CalibrationTable:
        """The table of the samples of both; neither is changed.

        Raises:
            DataError: the model, the data or the tensors differ.
        """
        self.check(shard.model_digest, shard.data_digest)
        lonely = sorted(self.tensors.keys() ^ shard.tensors.keys())
        if lonely:
            raise DataError(f"cannot merge calibration tables: only one of them has tensor {lonely[0]!r}")
        tensors = {name: mine.merge(shard.tensors[name]) for name, mine in self.tensors.items()}
        return CalibrationTable(self.model_digest, self.data_digest, self.samples + shard.samples, tensors)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table; the file appears whole or not at all. The same table gives the same bytes.

        Raises:
            DataError: the file cannot be written.
        """
        arrays: Arrays = {}
        for i, statistics in enumerate(self.tensors.values()):
            arrays |= {f"{i}.{key}": array for key, array in statistics.to_arrays().items()}
        header = {
            "format": FORMAT,
            "version": VERSION,
            "model_digest": self.model_digest,
            "data_digest": self.data_digest,
            "samples": self.samples,
            "tensors": list(self.tensors),
            "arrays": len(arrays),
        }
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        try:
            with replacing(Path(path)) as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # its stub types every keyword
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a loop
            said = getattr(error, "strerror", None) or error
            raise DataError(f"cannot write the calibration table {str(Path(path))!r}: {said}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationTable:
        """Read a table.

        Raises:
            DataError: the file is missing, is not a table, is damaged, or is of another version.
        """
        where = f"the calibration table {str(Path(path))!r}"
        arrays = _read_archive(Path(path), where)
        header = _read_header(arrays, where)
        if header.get("version") != VERSION:
            raise DataError(
                f"{where} has version {header.get('version')}; this onnxq reads version {VERSION}"
            )
        if header.get("arrays") != len(arrays) - 1:
            raise DataError(f"{where} is damaged: it lost arrays")
        by_tensor: dict[str, Arrays] = {}
        for key, array in arrays.items():
            index, _, name = key.partition(".")
            by_tensor.setdefault(index, {})[name] = array
        try:
            names = enumerate(header["tensors"])
            tensors = {
                name: TensorStatistics.from_arrays(name, by_tensor.get(str(i), {})) for i, name in names
            }
            return cls(header["model_digest"], header["data_digest"], header["samples"], tensors)
        except KeyError as error:
            raise DataError(f"{where} is damaged: its header lacks {error}") from error


def _read_archive(path: Path, where: str) -> Arrays:
    try:
        with path.open("rb") as file:
            if file.read(2) != b"PK":
                raise DataError(f"{where} is not one: the file is not an .npz archive")
            with zipfile.ZipFile(file) as members:
                damaged = members.testzip()  # before NumPy parses what may be noise
            if damaged is not None:
                raise zipfile.BadZipFile(f"{damaged} has a wrong checksum")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                return dict(archive)
    except FileNotFoundError as error:
        raise DataError(f"{where} does not exist") from error
    except OSError as error:
        raise DataError(f"cannot read {where}: {error.strerror or error}") from error
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        ValueError,
        RuntimeError,
    ) as error:  # the last: encrypted
        raise DataError(f"{where} is truncated or damaged: {error}") from error


def _read_header(arrays: Arrays, where: str) -> dict[str, Any]:
    """The header of an archive that is a table."""
    try:
        header = json.loads(arrays["header"].tobytes())
    except (KeyError, ValueError):
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise DataError(f"{where} is not one: it has no header of a calibration table")
    return header
