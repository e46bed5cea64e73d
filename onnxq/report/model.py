"""The report as data. Its JSON form is what `--report` writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onnxq.measure.compare import Difference
from onnxq.measure.coverage import Coverage
from onnxq.measure.speed import Speed
from onnxq.pipeline import Step

if TYPE_CHECKING:
    from onnxq.measure.layers import LayerNoise
    from onnxq.measure.metrics import Accuracy
    from onnxq.mixed_precision import Floor


@dataclass(frozen=True)
class NodeRow:
    """What became of one node of the float model.

    Attributes:
        name, op: as in the prepared model.
        status: `integer` runs on codes in the deployed graph, `storage` has quantized weights but computes in float, `float` is
            as it was.
        reason: why it is not `integer`; empty otherwise.
    """

    name: str
    op: str
    status: str
    reason: str = ""

    def as_json(self) -> dict[str, str]:
        """The row."""
        return {"name": self.name, "op": self.op, "status": self.status, "reason": self.reason}


@dataclass(frozen=True)
class Report:
    """All that is known about one compile.

    Attributes:
        model, output: paths, empty for models in memory.
        target, pipeline: what it was compiled for, and how, as text.
        calibration: source, samples, digest; None without data.
        nodes: what became of each node that computes in float.
        coverage: what the runtime made of it; None when that is another runtime than the one at hand.
        difference: outputs of the deployed model against float on calibration samples; None without data.
        accuracy: a metric of both on labelled test samples; None where none were given.
        layers: noise by layer, None where that was not asked for.
        speed: float against deployed, batch 1; None when it could not be run.
        float_bytes, quantized_bytes: file sizes.
        seconds: wall time of each pass and stage.
        peak_rss_bytes: peak memory of the process.
        versions: of onnxq and what it stands on.
        notes, warnings: sentences for the user.
        steps: the passes as they ran.
        deployed: losses of the emitted model, by the pass that asked for them.
        floor: what it took to keep an SQNR; None where none was asked for.
    """

    model: str
    output: str
    target: str
    pipeline: str
    calibration: Mapping[str, Any] | None
    nodes: Sequence[NodeRow]
    coverage: Coverage | None
    difference: Difference | None
    speed: Speed | None
    float_bytes: int
    quantized_bytes: int
    seconds: Mapping[str, float]
    peak_rss_bytes: int
    versions: Mapping[str, str]
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()
    steps: Sequence[Step] = ()
    deployed: Mapping[str, float] = field(default_factory=dict)
    accuracy: Accuracy | None = None
    layers: LayerNoise | None = None
    floor: Floor | None = None

    @property
    def bits(self) -> dict[str, str]:
        """Widths of each layer that a pass chose them for, such as `w4a8` or `w8a8 (first layer)`, by node name."""
        found: dict[str, str] = {}
        for step in self.steps:
            found |= step.result.facts.get("bits", {})
        return found

    @property
    def tensors(self) -> list[dict[str, Any]]:
        """What became of each quantized tensor (`onnxq.measure.tensors`), in the order of the plan."""
        return [row for step in self.steps for row in step.result.facts.get("tensors", ())]

    @property
    def lapq(self) -> dict[str, Any] | None:
        """Figures of the joint search of steps, with the loss of what was emitted; None without one."""
        found: dict[str, Any] = {}
        for step in self.steps:
            found |= step.result.facts.get("lapq", {})
        for loss in self.deployed.values():
            found["loss_deployed"] = loss
        return found or None

    @property
    def outputs(self) -> Mapping[str, Any] | None:
        """Whether outputs of layers were matched with float, and the SQNR without and with that; None where it was not tried."""
        found = [step.result.facts["outputs"] for step in self.steps if "outputs" in step.result.facts]
        return found[-1] if found else None

    @property
    def multipoint(self) -> Mapping[str, Any] | None:
        """Which channels have several points, and what they cost; None where that was not asked for."""
        found = [step.result.facts["multipoint"] for step in self.steps if "multipoint" in step.result.facts]
        return found[-1] if found else None

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready dict; infinite and missing figures are null."""
        main = self.difference.main if self.difference else None
        report: dict[str, Any] = finite(
            {
                "model": self.model,
                "output": self.output,
                "target": self.target,
                "pipeline": self.pipeline,
                "calibration": self.calibration,
                "nodes": [row.as_json() for row in self.nodes],
                "coverage": self.coverage.share if self.coverage else None,
                "macs": {
                    "integer": self.coverage.integer_macs if self.coverage else None,
                    "total": self.coverage.total_macs if self.coverage else None,
                },
                "kernels": dict(self.coverage.kernels) if self.coverage else {},
                "bits": self.bits,
                "quality": {
                    "sqnr_db": main.sqnr_db if main else None,
                    "agreement": main.agreement if main else None,
                    "samples": self.difference.samples if self.difference else 0,
                    "outputs": {n: d.as_json() for n, d in self.difference.outputs.items()}
                    if self.difference
                    else {},
                    "metric": self.accuracy.as_json() if self.accuracy else None,
                },
                "lapq": self.lapq,
                "outputs": self.outputs,
                "multipoint": self.multipoint,
                "floor": self.floor.as_json() if self.floor else None,
                "tensors": self.tensors,
                "layers": self.layers.as_json() if self.layers else None,
                "speed": self.speed.as_json() if self.speed else None,
                "size": {"float_bytes": self.float_bytes, "quantized_bytes": self.quantized_bytes},
                "seconds": dict(self.seconds),
                "peak_rss_bytes": self.peak_rss_bytes,
                "versions": dict(self.versions),
                "notes": list(self.notes),
                "warnings": list(self.warnings),
                "passes": [_step(step) for step in self.steps],
            }
        )
        return report


def _step(step: Step) -> dict[str, Any]:
    result = step.result
    skipped = dict(result.skipped)
    facts = {
        key: value for key, value in result.facts.items() if key != "tensors"
    }  # they have their own place
    return {
        "pass": step.spec,
        "seconds": step.seconds,
        "changed": result.changed,
        "skipped": skipped,
        "facts": facts,
    }


def finite(value: Any) -> Any:
    """The value with every float that JSON cannot hold replaced by None.

    >>> finite({"a": [1.5, float("inf")]})
    {'a': [1.5, None]}
    """
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
