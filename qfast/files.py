"""Files that appear whole or not at all, and folders that one process at a time writes to."""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qfast.errors import ConfigError, QfastError

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

__all__ = ["atomic_write", "is_disk_full", "locked", "sweep"]

log = logging.getLogger("qfast")

LOCK = ".lock"
# Ours, and those that safetensors writes before it puts a file in its place.
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp|\.tmp[0-9A-Za-z]{6}")


def atomic_write(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `target`, then put it in the target's place.

    Whatever goes wrong, `target` holds its old content or the new one, and no temporary file stays, unless
    the process is killed outright; `sweep` removes what such an end leaves.

    Raises
    ------
    QfastError
        The disk is full.
    """
    # The name is known before the file is there, so that no interrupt can come between the two.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise QfastError(
                f"no space left on the disk for {str(target)!r}; what is written so far is whole."
            ) from error
        raise


def sweep(folder: Path) -> list[Path]:
    """Remove the temporary files that a killed `atomic_write` left in `folder` and below; what was removed.

    To be called by the one process that writes to `folder`: any other's files would be taken for left over.
    """
    removed = []
    for file in folder.rglob(".*tmp*"):
        if TEMPORARY.fullmatch(file.name) and file.is_file() and not file.is_symlink():
            with contextlib.suppress(OSError):
                file.unlink()
                removed.append(file)
    return removed


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; the lock ends with the process, however it ends.

    Where the platform or the file system has no locks, nothing is held.

    Raises
    ------
    ConfigError
        Another process (or another call in this one) holds it.
    """
    handle = _lock(folder)
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()  # while it is still held, see _lock
            os.close(handle)


def _lock(folder: Path) -> int | None:
    if fcntl is None:
        return None
    file = folder / LOCK
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            log.debug("%s is not locked: %s", folder, error)
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(file)):
                return handle
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConfigError(
                    f"the run in {str(folder)!r} is still going on: another process writes to it. Remedy: wait for it "
                    "or stop it first."
                ) from None
            log.debug("%s is not locked: %s", folder, error)
            return None
        os.close(handle)  # its holder removed the file between our open and our lock: try with a new one


def is_disk_full(error: BaseException | None) -> bool:
    """True for an OSError that says the disk or the quota is full, or an error that one has caused."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if type(error).__name__ == "SafetensorError" and "No space left" in str(error):  # it is no OSError
            return True
        error = error.__cause__ or error.__context__
    return False
