"""`onnxq report`, and the forms in which a report is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxq.commands.checks import check_files
from onnxq.errors import DataError, OnnxqError
from onnxq.files import reason, replacing
from onnxq.report.page import page

PAGES = (".html", ".htm")


def report_bytes(report: Mapping[str, Any], path: Path) -> bytes:
    """A report as the suffix of its file says: an HTML page, else JSON."""
    if path.suffix.lower() in PAGES:
        return page(report).encode()
    return json.dumps(report, indent=2).encode() + b"\n"


def report_file(run: Path, output: Path) -> None:
    """Write the page of a JSON report.

    Raises:
        OnnxqError: a file cannot be read or written.
        DataError: `run` is no JSON report.
    """
    check_files({"page": output}, {"report": run})
    try:
        found = json.loads(run.read_bytes())
    except OSError as error:
        raise OnnxqError(f"cannot read the report {run}: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"cannot read the report {run}: it is no JSON ({error})") from None
    try:
        text = page(found)
    except DataError as error:
        raise DataError(f"cannot read the report {run}: {error}") from error
    try:
        with replacing(output) as file:
            file.write(text.encode())
    except OSError as error:
        raise OnnxqError(f"cannot write the page {output}: {reason(error)}") from None
