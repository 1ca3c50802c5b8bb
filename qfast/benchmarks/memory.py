"""Peak memory of a section of code. Linux only; elsewhere the peak is unknown."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Peak", "peak_memory"]

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Megabytes beyond the memory in use at the start of the section, None if unknown."""

    megabytes: float | None = None


@contextlib.contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the peak of resident memory in the block, relative to its start.

    Memory that was freed before the block is returned to the system first, where the C library can do that.

    Examples
    --------
    >>> with peak_memory() as peak:
    ...     block = bytearray(64 << 20)
    >>> peak.megabytes is None or peak.megabytes > 60
    True
    """
    peak = Peak()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        CLEAR.write_text("5")
        before = _megabytes("VmRSS")
    except OSError:
        before = None
    yield peak
    if before is not None:
        peak.megabytes = max(0.0, _megabytes("VmHWM") - before)


def _megabytes(field: str) -> float:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
