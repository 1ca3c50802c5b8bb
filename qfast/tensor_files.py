"""Checksums of safetensors files, which contain weights, checkpoints, fitted processors and saved handlers.

The metadata of a file contains the SHA-256 of its bytes, computed with zeros in place of the checksum. A flipped bit is
thus an error when the file is read. A second entry, `MARK`, states that the file has a checksum: a file with only this
entry is refused. Files with neither, which earlier versions and other programs write, are read as before.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from qfast.errors import CheckpointError, shown
from qfast.files import atomic_write

__all__ = ["KEY", "MARK", "REMEDY", "read_metadata", "require_intact", "write_checked"]

KEY = "qfast.sha256"
MARK = "qfast.checksum"
EMPTY = "0" * 64
LENGTH_BYTES = 8  # a file begins with the length of its header
MOST_HEADER_BYTES = 100_000_000  # the limit of safetensors
PART_BYTES = 1 << 20
REMEDY = "Remedy: restore the file from a copy, or train again."


def write_checked(
    path: Path, save: Callable[[Path, dict[str, str]], object], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file with a checksum. The file appears complete or not at all.

    Parameters
    ----------
    path : Path
        Its folder must exist.
    save : callable
        Receives the path of a temporary file and the metadata, and writes the file.
    metadata : mapping, optional
        Further text entries.

    Raises
    ------
    QfastError
        The disk is full.

    Examples
    --------
    >>> import tempfile, numpy, safetensors.numpy
    >>> arrays = {"x": numpy.zeros(2)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "x.safetensors")
    ...     write_checked(file, lambda target, metadata: safetensors.numpy.save_file(arrays, target, metadata))
    ...     require_intact(file)
    """

    def write(target: Path) -> None:
        save(target, {**(metadata or {}), MARK: "sha256", KEY: EMPTY})
        _sort_metadata(target)
        position = _checksum_position(target, EMPTY)
        digest = _digest(target, position)
        with target.open("rb+") as file:
            file.seek(position)
            file.write(digest.encode("ascii"))

    atomic_write(path, write)


def require_intact(path: Path) -> None:
    """Compare a safetensors file with its checksum. A file of earlier versions or other programs has none and passes.

    A file that safetensors cannot read at all, for example a truncated one, passes too: its reader reports the problem.

    Raises
    ------
    CheckpointError
        The content does not match the checksum, or the checksum has been removed.
    """
    try:
        header = json.loads(_header(path))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        metadata = header.get("__metadata__", {})
        expected, is_marked = metadata.get(KEY), MARK in metadata
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return
    if expected is None and is_marked:
        raise CheckpointError(
            f"{path} is damaged: its checksum, the entry {KEY!r} of the metadata, is missing. {REMEDY}"
        )
    data_bytes = path.stat().st_size - LENGTH_BYTES - len(_header(path))
    if expected is None or data_bytes != max(ends, default=0):
        return
    if not isinstance(expected, str) or re.fullmatch("[0-9a-f]{64}", expected) is None:
        raise CheckpointError(f"{path} is damaged: its checksum is {shown(expected)}. {REMEDY}")
    actual = _digest(path, _checksum_position(path, expected))
    if actual != expected:
        raise CheckpointError(
            f"{path} is damaged: the SHA-256 of its content is {actual}, expected {expected}. {REMEDY}"
        )


def read_metadata(path: Path) -> dict[str, str]:
    """The text entries of a safetensors file.

    Raises
    ------
    CheckpointError
        The header cannot be read.
    """
    try:
        header = json.loads(_header(path))
        metadata = header.get("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not a mapping of texts")
        return metadata
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable, it may be truncated ({error}). {REMEDY}") from None


def _sort_metadata(path: Path) -> None:
    """Sort the entries of the metadata, which safetensors writes in random order: files of equal content are equal."""
    old = _header(path)
    header = json.loads(old)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    new = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(len(old))
    if len(new) == len(old):
        with path.open("rb+") as file:
            file.seek(LENGTH_BYTES)
            file.write(new)


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > MOST_HEADER_BYTES:
            raise ValueError(f"its header has {length} bytes, expected at most {MOST_HEADER_BYTES}")
        return file.read(length)


def _checksum_position(path: Path, checksum: str) -> int:
    """Position of the checksum in a file."""
    entry = json.dumps(KEY).encode() + b":" + json.dumps(checksum).encode()
    found = _header(path).find(entry)
    if found < 0:
        raise CheckpointError(f"{path} is damaged: its header has no entry {entry.decode()}. {REMEDY}")
    return LENGTH_BYTES + found + len(entry) - len(checksum) - 1


def _digest(path: Path, position: int) -> str:
    """SHA-256 of a file with zeros in place of the checksum at `position`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(position))
        file.seek(position + len(EMPTY))
        digest.update(EMPTY.encode("ascii"))
        while part := file.read(PART_BYTES):
            digest.update(part)
    return digest.hexdigest()
