"""Which peers are asked for what: settings, and the ways in which each peer is run at a setting.

The first way of a peer is what it does by default at that setting, the others are what its documentation offers for accuracy.
A way that a peer cannot go stays in the list: its row holds the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ADAPTERS = Path(__file__).parent / "adapters"
SETTINGS = {
    "w8a8-tensor": "8-bit weights with one scale a tensor, 8-bit activations",
    "w8a8": "8-bit weights with a scale for each output channel, 8-bit activations",
    "w4a8": "4-bit weights with a scale for each output channel, 8-bit activations",
    "w4a4": "4-bit weights with a scale for each output channel, 4-bit activations",
    "w4": "4-bit weights alone, activations in float",
}


@dataclass(frozen=True)
class Peer:
    """A quantizer.

    Attributes:
        name: as on the command line; its requirements and its adapter are named after it.
        ways: options of the adapter by way, by setting.
        batch: samples a run while calibrating, where the model lets it be chosen.
        adapter: its script.
    """

    name: str
    ways: dict[str, dict[str, dict[str, Any]]]
    batch: int = 1
    adapter: Path = field(default=Path())

    @property
    def script(self) -> Path:
        """The adapter, `adapters/use_NAME.py` unless another is given."""
        return self.adapter if self.adapter.name else ADAPTERS / f"use_{self.name}.py"

    def at(self, setting: str, model: str) -> dict[str, dict[str, Any]]:
        """Ways at a setting, those that fit a model."""
        ways = self.ways.get(setting, {})
        return {
            name: options
            for name, options in ways.items()
            if not options.get("transformer") or model in TRANSFORMERS
        }


TRANSFORMERS = ("minilm_l6_v2",)
LAPQ, POINTS, ALL = {"ranges": "lapq"}, {"multipoint": 0.1}, {"first_last": "same"}
SEARCHED = {
    "default": {},
    "lapq": LAPQ,
    "lapq, cosine": LAPQ | {"loss": "cosine"},
    "multipoint 0.1": POINTS,
    "lapq, multipoint 0.1": LAPQ | POINTS,
    "all layers": ALL,
}
ENHANCED, EDGES = {"scheme": "tf_enhanced"}, {"edges": True}
ITERATIONS = 500  # of AIMET's AdaRound a layer, whose default of 10,000 takes hours on one core

ONNXQ_8 = {"default": {}, "accurate": {"preset": "int8-accurate"}, "lapq": LAPQ, "multipoint 0.1": POINTS}
ONNXRUNTIME_8 = {
    "default": {"signed": True},
    "unsigned": {},
    "unsigned, entropy": {"method": "Entropy"},
    "unsigned, percentile": {"method": "Percentile"},
    "unsigned, reduce_range": {"reduce_range": True},
}
ONNXRUNTIME_4 = {"default": {}, "edges 8": EDGES, "edges 8, percentile": EDGES | {"method": "Percentile"}}
NNCF_8 = {
    "default": {},
    "accurate bias correction": {"accurate": True},
    "mixed, accurate bias correction": {"accurate": True, "mixed": True},
    "folded, accurate bias correction": {"accurate": True, "fold": True},
    "transformer": {"transformer": True},
}
ONNXSIM_8 = {
    "default": {"kind": "static"},
    "full graph": {"kind": "full"},
    "full graph, mse": {"kind": "full", "method": "mse"},
    "full graph, equalized, biases corrected": {"kind": "full", "equalize": True, "correct": True},
    "full graph, gptq": {"kind": "full", "gptq": True},
}
AIMET_8 = {
    "default": {},
    "tf_enhanced": ENHANCED,
    "equalized": ENHANCED | {"equalize": True},
    "adaround": {"adaround": ITERATIONS},
}
AIMET_4 = {
    "default": {},
    "edges 8": ENHANCED | EDGES,
    "edges 8, equalized": ENHANCED | EDGES | {"equalize": True},
    "edges 8, seq mse": EDGES | {"seq_mse": True},
    "edges 8, adaround": ENHANCED | EDGES | {"adaround": ITERATIONS},
}
QUARK_8 = {
    "min-max": {"method": "MinMax"},
    "min-max, equalized": {"method": "MinMax", "algorithms": {"CLE": {}}},
    "min-max, biases corrected": {"method": "MinMax", "algorithms": {"BiasCorrection": {}}},
    "min-max, adaround": {"method": "MinMax", "algorithms": {"AdaRound": {}}},
}

PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "onnxq",
            {
                "w8a8-tensor": ONNXQ_8,
                "w8a8": ONNXQ_8,
                "w4a8": SEARCHED,
                "w4a4": SEARCHED,
                "w4": {
                    "default": {},
                    "all layers": ALL,
                    "without samples": {"blind": True},
                    "multipoint 0.1": POINTS,
                },
            },
        ),
        Peer(
            "onnxruntime",
            {
                "w8a8-tensor": ONNXRUNTIME_8,
                "w8a8": ONNXRUNTIME_8,
                "w4a8": ONNXRUNTIME_4,
                "w4a4": ONNXRUNTIME_4,
                "w4": {"default": {}, "tables": {"tables": True}},
            },
        ),
        Peer(
            "nncf",
            {
                "w8a8-tensor": NNCF_8,
                "w8a8": NNCF_8,
                "w4a8": {"default": {}},
                "w4a4": {"default": {}},
                "w4": {"default": {}, "groups of 32": {"group": 32}},
            },
        ),
        Peer(
            "aimet",
            {
                "w8a8-tensor": AIMET_8,
                "w8a8": AIMET_8,
                "w4a8": AIMET_4,
                "w4a4": AIMET_4,
                "w4": {
                    "default": {},
                    "edges 8": EDGES,
                    "edges 8, adaround": EDGES | {"adaround": ITERATIONS},
                },
            },
        ),
        Peer(
            "quark",
            {
                "w8a8-tensor": {"default": {"preset": "A8W8"}, "preset U8S8_AAWS": {"preset": "U8S8_AAWS"}}
                | QUARK_8,
                "w8a8": {"default": {"method": "Percentile"}} | QUARK_8,
                "w4a8": {"default": {}},
                "w4a4": {"default": {}},
                "w4": {"default": {}},
            },
        ),
        Peer(
            "onnxsim",
            {
                "w8a8-tensor": ONNXSIM_8,
                "w8a8": ONNXSIM_8,
                "w4a8": {
                    "default": {"kind": "static"},
                    "gptq": {"kind": "full", "gptq": True},
                    "gptq, biases corrected": {"kind": "full", "gptq": True, "correct": True},
                },
                "w4a4": {"default": {"kind": "static"}},
                "w4": {"default": {"kind": "int4"}, "nbits": {"kind": "nbits"}},
            },
        ),
    )
}
