"""The command line: arguments, exit codes, printing. The work is done in `onnxq.commands`."""

from __future__ import annotations

import io
import re
import sys
from typing import Any, NoReturn

import typer
from rich.markup import escape

from onnxq.console import fail, out, print_json, progress_bar, say
from onnxq.errors import OnnxqError, UsageError
from onnxq.files import reason
from onnxq.options import (
    CPU,
    SOURCES,
    Activations,
    AnalysisBits,
    AnalysisLoss,
    AnalysisOutput,
    AnalysisSamples,
    AnalysisSource,
    Batch,
    BenchBatch,
    BenchProvider,
    BenchThreads,
    BiasCorrection,
    Bits,
    Calib,
    CalibImages,
    CalibSamples,
    CheckpointFile,
    Cluster,
    Config,
    Data,
    Debug,
    Elementwise,
    Exact,
    First,
    FirstLast,
    Format,
    Images,
    Json,
    JudgedTarget,
    Largest,
    LoadCalibration,
    Loss,
    MaybeSecond,
    Metric,
    MinSqnr,
    Model,
    Multipoint,
    MultipointError,
    MultipointForm,
    MultipointSize,
    Output,
    Override,
    Page,
    Pair,
    Passes,
    PlotFormat,
    Plots,
    Preset,
    Provider,
    Ranges,
    ReportFile,
    Run,
    Samples,
    SaveCalibration,
    SearchBudget,
    Second,
    Seconds,
    Seed,
    Shape,
    Skip,
    Target,
    Test,
    TestMetric,
    Threads,
    Version,
    Weights,
)

ABOUT = "Quantize ONNX models after training, and prove that the result is smaller, faster and as accurate."
MISUSE, FAILED, INTERRUPTED = 2, 1, 130

app = typer.Typer(
    name="onnxq",
    help=ABOUT,
    epilog="Start with: onnxq compile model.onnx -o model_int8.onnx --calib samples.npz",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(
    "compile",
    short_help="Quantize a model and write the verified result.",
    epilog=f"{SOURCES}\n\nExample: onnxq compile model.onnx -o model_int8.onnx --calib samples.npz",
)
def compile_command(
    model: Model,
    output: Output,
    config: Config = None,
    report: ReportFile = None,
    as_json: Json = False,
    debug: Debug = False,
    calib: Calib = None,
    samples: CalibSamples = None,
    images: CalibImages = None,
    ranges: Ranges = None,
    loss: Loss = None,
    search_budget: SearchBudget = None,
    checkpoint: CheckpointFile = None,
    cluster: Cluster = None,
    bias_correction: BiasCorrection = None,
    save_calibration: SaveCalibration = None,
    load_calibration: LoadCalibration = None,
    test: Test = None,
    metric: TestMetric = None,
    preset: Preset = None,
    passes: Passes = None,
    bits: Bits = None,
    weights: Weights = None,
    activations: Activations = None,
    override: Override = None,
    first_last: FirstLast = None,
    elementwise: Elementwise = None,
    multipoint: Multipoint = None,
    multipoint_error: MultipointError = None,
    multipoint_size: MultipointSize = None,
    multipoint_form: MultipointForm = None,
    skip: Skip = None,
    min_sqnr: MinSqnr = None,
    form: Format = None,
    target: Target = "ort-cpu",
    seed: Seed = 0,
    threads: Threads = 0,
    provider: Provider = CPU,
) -> None:
    """Quantize MODEL, check the result against it, and write it to OUT.

    With --calib, weights and activations become integers that run in integer
    kernels: of 8 bits, or as --bits says. Without, convolutions keep 8-bit
    weights and compute in float, and matrix products and LSTMs quantize
    their inputs as they run.
    """
    from onnxq.choices import Choices
    from onnxq.commands.compiling import compile_file
    from onnxq.report.terminal import point_table, reasons, summary

    choices = Choices(
        preset=preset,
        pipeline=passes,
        form=form,
        target=target,
        bits=bits,
        weights=weights,
        activations=activations,
        override=override or (),
        first_last=first_last,
        elementwise=elementwise,
        ranges=ranges,
        loss=loss,
        search_budget=search_budget,
        checkpoint=checkpoint,
        cluster=cluster,
        bias_correction=bias_correction,
        skip=skip or (),
        min_sqnr=min_sqnr,
        multipoint=multipoint,
        multipoint_error=multipoint_error,
        multipoint_size=multipoint_size,
        multipoint_form=multipoint_form,
    )
    with progress_bar(as_json) as progress:
        done = compile_file(
            model,
            output,
            choices,
            calibration=calib,
            samples=samples,
            images=images,
            save_calibration=save_calibration,
            load_calibration=load_calibration,
            test=test,
            metric=metric,
            report=report,
            as_json=as_json,
            seed=seed,
            threads=threads,
            provider=provider,
            progress=progress,
        )
    say((*done.notes, *done.warnings))
    if as_json:
        print_json(done.as_json())
        return
    out.print(f"[bold]{escape(str(output))}[/bold]", soft_wrap=True)
    out.print(summary(done))
    for table in (point_table(done), reasons(done.nodes)):
        if table is not None:
            out.print()
            out.print(table)


@app.command(
    short_help="Measure a model on labelled data.",
    epilog=f"{SOURCES}\n\nExample: onnxq evaluate model_int8.onnx --data test.npz --metric top1",
)
def evaluate(
    model: Model,
    data: Data,
    metric: Metric = "top1",
    samples: Samples = None,
    images: Images = None,
    as_json: Json = False,
    debug: Debug = False,
    batch: Batch = 32,
    threads: Threads = 0,
    provider: Provider = CPU,
) -> None:
    """Measure MODEL on labelled data.

    A metric function of your own takes the outputs of all samples as a dict
    of arrays, and the labels (None without), and returns a number.
    """
    from onnxq.commands.measuring import evaluate_file

    sentences: list[str] = []
    with progress_bar(as_json) as progress:
        result = evaluate_file(
            model,
            data,
            metric,
            samples=samples,
            images=images,
            batch=batch,
            threads=threads,
            provider=provider,
            progress=progress,
            warn=sentences.append,
        )
    say(sentences)
    if as_json:
        print_json(result)
        return
    value = "not finite" if result["value"] is None else f"{result['value']:.4f}"
    out.print(
        f"{escape(result['metric'])} [bold]{value}[/bold] over {result['samples']} samples", soft_wrap=True
    )


@app.command(
    short_help="Compare the outputs of two models.",
    epilog=f"{SOURCES}\n\nExample: onnxq compare model.onnx model_int8.onnx --data test.npz",
)
def compare(
    a: First,
    b: MaybeSecond = None,
    *,
    data: Data,
    exact: Exact = False,
    samples: Samples = None,
    images: Images = None,
    as_json: Json = False,
    debug: Debug = False,
    batch: Batch = 32,
    threads: Threads = 0,
    provider: Provider = CPU,
) -> None:
    """Run two models on the same samples and compare their outputs.

    For each output: the power of A's output over that of the difference, in
    dB (sqnr_db), the share of samples, or of places in them, whose likeliest
    class is the same (agreement), and the largest difference (max_abs).

    With --exact: whether quantized files give the same codes everywhere.
    """
    from onnxq.commands.exactness import compare_exactly
    from onnxq.commands.measuring import compare_files
    from onnxq.report.exactness import exactness
    from onnxq.report.terminal import comparison

    sentences: list[str] = []
    settings: dict[str, Any] = {"samples": samples, "images": images, "batch": batch, "threads": threads}
    with progress_bar(as_json) as progress:
        settings |= {"provider": provider, "progress": progress, "warn": sentences.append}
        if exact:
            result = compare_exactly([a] if b is None else [a, b], data, **settings)
        else:
            result = compare_files(a, b, data, **settings)
    say(sentences)
    if as_json:
        print_json(result)
        return
    for part in exactness(result) if exact else [comparison(result)]:
        out.print(part)
    out.print(f"\n{result['samples']} samples")


@app.command(
    short_help="Time two models side by side.",
    epilog="Example: onnxq bench model.onnx model_int8.onnx --threads 2",
)
def bench(
    a: First,
    b: Second,
    batch: BenchBatch = 1,
    threads: BenchThreads = 1,
    shape: Shape = None,
    seconds: Seconds = 5.0,
    provider: BenchProvider = CPU,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time two models in turn on the same random inputs.

    The medians say how many times faster B is. Taking turns keeps a busy
    machine from favouring one of them.
    """
    from onnxq.commands.measuring import bench_files

    with progress_bar(as_json) as progress:
        result = bench_files(
            a,
            b,
            batch=batch,
            threads=threads,
            shapes=tuple(shape or ()),
            seconds=seconds,
            provider=provider,
            progress=progress,
        )
    if as_json:
        print_json(result)
        return
    times = f"{result['ms_a']:.3g} ms -> {result['ms_b']:.3g} ms"
    out.print(f"{times}, [bold]{result['speedup']:.2f}x[/bold] (medians of {result['runs']} runs)")


@app.command(
    short_help="Say what a model holds, and what would be quantized and why.",
    epilog="Example: onnxq inspect model.onnx",
)
def inspect(
    model: Model,
    target: JudgedTarget = "ort-cpu",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what MODEL holds, and what would be quantized, what not and why.

    Needs no data. Hazards are what may go wrong: types that change, inputs
    that are not float, weights that saturate on some processors.
    """
    from onnxq.commands.inspecting import inspect_file
    from onnxq.report.terminal import inspection

    result = inspect_file(model, target)
    if as_json:
        print_json(result)
        return
    for part in inspection(result):
        out.print(part)


@app.command(
    "analyze",
    short_help="Say which tensors' steps matter, and whether a joint search will pay.",
    epilog=f"{SOURCES}\n\nExample: onnxq analyze model.onnx --calib samples.npz --bits w4a4 --plots figures",
)
def analyze_command(
    model: Model,
    calib: AnalysisSource,
    bits: AnalysisBits = "w4a4",
    weights: Weights = None,
    override: Override = None,
    skip: Skip = None,
    loss: AnalysisLoss = "auto",
    samples: AnalysisSamples = 128,
    images: CalibImages = None,
    largest: Largest = 6,
    pair: Pair = None,
    output: AnalysisOutput = None,
    plots: Plots = None,
    plot_format: PlotFormat = "svg",
    as_json: Json = False,
    debug: Debug = False,
    seed: Seed = 0,
    threads: Threads = 0,
) -> None:
    """Look at the loss of MODEL around the steps that quantization chooses.

    It takes two evaluations of the loss for each tensor below 8 bits, and
    some dozens for the Hessian, a contour and the p of layer-wise ranges.
    The figures are those of the LAPQ paper.
    """
    from onnxq.commands.analyzing import analyze_file
    from onnxq.report.analysis import sensitivity_table

    with progress_bar(as_json) as progress:
        found = analyze_file(
            model,
            calib,
            output=output,
            plots=plots,
            form=plot_format,
            bits=bits,
            weights=weights,
            override=override or (),
            skip=skip or (),
            loss=loss,
            samples=samples,
            largest=largest,
            pair=pair,
            images=images,
            seed=seed,
            threads=threads,
            progress=progress,
        )
    if as_json:
        print_json(found.as_json())
        return
    out.print(sensitivity_table(found))
    out.print(escape(found.verdict), soft_wrap=True)


@app.command(
    "passes",
    short_help="List the passes with their options, and the presets.",
    epilog="Example: onnxq compile m.onnx -o q.onnx --calib s.npz --passes "
    "'fold-batchnorm annotate:skip=head*|Gemm calibrate choose-ranges quantize-weights emit-qdq'",
)
def passes_command(as_json: Json = False, debug: Debug = False) -> None:
    """List every pass with its options, and the presets, which are pipelines of passes.

    A pipeline is passes in order, each with its options:
    NAME:OPTION=VALUE,OPTION=VALUE
    """
    from onnxq.commands.listing import list_passes
    from onnxq.report.terminal import pass_table

    result = list_passes()
    if as_json:
        print_json(result)
        return
    out.print(pass_table(result))
    for name, text in result["presets"].items():
        out.print(f"\n[bold]preset {escape(name)}[/bold]\n  {escape(text)}", soft_wrap=True)


@app.command(
    "report",
    short_help="Show a compile as one HTML page.",
    epilog="Example: onnxq compile m.onnx -o q.onnx --calib s.npz --report run.json && onnxq report run.json -o run.html",
)
def report_command(run: Run, output: Page, debug: Debug = False) -> None:
    """Write what RUN holds as a page with tables and plots.

    The page needs no network and no other file.
    """
    from onnxq.commands.reporting import report_file

    report_file(run, output)
    out.print(f"[bold]{escape(str(output))}[/bold]", soft_wrap=True)


@app.callback(invoke_without_command=True)
def common(
    context: typer.Context,
    version: Version = False,
) -> None:
    """The options before the command."""
    if version:
        from onnxq import __version__

        out.print(f"onnxq {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code: 2 for misuse, 1 for a failure, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a name that the terminal cannot show is no failure
    try:
        code = app(given, prog_name="onnxq", standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:
        fail(_usage_sentence(error), MISUSE, debug)
    except UsageError as error:
        fail(str(error), MISUSE, debug)
    except OnnxqError as error:
        fail(str(error), FAILED, debug)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", INTERRUPTED, debug)
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader has gone
            sys.exit(FAILED)
        fail(f"{error.filename or 'standard output'}: {reason(error)}", FAILED, debug)
    except MemoryError:
        fail("there is not enough memory", FAILED, debug)
    except Exception as error:  # a mistake in onnxq or a plug-in: still one sentence
        what = f"{type(error).__name__}: {error}"
        fail(f"internal error: {what}; run with --debug for its origin", FAILED, debug)
    if code == INTERRUPTED:  # typer turns the interrupt into an exit code
        fail("interrupted", INTERRUPTED, debug)
    sys.exit(code if isinstance(code, int) else 0)


def _usage_sentence(error: typer.TyperException) -> str:
    """Typer's complaint in the words of the others."""
    text = " ".join(error.format_message().split()).rstrip(".")
    text = re.sub(r" \(Possible options: (.+)\)$", r"; did you mean \1?", text)
    text = text.replace(": Input should", ": it should")
    text = re.sub(r"\. (Did you mean .+)$", lambda found: f"; {found[1].lower()}", text)
    return text[:1].lower() + text[1:]
