"""LSTMs in integers: onnxq beside onnxruntime's own dynamic quantization, and float.

    python bench/recurrent.py        writes bench/results/recurrent.json; needs no data

Random weights of the spread that PyTorch starts from, normal inputs of 40 steps. Speed is the time of float over that of each, in
turn on one thread; `vnni` says whether the CPU sums 8-bit products in 32 bits.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper, parser
from onnxruntime.quantization import QuantType, quantize_dynamic
from peers.run import has_vnni

import onnxq
from onnxq.affine import sqnr_db
from onnxq.measure.speed import race
from onnxq.model.session import make_session

RESULTS = Path(__file__).parent / "results" / "recurrent.json"
STEPS, BATCHES = 40, (1, 8)
NETWORKS = {  # inputs, units, directions
    "64 units": (64, 64, 1),
    "128 units": (128, 128, 1),
    "256 units, both ways": (512, 256, 2),
    "512 units, both ways": (512, 512, 2),
}


def network(inputs: int, units: int, directions: int) -> onnx.ModelProto:
    """One LSTM."""
    way = "bidirectional" if directions == 2 else "forward"
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[s,n,{inputs}] x) => (float[s,d,n,{units}] y)'
        f' {{ y = LSTM<hidden_size={units}, direction="{way}">(x, w, r, b) }}'
    )
    rng, bound = np.random.default_rng(0), units**-0.5
    for name, shape in (("w", (4 * units, inputs)), ("r", (4 * units, units)), ("b", (8 * units,))):
        values = rng.uniform(-bound, bound, (directions, *shape)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def measure(directory: Path, model: onnx.ModelProto, inputs: int) -> dict[str, dict[str, float]]:
    """A row for each way."""
    paths = {name: directory / f"{name}.onnx" for name in ("float", "onnxq", "onnxruntime")}
    onnx.save(model, paths["float"])
    onnxq.compile_model(paths["float"], speed=False).save(paths["onnxq"])
    quantize_dynamic(paths["float"], paths["onnxruntime"], per_channel=True, weight_type=QuantType.QInt8)
    rng, rows = np.random.default_rng(1), {}
    exact = make_session(paths["float"], threads=1)
    for name in ("onnxq", "onnxruntime"):
        session = make_session(paths[name], threads=1)
        x = rng.normal(size=(STEPS, max(BATCHES), inputs)).astype(np.float32)
        wanted, found = (s.run(None, {"x": x})[0] for s in (exact, session))
        rows[name] = {"bytes": paths[name].stat().st_size, "sqnr_db": sqnr_db(wanted, found)}
        for batch in BATCHES:
            feeds = {"x": np.ascontiguousarray(x[:, :batch])}
            rows[name][f"speedup_batch{batch}"] = race(exact, session, feeds).speedup
    return rows


def main() -> None:
    """Measure all networks."""
    results: dict = {"versions": {"onnxruntime": ort.__version__, "vnni": has_vnni()}}
    for name, (inputs, units, directions) in NETWORKS.items():
        with tempfile.TemporaryDirectory() as directory:
            results[name] = measure(Path(directory), network(inputs, units, directions), inputs)
        print(name, results[name], flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
