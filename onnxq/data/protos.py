"""ONNX test data: `test_data_set_*` folders of tensors, each folder a whole feed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from onnxq.data.checks import check_feed, listed
from onnxq.data.dataset import Batch
from onnxq.data.feeds import FeedDataset, feed_size
from onnxq.data.inputs import InputSpec
from onnxq.errors import DataError


class ProtoDataset(FeedDataset):
    """Folders that hold `input_0.pb`, `input_1.pb`, … in graph-input order. Outputs are not read."""

    cuts = False
    has_labels = False

    def __init__(self, source: str, where: str, inputs: Sequence[InputSpec], folders: Sequence[Path]) -> None:
        super().__init__(source, where, inputs)
        for folder in folders:
            _check_files(folder, inputs)
        self._folders = tuple(folders)

    def _feeds(self, limit: int | None) -> Iterator[Batch]:
        for folder in self._picked(limit):
            feed = {spec.name: _load(folder / f"input_{i}.pb") for i, spec in enumerate(self.inputs)}
            where = f"'{folder}'"
            yield Batch(check_feed(where, feed, self.inputs), None, feed_size(where, feed, self.inputs))

    def _picked(self, limit: int | None) -> Sequence[Path]:
        """Folders evenly spaced, as many as hold about `limit` samples, one at least."""
        count = len(self._folders)
        if limit is None:
            return self._folders
        samples = sum(batch.size for batch in self._feeds(None))
        picked = min(count, max(1, limit * count // samples))
        return [self._folders[i * count // picked] for i in range(picked)]


def proto_folders(folder: Path) -> list[Path]:
    """The `test_data_set_*` folders in a folder, by number, or the folder itself when it is one."""
    if (folder / "input_0.pb").exists():
        return [folder]
    sets = [path for path in folder.glob("test_data_set_*") if path.is_dir()]
    return sorted(sets, key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)])


def _check_files(folder: Path, inputs: Sequence[InputSpec]) -> None:
    found = {path.name for path in folder.glob("input_*.pb")}
    for i, spec in enumerate(inputs):
        if f"input_{i}.pb" not in found:
            raise DataError(f"'{folder}' has no file input_{i}.pb for the model's input {spec.name!r}")
    if len(found) > len(inputs):
        names = listed(spec.name for spec in inputs)
        raise DataError(f"'{folder}' holds {len(found)} inputs, but the model has {len(inputs)}: {names}")


def _load(path: Path) -> NDArray[Any]:
    try:
        return np.asarray(onnx.numpy_helper.to_array(onnx.load_tensor(path)))
    except (OSError, DecodeError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"'{path}' is no readable ONNX tensor: {error}") from error
