"""Reads the dates of a source: one format for all of its files, inferred from all of their values.

pandas infers the format of each call from the first value, and falls back to guessing value by value. Day and month are
then swapped in some files or rows. Here every format that fits the first values is tried on all values. If two formats
with different results remain, the source is refused.
"""

from __future__ import annotations

import datetime as dt
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from qfast.data.column_names import cell_text
from qfast.data.time_zones import ZonedTimes, in_zone, one_zone, split_named_zone, split_zones
from qfast.errors import DataError, shown
from qfast.read_options import NUMBER_DATES

__all__ = ["DateColumn", "DateReader", "Dates", "is_date", "parse_dates", "read_dates", "times_of_day"]

log = logging.getLogger("qfast.data")

EARLIEST, LATEST = pd.Timestamp("1800-01-01"), pd.Timestamp("2200-01-01")  # other years come from wrong formats
FIRST_GUESS = pd.Timestamp("1985-01-01")  # before it, seconds since 1970 and other numbers could be confused
ISO = "iso"
UNITS = {"unix_s": "s", "unix_ms": "ms", "unix_us": "us", "unix_ns": "ns"}
SAMPLES = 20  # values whose formats are tried; a title above the dates may fit none

NUMERIC = ("%d{s}%m{s}%Y", "%m{s}%d{s}%Y", "%d{s}%m{s}%y", "%m{s}%d{s}%y", "%y{s}%m{s}%d", "%Y{s}%m{s}%d")
MONTH_NAMES = ("%d{s}%b{s}%Y", "%d{s}%B{s}%Y", "%d{s}%b{s}%y", "%b{s}%d{s}%Y", "%B{s}%d{s}%Y", "%Y{s}%b{s}%d")
OTHER_TEXTS = (
    *(
        "%a %m/%d/%Y",
        "%a %d/%m/%Y",
        "%a %d-%b-%Y",
        "%b %d, %Y",
        "%B %d, %Y",
        "%d %b, %Y",
        "%d. %B %Y",
        "%a, %d %b %Y",
        "%a %d %b %Y",
        "%a %b %d %Y",
        "%a %b %d, %Y",
    ),
    *("%A, %B %d, %Y", "%A, %d %B %Y", "%d%b%Y", "%d%b%y", "%Y年%m月%d日", "%G-W%V-%u", "%GW%V%u", "%Y-%j"),
)
DIGITS = {
    5: ("%d%m%y", "%m%d%y"),
    6: ("%d%m%y", "%m%d%y", "%y%m%d"),
    7: ("%d%m%Y", "%m%d%Y", "%Y%j"),
    8: ("%Y%m%d", "%d%m%Y", "%m%d%Y"),
    12: ("%Y%m%d%H%M",),
    14: ("%Y%m%d%H%M%S",),
}
WIDTHS = {"%Y%m%d": 8, "%d%m%Y": 8, "%m%d%Y": 8, "%y%m%d": 6, "%d%m%y": 6, "%m%d%y": 6}
TIME = r"^(?P<date>.*?)[ T,]\s*(?P<time>\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?:\s*[AaPp]\.?[Mm]\.?)?)$"


class DateColumn(NamedTuple):
    """The date column of one table, and the name of the table for messages."""

    values: pd.Series
    table: str


class Dates(NamedTuple):
    """The dates of a source.

    Attributes
    ----------
    columns : list of DatetimeIndex
        One timestamp for each row of each column, all with the same time zone or all without.
    format : str
        How they were read, for the log.
    """

    columns: list[pd.DatetimeIndex]
    format: str


class _Unique:
    """Unique values of a date column as text."""

    def __init__(self, texts: pd.Index) -> None:
        self.texts = texts

    @cached_property
    def parts(self) -> tuple[pd.Index, pd.TimedeltaIndex | None, np.ndarray | None]:
        """Dates as text, times of day if any text has one, and UTC offsets if any text has one."""
        if not self.texts.str.contains("[:Zz]").any():
            return self.texts, None, None
        plain, offsets = split_zones(self.texts)
        parts = plain.str.extract(TIME)
        dates = pd.Index(parts["date"].str.strip().where(parts["time"].notna(), plain.to_series(index=parts.index)))
        return (
            pd.Index(dates),
            pd.TimedeltaIndex(times_of_day(pd.Index(parts["time"])).fillna(pd.Timedelta(0))),
            offsets,
        )


@dataclass(frozen=True)
class _Texts:
    """The unique values of a date column, and the number of the unique value of each row."""

    column: DateColumn
    codes: np.ndarray
    unique: _Unique
    zone: str | None = None

    @property
    def texts(self) -> pd.Index:
        return self.unique.texts

    def row_of(self, position: int) -> int:
        return int(np.argmax(self.codes == position))

    def zoned(self, times: ZonedTimes) -> ZonedTimes:
        """The times in the zone whose name follows each of them."""
        if self.zone is None or times.offsets is not None or times.times.tz is not None:
            return times
        return ZonedTimes(in_zone(times, self.zone, is_utc=False, name=f"column {self.column.values.name!r}"), None)


@dataclass
class _Reading:
    """A format and the times of the columns that it has parsed."""

    name: str
    parsed: list[ZonedTimes]
    failure: tuple[_Texts, int, int] | None = None  # column, first value that does not fit, number of such values

    def walls(self) -> Iterator[pd.DatetimeIndex]:
        return (times.wall for times in self.parsed)

    def plausible(self) -> bool:
        """False if the dates are centuries away, or more than a year in the future, where no prices exist."""
        latest = pd.Timestamp.now() + pd.Timedelta(days=366)
        earliest = FIRST_GUESS if self.name in NUMBER_DATES else pd.Timestamp(year=1900, month=1, day=1)
        return all(bool((wall >= earliest).all() and (wall <= latest).all()) for wall in self.walls())


def parse_dates(values: pd.Series, name: str, date_format: str | None = None) -> pd.DatetimeIndex:
    """The timestamps of one column; see `read_dates`.

    Parameters
    ----------
    values : Series
        Timestamps, dates, periods, text, or numbers such as 20240131.
    name : str
        The file or frame, for messages.
    date_format : str, optional
        See `qfast.data.ReadOptions`.

    Raises
    ------
    DataError
        As for `read_dates`.

    Examples
    --------
    >>> parse_dates(pd.Series(["13/01/2024", "02/01/2024"]), "the frame")[1]
    Timestamp('2024-01-02 00:00:00')
    """
    return read_dates([DateColumn(values, name)], date_format).columns[0]


def read_dates(
    columns: Iterable[DateColumn],
    date_format: str | None = None,
    whole_days: bool = False,
    time_zone: str | None = None,
) -> Dates:
    """Read the dates of a source.

    Parameters
    ----------
    columns : iterable of DateColumn
        The date column of each table of the source.
    date_format : str, optional
        See `qfast.data.ReadOptions`. Default: inferred from all values of all columns.
    whole_days : bool
        True returns local times without a time zone, whose dates the caller uses.
    time_zone : str, optional
        Zone of the result; see `qfast.data.ReadOptions`.

    Returns
    -------
    Dates

    Raises
    ------
    DataError
        A date is missing or does not fit the format of the others, several formats fit all values, or the times are in
        several time zones. The message contains the table, the column, the row and the value.

    Examples
    --------
    >>> columns = [DateColumn(pd.Series(["2/1/20"]), "A.csv"), DateColumn(pd.Series(["13/1/20"]), "B.csv")]
    >>> dates = read_dates(columns)
    >>> dates.format, dates.columns[0][0]
    ('%d/%m/%y', Timestamp('2020-01-02 00:00:00'))
    """
    reader = DateReader(date_format, time_zone)
    for column in columns:
        reader.add(column)
    return reader.finish(whole_days)


class DateReader:
    """Reads the date columns of a source one after the other, so their text need not be in memory at the same time.

    Parameters
    ----------
    date_format, time_zone : str, optional
        As in `read_dates`.
    """

    def __init__(self, date_format: str | None = None, time_zone: str | None = None) -> None:
        self._date_format = date_format
        self._time_zone = time_zone
        self._alive: list[_Reading] | None = None  # the formats that fit all values so far
        self._texts: list[_Texts] = []  # the columns so far; only the first one once a single format is left
        self._ready: list[ZonedTimes | None] = []  # of each column; None: in the readings
        self._names: list[str] = []

    def add(self, column: DateColumn) -> None:
        """Read the next column. Raises a DataError as `read_dates` does."""
        _require_values(column)
        self._names.append(f"column {column.values.name!r} of {column.table}")
        stamps = _timestamps(column.values)
        self._ready.append(None if stamps is None else ZonedTimes(stamps, None))
        if stamps is not None:
            return
        texts = _texts(column)
        if self._alive is None:
            self._alive = [_Reading(name, []) for name in self._formats(texts)]
        tried = self._alive
        for reading in tried:
            times = _parse(reading.name, texts.unique)
            bad = np.flatnonzero(times.wall.isna())
            if len(bad):
                reading.failure = texts, int(bad[0]), len(bad)
            else:
                reading.parsed.append(texts.zoned(times).take(texts.codes))
        self._alive = [reading for reading in tried if reading.failure is None]
        if not self._alive:
            raise _no_format(tried, self._date_format)
        self._texts = [*self._texts, texts] if len(self._alive) > 1 or not self._texts else self._texts[:1]

    def _formats(self, texts: _Texts) -> list[str]:
        names = [self._date_format] if self._date_format is not None else _candidates(texts.texts[:SAMPLES])
        if not names:
            raise DataError(
                f"{texts.column.table}: row 0 is not a date: {texts.texts[0]!r} in column "
                f"{texts.column.values.name!r} (row 0 is the first row below the header). "
                + _remedy_for(str(texts.texts[0]))
            )
        return names

    def finish(self, whole_days: bool = False) -> Dates:
        """The dates of all columns. Raises a DataError if several formats fit, or for several time zones."""
        reading = self._reading() if self._alive is not None else _Reading("timestamps", [])
        parsed = iter(reading.parsed)
        times = [next(parsed) if ready is None else ready for ready in self._ready]
        name = "ISO 8601" if reading.name == ISO else reading.name
        if self._time_zone is not None:
            is_utc = [ready is None and reading.name in UNITS for ready in self._ready]
            zoned = [
                in_zone(column, self._time_zone, is_utc=utc, name=label)
                for column, utc, label in zip(times, is_utc, self._names, strict=True)
            ]
            return Dates([t.tz_localize(None) for t in zoned] if whole_days else zoned, f"{name}, {self._time_zone}")
        return Dates(one_zone(times, self._names, whole_days), name)

    def _reading(self) -> _Reading:
        assert self._alive
        if self._date_format is not None:
            return self._alive[0]
        plausible = [reading for reading in self._alive if reading.plausible()]
        alive = _different(plausible or self._alive)
        if len(alive) > 1 or (not plausible and "%y" in alive[0].name):
            raise _ambiguous(alive, self._texts)
        return alive[0]


def _remedy_for(text: str) -> str:
    """What to do with a text that fits no format."""
    abbreviation = re.search(r"\d\s*([A-Z]{2,5})$", text)
    if abbreviation is not None:
        zone = abbreviation[1]
        return (
            f"{zone!r} is not a UTC offset. Remedy: --date-format with the letters, for example '%Y-%m-%d %H:%M:%S "
            f"{zone}', which reads local times; --time-zone names their zone."
        )
    if re.search(r"[^\W\d_]{3}", text) is not None:
        return "Remedy: --date-format; names of months and days must be English."
    return "Remedy: --date-format."


def _require_values(column: DateColumn) -> None:
    missing = column.values.isna().to_numpy()
    if missing.any():
        row = int(np.argmax(missing))
        raise DataError(f"{column.table}: row {row} has no date (column {column.values.name!r}).")


def _timestamps(values: pd.Series) -> pd.DatetimeIndex | None:
    """The timestamps of a column that contains timestamps, dates or periods; None for text and numbers."""
    kind = values.dtype
    if isinstance(kind, pd.PeriodDtype):
        return pd.DatetimeIndex(pd.PeriodIndex(values).to_timestamp())
    if isinstance(kind, pd.DatetimeTZDtype) or getattr(kind, "kind", "") == "M":
        return pd.DatetimeIndex(values)
    if (
        isinstance(kind, pd.ArrowDtype)
        and kind.kind in "mMO"
        and pd.api.types.infer_dtype(values)
        in (
            "datetime64",
            "datetime",
            "date",
        )
    ):
        return pd.DatetimeIndex(pd.to_datetime(values.astype(object)))
    if kind == np.dtype(object) and len(values) and all(isinstance(value, dt.date) for value in values):
        zones = {str(value.tzinfo) if isinstance(value, dt.datetime) else "None" for value in values}
        return pd.DatetimeIndex(pd.to_datetime(values)) if len(zones) == 1 else None
    return None


def _texts(column: DateColumn) -> _Texts:
    codes, unique = pd.factorize(column.values)
    if pd.api.types.is_numeric_dtype(column.values.dtype):
        numbers = np.asarray(unique, dtype=np.float64)
        whole = bool((numbers == np.floor(numbers)).all())
        texts = pd.Index(np.asarray(unique).astype(np.int64)).astype(str) if whole else pd.Index(numbers).astype(str)
    elif isinstance(unique, pd.Index) and pd.api.types.is_string_dtype(unique.dtype) and unique.dtype != object:
        texts = unique.str.strip()
    else:
        texts = pd.Index([cell_text(value) for value in unique], dtype=object)
    if len(texts) and texts[0][:1] in "='":
        texts = pd.Index([cell_text(text) for text in texts], dtype=object)
    if len(texts) and re.fullmatch(r"\d+\.0+", texts[0]):  # whole numbers that were stored as floats
        texts = texts.str.replace(r"\.0+$", "", regex=True)
    plain, zone = split_named_zone(texts)
    return _Texts(column, codes, _Unique(plain), zone)


# ---------------------------------------------------------------- choosing the format
def _candidates(samples: Iterable[str]) -> list[str]:
    """Names of the formats that fit the first sample for which there is any."""
    for text in samples:
        sample = _Unique(pd.Index([text], dtype=object))
        names = []
        for name in _possible_formats(text):
            if not _parse(name, sample).wall.isna()[0]:
                if name == ISO:
                    return [ISO]
                names.append(name)
        if names:
            return names
    return []


def _possible_formats(text: str) -> Iterator[str]:
    if re.fullmatch(r"\d+(\.\d+)?", text):
        digits = len(text.partition(".")[0])
        yield from DIGITS.get(digits, ())
        yield from (name for name in NUMBER_DATES if _is_recent(float(text), name))
        return
    yield ISO
    separator = re.search(r"[^\w]", text.strip())
    if separator is not None:
        for name in (*NUMERIC, *MONTH_NAMES):
            yield name.replace("{s}", separator[0])
    yield from OTHER_TEXTS


def _is_recent(number: float, name: str) -> bool:
    """True if the number is a date since FIRST_GUESS."""
    dates = _parse_number(name, pd.Index([number]))
    return bool(((dates >= FIRST_GUESS) & (dates < pd.Timestamp(year=2100, month=1, day=1)))[0])


def _different(readings: Sequence[_Reading]) -> list[_Reading]:
    """The readings without those whose dates are those of an earlier one."""
    kept: list[_Reading] = []
    for reading in readings:
        if not any(all(map(_equal, reading.walls(), other.walls())) for other in kept):
            kept.append(reading)
    return kept


def _equal(one: pd.DatetimeIndex, other: pd.DatetimeIndex) -> bool:
    return bool((one == other).all())


def _ambiguous(readings: Sequence[_Reading], columns: Sequence[_Texts]) -> DataError:
    first, last = list(readings[0].walls()), list(readings[-1].walls())
    number = next((n for n in range(len(first)) if not _equal(first[n], last[n])), 0)
    row = int(np.argmax(first[number] != last[number]))
    examples = "; ".join(_described(reading, number, row) for reading in readings)
    count = f"{len(readings)} formats" if len(readings) > 1 else "one format only, with implausible years"
    texts = columns[number]
    return DataError(
        f"{texts.column.table}: the dates of column {texts.column.values.name!r} fit {count}. "
        f"{texts.texts[texts.codes[row]]!r} in row {row}: {examples}. Remedy: --date-format "
        f"{' or '.join(repr(reading.name) for reading in readings)}."
    )


def _described(reading: _Reading, number: int, row: int) -> str:
    """How a format reads one value, and the dates that result from all values."""
    walls = list(reading.walls())
    days = pd.DatetimeIndex(np.unique(np.concatenate([wall.normalize().to_numpy() for wall in walls])))
    weekends = int((days.day_of_week >= 5).sum())
    return (
        f"{reading.name!r} reads {walls[number][row]:%Y-%m-%d} (all: {days[0]:%Y-%m-%d} to {days[-1]:%Y-%m-%d}, "
        f"{weekends} of {len(days)} dates on weekends)"
    )


def _no_format(readings: Sequence[_Reading], date_format: str | None) -> DataError:
    """The error for a value that does not fit the format of most others."""

    def misfits(reading: _Reading) -> int:
        assert reading.failure is not None
        return reading.failure[2]

    best = min(readings, key=misfits)
    assert best.failure is not None
    column, position, count = best.failure
    text, name = column.texts[position], column.column.values.name
    other = [] if date_format is not None else _candidates([text])
    where = f"{column.column.table}: row {column.row_of(position)}"
    if other:
        return DataError(
            f"{where} does not have the format of the dates before it: {text!r} in column {name!r} fits "
            f"{' or '.join(map(_shown_format, other))}, but the others fit {_shown_format(best.name)}. All dates of a "
            "source must have one format."
        )
    accepted = f"the format {_shown_format(best.name)}" if date_format is None else f"--date-format {date_format!r}"
    rest = f" and {count - 1} more values do not fit" if count > 1 else " does not fit"
    return DataError(
        f"{where} is not a date: {shown(text)} in column {name!r}{rest} {accepted} (row 0 is the first row below the "
        "header)."
    )


def _shown_format(name: str) -> str:
    return "ISO 8601 (2020-12-31)" if name == ISO else repr(name)


# ---------------------------------------------------------------- parsing
def _parse(name: str, unique: _Unique) -> ZonedTimes:
    """The unique values under one format; NaT where they do not fit."""
    if name in NUMBER_DATES:
        times = ZonedTimes(_parse_number(name, unique.texts), None)
    elif name == ISO:
        # Shorter texts are years, months, or dates with a year of two digits, which are not ISO 8601.
        long_enough = np.asarray(unique.texts.str.len() >= 8)
        times = _parse_whole("ISO8601", unique.texts if long_enough.all() else unique.texts.where(long_enough, ""))
        if times.wall.isna().any():
            times = _parse_parts("ISO8601", unique)
    elif re.search(r"%[HIMSpz]", name):
        times = _parse_whole(name, unique.texts)
    else:
        times = _parse_whole(name, _padded(name, unique.texts))
        if times.wall.isna().any():
            times = _parse_parts(name, unique)
    wall = times.wall
    if len(wall) == 0 or (wall.min() >= EARLIEST and wall.max() < LATEST):
        return times
    inside = np.asarray((wall >= EARLIEST) & (wall < LATEST))
    return replace(times, times=pd.DatetimeIndex(times.times.where(inside)))


def _to_datetime(texts: pd.Index, name: str) -> pd.DatetimeIndex:
    try:
        return pd.DatetimeIndex(pd.to_datetime(texts, format=name, errors="coerce"))
    except (ValueError, OverflowError):  # several UTC offsets
        return pd.DatetimeIndex([pd.NaT] * len(texts))


def _parse_whole(name: str, texts: pd.Index) -> ZonedTimes:
    times = _to_datetime(texts, name)
    if "%z" not in name or not times.isna().any():
        return ZonedTimes(times, None)
    plain, offsets = split_zones(texts)
    return ZonedTimes(_to_datetime(plain, name.replace("%z", "").strip()), offsets)


def _parse_parts(name: str, unique: _Unique) -> ZonedTimes:
    """Dates that are followed by a time of day or a UTC offset."""
    dates, clock, offsets = unique.parts
    times = _to_datetime(_padded(name, dates), name)
    return ZonedTimes(times if clock is None else pd.DatetimeIndex(times + clock), offsets)


def _padded(name: str, texts: pd.Index) -> pd.Index:
    """Restore the leading zero that a number has lost. Other lengths do not fit: 2024111 has two meanings."""
    width = WIDTHS.get(name)
    if width is None:
        return texts
    least = width if name.startswith("%Y") else width - 1
    return texts.where(np.asarray(texts.str.len() >= least), "").str.zfill(width)


def _parse_number(name: str, texts: pd.Index) -> pd.DatetimeIndex:
    values: Any = texts
    numbers: Any = pd.to_numeric(values, errors="coerce")
    if name == "excel":
        days = np.asarray(numbers, dtype=np.float64)
        days = np.where((days >= 1) & (days < 110_000), days, np.nan)
        # Excel stores times as fractions of a day, whose rounding errors are below a second.
        return pd.DatetimeIndex(pd.to_datetime(days, unit="D", origin="1899-12-30")).round("s")
    unit: Any = UNITS[name]
    return pd.DatetimeIndex(pd.to_datetime(numbers, unit=unit, errors="coerce"))


def times_of_day(texts: pd.Index) -> pd.TimedeltaIndex:
    """Times of day such as 16:00, 4:00:00 PM, 930 and 093000; NaT where the text is none.

    Examples
    --------
    >>> times_of_day(pd.Index(["16:00", "9:30 AM", "150000"])).astype(str).tolist()
    ['0 days 16:00:00', '0 days 09:30:00', '0 days 15:00:00']
    """
    cleaned = texts.astype(object).astype(str).str.strip().str.upper().str.replace(".M", "M").str.replace(" ", "")
    digits = np.asarray(cleaned.str.fullmatch(r"\d{1,6}"), dtype=bool)
    longer = np.asarray(cleaned.str.len() > 4)
    padded = pd.Index(np.where(longer, cleaned.str.zfill(6), cleaned.str.zfill(4) + "00")).astype(object)
    clock = pd.Index(np.where(digits, padded, cleaned)).astype(object)
    result = pd.DatetimeIndex([pd.NaT] * len(clock))
    for name in ("%H:%M:%S", "%H:%M", "%H:%M:%S.%f", "%I:%M%p", "%I:%M:%S%p", "%H%M%S"):
        rest = result.isna()
        if not rest.any():
            break
        parsed = _to_datetime(clock.where(rest, ""), name)
        result = pd.DatetimeIndex(result.where(~rest, parsed))
    return pd.TimedeltaIndex(result - result.normalize())


def is_date(text: Any) -> bool:
    """True if the text is a date or time in one of the known formats."""
    return bool(_candidates([str(text).strip()]))
