"""Reads tables of prices: CSV and Parquet files, folders of them, and pandas frames."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from qfast.data.arrow_tables import conversion_hint, without_arrow
from qfast.data.calendar_notes import report_calendar, report_shifted_zone
from qfast.data.column_names import OTHER_FIELDS, PRICE_FIELDS, field_names, plain_name
from qfast.data.date_formats import DateReader, read_dates
from qfast.data.number_text import NumberText, decimal_mark
from qfast.data.panel import Block, Panel
from qfast.data.panel_folder import is_panel_folder
from qfast.data.prices import PriceSource
from qfast.data.source_notes import note
from qfast.data.storage import require_memory
from qfast.data.table_notes import report_codes, report_fields, report_file_names, report_infinite
from qfast.data.table_roles import Keys, adjusted_column, find_keys, instrument_names
from qfast.data.text_files import read_csv
from qfast.errors import DATA_PAGE, ConfigError, DataError, naming_data_page, shown, some
from qfast.read_options import ReadOptions

__all__ = ["keyed_frame", "panel_of", "read_table"]

log = logging.getLogger("qfast.data")

DEFAULTS = ReadOptions()
PARQUET_VALUE_BYTES = 20  # in memory: 8 in the frame, 4 in the panel, and 8 while the table is sorted
DAY_NAMES = ("day", "1day", "d", "1d", "daily")
CSV_ENDINGS = (".csv", ".csv.gz", ".csv.bz2", ".csv.xz", ".csv.zst", ".csv.zip", ".txt", ".tsv")
PARQUET_ENDINGS = (".parquet", ".pq")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
AVERAGES = ("prc", "dlyprc", "askhi", "bidlo")  # columns of CRSP
JUMP = 0.2  # change of adjusted close / close from one row to the next that is reported as a split


class _Table(NamedTuple):
    """One file or frame: instrument and float32 columns of each row, and how its keys were read."""

    name: str
    instruments: np.ndarray
    columns: dict[str, np.ndarray]
    clock: pd.TimedeltaIndex | None
    keys: str
    is_named_by_file: bool


def panel_of(source: PriceSource, options: ReadOptions = DEFAULTS) -> Panel:
    """The price panel of a file, a folder of files, a frame, a panel or a panel folder.

    Between the first and the last row of an instrument, every date of the calendar has a row.

    Parameters
    ----------
    source : path, DataFrame, Series, Panel, or a table with `__arrow_c_stream__` (Polars, Arrow, DuckDB)
    options : ReadOptions
        Panels are used as they are.

    Returns
    -------
    Panel
        One group "price", whose column names are in lower case.

    Raises
    ------
    ConfigError
        The source has another type.
    DataError
        A file or column is missing or damaged, the dates or numbers have several meanings, or a key occurs twice.

    Examples
    --------
    >>> frame = pd.DataFrame({"Date": ["2024-01-02", "2024-01-04"], "Ticker": "A", "Close": [1.0, 2.0]})
    >>> panel_of(frame).values("price").tolist()
    [[1.0], [2.0]]
    """
    if isinstance(source, Panel):
        return _lower_case(source)
    source = without_arrow(source)
    if isinstance(source, (pd.DataFrame, pd.Series)):
        frame = source.to_frame() if isinstance(source, pd.Series) else source
        return _read_tables([(frame, "the frame", None)], "the frame", options)
    if not isinstance(source, (str, Path)):
        raise ConfigError(
            f"prices must be a path, a DataFrame, an Arrow table or a Panel, got {type(source).__name__}: "
            f"{shown(source)}."
            + f"{_container_hint(source)}{conversion_hint(source)} {DATA_PAGE} shows every accepted form."
        )
    path = Path(source).expanduser()
    if is_panel_folder(path):
        return _lower_case(Panel.open(path))
    if path.is_dir():
        files = _files_of(path)
        return _read_tables(((read_table(file, options), file.name, _stem(file)) for file in files), path.name, options)
    if not path.exists():
        raise DataError(f"prices: no such file or folder: {path} (current folder {Path.cwd()}).")
    return _read_tables([(read_table(path, options), path.name, None)], path.name, options)


def _container_hint(source: object) -> str:
    """How to make one frame of several frames or of columns."""
    if not isinstance(source, (Mapping, list, tuple)):
        return ""
    parts = list(source.values() if isinstance(source, Mapping) else source)
    if parts and all(isinstance(part, (pd.DataFrame, pd.Series)) for part in parts):
        names = ", names=['instrument']" if isinstance(source, Mapping) else ""
        return f" Remedy: pandas.concat(frames{names})."
    return " Remedy: pandas.DataFrame(prices)."


def _lower_case(panel: Panel) -> Panel:
    group = "price" if "price" in panel.blocks else next(iter(panel.blocks), "price")
    block = panel.block(group)
    names = tuple(field_names(block.columns))
    return _dense(replace(panel, blocks={"price": Block(block.values, names)}))


@naming_data_page()
def _files_of(folder: Path) -> list[Path]:
    files = sorted(
        p
        for p in folder.iterdir()
        if p.name.lower().endswith(CSV_ENDINGS + PARQUET_ENDINGS) and not p.name.startswith((".", "_"))
    )
    if not files:
        inner = sorted(p.name for p in folder.iterdir() if p.is_dir())
        raise DataError(
            f"prices: the folder {folder} contains neither CSV nor Parquet files ({', '.join(CSV_ENDINGS[:2])}, "
            f"{', '.join(PARQUET_ENDINGS)}), and is not a Qlib store (calendars/, instruments/, features/)."
            + (f" It has the folders {some(inner, 5)}; files in them are not searched." if inner else "")
        )
    return files


def _stem(path: Path) -> str:
    """The name of a file without known endings: BRK.A for BRK.A.csv.gz, as in Qlib's script that dumps stores."""
    name = path.name
    for endings in (COMPRESSED, (".csv", ".txt", ".tsv", *PARQUET_ENDINGS)):
        name = next((name[: -len(ending)] for ending in endings if name.lower().endswith(ending)), name)
    return name


@naming_data_page()
def read_table(path: Path, options: ReadOptions = DEFAULTS) -> pd.DataFrame:
    """Read a CSV file, or a Parquet file or folder, as a frame.

    The dates and the instruments of a CSV file are read as text, so "000001" keeps its zeros.

    Parameters
    ----------
    path : Path
    options : ReadOptions

    Raises
    ------
    DataError
        The file is empty or damaged, its encoding is unknown, or pyarrow is missing.
    """
    if path.name.lower().endswith(PARQUET_ENDINGS) or path.is_dir() or _is_parquet(path):
        return _read_parquet(path)
    return read_csv(path, options)


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        if path.is_file():
            _require_memory_for(path)
        return pd.read_parquet(path)
    except MemoryError:
        raise DataError(f"{path} does not fit into memory. Remedy: a file with fewer rows or columns.") from None
    except ImportError:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow, which is not installed. "
            "Remedy: pip install 'qfast-models[parquet]', or save the prices as CSV."
        ) from None
    except (OSError, ValueError) as error:  # the errors of pyarrow derive from these
        hint = "" if path.is_dir() or _is_parquet(path) else " Remedy: rename it to .csv if it contains text."
        raise DataError(f"{path} cannot be read as Parquet: {error}{hint}") from None


def _require_memory_for(path: Path) -> None:
    """Refuse a Parquet file that does not fit into memory. A compressed file can have millions of rows per megabyte."""
    from pyarrow import parquet

    facts = parquet.read_metadata(path)
    require_memory(
        facts.num_rows * facts.num_columns * PARQUET_VALUE_BYTES,
        f"{path}: a table of {facts.num_rows:,} rows and {facts.num_columns} columns",
        "a file with fewer rows or columns",
    )


@naming_data_page()
def keyed_frame(frame: pd.DataFrame, name: str, options: ReadOptions) -> pd.DataFrame:
    """A table of factors, indexed (datetime, instrument).

    Parameters
    ----------
    frame : DataFrame
        With these keys as index levels or as columns, under any accepted name.
    name : str
        The file or frame, for messages.
    options : ReadOptions

    Raises
    ------
    DataError
        A key is missing, or the dates have several meanings.
    """
    if frame.columns.nlevels > 1:
        return frame
    keys = find_keys(frame, name, options)
    assert keys.instrument is not None
    whole_days = _whole_days(options)
    dates = read_dates([keys.dates(name)], options.date_format, whole_days, options.time_zone)
    clock = keys.times(name)
    times = _with_clock(dates.columns[0], clock)
    instruments = instrument_names(keys.frame[keys.instrument], name)
    index = pd.MultiIndex.from_arrays([times, instruments], names=["datetime", "instrument"])
    note(f"{name}: dates from column {keys.date!r} ({dates.format}), instruments from column {keys.instrument!r}")
    result = keys.frame.drop(columns=[c for c in (keys.date, keys.instrument, keys.clock) if c is not None])
    result = result.set_axis(index)
    if not whole_days:
        return result
    result = result.sort_index(kind="stable")
    result = result.set_axis(_whole_day_index(result.index))
    return result[~result.index.duplicated(keep="last")]


def _with_clock(dates: pd.DatetimeIndex, clock: pd.TimedeltaIndex | None) -> pd.DatetimeIndex:
    """Dates with the times of day of a separate column, unless they have times already."""
    return dates if clock is None or not (dates == dates.normalize()).all() else dates + clock


def _whole_day_index(index: pd.Index) -> pd.MultiIndex:
    days = pd.DatetimeIndex(index.get_level_values("datetime")).normalize()
    return pd.MultiIndex.from_arrays([days, index.get_level_values("instrument")], names=["datetime", "instrument"])


def _whole_days(options: ReadOptions) -> bool:
    return options.freq is not None and options.freq.lower() in DAY_NAMES


# ---------------------------------------------------------------- one table
@naming_data_page()
def _read_tables(frames: Iterable[tuple[pd.DataFrame, str, str | None]], source: str, options: ReadOptions) -> Panel:
    """The panel of frames, each with its name and the instrument of rows without one."""
    reader = DateReader(options.date_format, options.time_zone)
    tables = []
    empty = []
    for frame, name, stem in frames:
        if len(frame) == 0 and stem is not None:
            empty.append(name)
            continue
        keys = find_keys(frame, name, options, stem)
        if keys.instrument is None:
            instruments = np.full(len(keys.frame), stem, dtype=object)
        else:
            instruments = instrument_names(keys.frame[keys.instrument], name)
        clock = keys.times(name)
        reader.add(keys.dates(name))
        columns = _numeric_columns(keys.frame, {keys.date, keys.instrument, keys.clock}, name, options)
        tables.append(_Table(name, instruments, columns, clock, _described(keys), keys.instrument is None))
    if empty:
        note(f"{source}: leaving out {len(empty)} file(s) with a header but no rows: {some(empty, 5)}", warning=True)
    if not tables:
        raise DataError(f"{source}: no file has rows.")
    whole_days = _whole_days(options)
    dates = reader.finish(whole_days)
    times = [_with_clock(column, table.clock) for column, table in zip(dates.columns, tables, strict=True)]
    panel, rows = _stack(tables, times, whole_days, source)
    report_fields(source, {table.name: list(table.columns) for table in tables})
    report_file_names(source, _spans(tables, times))
    first, last = panel.datetimes[0], panel.datetimes[-1]
    note(
        f"{source}: {rows:,} rows of {len(panel.instruments)} instrument(s), {first:%Y-%m-%d} to {last:%Y-%m-%d}; "
        + _how_read(tables).replace("{}", dates.format)
    )
    _report_unadjusted(panel, source)
    return panel


def _described(keys: Keys) -> str:
    """How the keys were read, for the log; {} is the format of the dates."""
    where = "the file name" if keys.instrument is None else f"column {keys.instrument!r}"
    dated = f"column {keys.date!r}" if keys.clock is None else f"columns {keys.date!r} and {keys.clock!r}"
    return f"dates from {dated} ({{}}), instruments from {where}"


def _how_read(tables: Sequence[_Table]) -> str:
    other = next((table for table in tables if table.keys != tables[0].keys), None)
    return tables[0].keys + ("" if other is None else f"; {other.name}: {other.keys}")


def _spans(tables: Sequence[_Table], times: Sequence[pd.DatetimeIndex]) -> dict[str, tuple[pd.Timestamp, pd.Timestamp]]:
    """First and last time of each file whose name is the instrument."""
    return {
        str(table.instruments[0]): (column.min(), column.max())
        for table, column in zip(tables, times, strict=True)
        if table.is_named_by_file
    }


def _numeric_columns(
    frame: pd.DataFrame, keys: set[str | None], name: str, options: ReadOptions
) -> dict[str, np.ndarray]:
    """float32 values of the columns other than `keys`."""
    positions: dict[str, int] = {}
    labels = [column for column in frame.columns if column not in keys]
    plain_of = dict(zip(labels, field_names(labels), strict=True))
    for position, column in enumerate(frame.columns):
        if column in keys:
            continue
        plain = plain_of[column]
        if plain in positions:
            raise DataError(f"{name}: column {column!r} occurs twice; names are compared without case, $ and blanks.")
        positions[plain] = position
    columns: dict[str, np.ndarray] = {}
    texts: dict[str, pd.Series] = {}
    for plain, position in positions.items():
        values = frame.iloc[:, position]
        kind = values.dtype
        if pd.api.types.is_complex_dtype(kind):
            raise DataError(f"{name}: column {values.name!r} has complex numbers, but must have real ones.")
        if pd.api.types.is_numeric_dtype(kind):
            with np.errstate(over="ignore"):  # reported below
                columns[plain] = np.asarray(values.to_numpy(dtype=np.float32, na_value=np.nan))
        else:
            texts[plain] = values
    columns |= _text_columns(texts, columns, name, options)
    for label, plain in plain_of.items():
        if plain_name(label) in AVERAGES and plain in columns:
            _make_positive(columns, plain, f"{name}: column {label!r}")
    report_infinite(name, columns)
    if not columns:
        raise DataError(
            f"{name} has no price column; its columns are {list(frame.columns)}, expected some of {PRICE_FIELDS}."
        )
    if options.adjust:
        _adjust(columns, name)
    return {plain: columns[plain] for plain in positions if plain in columns} | columns


def _make_positive(columns: dict[str, np.ndarray], plain: str, what: str) -> None:
    """Remove the sign with which CRSP marks the average of bid and ask on days without a trade."""
    negative = int((columns[plain] < 0).sum())
    if negative:
        note(
            f"{what} has {negative} negative value(s), averages of bid and ask in CRSP's notation; using them unsigned"
        )
        columns[plain] = np.abs(columns[plain])


def _text_columns(
    texts: Mapping[str, pd.Series], numbers: Mapping[str, np.ndarray], name: str, options: ReadOptions
) -> dict[str, np.ndarray]:
    """Values of the text columns that contain numbers. Others are left out, unless they are price fields."""
    fields = PRICE_FIELDS + OTHER_FIELDS
    columns: dict[str, np.ndarray] = {}
    rest: dict[str, NumberText] = {}
    for plain, values in texts.items():
        if values.dtype.kind in "mM" or isinstance(values.dtype, pd.PeriodDtype):
            continue
        converted = pd.to_numeric(values, errors="coerce") if options.decimal != "," else values
        if options.decimal != "," and not (converted.isna() & values.notna()).any():
            columns[plain] = np.asarray(converted.to_numpy(dtype=np.float32, na_value=np.nan))
        elif plain in fields or _looks_numeric(values):
            rest[plain] = NumberText(values)
    decimal = options.decimal
    if decimal is None and rest:
        points = any(bool((values != np.floor(values))[np.isfinite(values)].any()) for values in numbers.values())
        proving = {plain: text for plain, text in rest.items() if plain in fields}
        try:
            decimal = decimal_mark(proving, points)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
    if decimal == "," and options.decimal is None and rest:
        note(f"{name}: numbers have decimal commas")
        rest |= {plain: NumberText(texts[plain]) for plain in columns}
    for plain, text in rest.items():
        values64 = text.numbers(decimal or ".")
        bad = text.bad_rows(values64)
        if not len(bad):
            with np.errstate(over="ignore"):
                columns[plain] = values64.astype(np.float32)
    for plain in [plain for plain in texts if plain not in columns]:
        if plain in fields:
            raise _not_numeric(name, texts[plain], rest.get(plain), decimal)
        _report_text(name, texts[plain], rest.get(plain), decimal or ".")
    return columns


def _report_text(name: str, values: pd.Series, text: NumberText | None, decimal: str) -> None:
    """Report that a column of text is left out; with a warning if most of its values are numbers."""
    if text is None:
        log.info("%s: ignoring column %r, which is not numeric", name, values.name)
        return
    bad = text.bad_rows(text.numbers(decimal))
    note(
        f"{name}: ignoring column {values.name!r}, which is not numeric: row {bad[0]} is {values.iloc[bad[0]]!r}",
        warning=len(bad) < len(values) / 2,
    )


def _looks_numeric(values: pd.Series) -> bool:
    return any(character.isdigit() for text in map(str, values.dropna().iloc[:20]) for character in text)


def _not_numeric(name: str, values: pd.Series, text: NumberText | None, decimal: str | None) -> DataError:
    row = 0 if text is None else int(text.bad_rows(text.numbers(decimal or "."))[0])
    return DataError(
        f"{name}: column {values.name!r} must be numeric, but row {row} is {values.iloc[row]!r} "
        "(row 0 is the first row below the header). Remedy: correct or empty the cell, or --decimal if it is a number."
    )


# ---------------------------------------------------------------- adjusted prices
def _adjust(columns: dict[str, np.ndarray], name: str) -> None:
    """Multiply prices by adjusted close / close and divide the volume by it, as Qlib's collector of Yahoo data does."""
    adjusted = adjusted_column(columns)
    if adjusted is None or "close" not in columns:
        raise DataError(
            f"{name} has no column for --adjust; it needs close and an adjusted close such as 'Adj Close', and has "
            f"{list(columns)}."
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = columns[adjusted].astype(np.float64) / columns["close"]
        for field in ("open", "high", "low", "close", "vwap"):
            if field in columns:
                columns[field] = (columns[field] * factor).astype(np.float32)
        if "volume" in columns:
            columns["volume"] = (columns["volume"] / factor).astype(np.float32)
    columns["factor"] = factor.astype(np.float32)


def _report_unadjusted(panel: Panel, source: str) -> None:
    """Report splits that the column close contains and the adjusted close does not."""
    names = panel.columns("price")
    adjusted = adjusted_column(dict.fromkeys(names, panel.date_codes))
    if adjusted is None or "close" not in names:
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = panel.column(adjusted).astype(np.float64) / panel.column("close")
        steps = np.abs(ratio[1:] / ratio[:-1] - 1)
    steps[np.diff(panel.instrument_codes) != 0] = 0
    splits = np.flatnonzero(steps > JUMP)
    if not len(splits):
        return
    row = int(splits[0]) + 1
    count = len(np.unique(panel.instrument_codes[splits]))
    note(
        f"{source}: close is not adjusted for splits: {adjusted!r} / close changes by {steps[row - 1]:.0%} on "
        f"{panel.datetimes[panel.date_codes[row]]:%Y-%m-%d} for {panel.instruments[panel.instrument_codes[row]]!r} "
        f"({count} instrument(s) in all), so returns of close are wrong there. --adjust "
        "(read_options={'adjust': True}) uses the adjusted close",
        is_repeated_by_check=True,
    )


# ---------------------------------------------------------------- one panel
def _stack(tables: list[_Table], times: list[pd.DatetimeIndex], whole_days: bool, source: str) -> tuple[Panel, int]:
    """One panel of all tables, with all dates between the first and last row of an instrument; and its original rows.

    Keys must be unique.
    """
    dates = pd.DatetimeIndex(times[0].append(times[1:]) if len(tables) > 1 else times[0])
    codes, names = pd.factorize(np.concatenate([t.instruments for t in tables]), sort=True)
    date_codes, calendar = pd.factorize(dates.normalize() if whole_days else dates, sort=True)
    key = codes.astype(np.int64) * len(calendar) + date_codes
    if whole_days:
        order = np.lexsort((dates.asi8, key))
        last = np.append(key[order[1:]] != key[order[:-1]], True)
        if not last.all():
            note(f"{source}: {int((~last).sum()):,} of {len(last):,} rows are earlier rows of a day and are left out")
        order = order[last]
    else:
        order = np.argsort(key, kind="stable")
    order = _without_duplicates(tables, order, key, source, lambda row: (dates[row], names[codes[row]]))
    report_codes(source, list(names))
    report_shifted_zone(source, dates.unique().sort_values() if whole_days else pd.DatetimeIndex(calendar))
    report_calendar(source, pd.DatetimeIndex(calendar), date_codes[order], codes[order])
    columns = list(dict.fromkeys(c for t in tables for c in t.columns))
    columns.sort(key=lambda c: PRICE_FIELDS.index(c) if c in PRICE_FIELDS else len(PRICE_FIELDS))
    values = np.empty((len(order), len(columns)), dtype=np.float32)
    for j, column in enumerate(columns):
        values[:, j] = _column(tables, column)[order]
    panel = Panel(
        datetimes=pd.DatetimeIndex(calendar).rename(None),
        instruments=np.asarray(names, dtype=object),
        date_codes=date_codes[order].astype(np.int32),
        instrument_codes=codes[order].astype(np.int32),
        blocks={"price": Block(values, tuple(columns))},
    )
    return _dense(panel), len(order)


def _without_duplicates(
    tables: Sequence[_Table],
    order: np.ndarray,
    key: np.ndarray,
    source: str,
    key_of: Callable[[int], tuple[pd.Timestamp, str]],
) -> np.ndarray:
    """The sorted rows without those that equal the row before them. Raises a DataError if rows of one key differ."""
    same = np.flatnonzero(key[order[1:]] == key[order[:-1]])
    if not len(same):
        return order
    first, second = order[same], order[same + 1]
    for column in dict.fromkeys(c for t in tables for c in t.columns):
        values = _column(tables, column)
        differ = np.flatnonzero(
            (values[first] != values[second]) & ~(np.isnan(values[first]) & np.isnan(values[second]))
        )
        if len(differ):
            rows = int(first[differ[0]]), int(second[differ[0]])
            one, other = (_row_name(tables, row) for row in rows)
            datetime, instrument = key_of(rows[0])
            raise DataError(
                f"duplicate key: {one} and {other} are both (datetime {datetime}, instrument {instrument!r}), but "
                f"{column} is {values[rows[0]]:g} and {values[rows[1]]:g}; {len(same)} duplicate "
                "rows in all. Remedy: keep one row per instrument and datetime, or --instrument-column if "
                "the instruments are in another column."
            )
    note(
        f"{source}: leaving out {len(same):,} row(s) that repeat another one exactly, the first is "
        f"{_row_name(tables, int(second[0]))}",
        warning=True,
    )
    return np.delete(order, same + 1)


def _column(tables: Sequence[_Table], column: str) -> np.ndarray:
    """One column of all tables, NaN where a table does not have it."""
    return np.concatenate([t.columns.get(column, np.full(len(t.instruments), np.nan, np.float32)) for t in tables])


def _row_name(tables: Sequence[_Table], row: int) -> str:
    if len(tables) == 1:
        return f"row {row} of {tables[0].name}"
    for table in tables:
        if row < len(table.instruments):
            return f"row {row} of {table.name}"
        row -= len(table.instruments)
    raise IndexError(row)


def _dense(panel: Panel) -> Panel:
    """Insert NaN rows at the dates that an instrument lacks between its first and last row."""
    starts = np.flatnonzero(np.diff(panel.instrument_codes, prepend=-1))
    stops = np.append(starts[1:], panel.n_rows)
    first, last = panel.date_codes[starts].astype(np.int64), panel.date_codes[stops - 1].astype(np.int64)
    lengths = last - first + 1
    total = int(lengths.sum())
    if total == panel.n_rows:
        return panel
    names = panel.columns("price")
    # The values, and the two codes and three temporary numbers of each row.
    needed = total * (len(names) * panel.values("price").itemsize + 32)
    longest = panel.instruments[panel.instrument_codes[starts[int(lengths.argmax())]]]
    require_memory(
        needed,
        f"the panel of {len(starts)} instruments with every date of the calendar between their first and last row "
        f"({total:,} rows instead of {panel.n_rows:,}; the longest is {longest!r} with {int(lengths.max()):,})",
        "leave out instruments whose rows are far apart, or use a Qlib data folder",
    )
    begin = np.cumsum(lengths) - lengths
    present = panel.instrument_codes[starts]
    group = np.repeat(np.arange(len(starts)), stops - starts)
    target = begin[group] + panel.date_codes - first[group]
    values = np.full((total, len(panel.columns("price"))), np.nan, dtype=panel.values("price").dtype)
    values[target] = panel.values("price")
    return replace(
        panel,
        date_codes=(np.arange(total) - np.repeat(begin - first, lengths)).astype(np.int32),
        instrument_codes=np.repeat(present, lengths).astype(np.int32),
        blocks={"price": Block(values, panel.columns("price"))},
    )
