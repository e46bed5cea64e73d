"""Hard swish, hard sigmoid and GELU between convolutions: in integers, in float, and as onnxruntime's own quantizer leaves them.

    python bench/activations.py        writes bench/results/activations.json; needs no data

Networks of inverted residual blocks with random weights, 96 x 96 pixels, W8A8. Speed is the time of float over that of each, all
in turn on one thread; `vnni` says whether the CPU sums 8-bit products in 32 bits.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from int8 import compile_theirs, speeds
from onnx import numpy_helper, parser
from peers.run import has_vnni

import onnxq
from onnxq.data import input_specs, open_data
from onnxq.measure.compare import compare_sessions
from onnxq.model.load import load_model
from onnxq.model.session import make_session
from onnxq.presets import PRESETS

RESULTS = Path(__file__).parent / "results" / "activations.json"
BLOCKS, WIDTH, INNER, SIDE = 6, 24, 96, 96
BATCHES = (1, 8)
IN_FLOAT = PRESETS["int8"].replace(" fold-activations", "")
SWISH = "{y}a = Add({x}, three) {y}c = Clip({y}a, zero, six) {y}m = Mul({x}, {y}c) {y} = Div({y}m, six)"
GELU = (
    "{y}d = Div({x}, root) {y}e = Erf({y}d) {y}a = Add({y}e, one) {y}m = Mul({x}, {y}a) {y} = Mul({y}m, half)"
)
GATE = (
    "{y}p = GlobalAveragePool({x}) {y}q = Conv({y}p, {y}w) {y}r = Relu({y}q) {y}s = Conv({y}r, {y}v)"
    " {y}g = HardSigmoid({y}s) {y} = Mul({x}, {y}g)"
)
NETWORKS = {
    "hard swish in four nodes": (SWISH, ""),
    "HardSwish": ("{y} = HardSwish({x})", ""),
    "Relu, gates of HardSigmoid": ("{y} = Relu({x})", GATE),
    "HardSwish, gates of HardSigmoid": ("{y} = HardSwish({x})", GATE),
    "GELU in five nodes": (GELU, ""),
}
NUMBERS = {"zero": 0.0, "half": 0.5, "one": 1.0, "three": 3.0, "six": 6.0, "root": 2.0**0.5}


@dataclass(frozen=True)
class Network:
    """A float model with its samples, as the other benchmarks have them."""

    path: Path
    calib: Path
    test: Path


def body(activation: str, gate: str) -> str:
    """The nodes of a network in ONNX text."""
    lines, last = ["t = Conv<strides=[2,2], pads=[1,1,1,1]>(x, stem)"], "t"
    for i in range(BLOCKS):
        lines += [f"e{i} = Conv({last}, we{i})", activation.format(x=f"e{i}", y=f"ea{i}")]
        lines += [
            f"d{i} = Conv<group={INNER}, pads=[1,1,1,1]>(ea{i}, wd{i})",
            activation.format(x=f"d{i}", y=f"da{i}"),
        ]
        lines += [gate.format(x=f"da{i}", y=f"gate{i}")]
        lines += [f"p{i} = Conv({'gate' if gate else 'da'}{i}, wp{i})", f"s{i} = Add({last}, p{i})"]
        last = f"s{i}"
    return " ".join([*lines, f"g = GlobalAveragePool({last}) f = Flatten(g) y = Gemm(f, head)"])


def network(directory: Path, activation: str, gate: str) -> Network:
    """Weights of the spread that keeps the spread of values, channels of different size."""
    rng = np.random.default_rng(0)
    shapes = {"stem": (WIDTH, 3, 3, 3)}
    for i in range(BLOCKS):
        shapes |= {f"we{i}": (INNER, WIDTH, 1, 1), f"wd{i}": (INNER, 1, 3, 3), f"wp{i}": (WIDTH, INNER, 1, 1)}
        if gate:
            shapes |= {f"gate{i}w": (INNER // 4, INNER, 1, 1), f"gate{i}v": (INNER, INNER // 4, 1, 1)}
    weights = {k: rng.normal(size=s) * (2 / np.prod(s[1:])) ** 0.5 for k, s in shapes.items()}
    weights |= {k: v * rng.uniform(0.5, 2.0, (len(v), 1, 1, 1)) for k, v in weights.items()}
    weights["head"] = rng.normal(size=(WIDTH, 10))
    text = body(activation, gate)
    weights |= {k: np.array(v) for k, v in NUMBERS.items() if f", {k}" in text}
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[N,3,{SIDE},{SIDE}] x) => (float[N,10] y) {{ {text} }}'
    )
    model.graph.initializer.extend(
        numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()
    )
    made = Network(directory / "float.onnx", directory / "calib.npz", directory / "test.npz")
    onnx.save(model, made.path)
    for path, count in ((made.calib, 64), (made.test, 64)):
        np.savez(path, x=rng.normal(size=(count, 3, SIDE, SIDE)).astype(np.float32))
    return made


def measure(directory: Path, activation: str, gate: str) -> dict[str, dict[str, float]]:
    """A row for each way."""
    made = network(directory, activation, gate)
    paths = {
        name: directory / f"{name}.onnx" for name in ("float", "integers", "kept_in_float", "onnxruntime")
    }
    skip = ("HardSigmoid",) if gate else ()
    onnxq.compile_model(made.path, made.calib, speed=False).save(paths["integers"])
    kept = onnxq.compile_model(made.path, made.calib, pipeline=IN_FLOAT, skip=skip, speed=False)
    kept.save(paths["kept_in_float"])
    compile_theirs(made, str(paths["onnxruntime"]), {"per_channel": True})  # type: ignore[arg-type]
    rows: dict[str, dict[str, float]] = {}
    data = open_data(made.test, input_specs(load_model(made.path)))
    for name, path in paths.items():
        if name != "float":
            pair = (make_session(p, threads=1) for p in (made.path, path))
            found = compare_sessions(*pair, data, batch=8).main
            assert found is not None
            rows[name] = {"sqnr_db": found.sqnr_db}
    for batch in BATCHES:
        times = speeds(made, paths, batch)  # type: ignore[arg-type]
        for name, row in rows.items():
            row[f"speedup_batch{batch}"] = times["float"] / times[name]
    return rows


def main() -> None:
    """Measure all networks."""
    results: dict = {"versions": {"onnxruntime": ort.__version__, "vnni": has_vnni()}}
    for name, (activation, gate) in NETWORKS.items():
        with tempfile.TemporaryDirectory() as directory:
            results[name] = measure(Path(directory), activation, gate)
        print(name, results[name], flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
