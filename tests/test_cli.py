"""The command line: exit codes, one sentence for each failure, one JSON object for machines, and files left alone."""

from __future__ import annotations

import errno
import json
import os
import pty
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

import onnxq
from onnxq.cli import main
from onnxq.errors import ModelError

ROOT = Path(__file__).parents[1]
CNN = str(ROOT / "models" / "digits_cnn.onnx")
CALIB = str(ROOT / "models" / "digits_calib.npz")
TEST = str(ROOT / "models" / "digits_test.npz")
COMMAND = [sys.executable, "-m", "onnxq"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "80"}
FAST = ("--samples", "32", "--threads", "1")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process: exit code, standard output, standard error."""

    def go(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        captured = capsys.readouterr()
        return int(str(left.value.code)), captured.out, captured.err

    return go


def sentence(text: str) -> str:
    """What the error line says; there must be that line only."""
    assert text.count("\n") == 1, text
    assert text.startswith("onnxq: error: ")
    return text.removeprefix("onnxq: error: ").rstrip("\n")


MISUSE = [
    ("compil", "no such command 'compil'; did you mean 'compile', 'compare'?"),
    ("compile m -o q --wieghts x", "no such option: --wieghts; did you mean --bits, --weights?"),
    ("compile", "missing argument 'MODEL'"),
    ("compile m", "missing option '-o' / '--output'"),
    ("compile m -o", "option '-o' requires an argument"),
    ("compile m n -o q", "got unexpected extra argument(s) (n)"),
    ("compile m -o q --samples few", "invalid value for '--samples': it should be a valid integer"),
    ("compile m -o q --samples 0", "invalid value for '--samples': it should be greater than or equal to 1"),
    ("compile m -o q --calib c --ranges minmx", "unknown range method 'minmx'; did you mean 'minmax'?"),
    ("compile m -o q --calib c --target ort-cpo", "unknown target 'ort-cpo'; did you mean 'ort-cpu'?"),
    ("compile m -o q --calib c --preset in8", "unknown preset 'in8'; did you mean 'int8'?"),
    ("compile m -o q --calib c --format qqdq", "unknown format 'qqdq'; did you mean 'qdq'?"),
    ("compile m -o q --calib c --weights int8:chanel", "cannot read 'chanel' in the scheme"),
    ("compile m -o q --calib c --activations int9", "cannot read the scheme 'int9'"),
    (
        "compile m -o q --calib c --bits w4a9",
        "cannot read the bits 'w4a9'; they are wB for weights alone or wBaB",
    ),
    (
        "compile m -o q --bits w4a4",
        "activations can only be chosen with calibration data; give some with --calib",
    ),
    (
        "compile m -o q --calib c --override head",
        "cannot read the override 'head'; it is GLOB=BITS or GLOB=float",
    ),
    (
        "compile m -o q --calib c --first-last 9",
        "option 'first_last' of pass 'quantize-recurrent': unknown value '9'",
    ),
    ("compile m -o q --calib c --passes anotate", "unknown pass 'anotate'; did you mean 'annotate'?"),
    (
        "compile m -o q --calib c --passes annotate:wights=a",
        "unknown option 'wights' of pass 'annotate'; did you mean",
    ),
    ("compile m -o q --calib c --passes annotate --preset int8", "give --preset or --passes, not both"),
    ("compile m -o q --calib c --passes annotate --format qdq", "a pipeline names its own emission pass"),
    ("compile m -o q --calib c --images sise=1", "unknown image option 'sise'; did you mean 'size'?"),
    (
        "compile m -o q --calib c --provider CPUExecution",
        "unknown execution provider 'CPUExecution'; did you mean",
    ),
    ("compile m -o q --samples 3", "--samples says how to read calibration samples; give them with --calib"),
    (
        "compile m -o q --images size=3",
        "--images says how to read samples; give them with --calib or --test",
    ),
    (
        "compile m -o q --calib c --metric top5",
        "metric 'top5' is measured on labelled samples; give them with --test",
    ),
    ("compile m -o q --calib c --test t --metric top2", "unknown metric 'top2'; did you mean 'top5'?"),
    (
        "compile m -o q --calib c --test t --report t",
        "the report would replace the test data t; choose another name",
    ),
    ("compile m -o q --save-calibration t", "--save-calibration has nothing to save"),
    ("compile m -o q --ranges mse", "ranges can only be chosen with calibration data"),
    ("compile m -o ./m", "the output would replace the model m; choose another name"),
    ("compile m -o q --report q", "the report would replace the output q; choose another name"),
    (
        "compile m -o q --calib c --report c",
        "the report would replace the calibration data c; choose another name",
    ),
    ("evaluate m --data d --metric top2", "unknown metric 'top2'; did you mean 'top5'?"),
    ("evaluate m --data d --provider CPU", "unknown execution provider 'CPU'"),
    ("compare a b --data d --images color=red", "unknown image color 'red'"),
    ("inspect m --target ort-gpu", "unknown target 'ort-gpu'; did you mean 'ort-cpu'?"),
    ("passes --jsn", "no such option: --jsn; did you mean --json?"),
]


@pytest.mark.parametrize(("line", "said"), MISUSE)
def test_misuse_is_found_before_anything_is_read(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)  # where none of the files exist
    code, out, err = run(*line.split())
    assert (code, out) == (2, "")
    assert sentence(err).startswith(said)
    assert list(tmp_path.iterdir()) == []


FAILURES = [
    (f"compile missing.onnx -o old --calib {CALIB}", "there is no model file missing.onnx"),
    (f"compile text -o old --calib {CALIB}", "text is not an ONNX model, or it is truncated"),
    (f"compile half -o old --calib {CALIB}", "half is not an ONNX model, or it is truncated"),
    (f"compile . -o old --calib {CALIB}", ". is a directory, not a model file"),
    (f"compile {CNN} -o . --calib {CALIB}", "cannot write the output .: it is a directory"),
    (f"compile {CNN} -o no/q --calib {CALIB}", "cannot write the output no/q: there is no directory"),
    (
        f"compile {CNN} -o old --report no/r --calib {CALIB}",
        "cannot write the report no/r: there is no directory",
    ),
    (f"compile {CNN} -o old --calib samples.npz", "there is no file or folder 'samples.npz'"),
    (f"compile {CNN} -o old --load-calibration text", "the calibration table 'text' is not one"),
    (f"evaluate {CNN} --data text", "'text' is no data source"),
    (f"compare {CNN} text --data {TEST}", "text is not an ONNX model, or it is truncated"),
    ("inspect missing.onnx", "there is no model file missing.onnx"),
]


@pytest.mark.parametrize(("line", "said"), FAILURES)
def test_bad_files_are_one_sentence_and_leave_the_output(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old").write_text("old")
    Path("text").write_text("hello")
    Path("half").write_bytes(Path(CNN).read_bytes()[:100_000])
    before = sorted(tmp_path.iterdir())
    code, out, err = run(*line.split())
    assert (code, out) == (1, "")
    assert sentence(err).startswith(said)
    assert Path("old").read_text() == "old"
    assert sorted(tmp_path.iterdir()) == before


def test_a_skip_pattern_that_matches_nothing(run: Run, tmp_path: Path) -> None:
    code, _, err = run("compile", CNN, "-o", str(tmp_path / "q"), "--calib", CALIB, "--skip", "hed.*")
    assert code == 2
    assert sentence(err).startswith("skip pattern 'hed.*' matches no node name and no op type")


def fail_with(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ModelError("onnxruntime cannot load the model"), 1, "onnxruntime cannot load the model"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "there is not enough memory"),
        (
            ZeroDivisionError("float division"),
            1,
            "internal error: ZeroDivisionError: float division; run with",
        ),
    ],
)
def test_a_failed_check_leaves_the_output(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    monkeypatch.setattr("onnxq.attempt.verify", fail_with(error))
    output, report = tmp_path / "q.onnx", tmp_path / "r.json"
    output.write_text("old")
    report.write_text("old")
    got, out, err = run("compile", CNN, "-o", str(output), "--report", str(report), "--calib", CALIB, *FAST)
    assert (got, out) == (code, "")
    assert sentence(err).startswith(said)
    assert output.read_text() == report.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [output, report]


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("onnxq.files.os.fsync", "q"),
        ("onnxq.files.os.replace", "q"),
        ("onnxq.commands.compiling.replacing", "the report r"),
    ],
)
def test_a_full_disk_leaves_model_and_report(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(place, fail_with(OSError(errno.ENOSPC, "No space left on device")))
    Path("q").write_text("old")
    Path("r").write_text("old")
    code, _, err = run("compile", CNN, "-o", "q", "--report", "r", "--calib", CALIB, *FAST)
    assert code == 1
    assert sentence(err) == f"cannot write {what}: no space left on device"
    assert Path("q").read_text() == Path("r").read_text() == "old"
    assert sorted(os.listdir()) == ["q", "r"]


@pytest.mark.parametrize("share", [0.5, 0.999])  # stops onnxruntime's own files already, and the output alone
def test_a_limit_on_file_sizes(run: Run, tmp_path: Path, share: float) -> None:
    output = tmp_path / "q.onnx"
    assert run("compile", CNN, "-o", str(output), "--calib", CALIB, *FAST)[0] == 0
    limit = int(output.stat().st_size * share)
    output.write_text("old")
    done = subprocess.run(
        [*COMMAND, "compile", CNN, "-o", str(output), "--calib", CALIB, *FAST],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    sentence(done.stderr)
    assert output.read_text() == "old"
    assert list(tmp_path.iterdir()) == [output]


def test_an_interrupt_while_calibrating(tmp_path: Path) -> None:
    (tmp_path / "feeds.py").write_text(
        "import os, signal\nimport numpy as np\n"
        "def feeds():\n"
        "    for index in range(4):\n"
        "        if index == 2:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "        yield {'image': np.random.default_rng(index).random((8, 1, 8, 8), np.float32)}\n"
    )
    output = tmp_path / "q.onnx"
    output.write_text("old")
    done = subprocess.run(
        [*COMMAND, "compile", CNN, "-o", str(output), "--calib", f"{tmp_path}/feeds.py:feeds"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert sentence(done.stderr) == "interrupted"
    assert output.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["feeds.py", "q.onnx"]


def test_debug_shows_the_traceback_and_keeps_the_exit_code(run: Run, tmp_path: Path) -> None:
    code, _, err = run("compile", "m", "-o", str(tmp_path / "q"), "--calib", "c", "--ranges", "x", "--debug")
    assert code == 2
    assert err.startswith("Traceback")
    sentence(err.splitlines(keepends=True)[-1])


def one_object(text: str) -> dict[str, Any]:
    """The only JSON object in the text."""
    value, end = json.JSONDecoder(parse_constant=fail_with(ValueError("not JSON"))).raw_decode(text)
    assert text[end:].strip() == ""
    assert isinstance(value, dict)
    return value


def test_compile_writes_what_it_reports(run: Run, tmp_path: Path) -> None:
    output, report = tmp_path / "q.onnx", tmp_path / "r.json"
    line = ("compile", CNN, "-o", str(output), "--calib", CALIB, *FAST)
    code, out, _ = run(*line, "--report", str(report), "--json")
    assert code == 0
    printed = one_object(out)
    assert printed == json.loads(report.read_text())
    assert (printed["model"], printed["output"]) == (CNN, str(output))
    assert printed["calibration"]["samples"] == 32
    assert printed["size"]["float_bytes"] == Path(CNN).stat().st_size
    assert printed["size"]["quantized_bytes"] == output.stat().st_size
    assert {
        "pipeline",
        "nodes",
        "coverage",
        "quality",
        "seconds",
        "peak_rss_bytes",
        "versions",
    } <= printed.keys()
    first = output.read_bytes()
    assert run(*line)[0] == 0
    assert output.read_bytes() == first


def test_compile_without_data_says_so(run: Run, tmp_path: Path) -> None:
    code, out, err = run("compile", CNN, "-o", str(tmp_path / "q"), "--threads", "1", "--json")
    assert code == 0
    assert one_object(out)["calibration"] is None
    assert "no calibration data" in err


def test_statistics_can_be_kept_and_used_without_the_samples(run: Run, tmp_path: Path) -> None:
    table, first, second = (str(tmp_path / name) for name in ("t.npz", "a.onnx", "b.onnx"))
    assert run("compile", CNN, "-o", first, "--calib", CALIB, "--save-calibration", table, *FAST)[0] == 0
    code, out, _ = run("compile", CNN, "-o", second, "--load-calibration", table, "--threads", "1", "--json")
    assert code == 0
    assert one_object(out)["calibration"]["samples"] == 32
    assert Path(first).read_bytes() == Path(second).read_bytes()


def test_evaluate(run: Run) -> None:
    code, out, err = run("evaluate", CNN, "--data", TEST, "--json", "--threads", "1")
    assert (code, err) == (0, "")
    assert one_object(out) == {"metric": "top1", "value": 795 / 797, "samples": 797}  # models/README.md
    assert run("evaluate", CNN, "--data", TEST, "--threads", "1")[1] == "top1 0.9975 over 797 samples\n"


@pytest.mark.parametrize("command", [("evaluate", CNN), ("compare", CNN, CNN)])
def test_suspicious_data_is_noted_beside_the_result(
    run: Run, tmp_path: Path, command: tuple[str, ...]
) -> None:
    source = tmp_path / "d.npz"
    np.savez(source, image=np.ones((4, 1, 8, 8), np.float32), label=np.zeros(4, np.int64))
    code, out, err = run(*command, "--data", str(source), "--json", "--threads", "1")
    assert code == 0
    assert one_object(out)["samples"] == 4
    assert err.startswith("note: ")
    assert "image" in err


def test_compare(run: Run) -> None:
    code, out, _ = run("compare", CNN, CNN, "--data", TEST, "--samples", "10", "--threads", "1", "--json")
    figures = {"sqnr_db": None, "agreement": 1.0, "max_abs": 0.0, "equal": True}
    assert code == 0
    assert one_object(out) == {**figures, "outputs": {"logits": figures}, "samples": 10}


def test_bench(run: Run) -> None:
    code, out, _ = run("bench", CNN, CNN, "--seconds", "0.1", "--batch", "3", "--json")
    assert code == 0
    found = one_object(out)
    assert list(found) == ["ms_a", "ms_b", "speedup", "runs"]
    assert found["speedup"] == found["ms_a"] / found["ms_b"]
    assert found["runs"] >= 5


def test_inspect_and_passes_print_one_object(run: Run) -> None:
    assert one_object(run("inspect", CNN, "--json")[1])["opset"] == 17
    assert {p["name"] for p in one_object(run("passes", "--json")[1])["passes"]} >= {"annotate", "emit-qdq"}


def test_help_teaches_and_is_quick() -> None:
    """Each command shows an example, and no heavy package is imported for it."""
    code = (
        "import sys\nfrom onnxq.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    assert not {'numpy', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
    )
    for command in ("compile", "evaluate", "compare", "bench", "inspect", "passes"):
        done = subprocess.run(
            [sys.executable, "-c", code, command, "--help"],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "Example: onnxq " in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 80
        assert "[default" not in done.stdout


def test_no_command_prints_the_commands(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    assert all(
        f" {name} " in out for name in ("compile", "evaluate", "compare", "bench", "inspect", "passes")
    )


def test_python_m_and_version() -> None:
    done = subprocess.run(
        [*COMMAND, "--version"], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"onnxq {onnxq.__version__}\n"


def test_a_reader_that_leaves_early() -> None:
    with subprocess.Popen(
        [*COMMAND, "passes"], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_is_full() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "passes", "--json"], env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert sentence(done.stderr) == "standard output: no space left on device"


def test_names_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    text = '<ir_version: 8, opset_import: ["":17]> g (float[N] x) => (float[N] y) {y = Erf(x)}'
    model = onnx.parser.parse_model(text)
    model.graph.node[0].name = "größe"
    onnx.save(model, path)
    done = subprocess.run(
        [*COMMAND, "inspect", str(path)],
        env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Erf gr??e" in done.stdout


def test_progress_is_for_terminals_only(tmp_path: Path) -> None:
    line = [*COMMAND, "compile", CNN, "-o", str(tmp_path / "q.onnx"), "--calib", CALIB, *FAST]
    quiet = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert "calibrat" not in quiet.stderr
    main_end, terminal = pty.openpty()
    with subprocess.Popen(
        line, env={**ENVIRONMENT, "TERM": "xterm"}, stdout=subprocess.PIPE, stderr=terminal, text=True
    ) as running:
        os.close(terminal)
        shown = _read_all(main_end)
        assert running.stdout is not None
        assert "size" in running.stdout.read()
    assert running.returncode == 0
    assert "starting" in shown
    assert "writing" in shown


def _read_all(handle: int) -> str:
    parts = []
    while True:
        try:
            part = os.read(handle, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(handle)
    return b"".join(parts).decode(errors="replace")
