"""Segments of rolling windows, date by date those of Qlib's `RollingGen` and `Rolling`."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import pandas as pd

from qfast.data.protocols import HandlerDataset
from qfast.data.store import BinaryStore
from qfast.dates import DateLike
from qfast.errors import ConfigError
from qfast.workflow.dataset import source_panel

__all__ = ["calendar_of", "label_reach", "rolling_segments"]

Segments: TypeAlias = dict[str, tuple[pd.Timestamp | None, pd.Timestamp | None]]
TEST, TRAIN = "test", "train"


def rolling_segments(
    calendar: Sequence[pd.Timestamp] | pd.DatetimeIndex,
    segments: Mapping[str, tuple[DateLike | None, DateLike | None] | Sequence[DateLike | None]],
    step: int,
    truncate: int,
    *,
    expanding: bool = False,
    last: DateLike | None = None,
) -> list[Segments]:
    """The segments of every rolling window.

    The first window has the segments of the workflow, cut at `truncate` days before its test segment, and is tested on
    the first `step` days of the test segment. Each following window is `step` days later. Windows end when a test
    segment would begin after the end of the workflow's test segment. As in Qlib, the test segment of the last window
    is not cut, so it may end later.

    Parameters
    ----------
    calendar : sequence of Timestamp
        All trading days, ascending.
    segments : mapping
        Name -> (start, end), both inclusive. "test" is required. None is unbounded.
    step : int
        Days of a test segment.
    truncate : int
        Number of later days that a label reads. All segments other than "test" end at least this number of days before
        the test segment begins, so no label reaches beyond its first day.
    expanding : bool
        The segment "train" keeps its start. All other segments slide.
    last : date-like, optional
        The last day with data, which replaces a test end of None or after it. Default: the last day of the calendar.

    Returns
    -------
    list of dict
        Name -> (start, end) for each window.

    Raises
    ------
    ConfigError
        The test segment has no day in the calendar or fewer days than `step`, another segment ends before the calendar
        or begins after it, or a segment would begin before the calendar.

    Notes
    -----
    Source: RollingGen in qlib/workflow/task/gen.py and TimeAdjuster in qlib/workflow/task/utils.py of pyqlib 0.9.7.
    Qlib's `Rolling` uses `RollingGen(step, trunc_days=horizon + 1)`, which expands the training segment.

    Examples
    --------
    >>> days = pd.bdate_range("2024-01-01", periods=30)
    >>> windows = rolling_segments(days, {"train": (days[0], days[19]), "test": (days[20], days[29])}, 5, 2)
    >>> [f"{w['train'][0]:%m-%d} {w['train'][1]:%m-%d} {w['test'][0]:%m-%d} {w['test'][1]:%m-%d}" for w in windows]
    ['01-01 01-25 01-29 02-02', '01-08 02-01 02-05 02-09']
    """
    days = list(calendar)
    bounds = {name: _positions(days, name, ends) for name, ends in segments.items()}
    test_end = _test_end(days, segments[TEST][1], last)
    begin = bounds[TEST][0] or 0
    length = bisect.bisect_right(days, test_end) - begin
    if length < step:
        raise ConfigError(
            f"the rolling step is {step} days, but the test segment {_text(segments[TEST])} has {max(length, 0)} "
            f"trading days. Remedy: a step of at most {max(length, 0)}, or a longer test segment."
        )
    bounds[TEST] = (begin, begin + step - 1)
    for name in bounds:
        if name != TEST:
            bounds[name] = _truncated(name, bounds[name], begin - truncate)
    windows = []
    while begin < len(days) and days[begin] <= test_end:
        windows.append({name: (_day(days, start), _day(days, end)) for name, (start, end) in bounds.items()})
        bounds = {name: _shifted(ends, step, expanding and name == TRAIN) for name, ends in bounds.items()}
        begin += step
    return windows


Position: TypeAlias = "tuple[int | None, int | None]"


def _positions(days: list[pd.Timestamp], name: str, ends: Sequence[DateLike | None]) -> Position:
    """Positions of the first day from the start on, and of the last day up to the end."""
    start, end = ends
    first = None if start is None else bisect.bisect_left(days, pd.Timestamp(start))
    last = None if end is None else bisect.bisect_right(days, pd.Timestamp(end)) - 1
    if name != TEST and (first == len(days) or last == -1):
        raise ConfigError(
            f"the segment {name!r} ({_text(ends)}) has no day in the calendar, which extends from "
            f"{days[0]:%Y-%m-%d} to {days[-1]:%Y-%m-%d}. Remedy: dates that the data has."
        )
    return first, last


def _test_end(days: list[pd.Timestamp], end: DateLike | None, last: DateLike | None) -> pd.Timestamp:
    """The end of the test segment on the calendar, at most the last day with data."""
    last_day = days[-1] if last is None else pd.Timestamp(last)
    if end is None:
        return last_day
    return min(last_day, days[max(0, bisect.bisect_right(days, pd.Timestamp(end)) - 1)])


def _truncated(name: str, ends: Position, most: int) -> Position:
    """Positions of at most `most`."""
    if most < 0:
        raise ConfigError(
            f"the test segment begins on day {most} of the calendar after {name!r} is truncated, so no day is left to "
            "train on. Remedy: an earlier training segment or a later test segment."
        )
    start, end = ends
    return (None if start is None else min(start, most)), (most if end is None else min(end, most))


def _shifted(ends: Position, step: int, only_end: bool) -> Position:
    start, end = ends
    return (
        start if start is None or only_end else start + step,
        None if end is None else end + step,
    )


def _day(days: list[pd.Timestamp], position: int | None) -> pd.Timestamp | None:
    """The day at a position; None after the end of the calendar."""
    return None if position is None or position >= len(days) else days[position]


def _text(ends: Sequence[object]) -> str:
    return f"{ends[0] or 'the first date'} to {ends[1] or 'the last date'}"


def calendar_of(dataset: HandlerDataset) -> tuple[pd.DatetimeIndex, pd.Timestamp]:
    """All trading days of the data, and the last day with data.

    A Qlib folder has a calendar, which may have future days as in Qlib (`day_future.txt`). For a table the calendar is
    the set of its dates.
    """
    handler = dataset.handler
    store = getattr(getattr(handler, "priced", None), "_store", None)
    if store is None:
        panel = source_panel(handler)
        return panel.datetimes, panel.datetimes[-1]
    reader = BinaryStore(store[0], getattr(handler, "freq", "day"))
    days = pd.DatetimeIndex(reader.calendar)
    future = reader.root / "calendars" / f"{reader.freq}_future.txt"
    if future.is_file():
        later = pd.DatetimeIndex(pd.to_datetime(future.read_text().split("\n")).dropna())
        return later.union(days), days[-1]
    return days, days[-1]


def label_reach(dataset: HandlerDataset) -> int | None:
    """Number of later days that a label reads; None if the label is a given column."""
    reach = getattr(getattr(dataset.handler, "priced", None), "label_horizon", None)
    return None if reach is None else int(reach)
