"""Reads Qlib's binary data folder.

Source of the format: qlib/data/storage/file_storage.py of pyqlib 0.9.7.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qfast.data.date_formats import is_date, parse_dates
from qfast.data.panel import Block, Panel
from qfast.data.prices import (
    PRICE_FIELDS,
    Extent,
    Instruments,
    Prices,
    Spans,
    StorePath,
    market_of,
    membership,
)
from qfast.dates import DateLike, date_text
from qfast.errors import ConfigError, DataError, suggest
from qfast.files import escapes, read_text

__all__ = ["BinaryStore", "is_store"]

log = logging.getLogger("qfast.data")

ALWAYS: tuple[tuple[None, None], ...] = ((None, None),)  # the membership of an instrument without spans
WINDOWS_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{d}{i}" for d in ("COM", "LPT") for i in range(10))}
DAY = re.compile(r"[12]\d{3}-\d\d-\d\d$")
FREQ_NAMES = {"1day": "day", "d": "day", "1d": "day", "daily": "day"}


def is_store(path: str | Path) -> bool:
    """True if the folder contains the subfolders of a Qlib binary store, calendars/ and features/."""
    root = Path(path).expanduser()
    return (root / "calendars").is_dir() and (root / "features").is_dir()


class BinaryStore:
    """Reader of a Qlib binary data folder, which contains calendars/, instruments/ and features/.

    Parameters
    ----------
    provider_uri : path or {freq: path}
    freq : str
        "day", "1min", ...

    Raises
    ------
    ConfigError
        `provider_uri` is not a path, or has no entry for `freq`.
    DataError
        The folder or its calendar is missing or damaged.
    """

    def __init__(self, provider_uri: StorePath, freq: str = "day") -> None:
        self.freq = FREQ_NAMES.get(freq.lower(), freq.lower())
        if isinstance(provider_uri, Mapping):
            by_freq = {FREQ_NAMES.get(str(k).lower(), str(k).lower()): v for k, v in provider_uri.items()}
            if self.freq not in by_freq:
                raise ConfigError(f"provider_uri has no entry for freq {self.freq!r}; it has {sorted(by_freq)}.")
            provider_uri = by_freq[self.freq]
        _require_inside("freq", self.freq)
        if not isinstance(provider_uri, (str, Path)):
            raise ConfigError(f"provider_uri must be a path, got {type(provider_uri).__name__}: {provider_uri!r}")
        self.root = Path(provider_uri).expanduser()
        if not self.root.is_dir():
            raise DataError(f"provider_uri: no such folder: {self.root}")
        self._features = str(self.root / "features")
        self.calendar = self._read_calendar()

    def markets(self) -> list[str]:
        """Names of all markets."""
        return sorted(p.stem for p in (self.root / "instruments").glob("*.txt"))

    def fields(self) -> list[str]:
        """Names of all fields that at least one instrument has."""
        suffix = f".{self.freq}.bin"
        return sorted({file.name.removesuffix(suffix) for file in (self.root / "features").glob(f"*/*{suffix}")})

    def read(
        self,
        instruments: Instruments = "all",
        wanted: Sequence[str] | None = None,
        start_time: DateLike | None = None,
        end_time: DateLike | None = None,
        margin: tuple[int, int] = (0, 0),
    ) -> Prices:
        """The stored rows of `instruments` between two times, extended by `margin` calendar steps.

        Parameters
        ----------
        instruments, start_time, end_time
            As in `load_prices`.
        wanted : sequence of str, optional
            Fields to read. Default: all. Fields without any file are left out.
        margin : (int, int)
            Additional calendar steps before and after.

        Returns
        -------
        Prices

        Raises
        ------
        DataError
            The market is unknown, no trading day is in the period, none of the instruments has data, or a file is
            damaged.
        """
        spans = self._spans(instruments)
        low, high = self._date_range(start_time, end_time)
        if low >= high:
            raise DataError(
                f"no trading day between start_time={start_time} and end_time={end_time}; the calendar of {self.root} "
                f"runs from {self.calendar[0]} to {self.calendar[-1]}."
            )
        low, high = max(0, low - margin[0]), min(len(self.calendar), high + margin[1])
        log.debug("%s: reading calendar positions %d to %d of %d instruments", self.root, low, high - 1, len(spans))
        stored: dict[str, dict[str, tuple[int, np.ndarray]]] = {}
        for name in wanted or ():
            _require_inside("field", name)
        for code in sorted(spans):
            series = self._read_instrument(code, wanted, low, high)
            if series:
                stored[code] = series
        absent = [code for code in spans if code not in stored]
        if absent:
            log.info(
                "%d of %d instruments have no data between %s and %s in %s, e.g. %s",
                len(absent),
                len(spans),
                date_text(self.calendar[low]),
                date_text(self.calendar[high - 1]),
                self.root,
                absent[:5],
            )
        if not stored:
            raise DataError(
                f"none of the {len(spans)} instruments ({', '.join(list(spans)[:5])}, ...) has data in "
                f"{self.root / 'features'} for freq {self.freq!r} between {self.calendar[low]} and "
                f"{self.calendar[high - 1]}."
            )
        return self._assemble(stored, spans)

    def members(self, instruments: Instruments, start: DateLike | None, end: DateLike | None) -> Instruments:
        """The instruments that belong to a market on at least one day between two dates, with their spans.

        Parameters
        ----------
        instruments
            As in `load_prices`. A list, and a market with a `filter_pipe`, are returned unchanged.
        start, end : date-like or None
            Both inclusive.

        Returns
        -------
        {code: [(start, end), ...]} or the argument
            The argument, if no instrument is a member in this period.

        Raises
        ------
        DataError
            The market is unknown.
        """
        if isinstance(instruments, Mapping) and instruments.get("filter_pipe"):
            return instruments
        spans = self._spans(instruments)
        if any(own is None for own in spans.values()):
            return instruments
        low, high = self._date_range(start, end)
        positions = self._span_positions([span for own in spans.values() for span in own or ()])
        present = {
            code: own
            for code, own in spans.items()
            if any(first < high and stop > low for first, stop in list(itertools.islice(positions, len(own or ()))))
        }
        return present or instruments

    # ---------------------------------------------------------------- calendar and membership
    def _read_calendar(self) -> pd.DatetimeIndex:
        path = self.root / "calendars" / f"{self.freq}.txt"
        if not path.is_file():
            others = sorted(p.stem for p in (self.root / "calendars").glob("*.txt") if not p.stem.endswith("_future"))
            raise DataError(
                f"{self.root} is not a Qlib data folder for freq {self.freq!r}: {path} is missing"
                + (f"; it has calendars for {others}." if others else ", and it has no other calendar.")
            )
        lines = [line.strip() for line in read_text(path).splitlines()]
        lines = [line for line in lines if line]
        if not lines:
            raise DataError(f"{path} contains no dates.")
        calendar = parse_dates(pd.Series(lines, name="date", dtype=object), str(path))
        steps = np.flatnonzero(np.diff(calendar.asi8) <= 0)
        if len(steps):
            raise DataError(f"{path}: line {steps[0] + 2} ({lines[steps[0] + 1]}) is not after the line before it.")
        return calendar

    def _date_range(self, begin: DateLike | None, end: DateLike | None) -> tuple[int, int]:
        """Half-open range of calendar positions from `begin` to `end`; an end without a time of day is a whole day."""
        empty = np.empty(0, dtype=np.int32)
        return Panel(self.calendar, np.empty(0, dtype=object), empty, empty, {}).date_code_range(begin, end)

    def _span_positions(self, spans: Sequence[tuple[Any, Any]]) -> Iterator[tuple[int, int]]:
        """`_date_range` of each span. Dates such as 2020-12-31 are converted together, which is much faster."""
        days = _days({day for span in spans for day in span}) if self.calendar.tz is None else {}
        if any(begin not in days or end not in days for begin, end in spans):
            return (self._date_range(*span) for span in spans)
        begins, ends = (pd.DatetimeIndex([days[day] for day in column]) for column in zip(*spans, strict=True))
        low = self.calendar.searchsorted(begins, "left")
        high = np.maximum(low, self.calendar.searchsorted(ends + pd.Timedelta(days=1), "left"))
        return zip(low.tolist(), high.tolist(), strict=True)

    def _spans(self, instruments: Instruments) -> Spans:
        if instruments is None:
            instruments = "all"
        if isinstance(instruments, Mapping) and "market" in instruments:
            instruments = market_of(instruments)
        if isinstance(instruments, str):
            return self._read_market(instruments)
        spans = membership(instruments)
        for code in spans:
            _require_inside("instrument", code)
        return spans

    def _read_market(self, market: str) -> Spans:
        _require_inside("market", market)
        path = self.root / "instruments" / f"{market.lower()}.txt"
        if not path.is_file():
            markets = self.markets()
            raise DataError(
                f"market {market!r} is not in {self.root / 'instruments'}, which has {markets}."
                + suggest(market, markets)
            )
        spans: Spans = {}
        lines = read_text(path).splitlines()
        days = _days({text for line in lines for text in line.split("\t")[1:3]})
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            parts = [part.strip() for part in line.split("\t")]
            if len(parts) < 3 or not parts[0]:
                raise DataError(f"{path}: line {number} must be CODE, start and end separated by tabs, got {line!r}.")
            if not (parts[1] in days or is_date(parts[1])) or not (parts[2] in days or is_date(parts[2])):
                raise DataError(f"{path}: line {number} must contain two dates, got {line!r}.")
            _require_inside(f"{path}: line {number}: instrument", parts[0])
            spans.setdefault(parts[0], []).append((parts[1], parts[2]))  # type: ignore[union-attr]
        if not spans:
            raise DataError(f"{path} contains no instruments.")
        return spans

    # ---------------------------------------------------------------- feature files
    def _folder(self, code: str) -> str:
        """Folder of an instrument, as text: building paths would take longer than reading the files."""
        name = f"_qlib_{code}" if code.upper() in WINDOWS_DEVICES else code
        return f"{self._features}{os.sep}{name.lower()}"

    def _read_instrument(
        self, code: str, wanted: Sequence[str] | None, low: int, high: int
    ) -> dict[str, tuple[int, np.ndarray]]:
        """Field -> (calendar position of the first value, values), for positions from `low` to `high - 1`."""
        folder, ending = self._folder(code), f".{self.freq}.bin"
        names = wanted
        if names is None:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                names = [name[: -len(ending)] for name in sorted(os.listdir(folder)) if name.endswith(ending)]
        series = {}
        for name in names or ():
            part = _read_bin(f"{folder}{os.sep}{name}{ending}", low, high, len(self.calendar))
            if part is not None and len(part[1]):
                series[name] = part
        return series

    def _assemble(self, stored: Mapping[str, Mapping[str, tuple[int, np.ndarray]]], spans: Spans) -> Prices:
        """One panel of the series of all instruments; an instrument's rows are all dates that any of its fields has."""
        names = {field for fields in stored.values() for field in fields}
        columns = [c for c in PRICE_FIELDS if c in names] + sorted(names - set(PRICE_FIELDS))
        first = np.array([min(at for at, _ in f.values()) for f in stored.values()])
        stop = np.array([max(at + len(v) for at, v in f.values()) for f in stored.values()])
        lengths = stop - first
        begin = np.cumsum(lengths) - lengths
        values = np.full((int(lengths.sum()), len(columns)), np.nan, dtype=np.float32)
        extents = {c: Extent(begin.copy(), begin.copy()) for c in columns}
        live = np.zeros(len(values), dtype=bool)
        positions = self._span_positions([span for code in stored for span in spans[code] or ALWAYS])
        for i, (code, series) in enumerate(stored.items()):
            for j, column in enumerate(columns):
                if column in series:
                    at, part = series[column]
                    row = int(begin[i] + at - first[i])
                    values[row : row + len(part), j] = part
                    extents[column].start[i], extents[column].stop[i] = row, row + len(part)
            for day, after in itertools.islice(positions, len(spans[code] or ALWAYS)):
                day, after = (min(max(d, int(first[i])), int(stop[i])) for d in (day, after))
                live[begin[i] + day - first[i] : begin[i] + after - first[i]] = True
        panel = Panel(
            datetimes=self.calendar,
            instruments=np.array(list(stored), dtype=object),
            date_codes=(np.arange(len(values)) - np.repeat(begin - first, lengths)).astype(np.int32),
            instrument_codes=np.repeat(np.arange(len(stored)), lengths).astype(np.int32),
            blocks={"price": Block(values, tuple(columns))},
            live=None if live.all() else live,
        )
        return Prices(panel, extents)


def _require_inside(what: str, name: str) -> None:
    """Refuse a name that would lead to files outside the store.

    Raises
    ------
    DataError
        The name has the part "..", or begins like an absolute path.
    """
    if escapes(name):
        raise DataError(
            f"{what} {name!r} leads outside the Qlib data folder. Remedy: names of instruments, markets and fields "
            "without '..'."
        )


def _days(values: Iterable[object]) -> dict[object, np.datetime64]:
    """The days of texts such as 2020-12-31. Other values are left out; all are, if one of the texts is not a date."""
    texts = [value for value in values if isinstance(value, str) and DAY.match(value)]
    try:
        return dict(zip(texts, np.array(texts, dtype="M8[D]"), strict=True))
    except ValueError:
        return {}


def _read_bin(path: str, low: int, high: int, n_dates: int) -> tuple[int, np.ndarray] | None:
    """(calendar position of the first value, float32 values) of a .bin file, for positions from `low` to `high - 1`.

    None if the file does not exist, is empty or has no value in this range. The file contains little-endian float32
    numbers: the calendar position of the first day, then the values. Only the requested part is read.
    """
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        status = os.fstat(file)
        n_bytes = status.st_size
        if not stat.S_ISREG(status.st_mode) or n_bytes == 0:
            return None
        if n_bytes % 4:
            raise DataError(f"{path} is damaged: {n_bytes} bytes are not a whole number of float32 values.")
        (start,) = struct.unpack("<f", os.pread(file, 4, 0))
        if not (0 <= start < n_dates and start == int(start)):
            raise DataError(
                f"{path} is damaged: its first value must be the calendar position of the first day, from 0 to "
                f"{n_dates - 1}, got {start}."
            )
        first, stop = max(int(start), low), min(int(start) + n_bytes // 4 - 1, high)
        if first >= stop:
            return None
        part = os.pread(file, 4 * (stop - first), 4 * (1 + first - int(start)))
        if len(part) != 4 * (stop - first):
            raise DataError(
                f"{path} became shorter while it was read: {len(part)} bytes instead of {4 * (stop - first)}."
            )
        return first, np.frombuffer(part, dtype="<f4")
    finally:
        os.close(file)
