"""Convolutions over few channels in float and in integers: time of one kernel by channels, window and output channels.

    python bench/narrow.py        writes bench/results/narrow.json

Both kernels take turns on one thread; a figure is the median of the float kernel over that of the integer one, so that below 1
integers are slower. Conversions between float and codes are not part of it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from onnxq.model.session import make_session

RESULTS = Path(__file__).parent / "results" / "narrow.json"
IMAGE, SIGNAL = (64, 64), (1, 16384)
WINDOWS = {
    **dict.fromkeys(("1x1", "3x3", "5x5", "8x8"), IMAGE),
    **dict.fromkeys(("1x16", "1x40", "1x80", "1x256"), SIGNAL),
}
CHANNELS = (1, 2, 3, 4, 8, 16)
OUTPUTS = (1, 8, 16, 64)
SECONDS, LEAST = 0.2, 5


def convolution(window: str, channels: int, outputs: int, *, integer: bool) -> onnx.ModelProto:
    """One convolution, of float32 or of codes."""
    kernel = [int(size) for size in window.split("x")]
    weights = np.random.default_rng(0).integers(-63, 64, (outputs, channels, *kernel))
    scale, zero = np.float32(0.02), np.uint8(128)
    inputs = {"w": weights.astype(np.float32), "b": np.zeros(outputs, np.float32)}
    names, op, kind = ["x", "w", "b"], "Conv", TensorProto.FLOAT
    if integer:
        scales = {"ws": np.full(outputs, 0.02, np.float32), "wz": np.zeros(outputs, np.int8)}
        grid = {"xs": scale, "xz": zero, "ys": scale * np.float32(64), "yz": zero}
        inputs = {"w": weights.astype(np.int8), "b": np.zeros(outputs, np.int32), **scales, **grid}
        names, op, kind = (
            ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"],
            "QLinearConv",
            TensorProto.UINT8,
        )
    shape = [1, channels, *WINDOWS[window]]
    graph = helper.make_graph(
        [helper.make_node(op, names, ["y"], kernel_shape=kernel)],
        "convolution",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in inputs.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def measure(window: str, channels: int, outputs: int) -> float:
    """How many times as fast as float the integer kernel is."""
    x = np.random.default_rng(1).integers(0, 256, (1, channels, *WINDOWS[window]))
    pairs = [
        (
            make_session(convolution(window, channels, outputs, integer=integer), threads=1),
            {"x": x.astype(kind)},
        )
        for integer, kind in ((False, np.float32), (True, np.uint8))
    ]
    for session, feeds in pairs:
        session.run(None, feeds)
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times[0]) < LEAST:
        for taken, (session, feeds) in zip(times, pairs, strict=True):
            start = time.process_time()
            session.run(None, feeds)
            taken.append(time.process_time() - start)
    return median(times[0]) / median(times[1])


def main() -> None:
    """Measure all."""
    results = {
        window: {str(c): {str(o): round(measure(window, c, o), 2) for o in OUTPUTS} for c in CHANNELS}
        for window in WINDOWS
    }
    vnni = "_vnni" in Path("/proc/cpuinfo").read_text()
    results["versions"] = {"onnxruntime": ort.__version__, "vnni": vnni}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
