"""Memory of this process: how much it took, and giving back what is not used any more."""

from __future__ import annotations

import ctypes
import gc
import sys


def peak_rss_bytes() -> int:
    """Peak resident memory of this process, 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back() -> None:
    """Free what only circles refer to, such as nodes of a graph and their weights, and have the allocator return what is free.

    It looks at every object, which takes some hundredths of a second, and frees at once what would be freed some time.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return  # not the C library of GNU
