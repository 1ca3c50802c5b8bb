"""Reads CSV files: compression, encoding, separator, lines before the header, headers of several lines."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import re
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pandas as pd

from qfast.data.column_names import (
    COMPANY_NAMES,
    DATE_NAMES,
    INSTRUMENT_NAMES,
    TIME_NAMES,
    find_column,
    is_field,
    role_name,
)
from qfast.data.number_text import MISSING
from qfast.data.source_notes import note
from qfast.errors import DataError, shown, some
from qfast.files import decode, text_encoding
from qfast.read_options import ReadOptions

__all__ = ["read_csv"]

SAMPLE_BYTES = 1 << 16
SAMPLE_LINES = 200
SEPARATORS = (",", ";", "\t", "|")
FOREIGN = {
    b"ARROW1": "a Feather file. Remedy: pandas.read_feather(path).to_parquet(...)",
    b"\x89HDF": "an HDF5 file. Remedy: pandas.read_hdf(path).to_parquet(...)",
    b"\xd0\xcf\x11\xe0": "an Excel workbook. Remedy: save the sheet as CSV",
    b"\x80\x04\x95": "a pickle, which can run code. Remedy: pandas.read_pickle(path).to_parquet(...)",
    b"\x80\x05\x95": "a pickle, which can run code. Remedy: pandas.read_pickle(path).to_parquet(...)",
    b"SQLite": "an SQLite database. Remedy: pandas.read_sql(...).to_parquet(...)",
    b"<": "HTML or XML, perhaps an error page. Remedy: download the data again, or pandas.read_html(path)",
    b"{": "JSON. Remedy: pandas.read_json(path).to_parquet(...)",
    b"[{": "JSON. Remedy: pandas.read_json(path).to_parquet(...)",
    b"[[": "JSON. Remedy: pandas.read_json(path).to_parquet(...)",
}
"""First bytes of other formats, and what to do with such files. "<" begins also the header <DATE> of CSV files."""
HTML = re.compile(rb"\s*<(!doctype|html|\?xml|head|body|table)", re.IGNORECASE)
CHUNK = 1 << 20
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd"}
OTHER_ENCODINGS = ("gb18030", "big5", "shift_jis", "cp949", "latin-1")
DAMAGE = (pd.errors.ParserError, OSError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, csv.Error)
HEADER_LINES = 20  # searched for the names of columns
TEXT_ROLES = (*INSTRUMENT_NAMES, *COMPANY_NAMES, *DATE_NAMES, *TIME_NAMES)
COMPACT_DATE = re.compile(r"(19|20)\d{6}")


@dataclass(frozen=True)
class _Layout:
    """The shape of a CSV file, from its first lines.

    Attributes
    ----------
    skipped : int
        Lines before the header.
    header_lines : int
        1; 2 or 3 if the columns have two levels.
    names : list of str
        Cells of the (last) header line.
    cells : list of list of str
        Lines below the header.
    """

    compression: str | None
    encoding: str
    separator: str
    skipped: int
    header_lines: int
    names: list[str]
    cells: list[list[str]]


def read_csv(path: Path, options: ReadOptions) -> pd.DataFrame:
    """Read a CSV file as a frame.

    Dates, times and instruments stay text, so "000001" keeps its zeros. A header of several lines gives columns with
    two levels.

    Raises
    ------
    DataError
        The file is empty, damaged, in an unknown encoding, or a line has another number of columns than the header.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes).")
    try:
        layout = _layout(path, options)
        _require_no_nul(path, layout)
        frame = _read(path, layout, options)
    except pd.errors.EmptyDataError:
        raise DataError(f"{path} contains no columns.") from None
    except UnicodeDecodeError as error:
        raise _wrong_encoding(path, options, error) from None
    except DAMAGE as error:
        raise DataError(
            f"{path} cannot be read as CSV: {str(error).strip()}. Remedy: --separator or --encoding, unless the "
            "file is damaged."
        ) from None
    _report_cut_off(path, layout, frame)
    return frame


def _read(path: Path, layout: _Layout, options: ReadOptions) -> pd.DataFrame:
    comma = options.decimal == "," or (options.decimal is None and _has_decimal_commas(layout))
    if comma and options.decimal is None:
        note(f"{path.name}: numbers have decimal commas")
    arguments: dict[str, Any] = {
        "sep": layout.separator,
        "encoding": layout.encoding,
        "compression": layout.compression,
        "skiprows": layout.skipped,
        "keep_default_na": False,
        "low_memory": False,
    }
    if len(layout.separator) > 1:
        arguments |= {"engine": "python"}
        del arguments["low_memory"]
    if comma:
        arguments |= {"decimal": ",", "thousands": "."}
    elif options.decimal == ".":
        arguments |= {"thousands": ","}
    if layout.header_lines > 1:
        return pd.read_csv(path, header=[0, 1], index_col=0, na_values=list(MISSING), **arguments)
    names = list(layout.names)
    texts = {c for position, c in enumerate(names) if _is_text(c, position, layout, options)}
    codes = {c for c in names if c == options.instrument_column or role_name(c) in INSTRUMENT_NAMES + COMPANY_NAMES}
    arguments["dtype"] = dict.fromkeys(texts, str)
    # The ticker NA is not a missing value.
    arguments["na_values"] = {c: list(MISSING) for c in names if c not in codes} if codes else list(MISSING)
    extra = _extra_cells(path, layout)
    if len(layout.separator) > 1 and all(len(row) == len(names) + 1 and row[0].isdigit() for row in layout.cells):
        arguments |= {"names": ["Unnamed: 0", *names], "header": 0, "index_col": False}  # DataFrame.to_string()
    elif extra:
        unnamed = [f"Unnamed: {len(names) + number}" for number in range(extra)]
        arguments |= {"names": [*names, *unnamed], "header": 0, "index_col": False}
        if codes:
            arguments["na_values"] |= {c: list(MISSING) for c in unnamed}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pd.errors.ParserWarning)
        return pd.read_csv(path, **arguments)


def _is_text(name: str, position: int, layout: _Layout, options: ReadOptions) -> bool:
    """True for columns that must not be read as numbers."""
    if name != options.instrument_column and role_name(name) not in TEXT_ROLES:
        return False
    if role_name(name) in DATE_NAMES and layout.cells and position < len(layout.cells[0]):
        # Numbers such as 20240131 are read faster as numbers. Others may have leading zeros.
        return COMPACT_DATE.fullmatch(layout.cells[0][position].strip()) is None
    return True


# ---------------------------------------------------------------- the first lines
def _layout(path: Path, options: ReadOptions) -> _Layout:
    compression = _compression(path)
    with _open(path, compression) as file:
        sample = file.read(SAMPLE_BYTES)
    _require_text(path, sample)
    complete = len(sample) < SAMPLE_BYTES
    if not sample.strip():
        raise DataError(f"{path} contains no columns.")
    encoding = options.encoding or text_encoding(sample)
    if encoding.startswith("utf-16") and options.encoding is None:
        note(f"{path.name}: the encoding is UTF-16")
    text = decode(sample, encoding, final=complete)
    lines = text.splitlines()
    lines = (lines if complete else lines[:-1] or lines)[:SAMPLE_LINES]
    separator, skipped = options.separator, 0
    if (directive := re.fullmatch(r"sep=(.)", lines[0].strip("\ufeff").strip())) is not None:  # written by Excel
        separator, skipped = separator or directive[1], 1
    separator = separator or _separator(lines[skipped:])
    rows = _cells(lines, separator)
    first = _header_position(rows, skipped)
    if any(line.strip() for line in lines[skipped:first]):
        note(f"{path.name}: skipping {first - skipped} line(s) before the header: {shown(lines[skipped])}")
    header_lines = _header_lines(rows[first:])
    names = [name.strip("\ufeff") or f"Unnamed: {position}" for position, name in enumerate(rows[first])]
    cells = [row for row in rows[first + header_lines :] if any(cell.strip() for cell in row)]
    if header_lines == 1:
        _require_names(path, names, separator)
    return _Layout(compression, encoding, separator, first, header_lines, names, cells)


def _require_text(path: Path, start: bytes) -> None:
    """Raise a DataError that names the format if a file is not CSV."""
    for magic, what in FOREIGN.items():
        if start.startswith(magic) and (magic != b"<" or HTML.match(start)):
            raise DataError(f"{path.name} is {what}.")


def _require_no_nul(path: Path, layout: _Layout) -> None:
    """Raise a DataError if the text contains NUL bytes, at which pandas ends numbers and lines."""
    if layout.encoding.replace("_", "-").lower().startswith(("utf-16", "utf-32")):
        return
    lines = 1
    with _open(path, layout.compression) as file:
        while chunk := file.read(CHUNK):
            position = chunk.find(b"\0")
            if position >= 0:
                line = lines + chunk[:position].count(b"\n")
                raise DataError(
                    f"{path.name}: line {line} contains NUL bytes, so the file is damaged or incomplete. Remedy: "
                    "download it again, or --encoding if it is not " + layout.encoding + "."
                )
            lines += chunk.count(b"\n")


def _report_cut_off(path: Path, layout: _Layout, frame: pd.DataFrame) -> None:
    """Report a last line that has fewer cells than the header, although it begins like the lines before it."""
    if layout.compression is not None or len(frame) < 2 or len(layout.separator) > 1:
        return
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - SAMPLE_BYTES // 16))
        lines = file.read().rstrip().splitlines()
    separator = layout.separator.encode(layout.encoding.removesuffix("-sig"), errors="ignore")
    counts = [line.count(separator) for line in lines[-2:]]
    if len(counts) == 2 and 0 < counts[1] < counts[0] and not lines[-1].endswith(separator):
        note(
            f"{path.name}: the last line has {counts[1] + 1} cells and the line before it {counts[0] + 1}, so the file "
            f"is probably incomplete: {shown(lines[-1].decode(layout.encoding, errors='replace'))}",
            warning=True,
        )


def _compression(path: Path) -> str | None:
    """Compression of the content, whatever the name of the file."""
    with path.open("rb") as file:
        start = file.read(8)
    return next((name for magic, name in MAGIC.items() if start.startswith(magic)), None)


def _open(path: Path, compression: str | None) -> IO[bytes]:
    if compression is None:
        return path.open("rb")
    if compression == "zip":
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise DataError(f"{path} is a damaged zip archive or Excel workbook: {error}.") from None
        names = archive.namelist()
        if "[Content_Types].xml" in names:
            raise DataError(f"{path} is an Excel workbook. Remedy: save the sheet as CSV.")
        if len(names) != 1:
            raise DataError(f"{path} must contain one file, got {len(names)}: {some(names, 5)}.")
        return archive.open(names[0])
    if compression == "zstd":
        try:
            import zstandard
        except ImportError:
            raise DataError(
                f"{path}: reading zstd needs the package zstandard, which is not installed. Remedy: install it, or "
                "decompress the file."
            ) from None
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(path.open("rb")))
    openers: dict[str, Any] = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}
    stream: IO[bytes] = openers[compression](path, "rb")
    return stream


def _separator(lines: Sequence[str]) -> str:
    """The separator with which the header has most cells; a comma if none does."""
    header = next(
        (line for line in lines if find_column(re.split(r"[,;\t|]", line.replace('"', "")), DATE_NAMES)), lines[0]
    )
    counts = {separator: len(_cells([header], separator)[0]) for separator in SEPARATORS}
    best = max(counts, key=lambda separator: counts[separator])
    if counts[best] == 1 and len(header.split()) > 2:
        return r"\s+"
    return best if counts[best] > 1 else ","


def _cells(lines: Sequence[str], separator: str) -> list[list[str]]:
    if len(separator) > 1:
        return [re.split(separator, line.strip()) for line in lines]
    return list(csv.reader(lines, delimiter=separator))


def _header_position(rows: Sequence[Sequence[str]], start: int) -> int:
    """Position of the line with the names of the columns: the first line, unless a later one has the name of a date."""
    for position in range(start, min(len(rows), HEADER_LINES)):
        row = rows[position]
        named = find_column(row, DATE_NAMES) is not None
        if named and sum(cell.strip() != "" for cell in row) > 1:
            return position
        if len(row) > 1 and sum(is_field(cell) for cell in row) > 1:
            return max(start, position - 1) if position > start and len(rows[position - 1]) == len(row) else position
    return start


def _header_lines(rows: Sequence[Sequence[str]]) -> int:
    """1, or the number of header lines of columns with two levels, such as price and ticker."""
    if len(rows) < 3:
        return 1
    prices = [sum(is_field(cell) for cell in row) for row in rows[:2]]
    if max(prices) < 2 or find_column(rows[0], DATE_NAMES) is not None or find_column(rows[1], DATE_NAMES) is not None:
        return 1
    if not all(cell.strip() and not _is_number(cell) for row in rows[:2] for cell in row[1:]):
        return 1
    third = [cell.strip() for cell in rows[2]]
    return 3 if len(third) and role_name(third[0]) in DATE_NAMES and not any(third[1:]) else 2


def _require_names(path: Path, names: Sequence[str], separator: str) -> None:
    seen: dict[str, str] = {}
    for name in names:
        plain = role_name(name)
        if plain and plain in seen:
            raise DataError(
                f"{path.name}: column {name!r} occurs twice; names are compared without case, $ and blanks."
            )
        seen[plain] = name
    if sum(_is_number(name) for name in names) > 1 or re.match(r"\d", names[0]):
        raise DataError(
            f"{path.name} has no header: its first line is {shown(separator.join(names))}. Remedy: add a line with the "
            "names of the columns, for example date,symbol,open,high,low,close,volume."
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _extra_cells(path: Path, layout: _Layout) -> int:
    """Number of empty cells that lines have beyond the header, because they end in separators."""
    width = len(layout.names)
    extra = max((len(row) - width for row in layout.cells), default=0)
    if extra <= 0 or all(len(row) == width + 1 and row[0].isdigit() and row[-1].strip() for row in layout.cells):
        return 0  # pandas uses the first column, the row numbers, as the index
    for number, row in enumerate(layout.cells):
        if any(cell.strip() for cell in row[width:]):
            raise DataError(
                f"{path.name} cannot be read as CSV: row {number} has {len(row)} columns, but the header has {width} "
                f"({some(layout.names, 8)}), in line {layout.skipped + layout.header_lines + number + 1}: "
                f"{shown(layout.separator.join(row))}. Remedy: --separator, if it is not {layout.separator!r}; quote "
                "cells that contain it."
            )
    note(f"{path.name}: lines end in {extra} separator(s) more than the header; ignoring the empty column(s)")
    return extra


def _has_decimal_commas(layout: _Layout) -> bool:
    """True if the numbers of the first lines must have decimal commas."""
    if layout.separator == ",":
        return False
    cells = [cell.strip() for row in layout.cells for cell in row]
    commas = [cell for cell in cells if re.fullmatch(r"[+-]?[\d.]*,\d+", cell)]
    points = any(re.fullmatch(r"[+-]?\d+\.\d+", cell) for cell in cells if not re.fullmatch(r"\d{1,3}\.\d{3}", cell))
    return not points and any(re.fullmatch(r"[+-]?[1-9]\d{0,2}(,\d{3})+", cell) is None for cell in commas)


def _wrong_encoding(path: Path, options: ReadOptions, error: UnicodeDecodeError) -> DataError:
    """Name the first line that cannot be decoded, and how other encodings read it."""
    with _open(path, _compression(path)) as file:
        lines = file.read().split(b"\n")
    used = options.encoding or "utf-8"
    for number, line in enumerate(lines, start=1):
        if _decoded(line, used) is not None:
            continue
        readings = {name: _decoded(line, name) for name in OTHER_ENCODINGS}
        cells = {name: _first_foreign_cell(text) for name, text in readings.items() if text is not None}
        listed = ", ".join(f"{text!r} as {name}" for name, text in cells.items())
        return DataError(
            f"{path.name} is not {used} text: line {number} contains {listed}. Remedy: --encoding {' or '.join(cells)}."
        )
    return DataError(f"{path.name} is not {used} text: {error}. Remedy: --encoding.")


def _decoded(line: bytes, encoding: str) -> str | None:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError:
        return None


def _first_foreign_cell(text: str) -> str:
    """The first cell of a line that contains characters outside ASCII."""
    cells = re.split(r"[,;\t|]", text)
    return next((cell for cell in cells if not cell.isascii()), text).strip()[:20]
