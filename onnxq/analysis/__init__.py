"""Why a network loses at few bits: what each step size matters, how they interact, and whether a joint search will pay."""

from onnxq.analysis.study import Analysis, analyze

__all__ = ["Analysis", "analyze"]
