"""The calendar of the data: weekends, gaps, missing weekdays and incomplete days."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from qfast.data.panel import Panel
from qfast.data.protocols import Handler
from qfast.dates import date_text
from qfast.errors import some
from qfast.workflow.check.findings import Finding
from qfast.workflow.dataset import source_panel

__all__ = ["calendar_findings"]

FEWEST_DAYS = 20  # of a calendar that is checked
EVERY_DAY = 0.9  # fraction of all calendar days from which a market is considered open on weekends
FEW_WEEKENDS = 2  # special sessions on weekends that are not reported
LONGEST_HOLIDAY = 12  # weekdays without trading
MOST_CLOSED = 0.15  # fraction of the weekdays that may be missing; 4% in New York, 7% in Shanghai
INCOMPLETE = 0.5  # fraction of the usual number of instruments below which a day is incomplete
NEIGHBOURS = 10  # days on either side that determine the usual number


def calendar_findings(handler: Handler) -> Iterator[Finding]:
    """Symptoms of dates that were read wrong, and days that are missing or incomplete."""
    panel = source_panel(handler)
    counts = _instruments_by_day(panel)
    stamps = panel.datetimes[counts > 0]
    counts = counts[counts > 0]
    days = pd.DatetimeIndex(stamps.tz_localize(None) if stamps.tz is not None else stamps).normalize().unique()
    if len(days) < FEWEST_DAYS:
        return
    step = np.median(np.diff(days.to_numpy()) / np.timedelta64(1, "D"))
    if step == 1:  # otherwise the data is weekly or monthly
        yield from _weekend_findings(days)
        yield from _gap_findings(days)
    if len(days) == len(stamps):
        yield from _incomplete_days(stamps, counts)


def _instruments_by_day(panel: Panel) -> np.ndarray:
    """Number of rows with values for each date code, int64 [len(panel.datetimes)]."""
    rows = panel.live_rows()
    if "price" in panel.blocks and "close" in panel.columns("price"):
        rows = rows[np.isfinite(panel.column("close")[rows])]
    return np.bincount(panel.date_codes[rows], minlength=len(panel.datetimes))


def _weekend_findings(days: pd.DatetimeIndex) -> Iterator[Finding]:
    if len(days) >= EVERY_DAY * ((days[-1] - days[0]).days + 1):
        return  # a market without weekends
    weekend = days[days.day_of_week >= 5]
    low_days = bool((days.day <= 12).all()) and len(days.to_period("M").unique()) > 2
    if low_days:
        yield Finding(
            "warning",
            "calendar",
            f"no date is after the 12th of a month ({len(days)} days, {date_text(days[0])} to {date_text(days[-1])}): "
            "day and month may be swapped. Remedy: specify the format of the dates",
        )
    elif len(weekend) > max(FEW_WEEKENDS, 0.01 * len(days)):
        swapped = int((weekend.day <= 12).sum()) == len(weekend)
        yield Finding(
            "warning",
            "calendar",
            f"{len(weekend)} of {len(days)} days are on a weekend, the first is {weekend[0]:%A %Y-%m-%d}"
            + (", and all are before the 13th of a month: day and month may be swapped" if swapped else "")
            + ". Remedy: check the format and the time zone of the dates",
        )


def _gap_findings(days: pd.DatetimeIndex) -> Iterator[Finding]:
    between = np.busday_count(days[:-1].to_numpy("datetime64[D]"), days[1:].to_numpy("datetime64[D]")) - 1
    long = np.flatnonzero(between > LONGEST_HOLIDAY)
    if len(long):
        ends = zip(days[:-1][long], days[1:][long], between[long], strict=True)
        listed = [f"{date_text(start)} to {date_text(end)} ({count} weekdays)" for start, end, count in ends]
        yield Finding("warning", "calendar", f"the data has no rows in {len(long)} period(s): {some(listed, most=3)}")
    inside = np.clip(between[between <= LONGEST_HOLIDAY], 0, None)
    closed = float(inside.sum()) / float(inside.sum() + len(days))
    if closed > MOST_CLOSED:
        yield Finding(
            "warning",
            "calendar",
            f"{int(inside.sum())} weekdays between {date_text(days[0])} and {date_text(days[-1])} are missing "
            f"({closed:.0%}); markets close on 4% to 8% of them. Remedy: check the format of the dates",
        )


def _incomplete_days(days: pd.DatetimeIndex, counts: np.ndarray) -> Iterator[Finding]:
    usual = pd.Series(counts).rolling(2 * NEIGHBOURS + 1, center=True, min_periods=NEIGHBOURS).median().to_numpy()
    few = np.flatnonzero(counts < INCOMPLETE * usual)
    if len(few):
        listed = [
            f"{date_text(day)} {count} of about {expected:.0f}"
            for day, count, expected in zip(days[few], counts[few], usual[few], strict=True)
        ]
        yield Finding(
            "warning", "calendar", f"{len(few)} day(s) lack more than half of the instruments: {some(listed, most=3)}"
        )
