"""One compile in a process of its own: what it wrote, what it took, or why it failed."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peers.adapters.job import Job

MEMORY = 12 * 2**30  # bytes of data a compile may allocate, so that a peer cannot take the machine with it
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
LONGEST = 240  # characters of a reason


@dataclass(frozen=True)
class Outcome:
    """What a compile came to.

    Attributes:
        cpu_seconds: of the process and its children, from start to end.
        peak_mb: peak resident memory in MB (10^6 bytes), None when the process was killed.
        failed: why there is no model, None when there is one.
        note: what a reader must know of the model.
        versions: of the peer's packages.
    """

    cpu_seconds: float
    peak_mb: float | None = None
    failed: str | None = None
    note: str | None = None
    versions: dict[str, str] = field(default_factory=dict)


def run_job(python: Path, adapter: Path, job: Job, seconds: int) -> Outcome:
    """Run an adapter on a job.

    Args:
        python: interpreter of the peer's environment.
        adapter: the peer's script.
        job: what to do; its output's folder holds all that the process leaves behind.
        seconds: CPU seconds after which the process is ended.
    """
    folder = Path(job.output).parent
    request, report, errors = folder / "job.json", folder / "report.json", folder / "errors.txt"
    request.write_text(json.dumps(asdict(job)), "utf-8")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))

    with errors.open("wb") as stream:
        process = subprocess.Popen(
            [python, adapter, request, report],
            cwd=folder,
            env=_environment(python, folder),
            stdout=stream,
            stderr=stream,
            preexec_fn=limit,
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # Ctrl-C
            process.kill()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    cpu = usage.ru_utime + usage.ru_stime
    if not report.exists():
        last = errors.read_text("utf-8", "replace").strip().splitlines()[-1:]
        return Outcome(
            cpu, failed=_death(process.returncode, cpu, seconds) or one_line("".join(last), folder)
        )
    found: dict[str, Any] = json.loads(report.read_text("utf-8"))
    failed = found.get("failed") or (
        None if Path(job.output).exists() else "it ended without writing a model"
    )
    return Outcome(
        cpu,
        found["peak_bytes"] / 1e6,
        failed and one_line(failed, folder),
        found.get("note"),
        found["versions"],
    )


def one_line(text: str, folder: Path) -> str:
    """A reason as one line of bounded length, without the folders of this machine.

    >>> one_line("cannot load /scratch/1/model.onnx:\\n  no  such file", Path("/scratch/1"))
    'cannot load model.onnx: no such file'
    """
    line = " ".join(
        re.sub(r"/\S+/(site-packages|lib/python\S+?)/", "", text.replace(f"{folder}/", "")).split()
    )
    return line if len(line) <= LONGEST else line[: LONGEST - 2] + " …"


def _environment(python: Path, folder: Path) -> dict[str, str]:
    """Variables of the process: one thread everywhere, no device, modules compiled once as pip leaves them, temporary files in
    its folder, and no path to this project in a peer's environment."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name != "PYTHONPATH" or str(python) == sys.executable
    }
    alike = {
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "",
        "TMPDIR": str(folder),
    }
    return kept | dict.fromkeys(THREADS, "1") | alike


def _death(code: int, cpu: float, seconds: int) -> str:
    """Why a process ended that a signal ended, empty for others."""
    if -code == signal.SIGXCPU or (-code == signal.SIGKILL and cpu > seconds):
        return f"it was ended after {seconds} CPU seconds"
    return f"it died of {signal.Signals(-code).name}" if code < 0 else ""
