"""Functions named as FILE.py:FUNCTION or package.module:FUNCTION."""

import sys
from pathlib import Path

import pytest

from onnxq.data.functions import is_function, load_function
from onnxq.errors import UsageError


def refused(spec: str, kind: str = "metric") -> str:
    with pytest.raises(UsageError) as error:
        load_function(spec, kind)
    return str(error.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(
        "from math import sqrt\nfrom onnxq_test_beside import TWO\nLIMIT = 3\n"
        "def accuracy(outputs, labels):\n    return TWO\n"
        "def _hidden():\n    pass\n"
    )
    (tmp_path / "onnxq_test_beside.py").write_text("TWO = 2\n")
    return path


def test_what_names_a_function() -> None:
    for text in (
        "calib.py:feeds",
        "/a b/calib.py:feeds",
        "package.module:feeds",
        "module:feeds",
        "calib.py:",
    ):
        assert is_function(text)
    for text in ("calib.npz", "calib.py", "a/b", "a/b:c", "a b:c", "module:"):
        assert not is_function(text)


def test_a_file_and_its_neighbours(file: Path) -> None:
    path = list(sys.path)
    function = load_function(f"{file}:accuracy", "metric")
    assert function(None, None) == 2
    assert sys.path == path
    assert function.__module__ in sys.modules


def test_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_function("os.path:join", "data")("a", "b") == str(Path("a") / "b")
    (tmp_path / "onnxq_test_in_working_directory.py").write_text("def f(): return 5\n")
    monkeypatch.chdir(tmp_path)
    assert load_function("onnxq_test_in_working_directory:f", "data")() == 5


def test_a_missing_function_names_the_nearest_and_the_files_own(file: Path) -> None:
    assert refused(f"{file}:acuracy") == (
        f"unknown metric function 'acuracy' in '{file}'; did you mean 'accuracy'? The choices are: accuracy"
    )


def test_something_that_is_no_function(file: Path) -> None:
    assert refused(f"{file}:LIMIT") == f"'LIMIT' in '{file}' is a int, no metric function"


def test_texts_that_name_none() -> None:
    for text in ("accuracy", "mine.py:", ":f"):
        assert refused(text) == (
            f"{text!r} names no metric function; write FILE.py:FUNCTION or package.module:FUNCTION"
        )


def test_missing_files_and_modules(tmp_path: Path) -> None:
    path = tmp_path / "none.py"
    assert refused(f"{path}:f", "data") == f"there is no file '{path}' with a data function"
    assert refused("no_such_module_here:f") == (
        "the metric function's module 'no_such_module_here' cannot be imported: "
        "ModuleNotFoundError: No module named 'no_such_module_here'"
    )


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_module_here", "ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
    ],
)
def test_files_that_fail_to_import(tmp_path: Path, code: str, reason: str) -> None:
    path, before = tmp_path / "broken.py", set(sys.modules)
    path.write_text(code)
    message = refused(f"{path}:f", "loss")
    assert message.startswith(f"the loss function's module '{path}' cannot be imported: {reason}")
    assert not {name for name in set(sys.modules) - before if "broken" in name}
