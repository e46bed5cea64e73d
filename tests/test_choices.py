"""What follows from a user's choices: schemes refine bits, bits refine the preset, and contradictions are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxq.choices import Choices
from onnxq.errors import UsageError
from onnxq.pipeline import Pipeline


def options(steps: Pipeline, name: str) -> dict[str, str]:
    """Printed options of one pass."""
    found = next(p for p in steps.passes if p.name == name)
    return {option: str(getattr(found, option)) for option in found.options()}


def test_nothing_chosen_is_the_preset() -> None:
    assert str(Choices().resolve(has_data=True)) == str(Choices(preset="int8").resolve(has_data=True))
    assert options(Choices().resolve(True), "annotate")["weights"] == "int8:channel"


def test_bits_refine_the_preset_and_schemes_refine_bits() -> None:
    steps = Choices(preset="int8-accurate", bits="w4a3").resolve(True)
    annotate = options(steps, "annotate")
    assert (annotate["weights"], annotate["activations"]) == ("int4:channel", "uint3")
    assert options(steps, "round-weights")["when"] == "always"  # the preset's own
    annotate = options(Choices(bits="w4a3", weights="int5:tensor").resolve(True), "annotate")
    assert (annotate["weights"], annotate["activations"]) == ("int5", "uint3")
    annotate = options(Choices(bits="w4a3", activations="int6").resolve(True), "annotate")
    assert (annotate["weights"], annotate["activations"]) == ("int4:channel", "int6")


def test_options_reach_every_pass_that_has_them() -> None:
    steps = Choices(
        bits="w4a4", override=("a=w8a8",), first_last="same", elementwise="same", skip=("b",)
    ).resolve(True)
    annotate = options(steps, "annotate")
    assert annotate["override"] == "('a=w8a8',)"
    assert (annotate["first_last"], annotate["elementwise"], annotate["skip"]) == ("same", "same", "('b',)")
    assert options(steps, "equalize")["activations"] == "uint4"


@pytest.mark.parametrize("choices", [Choices(bits="w4"), Choices(bits="w4a4", activations="float")])
def test_without_activations_only_weights_are_stored(choices: Choices) -> None:
    for has_data in (True, False):
        steps = choices.resolve(has_data)
        assert [p.name for p in steps.passes][-1] == "store-weights"
        assert options(steps, "store-weights")["weights"] == "int4:block=32"
        assert not choices.falls_back(has_data)


def test_without_data_products_are_quantized_at_run_time() -> None:
    assert Choices().falls_back(has_data=False)
    steps = Choices(bits="w4a8").resolve(has_data=False)
    assert options(steps, "quantize-dynamic")["weights"] == "int4:channel"


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (Choices(bits="w4a4"), "activations can only be chosen with calibration data"),
        (Choices(activations="uint8"), "activations can only be chosen with calibration data"),
        (Choices(ranges="mse"), "ranges can only be chosen with calibration data"),
        (Choices(preset="int9"), "unknown preset 'int9'"),
        (Choices(preset="int9", bits="w4"), "unknown preset 'int9'"),
        (Choices(target="ort"), "unknown target 'ort'; did you mean 'ort-cpu'"),
        (Choices(preset="int8", pipeline="annotate"), "give a preset or a pipeline, not both"),
        (
            Choices(bits="w4a8", multipoint=0.1, multipoint_error=0.1),
            "give one of multipoint, multipoint-error",
        ),
        (Choices(bits="w4a8", multipoint=0.1), "multipoint judges channels by calibration data"),
        (
            Choices(pipeline="annotate", bits="w4"),
            "activations are to stay float, and the pipeline 'annotate'",
        ),
        (
            Choices(pipeline="fold-pad", bits="w4a8"),
            "no pass of the pipeline 'fold-pad' has the option 'weights'",
        ),
    ],
)
def test_what_cannot_be_is_refused(choices: Choices, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        choices.resolve(has_data=False)


def test_further_points_stand_behind_what_chooses_codes() -> None:
    for choices in (Choices(bits="w4a8", multipoint=0.1), Choices(override=("fc=w4a8",), multipoint=0.1)):
        steps = choices.resolve(True)
        assert options(steps, "multipoint")["share"] == "0.1"
    names = [p.name for p in Choices(bits="w3a3", ranges="lapq", multipoint_error=0.1).resolve(True).passes]
    assert names.index("round-weights") < names.index("multipoint") < names.index("search-norm")
    assert options(Choices(bits="w4a8", multipoint_size="1MB").resolve(True), "multipoint")["size"] == "1MB"


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (Choices(multipoint=0.1), "weights of 8 bits fill the codes of the kernels"),
        (Choices(bits="w8a4", multipoint_error=0.1), "weights of 8 bits fill the codes of the kernels"),
        (Choices(bits="w4a8", multipoint_size="4xB"), "cannot read the size '4xB'"),
        (Choices(bits="w4", multipoint=0.1), "multipoint needs integer activations"),
        (Choices(pipeline="annotate calibrate", multipoint=0.1), "has the option 'share'"),
    ],
)
def test_further_points_that_cannot_be(choices: Choices, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        choices.resolve(has_data=True)


@pytest.mark.parametrize(
    ("choices", "has_data", "said"),
    [
        (
            Choices(min_sqnr=20.0),
            False,
            "min-sqnr is measured on calibration samples; give some with --calib",
        ),
        (Choices(bits="w4", min_sqnr=20.0), True, "min-sqnr needs integer activations, as in --bits w4a8"),
        (Choices(pipeline="fold-pad", min_sqnr=20.0), True, "the pipeline is 'fold-pad'"),
        (Choices(min_sqnr=float("nan")), True, "min-sqnr is a number of dB, not nan"),
        (
            Choices(bits="w4a4", ranges="lapq", checkpoint="state.npz", min_sqnr=20.0),
            True,
            "a checkpoint keeps one search, and min-sqnr compiles several times",
        ),
    ],
)
def test_a_floor_that_cannot_be_kept_or_measured(choices: Choices, has_data: bool, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        choices.resolve(has_data)


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        (Choices(bits="w3a8"), "8"),
        (Choices(bits="w3a8", min_sqnr=20.0), "same"),
        (Choices(bits="w3a8", min_sqnr=20.0, first_last="8"), "8"),
        (Choices(pipeline="annotate", min_sqnr=20.0), "8"),
    ],
)
def test_a_floor_finds_itself_which_ends_need_8_bits(choices: Choices, expected: str) -> None:
    assert options(choices.resolve(True), "annotate")["first_last"] == expected


def test_options_of_the_search_and_lists_reach_their_passes() -> None:
    steps = Choices(
        bits="w4a4",
        ranges="lapq",
        search_budget="30",
        checkpoint=Path("state.npz"),
        loss="mse",
        skip=["Gemm", "head"],
    ).resolve(True)
    search = next(p for p in steps.passes if p.name == "search-steps")
    assert [getattr(search, name) for name in ("budget", "checkpoint", "loss")] == ["30", "state.npz", "mse"]
    assert options(steps, "annotate")["skip"] == "('Gemm', 'head')"
