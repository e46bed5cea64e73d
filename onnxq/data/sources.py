"""Opens a data source, whatever it is."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.data.checks import as_array
from onnxq.data.dataset import Dataset
from onnxq.data.feeds import FunctionDataset, function_dataset
from onnxq.data.functions import is_function, load_function
from onnxq.data.image_folder import has_images, image_folder
from onnxq.data.images import ImageOptions
from onnxq.data.inputs import InputSpec
from onnxq.data.protos import ProtoDataset, proto_folders
from onnxq.data.samples import SampleDataset
from onnxq.data.shards import Shards
from onnxq.data.tables import MemoryColumn, make_table, npy_shard, npy_table, npz_table, only_input
from onnxq.errors import DataError, UsageError

Source = str | Path | Mapping[str, NDArray[Any]] | Callable[..., Any] | Iterable[Any]

CHOICES = (
    "a .npz file, a .npy file, a folder of such files or of images, a folder with test_data_set_*, "
    "FILE.py:FUNCTION, or package.module:FUNCTION"
)


PLAIN_IMAGES = ImageOptions()


def open_data(source: Source, inputs: Sequence[InputSpec], *, images: ImageOptions = PLAIN_IMAGES) -> Dataset:
    """Open samples for a model.

    Args:
        source: a `.npz` file of arrays named as the inputs, leading axis = samples, labels in `label`;
            a `.npy` file for a model with one input; a folder of such files; a folder of images, sub-folders
            being classes; a folder with ONNX's `test_data_set_*`, or one of them; FILE.py:FUNCTION or
            package.module:FUNCTION, yielding feeds. From Python also a dict of arrays, an array for a model
            with one input, a function that yields feeds, or a list of feeds.
        inputs: the model's, from `input_specs`.
        images: how images become the model's input.

    Raises:
        DataError: no such source, or it does not fit the inputs.
        UsageError: image options that do not apply, or a function that cannot be loaded.
    """
    if not inputs:
        raise DataError("the model has no inputs to feed")
    if not isinstance(source, str | Path):
        _refuse_options(images, "a Python object")
        return _open_object(source, inputs)
    if is_function(str(source)) and not Path(source).exists():
        _refuse_options(images, repr(str(source)))
        return function_dataset(str(source), repr(str(source)), inputs, load_function(str(source), "data"))
    return _open_path(str(source), Path(source), inputs, images)


def _open_object(source: Any, inputs: Sequence[InputSpec]) -> Dataset:
    if isinstance(source, np.ndarray):
        source = {only_input("the array", inputs, "give a dict of arrays"): source}
    if isinstance(source, Mapping):
        where = "the dict of arrays"
        columns = {
            str(name): MemoryColumn(as_array(where, str(name), array)) for name, array in source.items()
        }
        return SampleDataset(where, where, inputs, make_table(where, columns, inputs))
    if callable(source):
        name = getattr(source, "__qualname__", type(source).__qualname__)
        return function_dataset(name, f"function {name!r}", inputs, source)
    kind = type(source).__name__
    if isinstance(source, Iterator):
        raise DataError(f"a {kind} can be read only once; pass the function that makes it, or a list")
    if not isinstance(source, Iterable):
        raise DataError(
            f"a {kind} is no data source; give a dict of arrays, a function that yields feeds, or a list"
        )
    return FunctionDataset(kind, f"the {kind} of feeds", inputs, lambda: source)


def _open_path(source: str, path: Path, inputs: Sequence[InputSpec], images: ImageOptions) -> Dataset:
    where = f"'{source}'"
    if not path.exists():
        raise DataError(_missing(source, path))
    if path.is_dir():
        return _open_folder(source, path, inputs, images)
    _refuse_options(images, where)
    if path.suffix == ".npz":
        return SampleDataset(source, where, inputs, npz_table(path, inputs))
    if path.suffix == ".npy":
        return SampleDataset(source, where, inputs, npy_table(path, inputs))
    if path.suffix == ".py":
        raise DataError(f"{where} names no function; write {source}:FUNCTION")
    raise DataError(f"{where} is no data source; give {CHOICES}")


def _open_folder(source: str, folder: Path, inputs: Sequence[InputSpec], images: ImageOptions) -> Dataset:
    where = f"'{source}'"
    sets = proto_folders(folder)
    arrays = {suffix: sorted(folder.glob(f"*{suffix}")) for suffix in (".npz", ".npy")}
    kinds = [kind for kind, found in (("test_data_set_* folders", sets), *arrays.items()) if found]
    if len(kinds) > 1:
        raise DataError(f"{where} holds {' and '.join(kinds)}; a source is of one kind")
    if not kinds:
        if not has_images(folder):
            raise DataError(f"{where} holds no images, no .npz or .npy files, and no test_data_set_* folders")
        return SampleDataset(source, where, inputs, image_folder(folder, inputs, images))
    _refuse_options(images, where)
    if sets:
        return ProtoDataset(source, where, inputs, sets)
    table = npz_table if arrays[".npz"] else npy_shard
    return SampleDataset(source, where, inputs, Shards(arrays[".npz"] or arrays[".npy"], inputs, table))


def _missing(source: str, path: Path) -> str:
    """The sentence for a path that does not exist, with the nearest name beside it."""
    sentence = f"there is no file or folder {source!r}"
    if not path.parent.is_dir():
        return f"{sentence} (nor its folder '{path.parent}')"
    near = difflib.get_close_matches(path.name, [each.name for each in path.parent.iterdir()], n=1)
    return f"{sentence}; did you mean {near[0]!r}?" if near else f"{sentence}; a data source is {CHOICES}"


def _refuse_options(images: ImageOptions, where: str) -> None:
    if images != PLAIN_IMAGES:
        raise UsageError(f"image options apply to folders of images, not to {where}")
