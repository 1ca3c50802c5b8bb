"""Turns a frame of any shape into keys and columns: which column has dates, which instruments, which rows are data."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import numpy as np
import pandas as pd

from qfast.data.column_names import (
    ADJUSTED,
    COMPANY_NAMES,
    DATE_NAMES,
    FIELD_NAMES,
    INSTRUMENT_NAMES,
    PRICE_FIELDS,
    TIME_NAMES,
    find_column,
    is_index_name,
    plain_name,
    role_name,
)
from qfast.data.date_formats import DateColumn, is_date, times_of_day
from qfast.data.source_notes import note
from qfast.errors import DataError, shown, some, suggest
from qfast.read_options import ReadOptions

__all__ = ["Keys", "adjusted_column", "find_keys", "instrument_names"]

FOOTERS = ("total", "sum", "average", "mean", "source", "note", "copyright", "data from", "合计", "总计", "数据来源")
FOOTER_ROWS = 3


class Keys(NamedTuple):
    """A frame with its key columns.

    Attributes
    ----------
    frame : DataFrame
        The rows of data, with single-level columns, without index columns.
    date : str
        Name of the date column.
    instrument : str or None
        Name of the instrument column; None: all rows belong to one instrument.
    clock : str or None
        Name of a separate column with the time of day.
    """

    frame: pd.DataFrame
    date: str
    instrument: str | None
    clock: str | None

    def dates(self, table: str) -> DateColumn:
        """The date column."""
        return DateColumn(self.frame[self.date], table)

    def times(self, table: str) -> pd.TimedeltaIndex | None:
        """The times of day of the separate column, if there is one.

        Raises
        ------
        DataError
            A value is not a time of day.
        """
        if self.clock is None:
            return None
        values = self.frame[self.clock]
        codes, unique = pd.factorize(values)
        times = times_of_day(pd.Index(unique).astype(str))[codes]
        bad = np.asarray(times.isna()) | (codes < 0)
        if bad.any():
            row = int(np.argmax(bad))
            raise DataError(
                f"{table}: row {row} of column {self.clock!r} is not a time of day: {shown(values.iloc[row])}. Remedy: "
                "rename the column if it is something else."
            )
        return times


def find_keys(frame: pd.DataFrame, table: str, options: ReadOptions, has_name: bool) -> Keys:
    """Find the key columns of a frame, and remove everything that is not data.

    Parameters
    ----------
    frame : DataFrame
        Not modified.
    table : str
        Name of the file or frame, for messages.
    options : ReadOptions
    has_name : bool
        True if the name of the file is an instrument, which takes precedence over company names.

    Raises
    ------
    DataError
        There is no date or instrument column, or it occurs twice.
    """
    frame, levels = _flat(frame, table)
    if len(frame) == 0:
        raise DataError(f"{table} has no rows (columns {list(frame.columns)}).")
    date = find_column(levels, DATE_NAMES) or find_column(frame.columns, DATE_NAMES)
    if date is None:
        frame, date = _date_from_index(frame, table)
    instrument = _instrument_column(frame, levels, table, options, has_name)
    for column in (date, instrument):
        if column is not None and isinstance(frame[column], pd.DataFrame):
            count = frame[column].shape[1]
            raise DataError(f"{table}: column {column!r} must occur once, but occurs {count} times.")
    clock = _clock_column(frame, date)
    frame = _without_index_columns(frame, {date, instrument, clock}, table)
    return Keys(_data_rows(frame, date, table), date, instrument, clock)


# ---------------------------------------------------------------- shape
def _flat(frame: pd.DataFrame, table: str) -> tuple[pd.DataFrame, list[str]]:
    """The frame with single-level columns and its index as columns; and the names of the index levels."""
    if frame.columns.nlevels > 1:
        frame = _one_column_per_field(frame, table)
    names = list(frame.index.names)
    if isinstance(frame.index, pd.MultiIndex) and all(name is None for name in names):
        first = frame.index.levels[0]
        dated = isinstance(first, pd.DatetimeIndex) or (len(first) > 0 and is_date(first[0]))
        names = ["datetime", "instrument"] if dated else ["instrument", "datetime"]
        if frame.index.nlevels == 2:
            frame = frame.set_axis(frame.index.set_names(names))
    levels = [str(name) for name in names if name is not None]
    if levels:
        frame = _reset_index(frame, table)
    return frame.set_axis([str(c) for c in frame.columns], axis=1), levels


def _reset_index(frame: pd.DataFrame, table: str) -> pd.DataFrame:
    for name in [str(name) for name in frame.index.names if name is not None]:
        if name in frame.columns:  # set_index(drop=False)
            level, column = frame.index.get_level_values(name), frame[name]
            if not (np.asarray(level.astype(str)) == np.asarray(column.astype(str))).all():
                raise DataError(
                    f"{table}: index level {name!r} and column {name!r} have different values. Remedy: rename one."
                )
            frame = frame.drop(columns=[name])
    return frame.reset_index()


def _one_column_per_field(frame: pd.DataFrame, table: str) -> pd.DataFrame:
    """Move a column level with instruments, as in ("Close", "AAPL"), to the index."""
    columns = frame.columns
    dated = [c for c in list(columns) if role_name(c[0]) in (*DATE_NAMES, *INSTRUMENT_NAMES) and not str(c[-1]).strip()]
    known = {role_name(c[0]) for c in dated} | {role_name(name) for name in frame.index.names if name is not None}
    if known & set(INSTRUMENT_NAMES) or frame.index.nlevels > 1 or columns.nlevels != 2:
        return frame.set_axis([str(c[0] if c in dated else c[-1]) for c in list(columns)], axis=1)
    if dated:
        frame = frame.set_index(dated)
        frame = frame.set_axis(frame.index.set_names([str(c[0]) for c in dated]))
    fields = [{plain_name(name) for name in frame.columns.get_level_values(level)} for level in (0, 1)]
    counts = [len(names & {*PRICE_FIELDS, *FIELD_NAMES}) for names in fields]
    if max(counts) == 0:
        return frame.set_axis([str(c[-1]) for c in frame.columns], axis=1)
    level = 1 if counts[0] >= counts[1] else 0
    instruments = [str(name) for name in frame.columns.get_level_values(level).unique()]
    note(f"{table}: the columns have two levels, fields and {len(instruments)} instrument(s): {some(instruments, 5)}")
    index_name = frame.index.names[0]
    long = frame.stack(level=level, future_stack=True).dropna(how="all")
    assert isinstance(long, pd.DataFrame)
    return long.set_axis(long.index.set_names(["datetime" if index_name is None else index_name, "instrument"]))


def _date_from_index(frame: pd.DataFrame, table: str) -> tuple[pd.DataFrame, str]:
    """Use an index without a name, or a first column without a name, whose values are dates."""
    first = frame.columns[0] if len(frame.columns) else ""
    if isinstance(frame.index, pd.DatetimeIndex) or (frame.index.dtype.kind not in "iuf" and is_date(frame.index[0])):
        return frame.assign(datetime=frame.index), "datetime"
    if is_index_name(first) and frame[first].dtype.kind not in "iuf" and is_date(frame[first].iloc[0]):
        note(f"{table}: using the dates of the first column, which has no name")
        return frame, str(first)
    raise DataError(_no_column("datetime", DATE_NAMES, frame, table) + _wide_hint(frame))


def _no_column(what: str, accepted: tuple[str, ...], frame: pd.DataFrame, table: str) -> str:
    columns = list(frame.columns)
    near = next((hint for column in columns if (hint := suggest(role_name(column), accepted))), "")
    return (
        f"{table} has no {what} column; its columns are {columns}, accepted names are {list(accepted)} (upper or lower "
        f"case).{near}"
    )


def _wide_hint(frame: pd.DataFrame) -> str:
    if len(frame.columns) == 1:
        return " Remedy: --separator, if the file has another one than the comma."
    return ""


def _instrument_column(
    frame: pd.DataFrame, levels: list[str], table: str, options: ReadOptions, has_name: bool
) -> str | None:
    columns = [str(c) for c in frame.columns]
    if options.instrument_column is not None:
        column = find_column(columns, [role_name(options.instrument_column)])
        if column is None:
            raise DataError(
                f"{table} has no column {options.instrument_column!r} (--instrument-column); its columns are {columns}."
                + suggest(options.instrument_column, columns)
            )
        return column
    column = find_column(levels, INSTRUMENT_NAMES) or find_column(columns, INSTRUMENT_NAMES)
    if column is not None or has_name:
        return column
    column = find_column(columns, COMPANY_NAMES)
    if column is None:
        raise DataError(
            _no_column("instrument", INSTRUMENT_NAMES, frame, table)
            + " Remedy: --instrument-column NAME, or a folder of files that are named after instruments."
        )
    note(
        f"{table}: there is no column with symbols, so the instruments are the names in column {column!r}", warning=True
    )
    return column


def _clock_column(frame: pd.DataFrame, date: str) -> str | None:
    """A separate column with the time of day."""
    clock = find_column([str(c) for c in frame.columns if c != date], TIME_NAMES)
    if clock is None or isinstance(frame[clock], pd.DataFrame):
        return None
    values = frame[clock].dropna()
    if len(values) == 0 or values.dtype.kind in "mM" or times_of_day(pd.Index([str(values.iloc[0])])).isna()[0]:
        return None
    return clock


# ---------------------------------------------------------------- rows and columns that are not data
def _without_index_columns(frame: pd.DataFrame, keys: set[str | None], table: str) -> pd.DataFrame:
    dropped: list[Hashable] = []
    for position, column in enumerate(frame.columns):
        if column in keys or not is_index_name(column):
            continue
        values = frame.iloc[:, position]
        if values.isna().all():
            dropped.append(column)
        elif pd.api.types.is_numeric_dtype(values.dtype):
            numbers = values.to_numpy(dtype=np.float64, na_value=np.nan)
            counting = bool((np.diff(numbers) > 0).all()) and bool((numbers == np.floor(numbers)).all())
            unnamed = not plain_name(column).strip() or plain_name(column).startswith("unnamed")
            if counting or (unnamed and bool((numbers == np.floor(numbers)).all())):
                dropped.append(column)
    if dropped:
        note(f"{table}: leaving out {some([repr(str(c)) for c in dropped], 4)}, which is an index or empty")
    return frame.drop(columns=dropped) if dropped else frame


def _data_rows(frame: pd.DataFrame, date: str, table: str) -> pd.DataFrame:
    """The frame without blank rows, repeated headers, and totals or sources below the data."""
    dates = frame[date]
    left_out: dict[str, np.ndarray] = {}
    if bool(dates.isna().any()):
        undated = frame[dates.isna()]
        blank = np.zeros(len(frame), dtype=bool)
        blank[np.flatnonzero(dates.isna())] = (undated.isna() | (undated.astype(object) == "")).all(axis=1)
        left_out["blank row(s)"] = blank
    if not pd.api.types.is_numeric_dtype(dates.dtype) and dates.dtype.kind not in "mM":
        if not all(map(pd.api.types.is_numeric_dtype, frame.dtypes.drop(date))):  # a header makes all columns text
            left_out["repeated header(s)"] = np.asarray((dates == date).fillna(False), dtype=bool)
        left_out["line(s) below the data"] = _footer(frame, dates)
    keep = np.ones(len(frame), dtype=bool)
    for what, rows in left_out.items():
        if rows.any():
            first = int(np.argmax(rows))
            note(
                f"{table}: leaving out {int(rows.sum())} {what}, the first is row {first}", warning="blank" not in what
            )
            keep &= ~rows
    if keep.all():
        return frame
    if not keep.any():
        raise DataError(f"{table} has no rows of data (columns {list(frame.columns)}).")
    return frame[keep].reset_index(drop=True)


def _footer(frame: pd.DataFrame, dates: pd.Series) -> np.ndarray:
    """Rows at the end that contain a total or a source in place of a date."""
    footer = np.zeros(len(frame), dtype=bool)
    for row in range(len(frame) - 1, max(-1, len(frame) - 1 - FOOTER_ROWS), -1):
        if str(dates.iloc[row]).strip()[:1].isdigit():
            break
        cells = [str(value).strip().lower() for value in frame.iloc[row] if not pd.isna(value)]
        footer[row] = any(cell.startswith(FOOTERS) for cell in cells[:2]) and not is_date(dates.iloc[row])
        if not footer[row] and cells:
            break
    return footer


# ---------------------------------------------------------------- instruments
def instrument_names(values: pd.Series, table: str) -> np.ndarray:
    """Instrument of each row as text. Whole floats become integers: 600000.0 is "600000".

    Raises
    ------
    DataError
        A row has no instrument.
    """
    codes, unique = pd.factorize(values)
    texts = [str(u).strip() for u in unique]
    blank = np.array([*(text == "" for text in texts), True])  # the code of a missing value is -1
    if blank[codes].any():
        row = int(np.argmax(blank[codes]))
        raise DataError(f"{table}: row {row} has no instrument (column {values.name!r}).")
    if all(text.endswith(".0") and text[:-2].isdigit() for text in texts):
        texts = [text[:-2] for text in texts]
    return np.array(texts, dtype=object)[codes]


def adjusted_column(columns: dict[str, np.ndarray]) -> str | None:
    """Name of the column with the adjusted close."""
    return next((name for name in columns if role_name(name) in ADJUSTED), None)
