"""What every adapter shares: a job read from JSON, its samples, and the report of what it took.

Adapters run in a peer's environment, so this file needs numpy alone and whatever the peer brings.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np


class UnableError(Exception):
    """The peer cannot do what the job asks; the message is the reason in one sentence."""


@dataclass(frozen=True)
class Job:
    """One compile.

    Attributes:
        model: path of the float model.
        calib: path of an .npz with an array for each input, samples first; all of them are used.
        output: where to write the quantized model.
        setting: a key of `catalog.SETTINGS`.
        batch: samples a run while calibrating.
        options: what the adapter understands, see `catalog.py`.
    """

    model: str
    calib: str
    output: str
    setting: str
    batch: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Bits of weights."""
        return int(self.setting[1])

    @property
    def activations(self) -> int | None:
        """Bits of activations, None for float."""
        return int(self.setting[3]) if self.setting[2:3] == "a" else None

    @property
    def per_channel(self) -> bool:
        """Whether each output channel has its own scale."""
        return not self.setting.endswith("tensor")

    @property
    def samples(self) -> int:
        """Calibration samples."""
        with np.load(self.calib) as arrays:
            return len(arrays[arrays.files[0]])

    def feeds(self) -> Iterator[dict[str, np.ndarray]]:
        """Batches of the calibration samples by input name."""
        with np.load(self.calib) as arrays:
            inputs = {name: arrays[name] for name in arrays.files}
        for start in range(0, self.samples, self.batch):
            yield {name: values[start : start + self.batch] for name, values in inputs.items()}


def perform(quantize: Callable[[Job], str | None], *packages: str) -> None:
    """Run the job in the file that the first argument names; write the report to the second.

    Args:
        quantize: writes `job.output`, or raises; what it returns is a note for the row.
        packages: distributions whose versions the report names.
    """
    job, report = Job(**json.loads(Path(sys.argv[1]).read_text("utf-8"))), Path(sys.argv[2])
    found: dict[str, Any] = {"versions": _versions(packages)}
    use_one_thread()
    try:
        found["note"] = quantize(job)
    except Exception as error:  # a peer that fails is a result
        found["failed"] = str(error) if isinstance(error, UnableError) else f"{type(error).__name__}: {error}"
    found["peak_bytes"] = peak_bytes()
    report.write_text(json.dumps(found), "utf-8")


def use_one_thread() -> None:
    """Make sessions of onnxruntime single-threaded: idle threads spin, and would count as CPU time of the peer."""
    import onnxruntime

    class OneThread(onnxruntime.InferenceSession):
        def __init__(self, model: Any, sess_options: Any = None, *args: Any, **kwargs: Any) -> None:
            options = sess_options or onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            super().__init__(model, options, *args, **kwargs)

    onnxruntime.InferenceSession = OneThread


def peak_bytes() -> int:
    """Peak resident memory of this process; on Linux of its address space, as `getrusage` counts the parent's before exec."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
