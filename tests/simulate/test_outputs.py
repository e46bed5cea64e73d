"""Outputs of quantized layers get the means and spreads that they have in float, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import onnxq
import onnxq.simulate.outputs as outputs
import onnxq.simulate.walk as walk
from onnxq.affine import dequantize
from onnxq.data import input_specs, open_data
from onnxq.errors import DataError, UsageError
from onnxq.model.session import make_session
from onnxq.passes.correct_bias import CorrectBias
from onnxq.pipeline import Context, Pipeline
from onnxq.program import Program

Array = NDArray[Any]
ParseProgram = Callable[..., Program]

RNG = np.random.default_rng(5)
IMAGES = RNG.gamma(1.0, size=(256, 6, 8, 8)).astype(np.float32)
WEIGHTS: dict[str, Array] = {
    "v": RNG.normal(size=(12, 6, 3, 3)).astype(np.float32),
    "w": RNG.normal(size=(8, 12, 1, 1)).astype(np.float32),
    "b": RNG.normal(size=8).astype(np.float32),
}
TEXT = """g (float[N,6,8,8] x) => (float[a,b,c,d] y) {
    h = Conv<pads=[1,1,1,1]>(x, v) r = Relu(h) y = Conv(r, w, b)
}"""
PLAN = "calibrate:ranges=mse choose-ranges quantize-weights"


def context(program: Program, x: Array = IMAGES, **more: Any) -> Context:
    return Context(open_data({"x": x}, input_specs(program.source)), threads=1, **more)


def prepared(parse: ParseProgram, options: str, weights: Mapping[str, Array] = WEIGHTS) -> Program:
    program = parse(TEXT, dict(weights), 25)  # has codes of 2 bits
    Pipeline.parse(f"annotate:small=0,first_last=same,{options} {PLAN}").run(program, context(program))
    return program


def deployed(program: Program) -> Array:
    """What the second layer makes of the codes that arrive, before its own are rounded, (places, C)."""
    Pipeline.parse("emit-qdq").run(program, context(program))
    codes, model = program.codes["r"], program.to_model()
    (found,) = make_session(model, threads=1, extra_outputs=[codes]).run([codes], {"x": IMAGES})
    inputs = np.moveaxis(dequantize(found, program.params("r")), 1, -1).reshape(-1, 12)
    decision = program.plan["w"]
    assert decision.codes is not None
    assert decision.params is not None
    bias = next(iter(b for name, b in program.biases.items() if len(b) == 8))
    rows: Array = inputs @ dequantize(decision.codes, decision.params).reshape(8, 12).T + bias
    return rows


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_means_and_spreads_are_those_of_float(
    parse_program: ParseProgram, bits: int, granularity: str
) -> None:
    (y,) = make_session(parse_program(TEXT, WEIGHTS, 21).to_model(), threads=1).run(None, {"x": IMAGES})
    mean, spread = y.mean(axis=(0, 2, 3)), y.std(axis=(0, 2, 3))
    means, spreads = {}, {}
    for correction in ("output", "deployed"):
        program = prepared(parse_program, f"weights=int{bits}:{granularity},activations=uint{bits}")
        Pipeline.parse(f"correct-bias:correction={correction}").run(program, context(program))
        found = deployed(program)
        means[correction] = np.abs(found.mean(axis=0) - mean) / spread
        spreads[correction] = np.abs(found.std(axis=0) / spread - 1.0)
    # 2,048 random places of errors as large as the signal tell a mean to 2 % of the spread
    assert means["deployed"].max() < 0.06
    assert means["deployed"].mean() < means["output"].mean()
    if granularity == "tensor":  # one factor for all channels
        assert found.var(axis=0).sum() == pytest.approx((spread**2).sum(), rel=0.06)
        return
    assert spreads["deployed"].max() < 0.06
    assert spreads["deployed"].mean() < spreads["output"].mean()


def test_scales_change_within_bounds_and_the_program_not_at_all(parse_program: ParseProgram) -> None:
    program = prepared(parse_program, "weights=int2:channel,activations=uint8")
    matched = outputs.match_outputs(program, context(program))
    before = {name: program.params(name).scale for name in ("v", "w")}
    assert matched.biases.keys() == set(program.units)
    for name, decision in matched.plan.items():
        assert decision.params is not None
        factor = decision.params.scale / before[name]
        assert factor.shape == before[name].shape
        assert (factor >= 0.5).all()
        assert (factor <= 2.0).all()
        assert decision.codes is program.plan[name].codes
    assert program.params("v").scale is before["v"]  # the program is not changed


def test_scales_of_shared_weights_stay(parse_program: ParseProgram) -> None:
    text = """g (float[N,6,8,8] x) => (float[a,b,c,d] y, float[e,f,g,h] z) {
        y = Conv<pads=[1,1,1,1]>(x, v) z = Conv<pads=[1,1,1,1],strides=[2,2]>(x, v)
    }"""
    program = parse_program(text, {"v": WEIGHTS["v"]}, 21)
    Pipeline.parse(f"annotate:small=0,first_last=same,weights=int3:channel {PLAN}").run(
        program, context(program)
    )
    matched = outputs.match_outputs(program, context(program))
    assert not matched.plan
    assert len(matched.biases) == 2


def test_products_without_a_bias_get_a_scale_alone(parse_program: ParseProgram) -> None:
    weights = RNG.normal(size=(48, 16)).astype(np.float32)
    x = RNG.gamma(1.0, size=(256, 48)).astype(np.float32)
    program = parse_program("g (float[N,48] x) => (float[a,b] y) { y = MatMul(x, w) }", {"w": weights}, 21)
    Pipeline.parse(f"annotate:small=0,first_last=same,weights=int3:channel {PLAN}").run(
        program, context(program, x)
    )
    matched = outputs.match_outputs(program, context(program, x))
    assert matched.plan.keys() == {"w"}
    assert not matched.biases


def test_as_many_samples_as_fit(parse_program: ParseProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    program = prepared(parse_program, "weights=int3:channel,activations=uint4")
    seen: list[int] = []

    def listen(label: str, done: int, total: int | None) -> None:
        if label == "float outputs" and total is not None:
            seen.append(total)

    ctx = context(program, progress=listen)
    one = 4 * 6 * 8 * 8  # bytes of a sample: the input takes more than the codes between the layers
    for memory, wanted in ((1 << 20, 128), (20 * one, 20), (1, 1)):
        monkeypatch.setattr(walk, "MEMORY", memory)
        outputs.match_outputs(program, ctx)
        assert seen[-1] == wanted


def test_biases_fit_into_their_codes(parse_program: ParseProgram) -> None:
    """A channel whose spread would shrink the scale below what its bias needs keeps that scale."""
    weights = dict(WEIGHTS) | {"b": np.full(8, 3e7, np.float32)}
    program = prepared(parse_program, "weights=int2:channel,activations=uint8", weights)
    Pipeline.parse("correct-bias:correction=deployed emit-qdq").run(program, context(program))
    (y,) = make_session(program.to_model(), threads=1).run(None, {"x": IMAGES[:4]})
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y.mean(), 3e7, rtol=0.01)


def sqnr_db(model: Path, calibration: Path, bits: str, correction: str | None) -> float:
    """Of the compiled network's output, on the samples that `auto` is judged by too."""
    done = onnxq.compile_model(
        model, calibration, bits=bits, bias_correction=correction, threads=1, speed=False
    )
    assert done.report.difference is not None
    assert done.report.difference.main is not None
    assert done.report.difference.main.sqnr_db is not None
    return done.report.difference.main.sqnr_db


def test_the_digits_keep_more(models_dir: Path) -> None:
    """A network of few bits: SQNR of its output by what is corrected."""
    files = models_dir / "digits_cnn.onnx", models_dir / "digits_calib.npz"
    found = {kind: sqnr_db(*files, "w3a3", kind) for kind in ("none", "output", "deployed", None)}
    assert max(found["none"], found["output"]) < found["deployed"] - 1.0
    assert found[None] == found["deployed"]


@pytest.mark.parametrize("correction", ["auto", "deployed", "output"])
def test_the_report_says_what_became_of_outputs(models_dir: Path, correction: str) -> None:
    files = models_dir / "digits_cnn.onnx", models_dir / "digits_calib.npz"
    done = onnxq.compile_model(*files, bits="w3a4", bias_correction=correction, threads=1, speed=False)
    report = done.report
    if correction == "output":
        assert report.outputs is None
        return
    assert report.outputs is not None
    assert report.outputs["matched"]
    assert (report.outputs["sqnr_db"] is None) == (correction == "deployed")
    if report.outputs["sqnr_db"]:
        assert report.difference is not None
        assert report.difference.main is not None
        # of the same samples as the report's; the emitted graph has other padding, which rounds floats otherwise
        assert report.outputs["sqnr_db"][1] == pytest.approx(report.difference.main.sqnr_db, abs=0.01)


@pytest.mark.parametrize("bits", ["w4a8", "w2a4"])
@pytest.mark.parametrize("model", ["digits_cnn", "digits_transformer"])
def test_auto_takes_what_has_less_noise(models_dir: Path, model: str, bits: str) -> None:
    files = models_dir / f"{model}.onnx", models_dir / "digits_calib.npz"
    found = {kind: sqnr_db(*files, bits, kind) for kind in ("output", "deployed", "auto", "better")}
    assert found["auto"] == found["better"] == max(found["output"], found["deployed"])


def test_auto_leaves_what_would_add_noise(
    parse_program: ParseProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = prepared(parse_program, "weights=int4:channel,activations=uint4")
    ctx, good = context(program), outputs.match_outputs(program, context(program))
    decision = good.plan["w"]
    assert decision.params is not None
    params = replace(decision.params, scale=2 * decision.params.scale)
    bad = outputs.Matched(good.plan | {"w": replace(decision, params=params)}, good.biases)
    for found, is_taken in ((good, True), (bad, False)):
        monkeypatch.setattr(outputs, "match_outputs", lambda *_, found=found: found)
        assert outputs.matched(program, ctx, "deployed") is found
        judged = outputs.matched(program, ctx, "auto")
        better = outputs.matched(program, ctx, "better")
        assert (better.plan, better.biases) == (judged.plan, judged.biases)
        again = prepared(parse_program, "weights=int4:channel,activations=uint4")
        facts = CorrectBias().run(again, ctx).facts["outputs"]
        assert facts == {"matched": is_taken, "sqnr_db": judged.sqnr_db}
        assert judged.sqnr_db is not None
        assert (judged.sqnr_db[1] > judged.sqnr_db[0]) == is_taken
        assert (judged.plan, judged.biases) == ((found.plan, found.biases) if is_taken else ({}, {}))


def test_what_a_search_ended_with_stays_where_matching_anew_is_clearly_worse(
    parse_program: ParseProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = prepared(parse_program, "weights=int4:channel,activations=uint4")
    ctx, good = context(program), outputs.match_outputs(program, context(program))
    program.plan.update(good.plan)
    program.searched = dict(good.biases)
    decision = good.plan["w"]
    assert decision.params is not None
    for factor, is_kept in ((1.0, False), (1.5, True)):
        params = replace(decision.params, scale=factor * decision.params.scale)
        anew = outputs.Matched({"w": replace(decision, params=params)}, good.biases)
        monkeypatch.setattr(outputs, "match_outputs", lambda *_, anew=anew: anew)
        for correction in ("auto", "deployed"):
            found = outputs.matched(program, ctx, correction)
            assert found.plan == ({} if is_kept else anew.plan)
            assert found.biases == program.searched
            assert found.sqnr_db is None


def test_fewer_samples_where_the_network_cannot_be_cut(
    planned: Callable[..., tuple[Program, Context]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the layers of the transformer there are floats: each layer takes a run of its own."""
    program, ctx = planned("digits_transformer")
    found = []
    for runs in (1 << 10, 1):
        monkeypatch.setattr(walk, "RUNS", runs)
        sources = {u.name: u.inputs[0] for u in program.units.values() if u.weight is not None and u.inputs}
        found.append(walk.Walk(program, ctx, sources).affordable(64))
    assert found[0] == 64
    assert 1 <= found[1] <= 64 // 4  # of its four products alone


def test_what_bodies_read_from_outside_reaches_them(parse_program: ParseProgram) -> None:
    """The network is cut in front of its second layer, and a node behind the cut has bodies that read codes from before it."""
    text = """g (float[N,6,8,8] x, bool take) => (float[a,b,c,d] y, float[a,b,c,d] z) {
        h = Conv<pads=[1,1,1,1]>(x, v)
        r = Relu(h)
        p = GlobalAveragePool(r)
        y = Conv(r, w, b)
        z = If(take) <
            then_branch = g1 () => (float[a,b,c,d] s) { m = Conv(p, u) s = Add(m, y) },
            else_branch = g2 () => (float[a,b,c,d] s) { m = Conv(p, u) s = Mul(m, y) }
        >
    }"""
    program = parse_program(text, WEIGHTS | {"u": WEIGHTS["w"]}, 25)
    feeds = [{"x": IMAGES[i : i + 8], "take": np.array(i == 0)} for i in range(0, 16, 8)]
    ctx = Context(open_data(feeds, input_specs(program.source)), threads=1)
    plan = f"annotate:small=0,first_last=same,weights=int4:channel {PLAN}"
    Pipeline.parse(f"{plan} correct-bias:correction=deployed emit-qdq").run(program, ctx)
    assert set(program.biases) == {u.name for u in program.units.values() if u.weight is not None}
    found = make_session(program.to_model(), threads=1).run(["y", "z"], feeds[0])
    exact = make_session(program.source, threads=1).run(["y", "z"], feeds[0])
    for a, b in zip(exact, found, strict=True):
        assert np.var(a - b) < 0.1 * np.var(a)  # 4-bit weights leave about 0.02


def test_auto_leaves_8_bits_to_the_means_of_weights(parse_program: ParseProgram) -> None:
    biases = []
    for correction in ("auto", "output"):
        program = prepared(parse_program, "weights=int8:channel,activations=uint8")
        before = program.params("w")
        Pipeline.parse(f"correct-bias:correction={correction}").run(program, context(program))
        assert program.params("w") is before
        biases.append(program.biases)
    for name, bias in biases[0].items():
        np.testing.assert_array_equal(bias, biases[1][name])


def test_refusals(parse_program: ParseProgram) -> None:
    program = prepared(parse_program, "weights=int4:channel,activations=uint4")
    with pytest.raises(DataError, match="give some with --calib"):
        Pipeline.parse("correct-bias:correction=deployed").run(program, Context())
    program = prepared(parse_program, "weights=int4:channel,activations=uint4,sides=weights")
    with pytest.raises(UsageError, match="weights alone are quantized"):
        Pipeline.parse("correct-bias:correction=deployed").run(program, context(program))
    Pipeline.parse("correct-bias").run(program, context(program))  # auto


def test_a_bias_that_changes_on_the_way_reaches_the_layers_behind(parse_program: ParseProgram) -> None:
    text = """g (float[N,6] x) => (float[N,6] y) {
        a = Gemm(x, u) s = Tanh(a) e = Exp(s) b = Gemm(s, v) t = Tanh(b) c = Gemm(t, w) y = Div(c, e)
    }"""  # e is float: the network cannot be cut between the layers
    x = RNG.normal(size=(64, 6)).astype(np.float32)
    weights = {name: RNG.normal(size=(6, 6)).astype(np.float32) for name in "uvw"}

    def arriving(bias: float | None) -> Array:
        program = parse_program(text, weights)
        Pipeline.parse(f"annotate:small=0,first_last=same {PLAN}").run(program, context(program, x))
        units = {unit.weight: unit for unit in program.units.values() if unit.weight}
        way = walk.Walk(program, context(program, x), {u.name: u.inputs[0] for u in units.values()})
        found = {}
        for name, arrived in way.layers([{"x": x}]):
            found[name] = np.concatenate(list(arrived))
            if name == units["v"].name and bias is not None:
                way.biases[name] = np.full(6, bias, np.float32)
        codes = found[units["w"].name]
        return np.asarray(dequantize(codes, program.params(units["w"].inputs[0])))

    assert arriving(-20.0).max() < -0.95  # of a tangent
    assert arriving(None).max() > 0.5
