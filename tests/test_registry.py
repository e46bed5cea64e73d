"""Names of passes: built-in ones, plug-ins of other packages, and clashes."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest

from onnxq import registry
from onnxq.errors import OnnxqError, UsageError
from onnxq.passes import BUILT_IN
from onnxq.pipeline import Context, Pass, PassResult, Pipeline
from onnxq.presets import PRESETS
from onnxq.program import Program

Install = Callable[..., None]


@dataclass(frozen=True)
class Plugged(Pass):
    """A pass of another package."""

    name: ClassVar[str] = "plugged-in"
    level: int = 1

    def run(self, program: Program, ctx: Context) -> PassResult:
        return PassResult(self.level)


class Nameless(Pass):
    """A pass that forgot its name."""

    def run(self, program: Program, ctx: Context) -> PassResult:
        return PassResult()


class Misnamed(Nameless):
    """A pass whose name pipeline text could not hold."""

    name: ClassVar[str] = "a:b"


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Makes entry points known as if packages had been installed: keywords are names, values are objects."""
    module = types.ModuleType("plugin_package")
    for cls in (Plugged, Nameless, Misnamed):
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "plugin_package", module)

    def installed(**points: str) -> None:
        found = [EntryPoint(name, value, registry.GROUP) for name, value in points.items()]
        monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in found if p.group == group])
        registry.passes.cache_clear()

    yield installed
    registry.passes.cache_clear()


def test_the_built_in_passes_come_first_under_their_names(install: Install) -> None:
    install(p="plugin_package:Plugged")
    assert list(registry.passes()) == [*BUILT_IN, "plugged-in"]
    for name in BUILT_IN:
        assert registry.find_pass(name) is registry.passes()[name]


def test_a_broken_plug_in_does_not_stop_a_pipeline_without_it(install: Install) -> None:
    install(bad="no_such_package:Pass")
    assert str(Pipeline.parse("fold-pad")) == "fold-pad"
    with pytest.raises(OnnxqError, match="cannot be imported"):
        Pipeline.parse("fold-pad bad")


def test_a_pipeline_loads_its_own_passes_alone() -> None:
    code = "import sys; from onnxq.pipeline import Pipeline; Pipeline.parse(sys.argv[1]); print(*sys.modules)"
    command = [sys.executable, "-c", code, PRESETS["int8"]]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert {f"onnxq.passes.{name.replace('-', '_')}" for name in PRESETS["int8"].split()} <= set(loaded)
    assert not {"onnxq.passes.search_steps", "onnxq.search", "onnxq.simulate", "onnxq.points"} & set(loaded)


def test_a_plug_in_works_in_pipeline_text(install: Install) -> None:
    install(p="plugin_package:Plugged")
    pipeline = Pipeline.parse("fold-pad plugged-in:level=3")
    assert pipeline.passes[1] == Plugged(level=3)
    assert str(pipeline) == "fold-pad plugged-in:level=3"


def test_an_unknown_pass_is_named_with_the_nearest_and_all_choices(install: Install) -> None:
    install(p="plugin_package:Plugged")
    with pytest.raises(
        UsageError, match=r"unknown pass 'fold-batchnrm'; did you mean 'fold-batchnorm'\?"
    ) as error:
        registry.find_pass("fold-batchnrm")
    assert all(name in str(error.value) for name in registry.passes())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_package:Pass", "cannot be imported: No module named 'no_such_package'"),
        ("plugin_package:Absent", "cannot be imported: .*no attribute 'Absent'"),
        ("json:JSONDecoder", "is no subclass of onnxq.Pass"),
        ("json:loads", "is no subclass of onnxq.Pass"),
        ("plugin_package:Nameless", "has the name ''"),
        ("plugin_package:Misnamed", "has the name 'a:b'"),
        ("onnxq.passes.fold_pad:FoldPad", "takes the name 'fold-pad' of onnxq.passes.fold_pad"),
    ],
)
def test_a_bad_plug_in_is_named(install: Install, value: str, message: str) -> None:
    install(bad=value)
    with pytest.raises(OnnxqError, match=f"the plug-in pass 'bad' .{value}. {message}"):
        registry.passes()


def test_two_plug_ins_of_one_name_clash(install: Install) -> None:
    install(one="plugin_package:Plugged", two="plugin_package:Plugged")
    with pytest.raises(OnnxqError, match=r"'two' .* takes the name 'plugged-in' of"):
        registry.passes()
