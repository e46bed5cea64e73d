"""Pipeline text, options, and runs that name what they ran and what failed."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq import registry
from onnxq.data import InputSpec, open_data
from onnxq.errors import DataError, ModelError, OnnxqError, UsageError, unknown
from onnxq.passes import BUILT_IN
from onnxq.pipeline import Context, Pass, PassResult, Pipeline, make_pass, parse_pass
from onnxq.presets import PRESETS
from onnxq.program import Program
from onnxq.scheme import QuantScheme


@dataclass(frozen=True)
class Every(Pass):
    """A pass with an option of every kind."""

    name: ClassVar[str] = "every"
    flag: bool = False
    count: int = 3
    ratio: float = 0.5
    text: str = "plain"
    mode: Literal["fast", "exact"] = "fast"
    names: tuple[str, ...] = ()
    scheme: QuantScheme = field(default=QuantScheme.parse("int8"))
    limit: int | None = None

    def run(self, program: Program, ctx: Context) -> PassResult:
        return PassResult(self.count, facts={"text": self.text})


@dataclass(frozen=True)
class Failing(Pass):
    """A pass that fails in the way asked for."""

    name: ClassVar[str] = "failing"
    kind: str = "model"

    def run(self, program: Program, ctx: Context) -> PassResult:
        kinds = {"model": ModelError, "data": DataError, "usage": UsageError, "other": OnnxqError}
        if self.kind == "bug":
            raise KeyError("a bug")
        raise kinds[self.kind]("the sky fell")


@pytest.fixture(scope="module", autouse=True)
def _known_passes() -> Iterator[None]:
    """The built-in passes and the two above."""
    known = {**registry.passes(), "every": Every, "failing": Failing}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "passes", lambda: known)
        yield


@pytest.fixture
def program() -> Program:
    return Program(gs.Graph(), onnx.ModelProto())


def test_reading_every_kind_of_option() -> None:
    text = "every:flag=true,count=-2,ratio=1e-3,text=a=b:c,mode=exact,names=head.*|stem?,scheme=uint4:block=32,limit=7"
    assert parse_pass(text) == Every(
        True, -2, 0.001, "a=b:c", "exact", ("head.*", "stem?"), QuantScheme.parse("uint4:block=32"), 7
    )
    assert parse_pass("every:limit=none,names=,flag=false") == Every()
    assert Pipeline.parse("  every \n fold-pad\t").passes == (Every(), parse_pass("fold-pad"))
    assert Pipeline.parse("") == Pipeline(())


def test_printing_names_only_what_was_changed() -> None:
    assert str(Every()) == "every"
    assert str(Every(flag=True, names=("a", "b"))) == "every:flag=true,names=a|b"
    assert str(Pipeline((Every(limit=3), Every(text="two words")))) == "every:limit=3 'every:text=two words'"


# "" and "none" are how text says that there is no value, so tuples hold other names.
texts = st.text(st.characters(codec="utf-8"), max_size=8)
everies = st.builds(
    Every,
    flag=st.booleans(),
    count=st.integers(),
    ratio=st.floats(allow_nan=False),
    text=texts,
    mode=st.sampled_from(["fast", "exact"]),
    names=st.lists(texts.filter(bool), max_size=3).map(tuple),
    scheme=st.sampled_from(
        [QuantScheme.parse(t) for t in ("int8", "uint4:block=32", "int2:channel:asymmetric")]
    ),
    limit=st.none() | st.integers(),
)


@given(st.lists(everies, max_size=3))
def test_text_round_trip(passes: list[Every]) -> None:
    pipeline = Pipeline(tuple(passes))
    assert Pipeline.parse(str(pipeline)) == pipeline


@given(everies)
def test_one_pass_round_trip(step: Every) -> None:
    assert parse_pass(str(step)) == step


def test_presets_read_and_print_as_they_are() -> None:
    for text in PRESETS.values():
        assert str(Pipeline.parse(text)) == text


def test_built_in_passes_round_trip() -> None:
    text = " ".join(BUILT_IN)
    assert str(Pipeline.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("evry", r"unknown pass 'evry'; did you mean 'every'\? The choices are: annotate, .*"),
        (":flag=true", r"unknown pass ''; the choices are: .*"),
        (
            "every:cont=3",
            r"unknown option 'cont' of pass 'every'; did you mean 'count'\?"
            r" The choices are: count, flag, limit, mode, names, ratio, scheme, text",
        ),
        ("fold-pad:x=1", r"unknown option 'x' of pass 'fold-pad'; there are none"),
        ("every:flag", r"option 'flag' of pass 'every' has no value; write flag=VALUE"),
        ("every:flag=yes", r"option 'flag' of pass 'every': 'yes' is neither true nor false"),
        ("every:count=2.5", r"option 'count' of pass 'every': '2\.5' is no whole number"),
        ("every:limit=x", r"option 'limit' of pass 'every': 'x' is no whole number"),
        ("every:ratio=x", r"option 'ratio' of pass 'every': 'x' is no number"),
        (
            "every:mode=exct",
            r"option 'mode' of pass 'every': unknown value 'exct'; did you mean 'exact'\? .*",
        ),
        ("every:scheme=int99", r"option 'scheme' of pass 'every': cannot read the scheme 'int99'; it is .*"),
        ("every:count=1,count=2", r"option 'count' of pass 'every' is given twice"),
        ("every 'fold-pad", r"cannot read the pipeline .*: No closing quotation"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}$"):
        Pipeline.parse(text)


def test_passes_from_values() -> None:
    assert make_pass(Every, {"count": 5}) == Every(count=5)
    with pytest.raises(UsageError, match=r"unknown option 'counts' of pass 'every'; did you mean 'count'\?"):
        make_pass(Every, {"counts": 5})


def test_options_set_from_outside() -> None:
    pipeline = Pipeline.parse("fold-pad every:flag=true every")
    changed = pipeline.with_option("count", "7")
    assert str(changed) == "fold-pad every:flag=true,count=7 every:count=7"
    assert pipeline.with_option("names", ("a,b",)).passes[2] == Every(names=("a,b",))
    assert pipeline.with_option("names", "a|b").passes[2] == Every(names=("a", "b"))
    assert str(pipeline) == "fold-pad every:flag=true every"
    with pytest.raises(UsageError, match=r"no pass of the pipeline 'fold-pad .*' has the option 'weights'"):
        pipeline.with_option("weights", "int8")
    assert pipeline.with_option("weights", "int8", needed=False) == pipeline
    with pytest.raises(UsageError, match=r"option .count. of pass .every.: .many. is no whole number"):
        pipeline.with_option("count", "many")


def test_a_run_tells_what_every_pass_did(program: Program) -> None:
    seen: list[tuple[str, int, int | None]] = []
    context = Context(progress=lambda label, done, total: seen.append((label, done, total)))
    steps = Pipeline.parse("every:count=2 fold-pad").run(program, context)
    assert [(s.spec, s.name, s.result.changed) for s in steps] == [
        ("every:count=2", "every", 2),
        ("fold-pad", "fold-pad", 0),
    ]
    assert steps[0].result.facts == {"text": "plain"}
    assert all(s.seconds >= 0 for s in steps)
    assert seen == [("every", 0, None), ("fold-pad", 0, None)]


@pytest.mark.parametrize(
    ("kind", "error"), [("model", ModelError), ("data", DataError), ("other", OnnxqError)]
)
def test_a_failure_names_the_culprit_and_keeps_its_kind(
    program: Program, kind: str, error: type[OnnxqError]
) -> None:
    with pytest.raises(OnnxqError) as caught:
        Pipeline.parse(f"every failing:kind={kind} every").run(program, Context())
    assert type(caught.value) is error
    assert str(caught.value) == "pass 2/3 (failing) failed: the sky fell"
    assert str(caught.value.__cause__) == "the sky fell"


def test_wrong_usage_and_bugs_come_through_as_they_are(program: Program) -> None:
    with pytest.raises(UsageError, match=r"^the sky fell$"):
        Pipeline.parse("failing:kind=usage").run(program, Context())
    with pytest.raises(KeyError, match="a bug"):
        Pipeline.parse("failing:kind=bug").run(program, Context())


def test_a_pass_without_a_run_cannot_be_made() -> None:
    class Idle(Pass):
        name = "idle"

    with pytest.raises(TypeError, match="abstract"):
        Idle()  # type: ignore[abstract]


def test_options_are_what_may_not_change() -> None:
    assert list(Every.options()) == [f.name for f in dataclasses.fields(Every)]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Every().count = 4  # type: ignore[misc]


def test_the_generator_starts_from_the_seed() -> None:
    draws = [Context(seed=seed).rng().integers(0, 2**31, 4) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


def test_a_pass_gets_the_samples_it_wants_unless_their_number_is_chosen() -> None:
    x = np.zeros((40, 4), np.float32)
    four = open_data({"x": x}, [InputSpec("x", np.dtype(np.float32), (4, 4))])
    assert Context().up_to(300) == 300
    assert Context(samples=20).up_to(300) == 20
    assert Context(samples=20).up_to(8) == 8
    assert Context(four, samples=2).up_to(300) == 4  # the model takes four at a time
    assert Context(four).up_to(1) == 4


def test_unknown_names_are_told_with_the_choices() -> None:
    assert str(unknown("colour", "gren", ["red", "green"], where=" of the flag")) == (
        "unknown colour 'gren' of the flag; did you mean 'green'? The choices are: green, red"
    )
    assert str(unknown("colour", "xyz", ["red"])) == "unknown colour 'xyz'; the choices are: red"
    assert str(unknown("colour", "xyz", [])) == "unknown colour 'xyz'; there are none"


def test_printed_words_survive_a_shell() -> None:
    text = str(Pipeline((Every(text='it\'s a "test" \\ 1'),)))
    assert len(shlex.split(text)) == 1
