"""Calibration and evaluation samples: one way to read them, the same everywhere in the tool."""

from onnxq.data.dataset import Batch, Dataset
from onnxq.data.functions import load_function
from onnxq.data.images import ImageOptions
from onnxq.data.inputs import InputSpec, input_specs
from onnxq.data.part import Part
from onnxq.data.sources import Source, open_data

__all__ = [
    "Batch",
    "Dataset",
    "ImageOptions",
    "InputSpec",
    "Part",
    "Source",
    "input_specs",
    "load_function",
    "open_data",
]
