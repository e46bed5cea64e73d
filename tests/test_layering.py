"""The architecture, read from the source: who may import whom, and what every pass brings along."""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from onnxq.passes import BUILT_IN
from onnxq.pipeline import Pass
from onnxq.registry import built_in

ROOT = Path(__file__).parent.parent
CORE = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "onnxq").rglob("*.py"))
    if path.relative_to(ROOT).parts[1] != "passes"
}
PASSES = {
    f"onnxq.passes.{path.stem}".removesuffix(".__init__"): path
    for path in sorted((ROOT / "passes").glob("*.py"))
}
MODULES = CORE | PASSES
FILES = [path for name, path in PASSES.items() if name != "onnxq.passes"]


def walk(tree: ast.AST, at_import: bool) -> Iterator[ast.AST]:
    """All nodes, or those that run when the module is imported: no function bodies, nothing for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from walk(node, at_import)


def imports(path: Path, at_import: bool = False) -> set[str]:
    """Modules of the project that a file imports."""
    found: set[str] = set()
    for node in walk(ast.parse(path.read_text("utf-8")), at_import):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inner or {str(node.module)}
    return {name for name in found if name.split(".")[0] == "onnxq"}


def test_there_is_something_to_read() -> None:
    assert {"onnxq", "onnxq.pipeline", "onnxq.data"} <= CORE.keys()
    assert len(FILES) == len(BUILT_IN) >= 9
    assert "onnxq.program" in imports(CORE["onnxq.pipeline"])


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in CORE.values()}
    assert set(listed) == {".".join(folder.parts) for folder in folders} | {"onnxq.passes"}


def test_the_core_knows_passes_in_the_registry_alone() -> None:
    knowing = {
        name for name, path in CORE.items() if any(i.startswith("onnxq.passes") for i in imports(path))
    }
    assert knowing == {"onnxq.registry"}


def test_passes_know_the_core_and_not_each_other() -> None:
    for name, path in PASSES.items():
        if name != "onnxq.passes":
            assert not {i for i in imports(path) if i.startswith("onnxq.passes")}, (
                f"{name} imports another pass"
            )


def test_the_core_does_not_reach_up() -> None:
    """Passes and what they stand on know neither the command line nor the compiler."""
    upper = ("onnxq.cli", "onnxq.commands", "onnxq.compiler")
    for name, path in MODULES.items():
        if not name.startswith((*upper, "onnxq.__main__")) and name != "onnxq":
            assert not {i for i in imports(path) if i.startswith(upper)}, f"{name} reaches up"


def test_no_circles_at_import_time() -> None:
    needs = {name: imports(path, at_import=True) - {name} for name, path in MODULES.items()}
    unknown = set().union(*needs.values()) - MODULES.keys()
    assert not unknown
    graphlib.TopologicalSorter(needs).prepare()


def test_scipy_is_loaded_by_what_uses_it_alone() -> None:
    """Loading it takes longer than many a pass."""
    for name, path in MODULES.items():
        nodes = list(walk(ast.parse(path.read_text("utf-8")), at_import=True))
        loaded = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
        loaded += [str(n.module) for n in nodes if isinstance(n, ast.ImportFrom)]
        assert name == "onnxq.search.reference" or not [m for m in loaded if m.split(".")[0] == "scipy"], name


def test_only_the_command_line_prints() -> None:
    for name, path in MODULES.items():
        calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
        printed = [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
        assert not printed or name == "onnxq.cli", f"{path}:{printed} prints"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_one_pass_one_file_one_name(path: Path) -> None:
    module = importlib.import_module(f"onnxq.passes.{path.stem}")
    defined = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    (found,) = [c for c in defined if issubclass(c, Pass)]
    assert found.name in BUILT_IN
    assert found is built_in(found.name)
    assert [c for c in defined if not c.__name__.startswith("_")] == [found]
    assert found.name == path.stem.replace("_", "-")
    assert found.__name__.lower() == path.stem.replace("_", "")


def test_every_pass_has_its_tests() -> None:
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "passes").glob("test_*.py")}
    assert tests == {path.stem for path in FILES}


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_option_has_a_default_and_a_line(name: str) -> None:
    cls = built_in(name)
    names = [f.name for f in dataclasses.fields(cls)]
    assert dataclasses.MISSING not in cls.options().values()
    assert cls.__doc__
    _, _, attributes = cls.__doc__.partition("Attributes:")
    assert re.findall(r"^        (\w+): \S", attributes, re.MULTILINE) == names
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
