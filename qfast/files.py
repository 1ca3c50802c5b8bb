"""Atomic file writes, and a lock that lets one process at a time write to a folder."""

from __future__ import annotations

import codecs
import contextlib
import errno
import glob
import hashlib
import importlib
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qfast.errors import ConfigError, DataError, QfastError

try:
    fcntl: Any = importlib.import_module("fcntl")
except ImportError:  # a platform without POSIX locks
    fcntl = None

__all__ = [
    "atomic_write",
    "decode",
    "escapes",
    "file_hash",
    "is_disk_full",
    "is_locked",
    "is_temporary",
    "locked",
    "read_text",
    "require_file_target",
    "sweep",
    "text_encoding",
]

log = logging.getLogger("qfast")

LOCK = ".lock"
STALE_SECONDS = 3600  # without a change, a temporary file belongs to a killed write
# Temporary files of atomic_write, and those of safetensors.
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp|\.tmp[0-9A-Za-z]{6}")


def atomic_write(target: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with the path of a temporary file next to `target`, then rename that file to `target`.

    `target` always contains either its old content or the complete new one. Its mode follows the umask. The temporary
    file is removed on every error; only a killed process leaves it behind. `sweep`, or a write to the same target after
    an hour, removes it.

    Parameters
    ----------
    target : Path
        Its folder must exist.
    write : callable
        Receives the path of the temporary file and creates it.

    Raises
    ------
    QfastError
        The disk is full.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     atomic_write(Path(folder, "a.txt"), lambda file: file.write_text("content"))
    ...     Path(folder, "a.txt").read_text()
    'content'
    """
    # The name is chosen first. An interrupt can then never leave a file whose name is unknown here.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        _remove_stale(target)
        mode = _mode_of_new_file(temporary)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if stat.S_IMODE(temporary.stat().st_mode) != mode:  # safetensors makes files that only the owner may read
            temporary.chmod(mode)
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise QfastError(
                f"no space left on the disk for {str(target)!r}; existing files are complete. Remedy: free some space."
            ) from error
        raise


def _mode_of_new_file(path: Path) -> int:
    """Mode of a file that this process creates at `path`, which is left empty."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def _remove_stale(target: Path) -> None:
    """Remove temporary files of killed writes to `target`. A write in progress changes its file all the time."""
    oldest = time.time() - STALE_SECONDS
    for file in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            status = file.lstat()
            if TEMPORARY.fullmatch(file.name) and stat.S_ISREG(status.st_mode) and status.st_mtime < oldest:
                file.unlink()


def is_temporary(name: str) -> bool:
    """Whether a file name is that of a temporary file of `atomic_write`.

    >>> is_temporary(".a.txt.0123456789abcdef.tmp"), is_temporary("a.txt")
    (True, False)
    """
    return TEMPORARY.fullmatch(name) is not None


def escapes(name: str) -> bool:
    """Whether a name in a path leads outside its folder, or cannot be part of a path.

    >>> escapes("SH600000"), escapes("../x"), escapes("/etc/x")
    (False, True, True)
    """
    parts = re.split(r"[/\\]", name)
    return ".." in parts or not name or "\0" in name or parts[0] == "" or parts[0].endswith(":")


def sweep(folder: Path) -> list[Path]:
    """Remove the temporary files of killed processes in `folder` and its subfolders, and return their paths.

    Only the process that holds the lock of `folder` may call it, because it also removes the files that another process
    is writing.
    """
    removed = []
    for file in folder.rglob(".*tmp*"):
        if TEMPORARY.fullmatch(file.name) and file.is_file() and not file.is_symlink():
            with contextlib.suppress(OSError):
                file.unlink()
                removed.append(file)
    return removed


@contextlib.contextmanager
def locked(folder: Path, content: str = "run") -> Iterator[None]:
    """Lock `folder` for this process. The operating system releases the lock when the process ends.

    `content` is what the folder contains, for the message.

    On platforms and file systems without locks, this does nothing.

    Raises
    ------
    ConfigError
        Another process, or another call in this process, holds the lock.
    """
    handle = _lock(folder, content)
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()  # before the lock is released, see _lock
            os.close(handle)


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of `folder`. Nothing is written.

    On platforms and file systems without locks, True if the lock file exists.
    """
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:  # the holder removes the file
        return False
    try:
        if fcntl is None:
            return True
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _lock(folder: Path, content: str) -> int | None:
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
                    f"the {content} in {str(folder)!r} is still in progress: another process writes to it. "
                    "Remedy: wait until it ends, or stop it."
                ) from None
            log.debug("%s is not locked: %s", folder, error)
            return None
        os.close(handle)  # the previous holder removed the file between open and flock: try again


def require_file_target(path: Path, name: str) -> None:
    """Check that a file can be written to `path`, and create its folder.

    Parameters
    ----------
    path : Path
    name : str
        Name of the argument, for the message.

    Raises
    ------
    ConfigError
        `path` is a folder, or its parent is not a folder or cannot be created or written to.
    """
    if path.is_dir():
        raise ConfigError(f"{name} {str(path)!r} is a folder. Remedy: pass the name of a file in it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{name}: the folder {str(path.parent)!r} cannot be created: {error.strerror}.") from None
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{name}: the folder {str(path.parent)!r} is not writable. Remedy: pass another one.")


def is_disk_full(error: BaseException | None) -> bool:
    """True if the error, or one that caused it, reports a full disk or an exhausted quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if type(error).__name__ == "SafetensorError" and "No space left" in str(error):  # not an OSError
            return True
        error = error.__cause__ or error.__context__
    return False


def file_hash(path: Path) -> str:
    """The SHA-256 hash of a file as hexadecimal text."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def text_encoding(start: bytes) -> str:
    """Encoding of a text file from its first bytes: UTF-8, UTF-16 or UTF-32, with or without a byte-order mark.

    >>> text_encoding("date".encode("utf-16")), text_encoding(b"date")
    ('utf-16', 'utf-8')
    """
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    # In UTF-16, every second byte of ASCII characters is 0.
    for first, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        every_second = start[first:400:2]
        if every_second.count(0) > len(every_second) // 2:
            return name
    return "utf-8-sig" if start.startswith(codecs.BOM_UTF8) else "utf-8"


def decode(content: bytes, encoding: str, final: bool = True) -> str:
    """Decode text. With final=False, an incomplete character at the end is left out.

    >>> decode("é".encode()[:1], "utf-8", final=False)
    ''
    """
    return codecs.getincrementaldecoder(encoding)().decode(content, final)


def read_text(path: Path) -> str:
    """Read a text file in UTF-8 or UTF-16, without its byte-order mark.

    Raises
    ------
    DataError
        The file has another encoding.
    """
    content = path.read_bytes()
    try:
        return decode(content, text_encoding(content))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{path} is not UTF-8 text: line {line} cannot be decoded ({error}).") from None
