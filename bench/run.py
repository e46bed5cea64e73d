"""Measure everything that README and docs quote; needs ONNXQ_DATA. Takes some hours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = (
    *("int8.py", "low_bits.py", "mixed.py", "weight_only.py", "activations.py", "recurrent.py"),
    *("field.py", "narrow.py"),
    *("lapq.py", "search_cost.py", "ablations.py", "matching.py"),
    *("multipoint.py", "joint_points.py", "point_forms.py", "decomposition.py"),
    *("exactness.py", "portable.py", "saturation.py", "backend.py"),
    *("streaming.py", "memory.py", "samples.py", "cluster.py"),
    *("peers/run.py", "peers/more_images.py", "peers/cost.py"),
    *("table.py", "figures.py"),
)

if __name__ == "__main__":
    for script in SCRIPTS:
        print(f"== {script}", flush=True)
        subprocess.run([sys.executable, Path(__file__).parent / script], check=True)
