"""Observations about the calendar of a table: several times on one day, weekends, gaps."""

from __future__ import annotations

import numpy as np
import pandas as pd

from qfast.data.source_notes import note

__all__ = ["report_calendar", "report_shifted_zone"]

INTRADAY = 1.5  # rows of an instrument and day, on average, from which a table has intraday bars
GAP_DAYS = 15  # longer than any holiday of a stock exchange
STRAY_WEEKENDS = 0.1  # fraction of dates on weekends below which they are exceptions
YEARS_OF_GAP = 366  # days; a longer gap comes from a placeholder such as 1970-01-01
FUTURE_DAYS = 31  # dates that are later from today have been read or written wrong
FEW_BARS = 0.9  # fraction of the usual number of bars below which a day is a partial day


def report_calendar(
    table: str, calendar: pd.DatetimeIndex, date_codes: np.ndarray, instrument_codes: np.ndarray
) -> None:
    """Report days with several times, dates on weekends, and long gaps.

    Parameters
    ----------
    table : str
        Name of the source, for messages.
    calendar : DatetimeIndex
        Sorted unique times.
    date_codes, instrument_codes : ndarray
        int [R]: the keys of the rows, sorted by (instrument, date).
    """
    local = calendar if calendar.tz is None else calendar.tz_localize(None)
    day_of_time, days = pd.factorize(local.normalize())
    if len(days) < len(local):
        day_codes = day_of_time[date_codes]
        pairs = 1 + np.count_nonzero((np.diff(instrument_codes) != 0) | (np.diff(day_codes) != 0))
        if len(date_codes) >= INTRADAY * pairs:
            _report_partial_days(table, pd.DatetimeIndex(days), day_codes, instrument_codes)
            return
        _report_several_times(table, local, day_of_time, pd.DatetimeIndex(days), date_codes)
    _report_days(table, pd.DatetimeIndex(days))


def _report_several_times(
    table: str, local: pd.DatetimeIndex, day_of_time: np.ndarray, days: pd.DatetimeIndex, date_codes: np.ndarray
) -> None:
    times_of_day = np.bincount(day_of_time)
    several = np.flatnonzero(times_of_day > 1)
    rows_of_time = np.bincount(date_codes, minlength=len(local))
    day = several[-1]
    listed = ", ".join(f"{local[t]:%H:%M:%S} ({rows_of_time[t]} rows)" for t in np.flatnonzero(day_of_time == day)[:4])
    note(
        f"{table}: {len(several)} of {len(days)} days have rows at several times, for example {days[day]:%Y-%m-%d}: "
        f"{listed}. Each time counts as a trading day of its own, on which the other instruments are missing. Remedy: "
        "--freq day (freq: day in the handler) uses dates and the last row of each day",
        warning=True,
    )


def _report_partial_days(
    table: str, days: pd.DatetimeIndex, day_codes: np.ndarray, instrument_codes: np.ndarray
) -> None:
    """Report days of intraday bars on which instruments have fewer bars than usual."""
    pair = instrument_codes.astype(np.int64) * len(days) + day_codes
    first = np.flatnonzero(np.diff(pair, prepend=-1))  # the rows are sorted
    pairs, bars = pair[first], np.diff(first, append=len(pair))
    usual = float(np.median(bars))
    partial = np.flatnonzero(bars < FEW_BARS * usual)
    if not len(partial):
        return
    counts = np.bincount(pairs[partial] % len(days), minlength=len(days))
    of_day = np.bincount(pairs % len(days), minlength=len(days))
    affected = np.flatnonzero(counts)
    last = affected[-1]
    fewest = int(bars[partial][pairs[partial] % len(days) == last].min())
    note(
        f"{table}: {len(affected)} of {len(days)} days are partial, with fewer than {FEW_BARS:.0%} of the usual "
        f"{usual:.0f} bars for some instruments. The latest is {days[last]:%Y-%m-%d}: {counts[last]} of {of_day[last]} "
        f"instrument(s), the fewest with {fewest} bar(s)",
        warning=bool(last == len(days) - 1),
    )


def report_shifted_zone(table: str, calendar: pd.DatetimeIndex) -> None:
    """Report daily dates that are midnights of another time zone, such as 16:00 UTC on Sunday for Monday in Shanghai.

    Parameters
    ----------
    table : str
        Name of the source, for messages.
    calendar : DatetimeIndex
        The different times, at least one.
    """
    local = calendar if calendar.tz is None else calendar.tz_localize(None)
    clock = local - local.normalize()
    if clock[0] == pd.Timedelta(0) or not (clock == clock[0]).all():
        return
    hours = 24 - clock[0] / pd.Timedelta(hours=1)
    moved = local + pd.Timedelta(hours=hours)
    before, after = (int((days.day_of_week >= 5).sum()) for days in (local, moved))
    if hours <= 14 and before > STRAY_WEEKENDS * len(local) and after == 0:
        zone = "" if calendar.tz is None else f" {calendar.tz}"
        note(
            f"{table}: all times are {clock[0] / pd.Timedelta(hours=1):g}:00{zone} and {before} of {len(local)} dates "
            f"are on weekends; {hours:g} hours to the east they are midnights from Monday to Friday. The dates are "
            "probably one day early. Remedy: --time-zone, for example Asia/Shanghai",
            warning=True,
        )


def _report_days(table: str, days: pd.DatetimeIndex) -> None:
    weekend = np.flatnonzero(days.day_of_week >= 5)
    if 0 < len(weekend) < STRAY_WEEKENDS * len(days):
        note(f"{table}: {len(weekend)} of {len(days)} dates are on weekends, the first is {days[weekend[0]]:%Y-%m-%d}")
    elif len(weekend):
        note(f"{table}: {len(weekend)} of {len(days)} dates are on weekends")
    latest = pd.Timestamp.now().normalize() + pd.Timedelta(days=FUTURE_DAYS)
    future = int((days > latest).sum())
    if future:
        note(
            f"{table}: {future} of {len(days)} dates are in the future, the last is {days[-1]:%Y-%m-%d}. Remedy: "
            "--date-format, if the dates were read wrong",
            warning=True,
        )
    if len(days) < 2:
        return
    steps = np.diff(days.to_numpy()) / np.timedelta64(1, "D")
    limit = max(GAP_DAYS, 5 * float(np.median(steps)))
    gaps = np.flatnonzero(steps > limit)
    if len(gaps):
        longest = gaps[np.argmax(steps[gaps])]
        note(
            f"{table}: {len(gaps)} gap(s) of more than {limit:.0f} days without any row; the longest is from "
            f"{days[longest]:%Y-%m-%d} to {days[longest + 1]:%Y-%m-%d}",
            warning=bool(steps[longest] > YEARS_OF_GAP and steps[longest] > 10 * float(np.median(steps))),
        )
