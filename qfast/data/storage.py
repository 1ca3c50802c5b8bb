"""Arrays in files: memory maps that are written once, for data that may exceed memory."""

from __future__ import annotations

import logging
import mmap
import os
import tempfile
import weakref
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from qfast.errors import ConfigError, DataError, shown
from qfast.files import is_disk_full
from qfast.machine import usable_memory

log = logging.getLogger("qfast.data")

_maps: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()  # by the address of the first byte

__all__ = [
    "Storage",
    "byte_count",
    "default_memory_limit",
    "default_scratch",
    "map_at",
    "mapped_array",
    "new_mapped_file",
    "require_memory",
]

SMALLEST_FILE = 1 << 20  # arrays below this many bytes are always in memory
ZEROS = 1 << 24
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
VAR_TMP = Path("/var/tmp")


class Storage:
    """Allocates the arrays of a handler, in memory or in temporary files.

    A file has no name, so the operating system removes it when its array is no longer used, also if the process is
    killed. Its pages are written to disk whenever memory is needed.

    Parameters
    ----------
    folder : path or None
        Folder of the files; None: arrays are in memory.

    Examples
    --------
    >>> Storage(None).empty((2, 3)).shape
    (2, 3)
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()

    @classmethod
    def for_size(
        cls, n_bytes: int, memory_limit: str | float | None, scratch: str | os.PathLike[str] | None = None
    ) -> Storage:
        """Storage in memory if `n_bytes` are within the limit, otherwise in files.

        Parameters
        ----------
        n_bytes : int
            Expected size of all arrays.
        memory_limit : str, number or None
            See `byte_count`; None: `default_memory_limit()`.
        scratch : path or None
            Folder of the files. Default: `default_scratch()`.

        Examples
        --------
        >>> Storage.for_size(10**6, "2 MB").folder is None, Storage.for_size(10**6, 0).folder is None
        (True, False)
        """
        limit = default_memory_limit() if memory_limit is None else byte_count("memory_limit", memory_limit)
        return cls(None if n_bytes <= limit else (scratch or default_scratch()))

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> np.ndarray:
        """A writable array with arbitrary values.

        Raises
        ------
        DataError
            The disk has too little space, or the folder cannot be written to.
        """
        n_bytes = prod(shape) * np.dtype(dtype).itemsize
        if self.folder is None or n_bytes < SMALLEST_FILE:
            return np.empty(shape, dtype=dtype)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                array = _mapped(file, shape, dtype)
        except OSError as error:
            reason = "no space left on the disk" if is_disk_full(error) else str(error)
            raise DataError(
                f"the data needs a temporary file of {n_bytes / 1e9:.2f} GB in {str(self.folder)!r}: {reason}. Remedy: "
                "free some space, another folder (the argument scratch, or the variable TMPDIR), or a larger "
                "memory_limit."
            ) from error
        log.info("an array of %.2f GB is stored in a temporary file in %s", n_bytes / 1e9, self.folder)
        return array


def new_mapped_file(path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """A writable array whose values are the content of a new file.

    Raises
    ------
    OSError
        The file exists, or the disk is full.
    """
    with path.open("x+b") as file:
        return _mapped(file, shape, dtype)


def _mapped(file: Any, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    n_bytes = prod(shape) * np.dtype(dtype).itemsize
    if n_bytes == 0:
        return np.empty(shape, dtype=dtype)
    _reserve(file, n_bytes)
    return mapped_array(mmap.mmap(file.fileno(), n_bytes)).view(dtype).reshape(shape)


def mapped_array(mapped: mmap.mmap) -> np.ndarray:
    """The bytes of a memory map as an array uint8, which `map_at` finds again by its address."""
    values: np.ndarray = np.frombuffer(mapped, dtype=np.uint8)
    _maps[values.ctypes.data] = mapped
    return values


def map_at(address: int) -> tuple[mmap.mmap, int] | None:
    """The memory map of a file that contains an address, and the place of the address in it; None if there is none."""
    for start, mapped in list(_maps.items()):
        if start <= address < start + len(mapped):
            return mapped, address - start
    return None


def _reserve(file: Any, n_bytes: int) -> None:
    """Allocate the blocks of a file. A full disk is then an error here and not a crash at a later write to the map."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, n_bytes)
        return
    zeros = bytes(min(n_bytes, ZEROS))
    for start in range(0, n_bytes, ZEROS):
        file.write(zeros[: n_bytes - start])
    file.flush()


def byte_count(name: str, value: object) -> int:
    """A number of bytes, written as a number or as text with a unit.

    Parameters
    ----------
    name : str
        Name of the argument, for the message.
    value : number or str
        For example 2000000000, "2 GB" or "500MiB".

    Raises
    ------
    ConfigError
        The value is not a number of at least 0, or has an unknown unit.

    Examples
    --------
    >>> byte_count("memory_limit", "1.5 GB"), byte_count("memory_limit", 0)
    (1500000000, 0)
    """
    text = str(value).strip().upper()
    number = text.rstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ").strip()
    unit = text[len(number) :].strip()
    try:
        count = float(number) * UNITS[unit]
        if isinstance(value, bool) or not 0 <= count < float("inf"):
            raise ValueError
    except (ValueError, KeyError):
        raise ConfigError(
            f"{name} must be a number of bytes, or a number with a unit such as '2 GB', got {shown(value)}."
        ) from None
    return int(count)


def default_scratch() -> Path:
    """The folder of the variable TMPDIR, otherwise /var/tmp, because /tmp is often in memory.

    >>> default_scratch().is_dir()
    True
    """
    if "TMPDIR" not in os.environ and VAR_TMP.is_dir() and os.access(VAR_TMP, os.W_OK):
        return VAR_TMP
    return Path(tempfile.gettempdir())


def default_memory_limit() -> int:
    """Half of the memory that this process may use.

    >>> default_memory_limit() > 0
    True
    """
    return usable_memory() // 2


def require_memory(n_bytes: int, what: str, remedy: str) -> None:
    """Refuse arrays that this process has no memory for, before they are allocated.

    Parameters
    ----------
    n_bytes : int
        Expected size.
    what : str
        What needs it, for the message.
    remedy : str

    Raises
    ------
    DataError
        States the requirement and the memory.
    """
    usable = usable_memory()
    if n_bytes > usable:
        raise DataError(
            f"{what} needs {n_bytes / 2**30:.1f} GiB of memory, but this process may use {usable / 2**30:.1f} GiB. "
            f"Remedy: {remedy}."
        )
