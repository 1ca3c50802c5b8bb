"""Arrays in raw little-endian files with checksums, which are opened as memory maps.

`write_array` writes the values to `<stem>.values`, row by row, and the CRC-32 of each few megabytes to
`<stem>.checksums.npy`.
"""

from __future__ import annotations

import math
import mmap
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qfast.data.storage import mapped_array
from qfast.errors import DataError

__all__ = ["REMEDY", "array_entry", "map_file", "open_array", "pieces", "write_array", "write_file"]

CHECKSUM_BYTES = 4 << 20
REMEDY = "Remedy: save the panel again."


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Create a file that is durable when this function returns."""
    with path.open("xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def write_array(values: np.ndarray, contents: Path, stem: str) -> dict[str, Any]:
    """Write an array [R, ...] and its checksums, a few megabytes at a time.

    Returns
    -------
    dict
        The entry for `open_array`: "dtype", "shape", "values" and "checksums", the names of the files.
    """
    dtype = values.dtype.newbyteorder("<")
    checksums = []

    def write(file: BinaryIO) -> None:
        for rows in pieces(values):
            data = np.ascontiguousarray(values[rows], dtype=dtype).reshape(-1).view(np.uint8).data
            checksums.append(zlib.crc32(data))
            file.write(data)

    write_file(contents / f"{stem}.values", write)
    return array_entry(values, checksums, contents, stem)


def array_entry(values: np.ndarray, checksums: Sequence[int] | None, contents: Path, stem: str) -> dict[str, Any]:
    """Write the checksums of an array whose values are in `<stem>.values` already, and return its entry.

    None: the checksums are computed here.
    """
    if checksums is None:
        checksums = [_checksum(values[rows]) for rows in pieces(values)]
    table = np.array(checksums, dtype="<u4")
    write_file(contents / f"{stem}.checksums.npy", lambda file: np.save(file, table, allow_pickle=False))
    return {
        "dtype": values.dtype.name,
        "shape": list(values.shape),
        "values": f"{stem}.values",
        "checksums": f"{stem}.checksums.npy",
    }


def open_array(entry: Mapping[str, Any], contents: Path, verify: bool) -> np.ndarray:
    """A read-only array over the memory map of the values.

    Parameters
    ----------
    entry : mapping
        Result of `write_array`.
    contents : Path
        The folder.
    verify : bool
        Compare the values with their checksums, which reads the whole file once.

    Raises
    ------
    DataError
        The file has another size, or its values do not match their checksums.
    """
    file = contents / entry["values"]
    values = map_file(file, tuple(entry["shape"]), entry["dtype"])
    if verify:
        expected = np.load(contents / entry["checksums"], allow_pickle=False)
        for number, rows in enumerate(pieces(values)):
            if _checksum(values[rows]) != expected[number]:
                raise DataError(
                    f"{str(file)!r} is damaged: rows {rows.start} to {rows.stop - 1} do not match their checksum. "
                    f"{REMEDY}"
                )
    return values


def map_file(file: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The content of a file as a read-only array over its memory map."""
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    actual = file.stat().st_size
    if actual != expected:
        raise DataError(
            f"{str(file)!r} is truncated or damaged: expected {expected} bytes for {list(shape)} {dtype}, got "
            f"{actual}. {REMEDY}"
        )
    if expected == 0:
        values = np.empty(shape, dtype=dtype)
    else:
        with file.open("rb") as handle:
            # A private map: a stray write through a tensor cannot reach the file, and cannot crash the process.
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        values = mapped_array(mapped).view(dtype).reshape(shape)
    values.flags.writeable = False
    return values


def pieces(values: np.ndarray) -> Iterator[slice]:
    """Slices of consecutive rows with at most CHECKSUM_BYTES bytes, and at least one row each."""
    row_bytes = values.itemsize * math.prod(values.shape[1:])
    rows = max(1, CHECKSUM_BYTES // max(1, row_bytes))
    for start in range(0, len(values) if row_bytes else 0, rows):
        yield slice(start, min(start + rows, len(values)))


def _checksum(part: np.ndarray) -> int:
    return zlib.crc32(part.reshape(-1).view(np.uint8).data)
