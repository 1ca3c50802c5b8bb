"""The small workflow that cases run, damage and kill."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from support.workflows import write_case


@cache
def workflow_inputs() -> tuple[Path, Path, Path]:
    """A temporary folder, and in it a workflow file and its data. The folder is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="torture-inputs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder, *write_case(folder)
