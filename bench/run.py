"""Measure everything that README and docs quote; needs ONNXQ_DATA. Takes some hours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = (
    *(
        "int8.py",
        "low_bits.py",
        "lapq.py",
        "search_cost.py",
        "ablations.py",
        "multipoint.py",
        "joint_points.py",
        "exactness.py",
        "weight_only.py",
        "portable.py",
    ),
    *("streaming.py", "memory.py", "saturation.py", "backend.py", "cluster.py", "decomposition.py"),
    "peers/run.py",
    *("table.py", "figures.py"),
)

if __name__ == "__main__":
    for script in SCRIPTS:
        print(f"== {script}", flush=True)
        subprocess.run([sys.executable, Path(__file__).parent / script], check=True)
