"""One time zone for all times of a source."""

from __future__ import annotations

import datetime as dt
import logging
import re
import zoneinfo
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from qfast.errors import DataError, some

__all__ = ["ZonedTimes", "in_zone", "one_zone", "split_named_zone", "split_zones"]

log = logging.getLogger("qfast.data")

# A UTC offset without a colon follows a time only, because "02-01-2020" ends in a year.
OFFSET = re.compile(
    r"(?P<wall>.*:\d{2}(?:[.,]\d+)?(?:\s?[AP]M)?|[^:]*\d)\s?(?P<offset>Z|UTC|GMT|[+-]\d{2}:\d{2})"
    r"|(?P<timed>.*:\d{2}(?:[.,]\d+)?)\s?(?P<short>[+-]\d{2}(?:\d{2})?)",
    re.IGNORECASE,
)
NAMED_ZONE = re.compile(r"(?P<time>.*\d.*?)(?:\s+(?P<zone>[A-Za-z]+(?:/[A-Za-z_+-]+)+)|\s*\[(?P<bracket>[\w/+-]+)\])")


@dataclass(frozen=True)
class ZonedTimes:
    """Times that may have different UTC offsets.

    Attributes
    ----------
    times : DatetimeIndex
        With a time zone if all of them have the same one. Otherwise local times without a zone.
    offsets : ndarray or None
        Minutes, float64: the UTC offset of each local time, NaN where it has none. None: `times` is complete.
    """

    times: pd.DatetimeIndex
    offsets: np.ndarray | None

    @property
    def wall(self) -> pd.DatetimeIndex:
        """Local times without a zone."""
        return self.times if self.times.tz is None else self.times.tz_localize(None)

    def take(self, positions: np.ndarray) -> ZonedTimes:
        """The times at `positions`."""
        return ZonedTimes(self.times[positions], None if self.offsets is None else self.offsets[positions])

    def zone(self) -> str:
        """Name of the zone for messages."""
        if self.offsets is not None:
            return some([_offset_text(minutes) for minutes in np.unique(self.offsets)], 4)
        return "none" if self.times.tz is None else str(self.times.tz)

    def minutes(self) -> np.ndarray:
        """UTC offset of each time in minutes, float64; NaN where it has none."""
        if self.offsets is not None:
            return self.offsets
        if self.times.tz is None:
            return np.full(len(self.times), np.nan)
        return np.asarray((self.wall - self.times.tz_convert("UTC").tz_localize(None)) / pd.Timedelta(minutes=1))


def split_zones(texts: pd.Index) -> tuple[pd.Index, np.ndarray | None]:
    """Texts without their UTC offsets, and the offsets in minutes (NaN: none); None if no text has one.

    Examples
    --------
    >>> split_zones(pd.Index(["2020-01-02+05:30", "2020-01-02"]))[1].tolist()
    [330.0, nan]
    """
    walls, offsets = [], np.full(len(texts), np.nan)
    for position, text in enumerate(texts):
        match = OFFSET.fullmatch(text)
        if match is None:
            walls.append(text)
            continue
        offset = match["offset"] or match["short"]
        walls.append(match["wall"] or match["timed"])
        sign = -1 if offset[0] == "-" else 1
        digits = re.sub(r"\D", "", offset).ljust(4, "0")
        offsets[position] = sign * (60 * int(digits[:2]) + int(digits[2:]))
    return pd.Index(walls, dtype=object), None if np.isnan(offsets).all() else offsets


def split_named_zone(texts: pd.Index) -> tuple[pd.Index, str | None]:
    """Texts without the name of the zone that follows each of them, and this zone; None if they do not have one.

    Examples
    --------
    >>> split_named_zone(pd.Index(["2020-01-02 16:00 America/New_York"]))
    (Index(['2020-01-02 16:00'], dtype='object'), 'America/New_York')
    """
    if not len(texts) or NAMED_ZONE.fullmatch(texts[0]) is None:
        return texts, None
    matches = [NAMED_ZONE.fullmatch(text) for text in texts]
    if any(match is None for match in matches):
        return texts, None
    zones = {match["zone"] or match["bracket"] for match in matches if match is not None}
    zone = zones.pop()
    if zones:
        return texts, None
    try:
        zoneinfo.ZoneInfo(zone)
    except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
        return texts, None
    return pd.Index([match["time"] for match in matches if match is not None], dtype=object), zone


def in_zone(times: ZonedTimes, zone: str, *, is_utc: bool, name: str) -> pd.DatetimeIndex:
    """Times converted to a zone. Times without a UTC offset are local times of it, or UTC.

    Parameters
    ----------
    times : ZonedTimes
    zone : str
        Name of the zone.
    is_utc : bool
        Whether times without an offset are UTC, as seconds since 1970 are.
    name : str
        Name of the column, for messages.

    Raises
    ------
    DataError
        A local time occurs twice or never, because clocks change.

    Examples
    --------
    >>> midnight = ZonedTimes(pd.DatetimeIndex(["2020-01-01 16:00"]), None)
    >>> in_zone(midnight, "Asia/Shanghai", is_utc=True, name="date")[0]
    Timestamp('2020-01-02 00:00:00+0800', tz='Asia/Shanghai')
    """
    if times.times.tz is not None:
        return times.times.tz_convert(zone)
    offsets = times.minutes()
    if is_utc:
        offsets = np.zeros(len(offsets))
    has_offset = ~np.isnan(offsets)
    try:
        result = pd.DatetimeIndex(times.wall.where(~has_offset)).tz_localize(zone).tz_convert("UTC")
    except ValueError as error:  # also the errors about ambiguous and nonexistent times
        raise DataError(f"--time-zone {zone}: a local time of {name} is not unique: {error}.") from None
    if has_offset.any():
        utc = (times.wall - pd.to_timedelta(np.nan_to_num(offsets), unit="m")).tz_localize("UTC")
        result = pd.DatetimeIndex(result.where(~has_offset, utc))
    return result.tz_convert(zone)


def one_zone(columns: Sequence[ZonedTimes], names: Sequence[str], whole_days: bool) -> list[pd.DatetimeIndex]:
    """The times of all columns in one zone, or all without a zone.

    Columns with one zone stay as they are. Different offsets are accepted if all local times are midnight, which become
    dates without a zone, or if a zone with daylight saving time explains them, in which case the result is in UTC.

    Parameters
    ----------
    columns : sequence of ZonedTimes
    names : sequence of str
        Names of the columns, for messages.
    whole_days : bool
        True returns local times without a zone, whose dates the caller uses.

    Raises
    ------
    DataError
        The times are in several zones, or some have a zone and others not.
    """
    if whole_days:
        return [column.wall for column in columns]
    if all(column.offsets is None for column in columns) and len({str(column.times.tz) for column in columns}) == 1:
        return [column.times for column in columns]
    minutes = [column.minutes() for column in columns]
    distinct = np.unique(np.concatenate(minutes))
    if len(distinct) == 1 and not np.isnan(distinct[0]):
        return _with_offset(columns, float(distinct[0]))
    if all(bool((column.wall == column.wall.normalize()).all()) for column in columns):
        listed = some(sorted({column.zone() for column in columns}), 4)
        log.info("the dates have the UTC offsets %s and no times of day: using local dates without a time zone", listed)
        return [column.wall for column in columns]
    if _is_one_zone_with_dst(columns, minutes):
        log.info("the UTC offset of the times changes with daylight saving time: using UTC")
        return [
            (column.wall - pd.to_timedelta(offset, unit="m")).tz_localize("UTC")
            for column, offset in zip(columns, minutes, strict=True)
        ]
    raise _several_zones(columns, minutes, names)


def _with_offset(columns: Sequence[ZonedTimes], minutes: float) -> list[pd.DatetimeIndex]:
    zone = dt.timezone(dt.timedelta(minutes=minutes)) if minutes else dt.timezone.utc
    return [
        column.wall.tz_localize(zone) if column.times.tz is None else column.times.tz_convert(zone)
        for column in columns
    ]


def _is_one_zone_with_dst(columns: Sequence[ZonedTimes], minutes: Sequence[np.ndarray]) -> bool:
    """True if there are two offsets, one hour or less apart, and each local date has one of them."""
    offsets = np.concatenate(minutes)
    distinct = np.unique(offsets)
    if np.isnan(distinct).any() or len(distinct) != 2 or distinct[1] - distinct[0] > 60:
        return False
    days = np.concatenate([column.wall.normalize().to_numpy() for column in columns])
    return len(pd.unique(pd.Series(days))) == len(pd.DataFrame({"day": days, "offset": offsets}).drop_duplicates())


def _several_zones(columns: Sequence[ZonedTimes], minutes: Sequence[np.ndarray], names: Sequence[str]) -> DataError:
    examples: dict[str, str] = {}
    for column, offsets, name in zip(columns, minutes, names, strict=True):
        for offset in pd.unique(pd.Series(offsets)):
            row = int(np.argmax(np.isnan(offsets) if np.isnan(offset) else offsets == offset))
            zone = _offset_text(offset) if column.times.tz is None else str(column.times.tz)
            examples.setdefault(zone, f"row {row} in {name} ({column.wall[row]}) has {zone}")
    return DataError(
        f"the times do not have one time zone: {some(list(examples.values()), 3)}. Remedy: --freq day reads local "
        "dates without times and zones; for intraday bars, convert all times to one zone."
    )


def _offset_text(minutes: float) -> str:
    if np.isnan(minutes):
        return "none"
    hours, rest = divmod(int(abs(minutes)), 60)
    return f"{'-' if minutes < 0 else '+'}{hours:02d}:{rest:02d}"
