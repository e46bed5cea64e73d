"""Which kind of source a path or an object is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxq.data import ImageOptions, InputSpec, open_data
from onnxq.errors import DataError, UsageError

ONE = (InputSpec("x", np.dtype(np.float32), ("N", 2)),)
X = np.arange(6, dtype=np.float32).reshape(3, 2)


def refused(source: Any, inputs: tuple[InputSpec, ...] = ONE) -> str:
    with pytest.raises(DataError) as error:
        open_data(source, inputs)
    return str(error.value)


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    np.savez(tmp_path / "calib.npz", x=X)
    path = tmp_path / "clib.npz"
    assert refused(path) == f"there is no file or folder '{path}'; did you mean 'calib.npz'?"
    path = tmp_path / "zzzz"
    assert refused(path).startswith(f"there is no file or folder '{path}'; a data source is a .npz file, ")
    path = tmp_path / "none" / "calib.npz"
    assert refused(path) == f"there is no file or folder '{path}' (nor its folder '{tmp_path / 'none'}')"


def test_files_of_other_kinds(tmp_path: Path) -> None:
    for name in ("a.csv", "calib.py"):
        (tmp_path / name).touch()
    path = tmp_path / "a.csv"
    assert refused(path).startswith(f"'{path}' is no data source; give a .npz file, a .npy file, a folder")
    path = tmp_path / "calib.py"
    assert refused(str(path)) == f"'{path}' names no function; write {path}:FUNCTION"


def test_folders_of_no_kind_and_of_two(tmp_path: Path) -> None:
    where = f"'{tmp_path}'"
    assert (
        refused(tmp_path) == f"{where} holds no images, no .npz or .npy files, and no test_data_set_* folders"
    )
    np.savez(tmp_path / "a.npz", x=X)
    np.save(tmp_path / "b.npy", X)
    assert refused(tmp_path) == f"{where} holds .npz and .npy; a source is of one kind"
    (tmp_path / "b.npy").unlink()
    (tmp_path / "test_data_set_0").mkdir()
    assert refused(tmp_path) == f"{where} holds test_data_set_* folders and .npz; a source is of one kind"


def test_a_path_that_looks_like_a_function_but_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("calib:v2").mkdir()
    np.save("calib:v2/a.npy", X)
    assert open_data("calib:v2", ONE).count() == 3


def test_functions_by_name(tmp_path: Path) -> None:
    path = tmp_path / "calib.py"
    path.write_text("def feeds(): pass\n")
    with pytest.raises(UsageError) as error:
        open_data(f"{path}:fees", ONE)
    assert str(error.value) == (
        f"unknown data function 'fees' in '{path}'; did you mean 'feeds'? The choices are: feeds"
    )
    with pytest.raises(UsageError, match="names no data function"):
        open_data(f"{path}:", ONE)


def test_a_model_without_inputs() -> None:
    assert refused({}, ()) == "the model has no inputs to feed"


def test_an_array_is_for_the_only_input() -> None:
    (batch,) = open_data(X, ONE).batches(8)
    np.testing.assert_array_equal(batch.feeds["x"], X)
    two = (*ONE, InputSpec("z", np.dtype(np.float32), ("N", 2)))
    assert refused(X, two) == ("the array is for one input, but the model has 2: x, z; give a dict of arrays")


def test_image_options_apply_to_images_only(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X)
    options = ImageOptions(size=8)
    for source, name in (
        (tmp_path / "a.npz", f"'{tmp_path / 'a.npz'}'"),
        (tmp_path, f"'{tmp_path}'"),
        ("module:function", "'module:function'"),
        ({"x": X}, "a Python object"),
    ):
        with pytest.raises(UsageError) as error:
            open_data(source, ONE, images=options)
        assert str(error.value) == f"image options apply to folders of images, not to {name}"
