"""What a user chooses of a compile, and the pipeline that follows from it.

`weights` and `activations` refine `bits`, which refines the preset; each further option is set on every pass that has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnxq.errors import UsageError
from onnxq.pipeline import Pipeline
from onnxq.precision import Bits, override_bits
from onnxq.presets import WEIGHT_ONLY, WITHOUT_DATA, preset_pipeline
from onnxq.quantizers import parse_quantizer
from onnxq.scheme import QuantScheme
from onnxq.sizes import parse_bytes
from onnxq.target import Target, find_target

FLOAT, LAPQ = "float", "lapq"
DEFAULT = "int8"
OF_SEARCH = ("loss", "budget", "checkpoint", "cluster")
BLOCK = 32
PER_CHANNEL = QuantScheme.parse("int8:channel")


@dataclass(frozen=True)
class Choices:
    """Options of a compile that shape its pipeline; None leaves one to the preset or the pipeline.

    Attributes:
        preset: named pipeline, `int8` when left out.
        pipeline: passes to run instead of a preset, or their text.
        form: `qdq` or `integer`.
        target: runtime to compile for.
        bits: widths as `w4a8`, or `w4` for weights alone.
        weights: scheme of weights, e.g. int4:channel.
        activations: scheme of activations, e.g. uint4, or `float`.
        override: exceptions, GLOB=BITS or GLOB=float.
        first_last: width of the first and last layers: `same`, `8` or `float`; None for `8`, or `same` where min_sqnr finds those
            that need more.
        elementwise: width of activations that no layer multiplies: `8` or `same`.
        ranges: range method of activations, or `lapq` to search all steps together by the network's loss.
        loss, search_budget, checkpoint, cluster: of that search.
        bias_correction: `auto`, `none`, `output`, `exact` or `deployed`; None for the pipeline's own.
        skip: node names or op types to leave in float.
        min_sqnr: dB of the network's output to keep, for which layers get more bits than `bits`.
        multipoint: further weights of channels with several points, as a part of those below 8 bits.
        multipoint_error: instead, the largest error of a channel's output, as a part of its layer's mean power.
        multipoint_size: instead, the size of the file to stay within, such as 400KB.
        multipoint_form: `fold` or `rows`; None for what the target takes.
    """

    preset: str | None = None
    pipeline: Pipeline | str | None = None
    form: str | None = None
    target: str = "ort-cpu"
    bits: str | None = None
    weights: str | QuantScheme | None = None
    activations: str | QuantScheme | None = None
    override: Sequence[str] = ()
    first_last: str | None = None
    elementwise: str | None = None
    ranges: str | None = None
    loss: str | None = None
    search_budget: str | None = None
    checkpoint: str | Path | None = None
    cluster: str | None = None
    bias_correction: str | None = None
    skip: Sequence[str] = ()
    min_sqnr: float | None = None
    multipoint: float | None = None
    multipoint_error: float | None = None
    multipoint_size: str | None = None
    multipoint_form: str | None = None

    def resolve(self, has_data: bool) -> Pipeline:
        """The pipeline.

        Args:
            has_data: whether there are calibration samples or a table of their statistics.

        Raises:
            UsageError: an unknown, contradictory or unusable option.
        """
        target, bits = find_target(self.target), None if self.bits is None else Bits.parse(self.bits)
        self._check_points(bits, has_data)
        steps = self._passes(bits, has_data)
        weights, activations = self._weights(bits), self._activations(bits, target)
        if activations is not None and not self.is_weight_only(bits):
            target.activation_scheme(activations)
            if not has_data and activations.bits == 8 and self.activations is None:
                activations = None  # what is quantized at run time has 8 bits
        given = {
            "weights": weights,
            "activations": None if self.is_weight_only(bits) else activations,
            "ranges": None if self.is_joint else self.ranges,
            "loss": self.loss,
            "budget": self.search_budget,
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "cluster": self.cluster,
            "correction": self.bias_correction,
            "override": tuple(self.override),
            "first_last": self._first_last(),
            "elementwise": self.elementwise,
            "skip": tuple(self.skip),
            "share": self.multipoint,
            "error": self.multipoint_error,
            "size": self.multipoint_size,
            "form": self.multipoint_form,
        }
        if self.ranges is not None and not self.is_joint and self.ranges != "auto":
            parse_quantizer(self.ranges)
        if self.cluster is not None:
            from onnxq.cluster import Cluster

            Cluster.parse(self.cluster)
        for name, value in given.items():
            if value is None or value == ():
                continue
            if name in OF_SEARCH and self.pipeline is None and not self.is_joint:
                raise UsageError(f"{name} is of the joint search; choose it with --ranges lapq")
            if name in ("activations", "ranges", "correction") and not has_data:
                name = "bias_correction" if name == "correction" else name
                raise UsageError(f"{name} can only be chosen with calibration data; give some with --calib")
            steps = steps.with_option(name, value)
        if self.min_sqnr is not None:
            from onnxq.mixed_precision import check_floor

            check_floor(steps, self.min_sqnr, has_data=has_data, checkpoint=self.checkpoint)
        return steps

    @property
    def has_points(self) -> bool:
        """Whether some channels are to have further points."""
        return any(v is not None for v in (self.multipoint, self.multipoint_error, self.multipoint_size))

    @property
    def is_joint(self) -> bool:
        """Whether all steps are searched together."""
        return self.ranges == LAPQ

    @property
    def may_insist(self) -> bool:
        """Whether a second attempt may take the place of a noisy one: a pipeline that was given runs as it is, a search once."""
        return self.pipeline is None and not self.is_joint

    def falls_back(self, has_data: bool) -> bool:
        """Whether the preset gives way to its counterpart that needs no data."""
        bits = None if self.bits is None else Bits.parse(self.bits)
        asked = self.pipeline is None and not self.is_weight_only(bits)
        return asked and not has_data and (self.preset or DEFAULT) in WITHOUT_DATA

    def is_weight_only(self, bits: Bits | None) -> bool:
        """Whether activations stay float."""
        if self.activations is not None:
            return self.activations == FLOAT
        return bits is not None and bits.activations is None

    def _passes(self, bits: Bits | None, has_data: bool) -> Pipeline:
        if self.pipeline is None:
            preset = WEIGHT_ONLY if self.is_weight_only(bits) else self.preset or DEFAULT
            if self.preset is not None:
                preset_pipeline(self.preset)  # a name that is not known is an error all the same
            if self.is_joint and not has_data:
                raise UsageError("ranges can only be chosen with calibration data; give some with --calib")
            text = preset_pipeline(
                preset, self.form, data=has_data, joint=self.is_joint, points=self.has_points
            )
            return Pipeline.parse(text)
        if self.is_joint:
            raise UsageError(
                "a pipeline names its own search: write search-norm search-steps in front of correct-bias"
            )
        if self.preset is not None:
            raise UsageError("give a preset or a pipeline, not both")
        if self.form is not None:
            raise UsageError("a pipeline names its own emission pass; leave the format out")
        steps = Pipeline.parse(self.pipeline) if isinstance(self.pipeline, str) else self.pipeline
        if self.is_weight_only(bits) and any("activations" in p.options() for p in steps.passes):
            raise UsageError(f"activations are to stay float, and the pipeline '{steps}' quantizes them")
        return steps

    def _first_last(self) -> str | None:
        if self.first_last is None and self.min_sqnr is not None and self.pipeline is None:
            return "same"
        return self.first_last

    def _check_points(self, bits: Bits | None, has_data: bool) -> None:
        """Refuse further points that nothing could come of."""
        if not self.has_points:
            if self.multipoint_form is not None and self.pipeline is None:
                raise UsageError(
                    "multipoint-form says how further points are stored; ask for some with multipoint"
                )
            return
        given = (self.multipoint, self.multipoint_error, self.multipoint_size)
        if sum(value is not None for value in given) > 1:
            raise UsageError("give one of multipoint, multipoint-error and multipoint-size")
        if self.multipoint_size is not None:
            parse_bytes(self.multipoint_size)
        if not has_data:
            raise UsageError("multipoint judges channels by calibration data; give some with --calib")
        if self.is_weight_only(bits):
            raise UsageError("multipoint needs integer activations, as in --bits w4a8")
        widths = override_bits(self.override)
        scheme = self._weights(bits)
        if self.pipeline is None and min((PER_CHANNEL if scheme is None else scheme).bits, *widths, 8) == 8:
            raise UsageError(
                "weights of 8 bits fill the codes of the kernels, so multipoint has nothing to add to them; "
                "choose fewer, as in --bits w4a8"
            )

    def _weights(self, bits: Bits | None) -> QuantScheme | None:
        if isinstance(self.weights, str):
            return QuantScheme.parse(self.weights)
        if self.weights is not None or bits is None:
            return self.weights
        if self.is_weight_only(bits):
            return QuantScheme(bits.weights, signed=True, symmetric=True, granularity="block", block=BLOCK)
        return replace(PER_CHANNEL, bits=bits.weights)

    def _activations(self, bits: Bits | None, target: Target) -> QuantScheme | None:
        if isinstance(self.activations, str):
            return None if self.activations == FLOAT else QuantScheme.parse(self.activations)
        if self.activations is not None:
            return self.activations
        width = bits.activations if bits is not None else None
        if width is None:
            return QuantScheme(8, signed=True, symmetric=True) if target.signed else None
        return QuantScheme(width, signed=target.signed, symmetric=target.signed)
