"""Parsing and formatting of dates: which ones cover a whole day, and their ISO text."""

from __future__ import annotations

import datetime as dt
import re
from typing import TypeAlias

import numpy as np
import pandas as pd

__all__ = ["TEXT_FORMATS", "DateLike", "date_text", "is_date_only", "normal_date", "starts_after"]

DateLike: TypeAlias = str | dt.date | np.datetime64
"""A day or a time: text, `datetime.date`, `datetime.datetime`, `pandas.Timestamp` or `numpy.datetime64`."""

TEXT_FORMATS = "a date such as 2016-12-31 or a time such as '2016-12-31 14:30'"


def is_date_only(value: object) -> bool:
    """True for a date without a time of day. As the end of a span, such a date covers its whole day.

    >>> is_date_only("2020-12-31"), is_date_only("2020-12-31 00:00"), is_date_only(dt.date(2020, 12, 31))
    (True, False, True)
    """
    if isinstance(value, str):
        return ":" not in value
    return isinstance(value, dt.date) and not isinstance(value, dt.datetime)


def starts_after(start: DateLike, end: DateLike) -> bool:
    """True if a span ends before it starts. An end without a time of day covers its whole day.

    If only one of the two has a UTC offset, both count as local times.

    >>> starts_after("2020-12-31 10:00", "2020-12-31"), starts_after("2020-12-31 10:00", "2020-12-31 09:00")
    (False, True)
    """
    first, last = pd.Timestamp(start), pd.Timestamp(end)
    if (first.tz is None) != (last.tz is None):
        first, last = first.tz_localize(None), last.tz_localize(None)
    return first >= last + pd.Timedelta(days=1) if is_date_only(end) else first > last


def _require_one_meaning(text: str) -> None:
    """Raise a ValueError for a date whose day and month could be swapped, which pandas reads month-first."""
    match = re.match(r"\s*(\d{1,2})[/.-](\d{1,2})[/.-](\d{4}|\d{2})(?!\d)", text)
    if match is None or (max(int(match[1]), int(match[2])) > 12 and len(match[3]) == 4) or match[1] == match[2]:
        return
    raise ValueError(f"expected {TEXT_FORMATS}, got {text!r}, whose day and month could be swapped")


def date_text(stamp: pd.Timestamp) -> str:
    """ISO text of a timestamp, without the time of day if it is midnight.

    >>> date_text(pd.Timestamp("2020-12-31")), date_text(pd.Timestamp("2020-12-31 14:30"))
    ('2020-12-31', '2020-12-31T14:30:00')
    """
    return stamp.date().isoformat() if stamp == stamp.normalize() else stamp.isoformat()


def normal_date(value: object) -> str | None:
    """ISO text of a date or time. None, an open end, is returned as it is.

    A date without a time of day stays without one, because as an end it covers its whole day.

    Raises
    ------
    ValueError
        Not a date, or text such as 01/07/2020 that may be two dates. Numbers are rejected because pandas would read
        them as nanoseconds.

    Examples
    --------
    >>> normal_date(dt.date(2016, 12, 31)), normal_date("31 Dec 2016"), normal_date("2016-12-31 14:30")
    ('2016-12-31', '2016-12-31', '2016-12-31T14:30:00')
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, dt.date)):
        raise ValueError(f"expected {TEXT_FORMATS}, got the {type(value).__name__} {value!r}")
    if isinstance(value, str):
        _require_one_meaning(value)
    try:
        stamp = pd.Timestamp(value)
    except (ValueError, TypeError, OverflowError):
        stamp = pd.NaT
    if stamp is pd.NaT:
        raise ValueError(f"expected {TEXT_FORMATS}, got {value!r}")
    return stamp.date().isoformat() if is_date_only(value) else stamp.isoformat()
