"""Dates as they are written: which ones mean a whole day, and how one is shown."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pandas as pd

__all__ = ["date_text", "is_date_only"]


def is_date_only(value: Any) -> bool:
    """True for a date without a time of day; as the end of a span it covers its whole day.

    >>> is_date_only("2020-12-31"), is_date_only("2020-12-31 00:00"), is_date_only(dt.date(2020, 12, 31))
    (True, False, True)
    """
    if isinstance(value, str):
        return ":" not in value
    return isinstance(value, dt.date) and not isinstance(value, dt.datetime)


def date_text(stamp: pd.Timestamp) -> str:
    """ISO text of a timestamp; midnight is left out.

    >>> date_text(pd.Timestamp("2020-12-31")), date_text(pd.Timestamp("2020-12-31 14:30"))
    ('2020-12-31', '2020-12-31T14:30:00')
    """
    return stamp.date().isoformat() if stamp == stamp.normalize() else stamp.isoformat()
