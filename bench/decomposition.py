"""Points alone, without data: how close sums of few-bit points come to the weights of real layers, and how long that takes.

    python bench/decomposition.py [MODEL ...]        writes bench/results/decomposition.json

For each width and number of points: the median over a model's layers of the SQNR of their weights in dB and the least of them,
for each construction with free factors, and for whole ratios in one 8-bit kernel: `folded`, and `turned` where the ratio may be
negative. `seconds_per_million` are CPU seconds; models of a few thousand weights do not fill the arrays that make this fast.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from tasks import root

from onnxq.affine import sqnr_db
from onnxq.points import Grid, best_point, decompose, fold_free
from onnxq.points.decompose import CONSTRUCTIONS
from onnxq.saturation import as_rows

RESULTS = Path(__file__).parent / "results" / "decomposition.json"
MODELS = ("cifar10_resnet20", "imagenet_mobilenetv1_025", "kws_dscnn", "ncf_ml1m_mlp")
TIMED = "minilm_l6_v2"
WIDTHS, COUNTS = (2, 3, 4), (1, 2, 3)
SMALLEST = 64  # weights of a layer; smaller ones say nothing

Rows = NDArray[np.float32]
Method = Callable[[Rows], NDArray[np.floating]]


def layers(model: str) -> list[Rows]:
    """Weights of a model's convolutions and products as rows."""
    graph = onnx.load(root() / "models" / f"{model}.onnx").graph
    values = {t.name: t for t in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.input[1] not in values:
            continue
        weight = numpy_helper.to_array(values[node.input[1]]).astype(np.float32)
        turned = any(a.name == "transB" and a.i for a in node.attribute)
        axis = 0 if node.op_type == "Conv" or turned else 1
        if weight.size >= SMALLEST and (node.op_type == "Conv" or weight.ndim == 2):
            found.append(np.ascontiguousarray(as_rows(weight, node.op_type, axis)))
    return found


def free(bits: int, count: int, construction: str) -> Method:
    """Points with free factors."""
    ends = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    return lambda rows: decompose(rows, ends, count, construction).values()


def folded(bits: int, count: int, turned: bool = False) -> Method:
    """Points at whole ratios."""
    grid = Grid((-(1 << (bits - 1)), (1 << (bits - 1)) - 1), turned=turned)

    def values(rows: Rows) -> NDArray[np.floating]:
        found = fold_free(rows, grid, count)
        return found.codes * found.step[:, None]

    return values


def one_point(bits: int) -> Method:
    """The closest point."""
    ends = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)

    def values(rows: Rows) -> NDArray[np.floating]:
        factor, codes = best_point(rows, ends)
        return codes * factor[:, None]

    return values


def measured(method: Method, weights: list[Rows]) -> dict:
    """Median SQNR over layers and CPU seconds per million weights."""
    start = time.process_time()
    approximations = [method(rows) for rows in weights]
    seconds = time.process_time() - start
    ratios = [sqnr_db(rows, near) for rows, near in zip(weights, approximations, strict=True)]
    million = sum(rows.size for rows in weights) / 1e6
    return {
        "sqnr_db": round(float(np.median(ratios)), 2),
        "least_db": round(min(ratios), 2),
        "seconds_per_million": round(seconds / million, 3),
    }


def figures(model: str) -> dict:
    """All widths, numbers of points and constructions."""
    weights = layers(model)
    found: dict = {"layers": len(weights), "weights": sum(rows.size for rows in weights)}
    found["w8"] = {"1": {"closest": measured(one_point(8), weights)}}
    for bits in WIDTHS:
        one = found[f"w{bits}"] = {"1": {"closest": measured(one_point(bits), weights)}}
        for count in COUNTS[1:]:
            methods = {c: free(bits, count, c) for c in (*CONSTRUCTIONS, "best")} | {
                "folded": folded(bits, count),
                "turned": folded(bits, count, turned=True),
            }
            one[str(count)] = {name: measured(method, weights) for name, method in methods.items()}
    eight = found["w8"]["1"]["closest"]["sqnr_db"]
    found["two_of_w4_below_w8_db"] = {
        name: round(eight - found["w4"]["2"][name]["sqnr_db"], 2) for name in ("best", "folded")
    }
    return found


def timed() -> dict:
    """Wall seconds on all cores for the products of a larger model, two points of 4 bits."""
    weights = layers(TIMED)
    found: dict = {"weights": sum(rows.size for rows in weights)}
    ways: dict[str, Method] = {
        "folded": folded(4, 2),
        "folded, error feedback": fed,
        "lookahead": free(4, 2, "lookahead"),
    }
    for name, method in ways.items():
        start = time.perf_counter()
        for rows in weights:
            method(rows)
        found[name] = {"seconds": round(time.perf_counter() - start, 2)}
    return found


def fed(rows: Rows) -> NDArray[np.floating]:
    """Two points of 4 bits by a whole moment of inputs that are somewhat alike."""
    near = 0.5 ** np.abs(np.subtract.outer(np.arange(rows.shape[1]), np.arange(rows.shape[1])))
    found = fold_free(rows, Grid((-8, 7)), 2, near.astype(np.float32))
    return found.codes * found.step[:, None]


def main() -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for model in sys.argv[1:] or (*MODELS, TIMED):
        print(f"== {model}", flush=True)
        results[model] = timed() if model == TIMED else figures(model)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
