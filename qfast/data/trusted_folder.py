"""Folders whose files other users must not be able to change, checked by owner and mode as ssh does."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from qfast.errors import DataError
from qfast.files import STALE_SECONDS, is_locked

__all__ = ["remove_abandoned", "require_trusted", "without_other_writers"]

OTHER_WRITERS = stat.S_IWGRP | stat.S_IWOTH


def require_trusted(folder: Path) -> None:
    """Check that only this user and root can change a folder and everything in it.

    Parameters
    ----------
    folder : Path
        Its parent is checked too, because whoever can write to it can replace the folder.

    Raises
    ------
    DataError
        Names the first entry that belongs to another user, that others can write to, or that is a link.
    """
    if os.name != "posix":
        return
    parent = folder.parent.stat()
    if not parent.st_mode & stat.S_ISVTX:  # in a folder with the sticky bit, only owners replace their entries
        _require_own(folder.parent, parent)
    for path in _entries(folder):
        _require_own(path, path.lstat())


def _require_own(path: Path, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise DataError(f"{str(path)!r} is a link, which could lead to files of others. Remedy: delete it.")
    if status.st_uid not in (os.getuid(), 0):
        raise DataError(
            f"{str(path)!r} belongs to user {status.st_uid}, not to this user ({os.getuid()}). Remedy: a folder of "
            "your own."
        )
    if status.st_mode & OTHER_WRITERS:
        raise DataError(
            f"{str(path)!r} has mode {stat.S_IMODE(status.st_mode):o}, so other users can change it. Remedy: chmod -R "
            "go-w."
        )


def without_other_writers(folder: Path) -> None:
    """Remove the permission of group and others to write to a folder and everything in it."""
    for path in _entries(folder):
        status = path.lstat()
        if status.st_mode & OTHER_WRITERS and not stat.S_ISLNK(status.st_mode):
            path.chmod(stat.S_IMODE(status.st_mode) & ~OTHER_WRITERS)


def remove_abandoned(folder: Path, pattern: str, complete: str) -> list[Path]:
    """Remove the subfolders that killed writes have left behind, and return their paths.

    Parameters
    ----------
    folder : Path
    pattern : str
        Glob pattern of the subfolders.
    complete : str
        Name of a file that every complete subfolder has. A subfolder without it is removed if nobody has its lock and
        nothing in it has changed for an hour.
    """
    removed = []
    oldest = time.time() - STALE_SECONDS
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):
            is_folder = path.is_dir() and not path.is_symlink()
            if not is_folder or (path / complete).exists() or is_locked(path):
                continue
            if max(entry.lstat().st_mtime for entry in _entries(path)) < oldest:
                shutil.rmtree(path)
                removed.append(path)
    return removed


def _entries(folder: Path) -> Iterator[Path]:
    yield folder
    yield from folder.rglob("*")
