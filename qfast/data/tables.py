"""Reads tables of prices: CSV and Parquet files, folders of them, and pandas frames."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from qfast.data.panel import Block, Panel
from qfast.data.prices import PRICE_FIELDS, PriceSource, parse_dates
from qfast.errors import ConfigError, DataError, shown
from qfast.read_options import ReadOptions

__all__ = ["panel_of", "read_table"]

log = logging.getLogger("qfast.data")

DEFAULTS = ReadOptions()

OTHER_FIELDS = ("factor", "change", "amount", "money", "turnover")
DATETIME_NAMES = ("datetime", "date", "timestamp", "trade_date", "tradedate", "trading_date", "time", "day")
INSTRUMENT_NAMES = ("instrument", "symbol", "ticker", "code", "ts_code", "stock_code", "secid", "stock", "name")
FIELD_NAMES = {"vol": "volume", "average_price": "vwap"}
CSV_ENDINGS = (".csv", ".csv.gz", ".csv.bz2", ".csv.xz", ".csv.zst", ".csv.zip")
PARQUET_ENDINGS = (".parquet", ".pq")
MISSING = ("", "NA", "N/A", "n/a", "<NA>", "#N/A", "NaN", "nan", "-nan", "null", "NULL", "None", "-")


class _Table(NamedTuple):
    """One file or frame: date, instrument and float32 columns of each row."""

    name: str
    dates: pd.DatetimeIndex
    instruments: np.ndarray
    columns: dict[str, np.ndarray]


def panel_of(source: PriceSource, options: ReadOptions = DEFAULTS) -> Panel:
    """The price panel of a file, a folder of files, a frame or a panel.

    Between the first and the last row of an instrument, every date of the calendar has a row.

    Parameters
    ----------
    source : path, DataFrame, Series or Panel
    options : ReadOptions

    Returns
    -------
    Panel
        One group "price", whose column names are in lower case.

    Raises
    ------
    ConfigError
        The source has another type.
    DataError
        A file or column is missing or damaged, or a key occurs twice.

    Examples
    --------
    >>> frame = pd.DataFrame({"Date": ["2024-01-02", "2024-01-04"], "Ticker": "A", "Close": [1.0, 2.0]})
    >>> panel_of(frame).values("price").tolist()
    [[1.0], [2.0]]
    """
    if isinstance(source, Panel):
        return _lower_case(source)
    if isinstance(source, (pd.DataFrame, pd.Series)):
        frame = source.to_frame() if isinstance(source, pd.Series) else source
        return _stack([_table(frame, "the frame", None)])
    if not isinstance(source, (str, Path)):
        raise ConfigError(
            f"prices must be a path, a DataFrame or a Panel, got {type(source).__name__}: {shown(source)}."
        )
    path = Path(source).expanduser()
    if path.is_dir():
        files = _files_of(path)
        return _stack([_table(read_table(file), file.name, _stem(file)) for file in files])
    if not path.exists():
        raise DataError(f"prices: no such file or folder: {path} (current folder {Path.cwd()}).")
    return _stack([_table(read_table(path), path.name, None)])


def _lower_case(panel: Panel) -> Panel:
    group = "price" if "price" in panel.blocks else next(iter(panel.blocks), "price")
    block = panel.block(group)
    names = tuple(_plain_name(c) for c in block.columns)
    return _dense(replace(panel, blocks={"price": Block(block.values, names)}))


def _files_of(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.iterdir() if p.name.lower().endswith(CSV_ENDINGS + PARQUET_ENDINGS))
    if not files:
        raise DataError(
            f"prices: the folder {folder} contains neither CSV nor Parquet files ({', '.join(CSV_ENDINGS[:2])}, "
            f"{', '.join(PARQUET_ENDINGS)}), and is not a Qlib store (calendars/, instruments/, features/)."
        )
    return files


def _stem(path: Path) -> str:
    return path.name.split(".")[0] if path.name.count(".") <= 2 else path.name.rsplit(".", 1)[0]


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV file, or a Parquet file or folder, as a frame.

    The instrument column of a CSV file is read as text, so "000001" keeps its zeros.

    Raises
    ------
    DataError
        The file is empty or damaged, or pyarrow is missing.
    """
    if path.name.lower().endswith(PARQUET_ENDINGS) or path.is_dir():
        return _read_parquet(path)
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes).")
    try:
        header = [str(c) for c in pd.read_csv(path, nrows=0, encoding_errors="replace").columns]
        code = _find(header, INSTRUMENT_NAMES)
        # Instruments are text: "000001" keeps its zeros, and the ticker NA is not a missing value.
        texts = {code} if code is not None else set()
        missing = {c: list(MISSING) for c in header if c not in texts}
        dtype = dict.fromkeys(texts, str)
        return pd.read_csv(path, dtype=dtype, keep_default_na=False, na_values=missing, low_memory=False)
    except pd.errors.EmptyDataError:
        raise DataError(f"{path} contains no columns.") from None
    except (pd.errors.ParserError, UnicodeDecodeError, OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read as CSV: {str(error).strip()}") from None


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except ImportError:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow, which is not installed. "
            "Remedy: pip install 'qfast-models[parquet]', or save the prices as CSV."
        ) from None
    except (OSError, ValueError) as error:  # the errors of pyarrow derive from these
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None


def _table(frame: pd.DataFrame, name: str, instrument: str | None) -> _Table:
    """Keys and numeric columns of a frame. Without an instrument column, all rows belong to `instrument`."""
    if any(level is not None for level in frame.index.names):
        frame = frame.reset_index()
    flat: list[Any] = list(frame.columns)
    frame = frame.set_axis([str(c[-1] if isinstance(c, tuple) else c) for c in flat], axis=1)
    if len(frame) == 0:
        raise DataError(f"{name} has no rows (columns {list(frame.columns)}).")
    date, code = _find(frame.columns, DATETIME_NAMES), _find(frame.columns, INSTRUMENT_NAMES)
    if date is None and isinstance(frame.index, pd.DatetimeIndex):
        frame = frame.assign(datetime=frame.index)
        date = "datetime"
    for what, column, accepted in (("datetime", date, DATETIME_NAMES), ("instrument", code, INSTRUMENT_NAMES)):
        if column is None and not (what == "instrument" and instrument is not None):
            raise DataError(
                f"{name} has no {what} column; its columns are {list(frame.columns)}, accepted names are "
                f"{list(accepted)} (upper or lower case)."
            )
    dates = parse_dates(_column(frame, date, name), name)
    names = np.full(len(frame), instrument, dtype=object) if code is None else _codes(_column(frame, code, name), name)
    columns: dict[str, np.ndarray] = {}
    for position, column in enumerate(frame.columns):
        if column in (date, code):
            continue
        plain = _plain_name(column)
        if plain in columns:
            raise DataError(f"{name}: column {column!r} occurs twice; names are compared without case, $ and blanks.")
        values = _numbers(frame.iloc[:, position], plain, name)
        if values is not None:
            columns[plain] = values
    if not columns:
        raise DataError(
            f"{name} has no price column; its columns are {list(frame.columns)}, expected some of {PRICE_FIELDS}."
        )
    return _Table(name, dates, names, columns)


def _plain_name(column: object) -> str:
    plain = str(column).strip().lstrip("$").lower()
    return FIELD_NAMES.get(plain, plain)


def _find(columns: Iterable[str], accepted: Sequence[str]) -> str | None:
    plain = {str(c).strip().lstrip("$").lower(): c for c in reversed(list(columns))}
    return next((plain[name] for name in accepted if name in plain), None)


def _column(frame: pd.DataFrame, column: str | None, name: str) -> pd.Series:
    values: Any = frame[column]
    if isinstance(values, pd.DataFrame):
        raise DataError(f"{name}: column {column!r} must occur once, but occurs {values.shape[1]} times.")
    assert isinstance(values, pd.Series)
    return values


def _codes(values: pd.Series, name: str) -> np.ndarray:
    missing = values.isna().to_numpy() | (values.astype(object) == "").to_numpy()
    if missing.any():
        raise DataError(f"{name}: row {int(np.argmax(missing))} has no instrument (column {values.name!r}).")
    codes, unique = pd.factorize(values)
    texts = np.array([str(u).strip() for u in unique], dtype=object)
    return texts[codes]


def _numbers(values: pd.Series, plain: str, name: str) -> np.ndarray | None:
    """float32 values, or None for a text column that is not a price field."""
    kind = values.dtype
    if pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_complex_dtype(kind):
        return np.asarray(values.to_numpy(dtype=np.float32, na_value=np.nan))
    converted = pd.to_numeric(values, errors="coerce") if kind.kind not in "mM" else None
    if converted is not None:
        bad = (converted.isna() & values.notna()).to_numpy()
        if not bad.any():
            return np.asarray(converted.to_numpy(dtype=np.float32, na_value=np.nan))
    if plain in PRICE_FIELDS + OTHER_FIELDS:
        row = 0 if converted is None else int(np.argmax(bad))
        raise DataError(
            f"{name}: column {values.name!r} must be numeric, but row {row} is {values.iloc[row]!r} "
            "(row 0 is the first row below the header)."
        )
    log.info("%s: ignoring column %r, which is not numeric", name, values.name)
    return None


def _stack(tables: list[_Table]) -> Panel:
    """One panel of all tables, with all dates between the first and last row of an instrument. Keys must be unique."""
    zones = {str(t.dates.tz): t.name for t in tables}
    if len(zones) > 1:
        listed = ", ".join(f"{name} has {zone}" for zone, name in zones.items())
        raise DataError(f"all files must have the same time zone, but {listed}.")
    dates = tables[0].dates.append([t.dates for t in tables[1:]]) if len(tables) > 1 else tables[0].dates
    date_codes, calendar = pd.factorize(dates, sort=True)
    codes, names = pd.factorize(np.concatenate([t.instruments for t in tables]), sort=True)
    key = codes.astype(np.int64) * len(calendar) + date_codes
    order = np.argsort(key, kind="stable")
    same = np.flatnonzero(key[order[1:]] == key[order[:-1]])
    if len(same):
        first, second = (_row_name(tables, int(order[k])) for k in (same[0], same[0] + 1))
        row = order[same[0]]
        raise DataError(
            f"duplicate key: {first} and {second} are both (datetime {dates[row]}, instrument {names[codes[row]]!r}); "
            f"{len(same)} duplicate rows in all. Remedy: keep one row per instrument and datetime."
        )
    columns = list(dict.fromkeys(c for t in tables for c in t.columns))
    columns.sort(key=lambda c: PRICE_FIELDS.index(c) if c in PRICE_FIELDS else len(PRICE_FIELDS))
    values = np.empty((len(key), len(columns)), dtype=np.float32)
    for j, column in enumerate(columns):
        parts = [t.columns.get(column, np.full(len(t.dates), np.nan, np.float32)) for t in tables]
        values[:, j] = np.concatenate(parts)[order]
    panel = Panel(
        datetimes=pd.DatetimeIndex(calendar).rename(None),
        instruments=np.asarray(names, dtype=object),
        date_codes=date_codes[order].astype(np.int32),
        instrument_codes=codes[order].astype(np.int32),
        blocks={"price": Block(values, tuple(columns))},
    )
    return _dense(panel)


def _row_name(tables: list[_Table], row: int) -> str:
    if len(tables) == 1:
        return f"row {row} of {tables[0].name}"
    for table in tables:
        if row < len(table.dates):
            return f"row {row} of {table.name}"
        row -= len(table.dates)
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
