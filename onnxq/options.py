"""The options and arguments of the commands. A help text says its default in parentheses where that matters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from onnxq.config import Setting, read_config

SOURCES = (
    "[bold]SRC[/bold] is a .npz file with arrays named as the model's inputs (leading axis = samples, "
    "labels in 'label'), a .npy file, a directory of either, of images (sub-folders are classes) or of ONNX "
    "test_data_set_*, or FILE.py:FUNCTION that yields feeds."
)
IMAGES_HELP = (
    "How to read images, as NAME=VALUE with commas between: size=256, crop=224 or 224x192, scale=1/255, "
    "mean=0.5|0.5|0.5, std=0.2, layout=nchw, color=rgb, resample=bilinear."
)
CPU = "CPUExecutionProvider"
CALIBRATION, QUANTIZATION, RUNNING = "Calibration", "Quantization", "Running"


def option(
    text: str, *names: str, metavar: str = "", panel: str | None = None, least: float | None = None
) -> Any:
    return typer.Option(
        *names, help=text, metavar=metavar, rich_help_panel=panel, show_default=False, min=least
    )


def model(text: str, name: str = "MODEL") -> Any:
    return typer.Argument(help=text, metavar=name, show_default=False)


Model = Annotated[Path, model("ONNX model.")]
First = Annotated[Path, model("ONNX model to compare with, usually the float one.", "A")]
Second = Annotated[Path, model("ONNX model with the same inputs.", "B")]
MaybeSecond = Annotated[
    Path | None, model("ONNX model with the same inputs; may be left out with --exact.", "B")
]
Exact = Annotated[
    bool,
    option(
        "Say whether each quantized file gives the same codes on machines that add products in 32 bits and on "
        "AVX2 machines without VNNI, and in onnxruntime here.",
        "--exact",
    ),
]
Data = Annotated[str, option("Samples to run, see below.", "--data", metavar="SRC")]
Samples = Annotated[
    int | None, option("Use N samples, evenly spaced over the source (all).", metavar="N", least=1)
]
Images = Annotated[str | None, option(IMAGES_HELP, "--images", metavar="TEXT")]
Batch = Annotated[int, option("Samples in one run (32).", metavar="N", least=1, panel=RUNNING)]
Threads = Annotated[
    int, option("Threads inside one operator; 0 is one per core (0).", metavar="N", least=0, panel=RUNNING)
]
Provider = Annotated[str, option(f"onnxruntime execution provider ({CPU}).", metavar="EP", panel=RUNNING)]
TARGETS = "ort-cpu, onnx for operators of the ONNX standard alone, openvino or tensorrt (ort-cpu)."
Target = Annotated[str, option(f"Runtime to compile for: {TARGETS}", metavar="NAME", panel=QUANTIZATION)]
Json = Annotated[bool, option("Print one JSON object and nothing else on standard output.", "--json")]
Debug = Annotated[bool, option("Show where an error comes from.", "--debug")]


def _settings(context: typer.Context) -> list[Setting]:
    """What a configuration file may set: every parameter of the command but the file itself."""
    found = []
    for param in context.command.params:
        long = [name for name in param.opts if name.startswith("--")]
        key = long[0].removeprefix("--") if long else (param.name or "").lower()
        if key in ("config", "help"):
            continue
        is_list, is_flag = (bool(getattr(param, name, False)) for name in ("multiple", "is_flag"))
        found.append(Setting(param.name or "", key, is_list, is_flag, is_path=key in PATHS))
    return found


def _take_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values of the file the command's defaults."""
    if path is not None:
        context.default_map = read_config(path, _settings(context))
    return path


PATHS = ("model", "output", "calib", "test", "report", "save-calibration", "load-calibration", "checkpoint")
Config = Annotated[
    Path | None,
    typer.Option(
        help='TOML file with any of these options by their long names: bits = "w4a4", override = ["head=w8a8"], '
        "model and output too. Its paths start from its folder; the command line counts before it.",
        metavar="FILE",
        callback=_take_config,
        is_eager=True,
        show_default=False,
    ),
]
Output = Annotated[Path, option("Where to write the quantized model.", "-o", "--output", metavar="OUT")]
ReportFile = Annotated[
    Path | None,
    option("Write all that was done and measured: a page if FILE ends in .html, else JSON.", metavar="FILE"),
]
Run = Annotated[Path, model("What `compile --report RUN.json` wrote.", "RUN")]
Page = Annotated[Path, option("Where to write the page.", "-o", "--output", metavar="PAGE")]

Calib = Annotated[str | None, option("Calibration samples, see below.", metavar="SRC", panel=CALIBRATION)]
CalibSamples = Annotated[
    int | None,
    option(
        "Use N samples, evenly spaced over SRC (128 for ranges at 8 bits, else up to 512).",
        metavar="N",
        least=1,
        panel=CALIBRATION,
    ),
]
CalibImages = Annotated[str | None, option(IMAGES_HELP, metavar="TEXT", panel=CALIBRATION)]
Ranges = Annotated[
    str | None,
    option(
        "How ranges are chosen: minmax, percentile, percentile=99.9, mse, entropy or aciq (minmax at 8 bits, mse below), "
        "or lapq, which searches all of them together by the network's loss.",
        metavar="NAME",
        panel=CALIBRATION,
    ),
]
SEARCH = "Joint search (--ranges lapq)"
Loss = Annotated[
    str | None,
    option(
        "What the search lowers: auto, cross-entropy, kl, mse, cosine or FILE.py:FUNCTION (auto).",
        metavar="NAME",
        panel=SEARCH,
    ),
]
SearchBudget = Annotated[
    str | None,
    option("Most evaluations of the loss, as 200, or time, as 90s or 2m.", metavar="LIMIT", panel=SEARCH),
]
CheckpointFile = Annotated[
    Path | None,
    option(
        "Keep the state of the search in a file, and go on from it.",
        "--checkpoint",
        metavar="FILE",
        panel=SEARCH,
    ),
]
Cluster = Annotated[
    str | None,
    option(
        "Evaluate the loss on N workers here, local:N, or those of a Dask scheduler, tcp://HOST:PORT.",
        metavar="WHERE",
        panel=SEARCH,
    ),
]
TEST = "Test"
Test = Annotated[
    str | None,
    option(
        "Labelled samples, other than those of --calib: measure float and the result on them.",
        "--test",
        metavar="SRC",
        panel=TEST,
    ),
]
TestMetric = Annotated[
    str | None,
    option(
        "What is measured on them: top1, top5, cross-entropy, mse or FILE.py:FUNCTION (top1).",
        "--metric",
        metavar="NAME",
        panel=TEST,
    ),
]
SaveCalibration = Annotated[
    Path | None, option("Keep the gathered statistics in a file.", metavar="FILE", panel=CALIBRATION)
]
LoadCalibration = Annotated[
    Path | None,
    option("Use statistics kept earlier; --calib may be left out.", metavar="FILE", panel=CALIBRATION),
]

Preset = Annotated[str | None, option("Named pipeline (int8).", metavar="NAME", panel=QUANTIZATION)]
Passes = Annotated[
    str | None,
    option("Pipeline text instead of a preset; see onnxq passes.", metavar="TEXT", panel=QUANTIZATION),
]
Bits = Annotated[
    str | None,
    option(
        "Widths of weights and activations, 2 to 8: w8a8, w4a8, w4a4 and so on; w4 leaves activations in float (w8a8).",
        metavar="wBaB",
        panel=QUANTIZATION,
    ),
]
Weights = Annotated[
    str | None,
    option(
        "Scheme of weights, which refines --bits: intB:channel, intB:tensor, or intB:block=N without activations.",
        metavar="SCHEME",
        panel=QUANTIZATION,
    ),
]
Activations = Annotated[
    str | None,
    option(
        "Scheme of activations, which refines --bits: uintB, intB or float.",
        metavar="SCHEME",
        panel=QUANTIZATION,
    ),
]
Override = Annotated[
    list[str] | None,
    option(
        "Other widths for nodes of this name, end of a path or op type: 'layer1.*=w8a8', 'head=float'. May be repeated.",
        metavar="GLOB=BITS",
        panel=QUANTIZATION,
    ),
]
FirstLast = Annotated[
    str | None,
    option(
        "First and last layers: 8 for at least 8 bits, same as the others, or float (8, with --min-sqnr same).",
        metavar="8|same|float",
        panel=QUANTIZATION,
    ),
]
Elementwise = Annotated[
    str | None,
    option(
        "Activations that only additions, concatenations or pooling read: 8 bits or the same as the others (8).",
        metavar="8|same",
        panel=QUANTIZATION,
    ),
]
BiasCorrection = Annotated[
    str | None,
    option(
        "How shifted means are put right: deployed, spreads too; output, those of weights; better, the one of them with "
        "less noise; exact; none (better below 8 bits and where 8 bits are noisy, else output).",
        metavar="KIND",
        panel=QUANTIZATION,
    ),
]
POINTS = "Channels with several points (weights below 8 bits)"
Multipoint = Annotated[
    float | None,
    option(
        "Store further points of the channels that hurt most: this part more weights, as 0.05. The kernels stay the same.",
        metavar="SHARE",
        panel=POINTS,
        least=0.0,
    ),
]
MultipointError = Annotated[
    float | None,
    option(
        "Instead, of all channels whose output errs by more than this part of its layer's mean power.",
        metavar="E",
        panel=POINTS,
        least=0.0,
    ),
]
MultipointSize = Annotated[
    str | None,
    option("Instead, as many as a file of this size holds, as 400KB.", metavar="SIZE", panel=POINTS),
]
MultipointForm = Annotated[
    str | None,
    option(
        "fold sums points up when the model is loaded; rows lets layers compute each and adds up their outputs (fold, where the "
        "target has 8-bit codes).",
        metavar="fold|rows",
        panel=POINTS,
    ),
]
Skip = Annotated[
    list[str] | None,
    option(
        "Leave nodes of this name, end of a path or op type in float; * and ? match. May be repeated.",
        metavar="GLOB",
        panel=QUANTIZATION,
    ),
]
MinSqnr = Annotated[
    float | None,
    option(
        "Give the layers that hurt most more bits than --bits says, or leave them in float, until the output keeps this SQNR "
        "on samples, as 25. Compiles several times.",
        metavar="DB",
        panel=QUANTIZATION,
    ),
]
Format = Annotated[
    str | None,
    option(
        "qdq (QuantizeLinear, DequantizeLinear) or integer (QLinearConv and its kin) (qdq).",
        "--format",
        metavar="NAME",
        panel=QUANTIZATION,
    ),
]
Seed = Annotated[int, option("Seed of every random choice (0).", metavar="N", least=0, panel=RUNNING)]

Metric = Annotated[str, option("top1, top5, cross-entropy, mse, or FILE.py:FUNCTION (top1).", metavar="NAME")]
BenchBatch = Annotated[int, option("Size of dynamic leading dimensions (1).", metavar="N", least=1)]
BenchThreads = Annotated[
    int, option("Threads inside one operator; 0 is one per core (1).", metavar="N", least=0)
]
BenchProvider = Annotated[str, option(f"onnxruntime execution provider ({CPU}).", metavar="EP")]
Shape = Annotated[
    list[str] | None,
    option(
        "Shape of an input with other dynamic dimensions, e.g. ids=1x128. May be repeated.",
        metavar="NAME=SIZES",
    ),
]
Seconds = Annotated[float, option("Time to spend (5).", metavar="S", least=0.1)]
JudgedTarget = Annotated[str, option(f"Runtime to judge for: {TARGETS}", metavar="NAME")]
Version = Annotated[bool, option("Print the version.", "--version")]

AnalysisSource = Annotated[str, option("Calibration samples, see below.", "--calib", metavar="SRC")]
AnalysisOutput = Annotated[
    Path | None, option("Write all figures as JSON.", "-o", "--output", metavar="FILE")
]
AnalysisBits = Annotated[str, option("Widths to look at, as for compile (w4a4).", "--bits", metavar="BITS")]
AnalysisLoss = Annotated[
    str,
    option(
        "Loss to look at: auto, cross-entropy, kl, mse, cosine or FILE.py:FUNCTION (auto).", metavar="NAME"
    ),
]
AnalysisSamples = Annotated[
    int, option("Evaluate on N samples, evenly spaced over SRC (128).", "--samples", metavar="N", least=16)
]
Plots = Annotated[Path | None, option("Draw the figures into this folder (needs matplotlib).", metavar="DIR")]
PlotFormat = Annotated[str, option("svg, png or pdf (svg).", metavar="NAME")]
Pair = Annotated[
    str | None,
    option("Two tensors whose steps the contour moves; those that interact most without.", metavar="A,B"),
]
Largest = Annotated[
    int,
    option(
        "Tensors of the Hessian, those that matter most; it takes N x N evaluations (6).",
        metavar="N",
        least=1,
    ),
]
