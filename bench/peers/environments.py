"""A virtual environment for each peer, made when it is first needed and kept outside the repository."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"


class NotInstalledError(Exception):
    """The environment cannot be made; the message is the reason in one sentence."""


def cache() -> Path:
    """The folder of the environments: `ONNXQ_PEERS`, or one for temporary files."""
    return Path(os.environ.get("ONNXQ_PEERS", Path(tempfile.gettempdir()) / "onnxq-peers"))


def interpreter(peer: str) -> Path:
    """Python of a peer's environment; that of this process for a peer without requirements, such as onnxq.

    An environment is made anew when its requirements change.

    Raises:
        NotInstalledError: pip failed.
    """
    requirements = REQUIREMENTS / f"{peer}.txt"
    if not requirements.exists():
        return Path(sys.executable)
    place = cache() / peer
    python, stamp = place / "bin" / "python", place / "requirements.sha256"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return python
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True)
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", requirements]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise NotInstalledError(
            f"pip cannot install it: {(errors or ['no reason given'])[0].removeprefix('ERROR: ')}"
        )
    stamp.write_text(digest)
    return python
