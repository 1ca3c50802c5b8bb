"""Tables of prices: CSV and Parquet files, folders of them, and pandas frames."""

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
from qfast.errors import ConfigError, DataError

__all__ = ["panel_of", "read_table"]

log = logging.getLogger("qfast.data")

OTHER_KNOWN_FIELDS = ("factor", "change", "amount", "money", "turnover")
DATETIME_NAMES = ("datetime", "date", "timestamp", "trade_date", "tradedate", "trading_date", "time", "day")
INSTRUMENT_NAMES = ("instrument", "symbol", "ticker", "code", "ts_code", "stock_code", "secid", "stock", "name")
FIELD_NAMES = {"vol": "volume", "average_price": "vwap"}
CSV_ENDINGS = (".csv", ".csv.gz", ".csv.bz2", ".csv.xz", ".csv.zst", ".csv.zip")
PARQUET_ENDINGS = (".parquet", ".pq")
MISSING = ("", "NA", "N/A", "n/a", "<NA>", "#N/A", "NaN", "nan", "-nan", "null", "NULL", "None", "-")


class _Table(NamedTuple):
    """One file or frame: dates, instrument names and float32 columns, row by row."""

    name: str
    dates: pd.DatetimeIndex
    instruments: np.ndarray
    columns: dict[str, np.ndarray]


def panel_of(source: PriceSource) -> Panel:
    """Dense price panel of a file, a folder of files, a frame or a Panel."""
    if isinstance(source, Panel):
        return _lower_case(source)
    if isinstance(source, (pd.DataFrame, pd.Series)):
        frame = source.to_frame() if isinstance(source, pd.Series) else source
        return _stack([_table(frame, "the frame", None)])
    if not isinstance(source, (str, Path)):
        raise ConfigError(
            f"prices must be a path, a DataFrame or a Panel, got {type(source).__name__}: {str(source)[:60]!r}"
        )
    path = Path(source).expanduser()
    if path.is_dir():
        files = _files_of(path)
        return _stack([_table(read_table(file), file.name, _stem(file)) for file in files])
    if not path.exists():
        raise DataError(f"prices: no such file or folder: {path} (looked in {Path.cwd()}).")
    return _stack([_table(read_table(path), path.name, None)])


def _lower_case(panel: Panel) -> Panel:
    group = "price" if "price" in panel.blocks else next(iter(panel.blocks), "price")
    block = panel.block(group)
    names = tuple(_plain_name(c) for c in block.columns)
    return _dense(replace(panel, blocks={"price": Block(block.values, names)}))


def _files_of(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.name.lower().endswith(CSV_ENDINGS + PARQUET_ENDINGS))
    if not found:
        raise DataError(
            f"prices: the folder {folder} holds neither CSV nor Parquet files ({', '.join(CSV_ENDINGS[:2])}, "
            f"{', '.join(PARQUET_ENDINGS)}), and is no Qlib store (calendars/, instruments/, features/)."
        )
    return found


def _stem(path: Path) -> str:
    return path.name.split(".")[0] if path.name.count(".") <= 2 else path.name.rsplit(".", 1)[0]


def read_table(path: Path) -> pd.DataFrame:
    """A CSV file, or a Parquet file or folder, as a frame; instruments stay text ("000001" keeps its zeros)."""
    if path.name.lower().endswith(PARQUET_ENDINGS) or path.is_dir():
        return _read_parquet(path)
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes).")
    try:
        header = [str(c) for c in pd.read_csv(path, nrows=0, encoding_errors="replace").columns]
        code = _find(header, INSTRUMENT_NAMES)
        # "000001" must keep its zeros, and a ticker may be called NA
        texts = {code} if code is not None else set()
        missing = {c: list(MISSING) for c in header if c not in texts}
        return pd.read_csv(
            path, dtype=dict.fromkeys(texts, str), keep_default_na=False, na_values=missing, low_memory=False
        )  # fmt: skip
    except pd.errors.EmptyDataError:
        raise DataError(f"{path} holds no columns.") from None
    except (pd.errors.ParserError, UnicodeDecodeError, OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read as CSV: {str(error).strip()}") from None


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except ImportError:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow, which is not installed. "
            "Remedy: pip install 'qfast-models[parquet]', or give the prices as CSV."
        ) from None
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None


def _table(frame: pd.DataFrame, name: str, instrument: str | None) -> _Table:
    """Keys and numeric columns of a frame; `instrument` names all rows if no column does."""
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
                f"{name} has no {what} column; found {list(frame.columns)}, accepted names are {list(accepted)} "
                "(upper or lower case)."
            )
    dates = parse_dates(_column(frame, date, name), name)
    names = np.full(len(frame), instrument, dtype=object) if code is None else _codes(_column(frame, code, name), name)
    columns: dict[str, np.ndarray] = {}
    for position, column in enumerate(frame.columns):
        if column in (date, code):
            continue
        plain = _plain_name(column)
        if plain in columns:
            raise DataError(
                f"{name}: column {column!r} occurs twice (upper and lower case, $ and blanks do not count)."
            )
        values = _numbers(frame.iloc[:, position], plain, name)
        if values is not None:
            columns[plain] = values
    if not columns:
        raise DataError(f"{name} has no price column; found {list(frame.columns)}, expected some of {PRICE_FIELDS}.")
    return _Table(name, dates, names, columns)


def _plain_name(column: object) -> str:
    plain = str(column).strip().lstrip("$").lower()
    return FIELD_NAMES.get(plain, plain)


def _find(columns: Iterable[str], accepted: Sequence[str]) -> str | None:
    plain = {str(c).strip().lstrip("$").lower(): c for c in reversed(list(columns))}
    return next((plain[name] for name in accepted if name in plain), None)


def _column(frame: pd.DataFrame, column: str | None, name: str) -> pd.Series:
    found: Any = frame[column]
    if isinstance(found, pd.DataFrame):
        raise DataError(f"{name}: column {column!r} occurs {found.shape[1]} times.")
    assert isinstance(found, pd.Series)
    return found


def _codes(values: pd.Series, name: str) -> np.ndarray:
    missing = values.isna().to_numpy() | (values.astype(object) == "").to_numpy()
    if missing.any():
        raise DataError(f"{name}: row {int(np.argmax(missing))} has no instrument (column {values.name!r}).")
    codes, unique = pd.factorize(values)
    texts = np.array([str(u).strip() for u in unique], dtype=object)
    return texts[codes]


def _numbers(values: pd.Series, plain: str, name: str) -> np.ndarray | None:
    """float32 values; None for a column of text that no price expression needs."""
    kind = values.dtype
    if pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_complex_dtype(kind):
        return np.asarray(values.to_numpy(dtype=np.float32, na_value=np.nan))
    converted = pd.to_numeric(values, errors="coerce") if kind.kind not in "mM" else None
    if converted is not None:
        bad = (converted.isna() & values.notna()).to_numpy()
        if not bad.any():
            return np.asarray(converted.to_numpy(dtype=np.float32, na_value=np.nan))
    if plain in PRICE_FIELDS + OTHER_KNOWN_FIELDS:
        row = 0 if converted is None else int(np.argmax(bad))
        raise DataError(
            f"{name}: column {values.name!r} is not numeric: row {row} is {values.iloc[row]!r} "
            "(the first row below the header is row 0)."
        )
    log.info("%s: column %r is not numeric and is left out", name, values.name)
    return None


def _stack(tables: list[_Table]) -> Panel:
    """One dense panel of all tables; refuses keys that occur twice."""
    zones = {str(t.dates.tz): t.name for t in tables}
    if len(zones) > 1:
        raise DataError(f"the files differ in time zone: {', '.join(f'{n} has {z}' for z, n in zones.items())}.")
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
        nothing = [np.full(len(t.dates), np.nan, np.float32) if column not in t.columns else None for t in tables]
        parts = [t.columns[column] if n is None else n for t, n in zip(tables, nothing, strict=True)]
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
    """Insert NaN rows so that every instrument has all calendar dates between its first and last row."""
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
