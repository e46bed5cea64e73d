"""The built-in passes, one file each, named like their pass; a file is loaded when its pass is asked for."""

if __name__ != "onnxq.passes":
    raise ImportError(
        "import the passes as onnxq.passes: a second copy of every class would not be recognised"
    )

BUILT_IN = (
    "fold-constants",
    "fold-batchnorm",
    "fold-pad",
    "fold-activations",
    "flatten-matmul",
    "keep-stem",
    "equalize",
    "quantize-recurrent",
    "annotate",
    "calibrate",
    "choose-ranges",
    "quantize-weights",
    "search-norm",
    "search-steps",
    "round-weights",
    "multipoint",
    "correct-bias",
    "pad-channels",
    "emit-qdq",
    "emit-integer",
    "quantize-dynamic",
    "store-weights",
)
