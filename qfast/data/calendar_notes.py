"""Observations about the calendar of a table: several times on one day, weekends, gaps."""

from __future__ import annotations

import numpy as np
import pandas as pd

from qfast.data.source_notes import note

__all__ = ["report_calendar", "report_codes"]

INTRADAY = 1.5  # rows of an instrument and day, on average, from which a table has intraday bars
GAP_DAYS = 15  # longer than any holiday of a stock exchange
STRAY_WEEKENDS = 0.1  # fraction of dates on weekends below which they are exceptions


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
            return  # intraday bars
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


def _report_days(table: str, days: pd.DatetimeIndex) -> None:
    weekend = np.flatnonzero(days.day_of_week >= 5)
    if 0 < len(weekend) < STRAY_WEEKENDS * len(days):
        note(f"{table}: {len(weekend)} of {len(days)} dates are on weekends, the first is {days[weekend[0]]:%Y-%m-%d}")
    elif len(weekend):
        note(f"{table}: {len(weekend)} of {len(days)} dates are on weekends")
    if len(days) < 3:
        return
    steps = np.diff(days.to_numpy()) / np.timedelta64(1, "D")
    limit = max(GAP_DAYS, 5 * float(np.median(steps)))
    gaps = np.flatnonzero(steps > limit)
    if len(gaps):
        longest = gaps[np.argmax(steps[gaps])]
        note(
            f"{table}: {len(gaps)} gap(s) of more than {limit:.0f} days without any row; the longest is from "
            f"{days[longest]:%Y-%m-%d} to {days[longest + 1]:%Y-%m-%d}"
        )


def report_codes(table: str, names: np.ndarray) -> None:
    """Report numeric codes of unequal length, which have probably lost leading zeros."""
    texts = [str(name) for name in names]
    lengths = {len(text): text for text in texts}
    if len(lengths) > 1 and all(text.isdigit() for text in texts):
        short, long = lengths[min(lengths)], lengths[max(lengths)]
        note(
            f"{table}: the instruments are codes of unequal length, for example {short!r} and {long!r}; they may have "
            f"lost leading zeros. Remedy: store the codes as text, {short.zfill(len(long))!r}",
            warning=True,
        )
