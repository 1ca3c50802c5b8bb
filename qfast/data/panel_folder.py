"""Panels in folders: written in bounded memory, and opened as memory maps that all processes of a machine share.

A panel folder contains `panel.json` and one subfolder `contents-…` with the data:

    block-N.values        values of the N-th column group: raw little-endian float32 or float64 [R, C], row-major
    block-N.checksums.npy CRC-32 of each few megabytes of these values
    block-N-….values      instead of the two files above: the arrays of a view of prices, each with its checksums
    date_codes.values, instrument_codes.values  keys of the rows: raw little-endian int32 [R]
    keys.npz              the datetimes, and the mask of live rows
    instruments.json      instrument names

`panel.json` names the subfolder, the column groups, and the size and digest of every small file. It is the only file
that is ever replaced, and the replacement is atomic. A folder therefore contains either the previous panel or the new
one, whatever interrupts the write. Processes that have mapped the previous panel keep it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from qfast.data.array_files import CHECKSUM_BYTES, REMEDY, array_entry, map_file, open_array, write_array, write_file
from qfast.data.storage import new_mapped_file
from qfast.errors import DataError, QfastError
from qfast.files import atomic_write, is_disk_full, is_temporary, locked

if TYPE_CHECKING:
    from qfast.data.panel import Block, Panel

__all__ = ["create_panel", "is_panel_folder", "open_panel", "save_panel"]

FORMAT = "qfast panel"
VERSION = 2
VERSION_WITH_VIEW = 3  # of a panel with a view of prices, which version 2 does not contain
HEADER = "panel.json"
KEYS, INSTRUMENTS = "keys.npz", "instruments.json"
DATE_CODES, INSTRUMENT_CODES = "date_codes.values", "instrument_codes.values"
RESERVE_BYTES = 1 << 20  # free space that a write leaves for the small files


def is_panel_folder(path: object) -> bool:
    """True if `path` is a folder with a panel, complete or not."""
    return isinstance(path, (str, os.PathLike)) and (Path(path) / HEADER).is_file()


# ---------------------------------------------------------------- writing
def save_panel(panel: Panel, path: str | os.PathLike[str]) -> None:
    """Write a panel to a folder; see `Panel.save`."""
    with _new_contents(path, panel.nbytes) as (contents, header):
        blocks = [
            _write_block(name, block, contents, f"block-{number}")
            for number, (name, block) in enumerate(panel.blocks.items())
        ]
        header |= _write_keys(panel, blocks, contents)


@contextlib.contextmanager
def create_panel(
    keys: Panel, path: str | os.PathLike[str], columns: Mapping[str, Sequence[str]]
) -> Iterator[dict[str, np.ndarray]]:
    """Write a panel whose values the caller computes; see `Panel.create`."""
    with _new_contents(path, keys.nbytes + 4 * keys.n_rows * sum(map(len, columns.values()))) as (contents, header):
        files = {group: f"block-{number}" for number, group in enumerate(columns)}
        arrays = {
            group: new_mapped_file(contents / f"{stem}.values", (keys.n_rows, len(columns[group])), np.float32)
            for group, stem in files.items()
        }
        yield dict(arrays)
        blocks = [_finish_block(group, columns[group], arrays[group], contents, stem) for group, stem in files.items()]
        header |= _write_keys(keys, blocks, contents)


@contextlib.contextmanager
def _new_contents(path: str | os.PathLike[str], n_bytes: int) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A subfolder for new contents, and the header that the caller fills. The header then replaces the previous one."""
    folder = Path(path).expanduser()
    _require_usable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "panel"):
        _remove_leftovers(folder)
        contents = folder / f"contents-{secrets.token_hex(8)}"
        header: dict[str, Any] = {}
        try:
            _require_space(folder, n_bytes)
            contents.mkdir()
            yield contents, header
            header["digest"] = _digest_of(header)
            _sync_folder(contents)
            _sync_folder(folder)
            text = json.dumps(header, indent=1, ensure_ascii=False)
            atomic_write(folder / HEADER, lambda file: file.write_text(text, encoding="utf-8"))
            _sync_folder(folder)
        except BaseException as error:
            if not _is_current(folder, contents):
                shutil.rmtree(contents, ignore_errors=True)
            if is_disk_full(error) and not isinstance(error, QfastError):
                raise DataError(
                    f"no space left on the disk for the panel {str(folder)!r}, which needs {n_bytes / 1e9:.2f} GB; a "
                    "previous panel in this folder is complete. Remedy: free some space."
                ) from error
            raise
        _remove_leftovers(folder)


def _require_usable(folder: Path) -> None:
    """Refuse a file, and a folder whose contents are not a panel."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"a panel is saved to a folder, but {str(folder)!r} is a file. Remedy: another path.")
    if folder.is_dir() and not is_panel_folder(folder):
        foreign = [entry.name for entry in folder.iterdir() if not _is_leftover(entry)]
        if foreign:
            raise DataError(
                f"{str(folder)!r} contains other files, for example {sorted(foreign)[0]!r}. Remedy: a new or empty "
                "folder, or a folder with a panel, which is then replaced."
            )


def _require_space(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < n_bytes + RESERVE_BYTES:
        raise DataError(
            f"the panel needs {n_bytes / 1e9:.2f} GB, but the disk of {str(folder)!r} has {free / 1e9:.2f} GB left. "
            "Remedy: free some space, or save to another disk."
        )


def _write_keys(panel: Panel, blocks: list[dict[str, Any]], contents: Path) -> dict[str, Any]:
    """Write the keys and names of a panel, and return the header without its digest."""
    stamps = panel.datetimes.tz_convert("UTC").tz_localize(None) if panel.datetimes.tz is not None else panel.datetimes
    for name, codes in ((DATE_CODES, panel.date_codes), (INSTRUMENT_CODES, panel.instrument_codes)):
        data = np.ascontiguousarray(codes, dtype="<i4").data
        write_file(contents / name, lambda file, data=data: file.write(data))  # type: ignore[misc]
    arrays = {"datetimes": stamps.asi8, **({} if panel.live is None else {"live": panel.live})}
    write_file(contents / KEYS, lambda file: np.savez(file, allow_pickle=False, **arrays))
    names = json.dumps(_plain_names(panel.instruments), ensure_ascii=False)
    write_file(contents / INSTRUMENTS, lambda file: file.write(names.encode()))
    digested = [DATE_CODES, INSTRUMENT_CODES, KEYS, INSTRUMENTS, *_names_in(blocks, "checksums")]
    return {
        "format": FORMAT,
        "version": VERSION_WITH_VIEW if any("windows" in block for block in blocks) else VERSION,
        "byte_order": "little",
        "contents": contents.name,
        "rows": panel.n_rows,
        "datetimes": {"unit": panel.datetimes.unit, "time_zone": _zone_name(panel.datetimes)},
        "blocks": blocks,
        "files": {name: _file_digest(contents / name) for name in digested},
    }


def _write_block(name: str, block: Block, contents: Path, stem: str) -> dict[str, Any]:
    """Write the values of a block, or the prices of a view, and return its entry in the header."""
    from qfast.data.panel import WindowBlock
    from qfast.data.window_folder import write_windows

    if isinstance(block, WindowBlock):
        return {"group": name, "columns": list(block.columns), "windows": write_windows(block.table, contents, stem)}
    if block.values.dtype.name not in ("float32", "float64"):
        raise DataError(f"a panel is saved in float32 or float64, but group {name!r} is {block.values.dtype}.")
    return _block_entry(name, block.columns, write_array(block.values, contents, stem))


def _finish_block(name: str, columns: Sequence[str], values: np.ndarray, contents: Path, stem: str) -> dict[str, Any]:
    """Make the values of a mapped file durable, and write their checksums."""
    with (contents / f"{stem}.values").open("r+b") as file:
        os.fsync(file.fileno())
    return _block_entry(name, columns, array_entry(values, None, contents, stem))


def _block_entry(name: str, columns: Sequence[str], array: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a block in the header. The shape follows from its columns and the number of rows."""
    return {"group": name, "columns": list(columns), **{key: array[key] for key in ("dtype", "values", "checksums")}}


def _names_in(entry: object, key: str) -> Iterator[Any]:
    """All values of `key` in nested entries: the names of files."""
    if isinstance(entry, Mapping):
        if not isinstance(entry.get(key, {}), (Mapping, list)):
            yield entry[key]
        entry = list(entry.values())
    if isinstance(entry, list):
        for item in entry:
            yield from _names_in(item, key)


def _sync_folder(folder: Path) -> None:
    """Make the names of new files durable. Only POSIX systems can open a folder."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _is_leftover(entry: Path) -> bool:
    """True for the remains of an interrupted write, and for lock and temporary files."""
    return entry.name.startswith("contents-") or entry.name.startswith(".")


def _remove_leftovers(folder: Path) -> None:
    """Remove the contents to which `panel.json` does not refer. The caller holds the lock."""
    for entry in folder.glob("contents-*"):
        if entry.is_dir() and not entry.is_symlink() and not _is_current(folder, entry):
            shutil.rmtree(entry, ignore_errors=True)
    for entry in folder.iterdir():
        if is_temporary(entry.name) and entry.is_file() and not entry.is_symlink():
            entry.unlink(missing_ok=True)


def _is_current(folder: Path, contents: Path) -> bool:
    """True if the header refers to `contents`, or cannot be read, so that nothing is removed by mistake."""
    header = folder / HEADER
    if not header.exists():
        return False
    try:
        return bool(json.loads(header.read_text(encoding="utf-8"))["contents"] == contents.name)
    except (OSError, ValueError, KeyError, TypeError):
        return True


def _plain_names(instruments: np.ndarray) -> list[str | int]:
    names = [int(name) if isinstance(name, (int, np.integer)) else name for name in instruments]
    for name in names:
        if not isinstance(name, (str, int)):
            raise DataError(f"a panel is saved with instruments that are text or integers, got {name!r}.")
    return names


def _zone_name(datetimes: pd.DatetimeIndex) -> str | None:
    """Name under which pandas finds the time zone again."""
    zone = datetimes.tz
    if zone is None:
        return None
    name = str(getattr(zone, "key", None) or getattr(zone, "zone", None) or zone)
    try:
        if datetimes[:1].tz_convert(name).equals(datetimes[:1]):
            return name
    except (KeyError, ValueError, TypeError):
        pass
    raise DataError(f"the time zone {zone!r} of the panel has no name. Remedy: panel.datetimes in a named time zone.")


# ---------------------------------------------------------------- reading
def open_panel(path: str | os.PathLike[str], *, verify: bool = True) -> Panel:
    """Map a panel folder; see `Panel.open`."""
    folder = Path(path).expanduser()
    header = _read_header(folder)
    try:
        return _map(folder, header, verify)
    except FileNotFoundError:
        newer = _read_header(folder)  # another process may have replaced the panel after the header was read
        if newer["contents"] == header["contents"]:
            raise DataError(
                f"the panel {str(folder)!r} is incomplete: {header['contents']!r} lacks files. {REMEDY}"
            ) from None
        return _map(folder, newer, verify)


def _read_header(folder: Path) -> dict[str, Any]:
    file = folder / HEADER
    if not folder.is_dir() or not file.is_file():
        what = "does not exist" if not folder.exists() else f"is not a panel folder: it has no {HEADER}"
        raise DataError(f"{str(folder)!r} {what}. Remedy: Panel.save writes such a folder.")
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
        is_ours = isinstance(header, dict) and header.get("format") == FORMAT
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{str(file)!r} cannot be read: {error}. {REMEDY}") from None
    if not is_ours:
        raise DataError(f"{str(file)!r} does not describe a panel of qfast. Remedy: a folder written by Panel.save.")
    if header.get("version") not in (VERSION, VERSION_WITH_VIEW):
        raise DataError(
            f"{str(file)!r} has format version {header.get('version')!r}; this release reads the versions {VERSION} "
            f"and {VERSION_WITH_VIEW}. "
            "Remedy: save the panel with this release, or open it with the release that wrote it."
        )
    if header.get("byte_order") != sys.byteorder:
        raise DataError(
            f"the values in {str(folder)!r} are in {header.get('byte_order')!r} byte order, and this machine needs "
            f"{sys.byteorder!r}. Remedy: save the panel on a machine of this kind."
        )
    names = [header.get("contents"), *header.get("files", ()), *_names_in(header.get("blocks"), "values")]
    if header.get("digest") != _digest_of(header) or not all(_is_plain(name) for name in names):
        raise DataError(f"{str(file)!r} is damaged: its digest does not match its content. {REMEDY}")
    return header


def _is_plain(name: object) -> bool:
    """True for a file name without a folder, so a header cannot point outside its own folder."""
    return isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*", name) is not None


def _map(folder: Path, header: Mapping[str, Any], verify: bool) -> Panel:
    from qfast.data.panel import Panel

    contents = folder / header["contents"]
    for name, expected in header["files"].items():
        if _file_digest(contents / name) != expected:
            raise DataError(f"{str(contents / name)!r} is damaged: its digest does not match {HEADER}. {REMEDY}")
    with np.load(contents / KEYS, allow_pickle=False) as keys:
        live = keys.get("live")
        stamps = pd.DatetimeIndex(keys["datetimes"].view(f"M8[{header['datetimes']['unit']}]"))
    zone = header["datetimes"]["time_zone"]
    datetimes = stamps if zone is None else stamps.tz_localize("UTC").tz_convert(zone)
    instruments = np.array(json.loads((contents / INSTRUMENTS).read_text(encoding="utf-8")), dtype=object)
    blocks = {block["group"]: _open_block(block, header["rows"], contents, verify) for block in header["blocks"]}
    date_codes, instrument_codes = (
        map_file(contents / name, (header["rows"],), "int32") for name in (DATE_CODES, INSTRUMENT_CODES)
    )
    return Panel(datetimes, instruments, date_codes, instrument_codes, blocks, live)


def _open_block(entry: Mapping[str, Any], n_rows: int, contents: Path, verify: bool) -> Block:
    from qfast.data.panel import Block, WindowBlock
    from qfast.data.window_folder import open_windows

    columns = tuple(entry["columns"])
    if "windows" in entry:
        return WindowBlock(open_windows(entry["windows"], contents, verify), columns)
    return Block(open_array({**entry, "shape": [n_rows, len(columns)]}, contents, verify), columns)


def _file_digest(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as content:
        while part := content.read(CHECKSUM_BYTES):
            digest.update(part)
    return digest.hexdigest()


def _digest_of(header: Mapping[str, Any]) -> str:
    """Digest of a header without the entry "digest"."""
    content: Sequence[Any] = sorted((key, value) for key, value in header.items() if key != "digest")
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
