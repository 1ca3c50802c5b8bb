"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from qfast.errors import QfastError

__all__ = ["atomic_write", "is_disk_full"]


def atomic_write(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `target`, then put it in the target's place.

    Whatever goes wrong, `target` holds its old content or the new one, and no temporary file stays.

    Raises
    ------
    QfastError
        The disk is full.
    """
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files private
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise QfastError(
                f"no space left on the disk for {str(target)!r}; what is written so far is whole."
            ) from error
        raise


def is_disk_full(error: BaseException | None) -> bool:
    """True for an OSError that says the disk or the quota is full, or an error that one has caused."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if type(error).__name__ == "SafetensorError" and "No space left" in str(error):  # it is no OSError
            return True
        error = error.__cause__ or error.__context__
    return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
