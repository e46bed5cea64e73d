"""Compile every model of onnx's backend tests, with and without data, and count what became of them.

    python bench/backend.py [--every N]        writes bench/results/backend.json

A model counts as `equal` or `close` (at least BOUND_DB against float on every output) when it was compiled, and as `refused` when
onnxq said in one sentence why not. Anything else is `crashed` or `far`, and a bug.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases

RESULTS = Path(__file__).parent / "results" / "backend.json"
BOUND_DB = 20.0  # one multiplication of random values in 8 bits gives about 35 dB; small reductions of few values less
DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
FOLDERS = ("simple", "pytorch-converted", "pytorch-operator")


def _as_proto(value: object, name: str) -> bytes:
    if isinstance(value, onnx.TensorProto):
        return value.SerializeToString()
    if isinstance(value, list):
        return numpy_helper.from_list(value, name).SerializeToString()
    if value is None:
        return numpy_helper.from_optional(value, name).SerializeToString()
    return numpy_helper.from_array(np.asarray(value), name).SerializeToString()


def folders(root: Path) -> Iterator[Path]:
    """Folders that hold a model.onnx and its data, node tests written below the root."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    for case in cases:
        data = root / "node" / case.name / "test_data_set_0"
        data.mkdir(parents=True)
        onnx.save(case.model, data.parent / "model.onnx")
        graph, (inputs, outputs) = case.model.graph, case.data_sets[0]
        for values, infos, kind in ((inputs, graph.input, "input"), (outputs, graph.output, "output")):
            for index, (value, info) in enumerate(zip(values, infos, strict=False)):
                (data / f"{kind}_{index}.pb").write_bytes(_as_proto(value, info.name))
        yield data.parent
    for folder in FOLDERS:
        yield from (model.parent for model in sorted((DATA / folder).glob("*/model.onnx")))
    yield from sorted((DATA / "light").glob("*.onnx"))


def fate(place: str) -> dict[str, tuple[str, str]]:
    """What became of one model with and without data: a word and, where there is one, a reason."""
    from onnxq import compile_model
    from onnxq.errors import OnnxqError

    path = Path(place)
    model = path if path.is_file() else path / "model.onnx"
    found = {}
    for mode, data in (("with data", str(path) if path.is_dir() else None), ("without data", None)):
        if mode == "with data" and data is None:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                report = compile_model(model, data, threads=1, speed=False, samples=64).report
        except OnnxqError as error:
            found[mode] = ("refused", str(error))
            continue
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            found[mode] = (
                "crashed",
                f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})",
            )
            continue
        worst = _worst(report.difference.outputs.values()) if report.difference else None
        word = (
            "compiled"
            if worst is None
            else "equal"
            if worst == np.inf
            else "close"
            if worst >= BOUND_DB
            else "far"
        )
        integer = any(row.status in ("integer", "storage") for row in report.nodes)
        found[mode] = (
            word + (", quantized" if integer else ", left float"),
            "" if worst is None else f"{worst:.1f} dB",
        )
    return found


def _worst(outputs: object) -> float | None:
    values = [np.inf if o.noise == 0.0 else -np.inf if o.sqnr_db is None else o.sqnr_db for o in outputs]  # type: ignore[attr-defined]
    return min(values, default=None)


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1, help="take every Nth model only")
    every = parser.parse_args().every
    counts: dict[str, Counter] = {"with data": Counter(), "without data": Counter()}
    refusals: Counter = Counter()
    bugs = {}
    with tempfile.TemporaryDirectory() as root, Pool(1, maxtasksperchild=100) as pool:
        places = [str(p) for p in folders(Path(root))][::every]
        for place, found in zip(places, pool.imap(fate, places), strict=True):
            for mode, (word, reason) in found.items():
                counts[mode][word] += 1
                if word == "refused":
                    refusals[reason.replace(root, "").split("Node")[0][:90]] += 1
                if word.startswith(("crashed", "far")):
                    bugs[f"{Path(place).parent.name}/{Path(place).name} {mode}"] = f"{word}: {reason}"
    results = {"models": len(places), **{m: dict(sorted(c.items())) for m, c in counts.items()}, "bugs": bugs}
    print(json.dumps(results, indent=1))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**results, "refusals": dict(refusals.most_common(30))}, indent=1) + "\n")


if __name__ == "__main__":
    main()
