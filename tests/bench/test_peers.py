"""The harness of bench/peers with a peer made up here: jobs, rows, reasons and tables, without a network."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"
ADAPTER = """
import os, tempfile
from pathlib import Path
import numpy as np, onnx
from onnx import numpy_helper
from job import UnableError, perform

def quantize(job):
    assert job.options.get("way") != "float weights", "no such way"
    if job.options.get("way") == "unable":
        raise UnableError(f"it has no weights of {job.weights} bits")
    if job.options.get("way") == "abort":
        os.abort()
    while job.options.get("way") == "endless":
        pass
    assert Path(tempfile.gettempdir()) == Path(job.output).parent  # nothing stays behind
    assert sum(len(feeds["image"]) for feeds in job.feeds()) == job.samples
    model = onnx.load(job.model)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim > 1:
            step = np.abs(values).max() / 127
            tensor.CopyFrom(numpy_helper.from_array(np.round(values / step) * step, tensor.name))
    onnx.save(model, job.output)
    return "rounded weights"

perform(quantize, "numpy", "no-such-package")
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The driver, with one made-up peer, one model and results in a temporary folder."""
    monkeypatch.syspath_prepend(str(BENCH))
    driver, tasks = importlib.import_module("peers.run"), importlib.import_module("tasks")
    (tmp_path / "models").mkdir()
    (tmp_path / "prepare.py").write_text("")
    adapter = tmp_path / "use_fake.py"
    adapter.write_text(ADAPTER)
    shutil.copy(ROOT / "models" / "digits_cnn.onnx", tmp_path / "models")
    for part in ("calib", "test"):
        shutil.copy(ROOT / "models" / f"digits_{part}.npz", tmp_path / f"digits.{part}.npz")
    monkeypatch.setenv("ONNXQ_DATA", str(tmp_path))
    monkeypatch.setenv("ONNXQ_FEEDS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{BENCH / 'peers' / 'adapters'}:{ROOT}")
    ways = {
        "default": {},
        "unable": {"way": "unable"},
        "broken": {"way": "float weights"},
        "abort": {"way": "abort"},
    }
    peer = driver.Peer("fake", {"w8a8": ways}, adapter=adapter)
    monkeypatch.setattr(driver, "PEERS", {"fake": peer})
    monkeypatch.setattr(driver, "TASKS", (tasks.Task("digits_cnn", "digits"),))
    monkeypatch.setattr(driver, "MODELS", ("digits_cnn",))
    monkeypatch.setattr(driver, "RESULTS", tmp_path / "peers.json")
    measure = importlib.import_module("peers.measure")
    monkeypatch.setattr(measure, "ENOUGH", 0.0)
    monkeypatch.setattr(measure, "ROUNDS", 2)
    tasks.feeds.cache_clear()
    yield driver
    tasks.feeds.cache_clear()


def test_rows_of_another_kind_of_cpu_say_so(run: ModuleType) -> None:
    row = {"loads": True, "metric": 0.9}
    assert run.remarked(row, True, True) == row
    assert run.remarked(row, True, False) == row | {"note": "on a CPU without VNNI"}
    assert run.remarked(row | {"note": "slow"}, False, True)["note"] == "slow; on a CPU with VNNI"
    assert run.remarked({"failed": "it was ended"}, True, False) == {"failed": "it was ended"}


def test_new_quality_keeps_the_times_of_the_same_kernels(run: ModuleType) -> None:
    old = {"loads": True, "integer_kernels": 3, "float_kernels": 0, "cpu_seconds": 1.0, "speedup_batch1": 2.0}
    old |= {"metric": 0.8, "sqnr_db": 20.0, "agreement": 0.9, "bytes": 100}
    new = old | {"metric": 0.9, "sqnr_db": 25.0, "agreement": 0.95, "bytes": 90, "cpu_seconds": 3.0}
    assert run.renewed(old, new) == new | {"cpu_seconds": 1.0}
    assert run.renewed(old, new | {"float_kernels": 1}) == new | {"float_kernels": 1}
    assert run.renewed({}, new) == new
    assert run.renewed({"failed": "it was ended"}, new) == new
    assert run.renewed(old, {"failed": "it was ended"}) == {"failed": "it was ended"}
    unread = {key: value for key, value in new.items() if not key.endswith("_kernels")}
    assert run.renewed(old, unread) == unread
    assert run.renewed(unread, unread | {"cpu_seconds": 4.0}) == unread | {"cpu_seconds": 4.0}


def test_rows_hold_figures_or_reasons(run: ModuleType) -> None:
    run.main(["--peer", "fake"])
    results = json.loads(run.RESULTS.read_text())
    rows = results["digits_cnn"]["w8a8"]
    good = rows["fake: default"]
    assert good["loads"]
    assert good["metric"] > 0.95
    assert 20 < good["sqnr_db"] < 80
    assert 0.95 < good["agreement"] <= 1
    assert good["note"] == "rounded weights"
    assert good["float_kernels"] >= 2
    assert good["integer_kernels"] == 0
    assert 0.1 < good["cpu_seconds"] < 60
    assert 20 < good["peak_mb"] < 1000
    assert {"speedup_batch1", "speedup_batch32", "bytes"} <= set(good)
    assert rows["fake: unable"]["failed"] == "it has no weights of 8 bits"
    assert rows["fake: broken"]["failed"] == "AssertionError: no such way"
    assert rows["fake: abort"]["failed"] == "it died of SIGABRT"
    assert results["versions"]["fake"]["no-such-package"] == "not installed"


def test_rows_that_stand_stay_unless_asked_again(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def fail(row: Any, calib: Path, folder: Path, seconds: int) -> tuple[dict[str, str], dict[str, str]]:
        done.append(row.way)
        return {"failed": "no reason"}, {}

    monkeypatch.setattr(run, "measure", fail)
    run.main([])
    run.main(["--setting", "w8a8", "w4a8"])
    assert done == ["default", "unable", "broken", "abort"]
    run.main(["--again", "--model", "digits_cnn"])
    assert len(done) == 8
    run.main(["--again", "--way", "default", "abort"])
    assert done[8:] == ["default", "abort"]
    with pytest.raises(SystemExit):
        run.main(["--way", "defualt"])


def test_a_compile_that_does_not_end_is_ended(run: ModuleType, tmp_path: Path) -> None:
    jobs, environments = importlib.import_module("peers.jobs"), importlib.import_module("peers.environments")
    peer = run.PEERS["fake"]
    job = run.Job("m.onnx", "c.npz", str(tmp_path / "out.onnx"), "w4", options={"way": "endless"})
    outcome = jobs.run_job(environments.interpreter("fake"), peer.script, job, 2)
    assert outcome.failed == "it was ended after 2 CPU seconds"
    assert 1.5 < outcome.cpu_seconds < 8


def test_a_file_that_the_runtime_refuses_is_a_row(run: ModuleType, tmp_path: Path) -> None:
    measure = importlib.import_module("peers.measure")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    row = measure.judge(run.TASKS[0], broken)
    assert row["loads"] is False
    assert str(tmp_path) not in row["failed"]
    same = measure.judge(run.TASKS[0], run.TASKS[0].path)
    assert same["failed"].startswith("it leaves this model as it is")


def test_inner_tensors_that_a_peer_leaves_as_outputs_are_not_held(run: ModuleType, tmp_path: Path) -> None:
    measure, task = importlib.import_module("peers.measure"), run.TASKS[0]
    model = onnx.load(task.path)
    wanted = [output.name for output in model.graph.output]
    model.graph.output.extend(onnx.ValueInfoProto(name=node.output[0]) for node in model.graph.node[:-1])
    onnx.save(model, tmp_path / "more.onnx")
    found, labels = measure.outputs(task, tmp_path / "more.onnx")
    assert list(found) == wanted
    assert len(found[wanted[0]]) == len(labels)


def test_an_environment_is_made_once(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments = importlib.import_module("peers.environments")
    monkeypatch.setattr(environments, "REQUIREMENTS", tmp_path)
    monkeypatch.setenv("ONNXQ_PEERS", str(tmp_path / "cache"))
    (tmp_path / "fake.txt").write_text("")
    python = environments.interpreter("fake")
    assert python.exists()
    (python.parent / "mark").touch()
    assert environments.interpreter("fake") == python
    assert (python.parent / "mark").exists()
    (tmp_path / "fake.txt").write_text("./no_such_file-1.0-py3-none-any.whl\n")
    with pytest.raises(environments.NotInstalledError, match="pip cannot install it"):
        environments.interpreter("fake")
    assert not (python.parent / "mark").exists()


def test_every_peer_has_an_adapter_and_pinned_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    catalog = importlib.import_module("peers.catalog")
    tables = importlib.import_module("peers.tables")
    assert set(catalog.PEERS) == set(tables.TOOLS)
    for peer in catalog.PEERS.values():
        assert peer.script.exists()
        assert set(peer.ways) == set(catalog.SETTINGS)
    pins = [
        line
        for path in (BENCH / "peers" / "requirements").glob("*.txt")
        for line in path.read_text().split("\n")
    ]
    assert len(pins) > 10
    assert [line for line in pins if line and "==" not in line] == []


def test_the_tables_take_the_best_way_and_name_who_is_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    tables = importlib.import_module("peers.tables")
    row = {
        "metric": 0.9,
        "sqnr_db": 20.0,
        "agreement": 0.95,
        "bytes": 2000,
        "speedup_batch1": 2.0,
        "speedup_batch32": 2.0,
    }
    row |= {"cpu_seconds": 1.0, "peak_mb": 100.0, "integer_kernels": 3, "float_kernels": 1}
    rows = {
        "onnxq: default": row | {"metric": 0.8},
        "onnxq: lapq": row,
        "nncf: default": row | {"bytes": 1000, "speedup_batch1": 2.5},
        "aimet: default": row | {"metric": 0.91, "note": "slow"},
        "quark: default": {"failed": "no 4 bits"},
        "onnxruntime: default": row | {"metric": 0.85, "bytes": 500},
    }
    results = {"versions": {}, "m": {"float": {"metric": 0.92, "bytes": 8000}, "w4a8": rows}}
    lines = tables.summary(results).splitlines()
    cells = lines[-1].split(" | ")
    assert cells[3] == "90.00, 2 kB, 2.00x"
    assert cells[-2] == "-"
    ahead = tables.behind(results).splitlines()[2:]
    assert [line.split(" | ")[-1].strip(" |") for line in ahead] == ["size, speed", "accuracy"]
    assert ahead[0].split(" | ")[2] == "lapq: 90.00 (95.0 %, 20.0 dB), 2 kB, 2.00x"
    assert len(tables.short(results).splitlines()) == 2  # onnxsim is not measured yet
    rows["onnxsim: default"] = {"failed": "no 4 bits"}
    cells = tables.short(results).splitlines()[2].split(" | ")
    assert cells[3] == "**90.00**, 95.0 %, 2 kB, 2.00x"
    assert cells[4] == "AIMET: **91.00**, 95.0 %, 2 kB, 2.00x |"
    text = tables.full(results)
    assert "- quark: default: no 4 bits" in text
    assert text.index("aimet: default (slow)") < text.index("onnxq: lapq") < text.index("onnxq: default")


def test_ways_are_compared_image_by_image(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    more = importlib.import_module("peers.more_images")
    monkeypatch.setattr(more, "IMAGES", "digits")
    rows = [
        replace(row, peer=replace(row.peer, name=name))
        for name in ("onnxq", "fake")
        for row in run.plan(["digits_cnn"], ["fake"], ["w8a8"], ["default", "unable"])
    ]
    found = more.cell(rows, tmp_path, 60)
    assert found["onnxq: default"]["metric"] > 0.97
    assert found["fake: default"] == found["onnxq: default"] | {"right_alone": 0, "wrong_alone": 0, "p": 1.0}
    assert set(found["fake: unable"]) == {"failed"}


def test_as_good_by_mcnemar(run: ModuleType) -> None:
    more = importlib.import_module("peers.more_images")
    ours = np.array([True] * 6 + [False] * 4)
    theirs = np.array([True, False, False, False, False, False, True, True, True, False])
    # 3 right alone, 5 wrong alone: 2 (C(8,0) + C(8,1) + C(8,2) + C(8,3)) / 2^8
    assert more.against(theirs, ours) == {"right_alone": 3, "wrong_alone": 5, "p": pytest.approx(186 / 256)}


def test_costs_are_compared_within_a_round(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost, tables = importlib.import_module("peers.cost"), importlib.import_module("peers.tables")
    adapter = run.PEERS["fake"].adapter
    ways = {"default": {}, "abort": {"way": "abort"}}
    made = {name: run.Peer(name, {"w8a8": ways}, adapter=adapter) for name in ("onnxq", "alike", "ended")}
    monkeypatch.setattr(run, "PEERS", made)
    monkeypatch.setattr(cost, "PEERS", {"onnxq": "default", "alike": "default", "ended": "abort"})
    monkeypatch.setattr(cost, "ROUNDS", 1)
    monkeypatch.setattr(tables, "TOOLS", dict.fromkeys(made, "a tool"))
    found = cost.compare("digits_cnn", tmp_path)
    ours, theirs = found["onnxq"], found["alike"]
    assert ours["cpu_seconds_over_onnxq"] == ours["peak_mb_over_onnxq"] == 1.0
    for key in ("cpu_seconds", "peak_mb"):
        assert theirs[f"{key}_over_onnxq"] == pytest.approx(theirs[key] / ours[key])
    assert ours["peak_mb"] > 20  # Python with numpy and onnx takes more
    assert found["ended"] == {"failed": "it died of SIGABRT"}
    cells = tables.costs({"versions": {}, "digits_cnn": found}).splitlines()[-1].split(" | ")
    assert cells[1] == f"{ours['cpu_seconds']:.2f} s, {ours['peak_mb']:.0f} MB"
    assert cells[2].endswith(f"x, {theirs['peak_mb_over_onnxq']:.2f}x)")
    assert cells[3] == "fails |"
