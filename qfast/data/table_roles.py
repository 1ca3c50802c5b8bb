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
    DATE_PARTS,
    INSTRUMENT_NAMES,
    TIME_NAMES,
    cell_text,
    find_column,
    is_field,
    is_index_name,
    plain_name,
    role_name,
)
from qfast.data.date_formats import DateColumn, is_date, times_of_day
from qfast.data.source_notes import note
from qfast.errors import DataError, nearest, shown, some, suggest
from qfast.read_options import ReadOptions

__all__ = ["Keys", "adjusted_column", "find_keys", "instrument_names"]

FOOTERS = (
    *("total", "sum", "average", "mean", "source", "note", "copyright", "data from", "data as of", "downloaded"),
    *("end of", "合计", "总计", "数据来源"),
)
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


def find_keys(frame: pd.DataFrame, table: str, options: ReadOptions, stem: str | None = None) -> Keys:
    """Find the key columns of a frame, and remove everything that is not data.

    Parameters
    ----------
    frame : DataFrame
        Not modified.
    table : str
        Name of the file or frame, for messages.
    options : ReadOptions
    stem : str, optional
        Name of a file of a folder. It is the instrument, or the date, that the table has no column for.

    Raises
    ------
    DataError
        There is no date or instrument column, or it occurs twice, or the table has one row per field.
    """
    frame, levels = _flat(frame, table)
    if len(frame) == 0:
        raise DataError(f"{table} has no rows (columns {list(frame.columns)}).")
    frame, date = _date_column(frame, levels, table, stem)
    instrument = _instrument_column(frame, levels, table, options, date, stem)
    _require_dates(frame, date, instrument, table)
    _require_one_row_per_date(frame, {date, instrument}, table)
    _report_other_codes(frame, instrument, table)
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
        dated = isinstance(first, (pd.DatetimeIndex, pd.PeriodIndex)) or (len(first) > 0 and is_date(first[0]))
        names = ["datetime", "instrument"] if dated else ["instrument", "datetime"]
        if frame.index.nlevels == 2:
            frame = frame.set_axis(frame.index.set_names(names))
    elif frame.index.nlevels == 2 and None in names:
        names = _with_missing_name(names)
        frame = frame.set_axis(frame.index.set_names(names))
    levels = [str(name) for name in names if name is not None]
    if levels:
        frame = _reset_index(frame, table)
    return frame.set_axis([str(c) for c in frame.columns], axis=1), levels


def _with_missing_name(names: list[Hashable]) -> list[Hashable]:
    """The names of two index levels, of which the only missing one is the instrument or the date."""
    known = next(name for name in names if name is not None)
    if role_name(known) in DATE_NAMES:
        return ["instrument" if name is None else name for name in names]
    return ["datetime" if name is None and role_name(known) in INSTRUMENT_NAMES else name for name in names]


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
    counts = [sum(map(is_field, frame.columns.get_level_values(level).unique())) for level in (0, 1)]
    if max(counts) == 0:
        return frame.set_axis([str(c[-1]) for c in frame.columns], axis=1)
    level = 1 if counts[0] >= counts[1] else 0
    instruments = [str(name) for name in frame.columns.get_level_values(level).unique()]
    note(f"{table}: the columns have two levels, fields and {len(instruments)} instrument(s): {some(instruments, 5)}")
    index_name = frame.index.names[0]
    long = frame.stack(level=level, future_stack=True).dropna(how="all")
    assert isinstance(long, pd.DataFrame)
    return long.set_axis(long.index.set_names(["datetime" if index_name is None else index_name, "instrument"]))


def _date_column(frame: pd.DataFrame, levels: list[str], table: str, stem: str | None) -> tuple[pd.DataFrame, str]:
    """The frame and its date column, which may result from an index, from several columns, or from the file name."""
    date = find_column(levels, DATE_NAMES)
    if date is not None:
        return frame, date
    columns = [str(c) for c in frame.columns]
    parts = [find_column(columns, names) for names in DATE_PARTS]
    date = find_column([c for c in columns if c not in parts], DATE_NAMES)
    if date is None and None not in parts:
        year, month, day = (frame[part].map(_whole_number_text) for part in parts)
        note(f"{table}: dates from the columns {', '.join(repr(part) for part in parts)}")
        dated = frame.drop(columns=parts).assign(date=year + "-" + month.str.zfill(2) + "-" + day.str.zfill(2))
        return dated, "date"
    date = date or find_column(columns, DATE_NAMES)
    if date is not None:
        return frame, date
    first = columns[0] if columns else ""
    if isinstance(frame.index, pd.DatetimeIndex) or (frame.index.dtype.kind not in "iuf" and is_date(frame.index[0])):
        return frame.assign(datetime=frame.index), "datetime"
    if is_index_name(first) and frame[first].dtype.kind not in "iuf" and is_date(frame[first].iloc[0]):
        note(f"{table}: using the dates of the first column, which has no name")
        return frame, first
    if stem is not None and is_date(stem):
        note(f"{table}: the date of all rows is the file name")
        return frame.assign(date=stem), "date"
    raise DataError(_no_column("datetime", DATE_NAMES, frame, table) + _date_hint(frame))


def _whole_number_text(value: object) -> str:
    return cell_text(value).removesuffix(".0")


def _no_column(what: str, accepted: tuple[str, ...], frame: pd.DataFrame, table: str) -> str:
    columns = list(frame.columns)
    pairs = [(column, nearest(role_name(column), accepted, cutoff=0.8)) for column in columns]
    near = next((f" Did you mean {name!r} by {column!r}?" for column, name in pairs if name is not None), "")
    return (
        f"{table} has no {what} column; its columns are {columns}, accepted names are {list(accepted[:16])} and others "
        f"(upper or lower case).{near}"
    )


def _date_hint(frame: pd.DataFrame) -> str:
    """What to do with a table without a date column."""
    if len(frame.columns) == 1:
        return " Remedy: --separator, if the file has another one than the comma."
    for position, column in enumerate(frame.columns):
        values = frame.iloc[:, position]
        if values.dtype.kind == "M" or (values.dtype.kind not in "iufb" and is_date(values.iloc[0])):
            return f" Remedy: rename {str(column)!r} to 'date', because it contains dates."
    return ""


def _instrument_column(
    frame: pd.DataFrame, levels: list[str], table: str, options: ReadOptions, date: str, stem: str | None
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
    if column is not None or stem is not None:
        return column
    column = find_column(columns, COMPANY_NAMES)
    if column is None:
        raise DataError(_no_column("instrument", INSTRUMENT_NAMES, frame, table) + _instrument_hint(frame, date))
    note(
        f"{table}: there is no column with symbols, so the instruments are the names in column {column!r}", warning=True
    )
    return column


def _instrument_hint(frame: pd.DataFrame, date: str) -> str:
    """What to do with a table without an instrument column."""
    others = [str(c) for c in frame.columns if c != date and pd.api.types.is_numeric_dtype(frame[c].dtype)]
    if frame[date].is_unique and any(map(is_field, others)):
        return (
            " It has one row per date. Remedy: if it has one instrument, add a column with its symbol, "
            "frame.assign(symbol='AAPL'), or put the file into a folder under the instrument's name; otherwise "
            "--instrument-column NAME."
        )
    if frame[date].is_unique and len(others) > 1 and len(others) >= frame.shape[1] - 2:
        return (
            f" The columns may be instruments ({some(others, 3)}). Remedy: one row per instrument and date, "
            f"frame.set_index({date!r}).stack().rename_axis(['datetime', 'instrument']).rename('close')."
        )
    return " Remedy: --instrument-column NAME, or a folder of files that are named after instruments."


def _require_dates(frame: pd.DataFrame, date: str, instrument: str | None, table: str) -> None:
    """Refuse keys whose names are swapped."""
    if instrument is None or any(isinstance(frame[key], pd.DataFrame) for key in (date, instrument)):
        return
    dated = [pd.api.types.is_datetime64_any_dtype(frame[key].dtype) for key in (date, instrument)]
    if dated == [False, True]:
        raise DataError(
            f"{table}: the names of the keys are swapped: {instrument!r} contains dates, and {date!r} contains "
            f"{shown(frame[date].iloc[0])}. Remedy: rename them, for example "
            "frame.rename_axis(['instrument', 'datetime'])."
        )


def _require_one_row_per_date(frame: pd.DataFrame, keys: set[str | None], table: str) -> None:
    """Refuse tables with the name of a field in each row: date, symbol, variable, value."""
    for column in frame.columns:
        if column in keys or isinstance(frame[column], pd.DataFrame) or pd.api.types.is_numeric_dtype(frame[column]):
            continue
        names = list(dict.fromkeys(map(str, frame[column].dropna().iloc[:: max(1, len(frame) // 50)])))
        if len(names) > 1 and all(map(is_field, names)):
            raise DataError(
                f"{table} has one row per field: column {column!r} contains {some(names, 4)}. Remedy: one column per "
                f"field, frame.pivot(index=[...], columns={column!r}, values=...)."
            )


def _report_other_codes(frame: pd.DataFrame, instrument: str | None, table: str) -> None:
    """Report another column with codes that separates the rows into another number of instruments."""
    names = list(frame.columns)
    others = [c for c in names if c != instrument and role_name(c) in INSTRUMENT_NAMES and names.count(c) == 1]
    if instrument is None or names.count(instrument) > 1 or not others:
        return
    count = frame[instrument].nunique()
    for column in others:
        other = frame[column].nunique()
        if other not in (0, count):
            note(
                f"{table}: the instruments are those of column {instrument!r} ({count}), but column {column!r} has "
                f"{other}. --instrument-column {column!r} uses it",
                warning=True,
            )


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
        cells = [str(value).strip().lower().lstrip("#*(/") for value in frame.iloc[row] if not pd.isna(value)]
        cells = [cell for cell in cells if cell]
        is_footer = len(cells) == 1 or any(cell.startswith(FOOTERS) for cell in cells[:2])
        footer[row] = is_footer and not is_date(dates.iloc[row])
        if not footer[row] and cells:
            break
    return footer


# ---------------------------------------------------------------- instruments
def instrument_names(values: pd.Series, table: str) -> np.ndarray:
    """Instrument of each row as text. Whole floats become integers: 600000.0 is "600000".

    Raises
    ------
    DataError
        A row has no instrument, or something other than text or a number.
    """
    try:
        codes, unique = pd.factorize(values)
    except TypeError:  # lists cannot be hashed
        hashable = values.map(lambda value: isinstance(value, Hashable))
        row = int(np.argmin(hashable.to_numpy()))
        raise DataError(
            f"{table}: row {row} of column {values.name!r} must be text or a number, got {shown(values.iloc[row])}."
        ) from None
    for position, name in enumerate(unique):
        if isinstance(name, (tuple, list, dict, set, frozenset)):
            raise DataError(
                f"{table}: row {int(np.argmax(codes == position))} of column {values.name!r} must be text or a number, "
                f"got {shown(name)}."
            )
    texts = [cell_text(u) for u in unique]
    blank = np.array([*(text == "" for text in texts), True])  # the code of a missing value is -1
    if blank[codes].any():
        row = int(np.argmax(blank[codes]))
        raise DataError(
            f"{table}: row {row} has no instrument (column {values.name!r}). Row 0 is the first row below the header."
        )
    if all(text.endswith(".0") and text[:-2].isdigit() for text in texts):
        texts = [text[:-2] for text in texts]
    return np.array(texts, dtype=object)[codes]


def adjusted_column(columns: dict[str, np.ndarray]) -> str | None:
    """Name of the column with the adjusted close."""
    return next((name for name in columns if role_name(name) in ADJUSTED), None)
