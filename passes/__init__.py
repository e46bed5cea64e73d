"""The built-in passes, one file each."""

if __name__ != "onnxq.passes":
    raise ImportError(
        "import the passes as onnxq.passes: a second copy of every class would not be recognised"
    )

from onnxq.passes.annotate import Annotate
from onnxq.passes.calibrate import Calibrate
from onnxq.passes.choose_ranges import ChooseRanges
from onnxq.passes.correct_bias import CorrectBias
from onnxq.passes.emit_integer import EmitInteger
from onnxq.passes.emit_qdq import EmitQDQ
from onnxq.passes.equalize import Equalize
from onnxq.passes.flatten_matmul import FlattenMatMul
from onnxq.passes.fold_batchnorm import FoldBatchNorm
from onnxq.passes.fold_constants import FoldConstants
from onnxq.passes.fold_pad import FoldPad
from onnxq.passes.keep_stem import KeepStem
from onnxq.passes.multipoint import Multipoint
from onnxq.passes.pad_channels import PadChannels
from onnxq.passes.quantize_dynamic import QuantizeDynamic
from onnxq.passes.quantize_weights import QuantizeWeights
from onnxq.passes.round_weights import RoundWeights
from onnxq.passes.search_norm import SearchNorm
from onnxq.passes.search_steps import SearchSteps
from onnxq.passes.store_weights import StoreWeights

BUILT_IN = (
    FoldConstants,
    FoldBatchNorm,
    FoldPad,
    FlattenMatMul,
    KeepStem,
    Equalize,
    Annotate,
    Calibrate,
    ChooseRanges,
    QuantizeWeights,
    SearchNorm,
    SearchSteps,
    RoundWeights,
    Multipoint,
    CorrectBias,
    PadChannels,
    EmitQDQ,
    EmitInteger,
    QuantizeDynamic,
    StoreWeights,
)
