"""Prices from a CSV or Parquet file or folder, a pandas frame, or Qlib's binary store.

Every source ends in one panel with the group "price" (open, high, low, close, volume, vwap where there
is one, and whatever else the source holds), float32, instrument by instrument. Between an instrument's
first and last row every date of the calendar has a row, NaN where the source had none: a shift by n
rows is then a shift by n trading days.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from qfast.data.expression import Extent
from qfast.data.panel import Block, Panel
from qfast.data.rows import restrict_rows, take_rows
from qfast.errors import ConfigError, DataError, suggest

__all__ = ["PRICE_FIELDS", "BinaryStore", "Prices", "is_store", "load_prices", "read_prices"]

log = logging.getLogger("qfast.data")

PRICE_FIELDS = ("open", "high", "low", "close", "volume", "vwap")
OTHER_KNOWN_FIELDS = ("factor", "change", "amount", "money", "turnover")
DATETIME_NAMES = ("datetime", "date", "timestamp", "trade_date", "tradedate", "trading_date", "time", "day")
INSTRUMENT_NAMES = ("instrument", "symbol", "ticker", "code", "ts_code", "stock_code", "secid", "stock", "name")
FIELD_NAMES = {"vol": "volume", "average_price": "vwap"}
CSV_ENDINGS = (".csv", ".csv.gz", ".csv.bz2", ".csv.xz", ".csv.zst", ".csv.zip")
PARQUET_ENDINGS = (".parquet", ".pq")
WINDOWS_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{d}{i}" for d in ("COM", "LPT") for i in range(10))}
FREQ_NAMES = {"1day": "day", "d": "day", "1d": "day", "daily": "day"}
DAY_AS_NUMBER = range(1800_01_01, 2200_12_32)  # 20240131


class Prices(NamedTuple):
    """A price panel with what only a store knows.

    `panel.live` marks the rows at which the instrument belongs to the market (None: all). `extents`
    says in which rows a field is stored; a field that is not named is stored in all rows.
    """

    panel: Panel
    extents: dict[str, Extent]


def load_prices(
    source: Any = None,
    *,
    provider_uri: Any = None,
    instruments: Any = "all",
    start_time: Any = None,
    end_time: Any = None,
    freq: str = "day",
    vwap: str | None = None,
) -> Panel:
    """Price panel of any source.

    Parameters
    ----------
    source : path, DataFrame or Panel
        CSV file, Parquet file, a folder of either (one file per instrument; the file name is the
        instrument where no column says so), a frame with datetime and instrument as index or columns,
        or the folder of a Qlib binary store.
    provider_uri : path or {freq: path}, alternative to `source`
        Folder of a Qlib binary store.
    instruments : str, list, {code: [(start, end), ...]} or {"market": name}
        Market name (needs a store; other sources give all their instruments) or instruments.
    start_time, end_time : date-like, optional
        Keep rows between, both inclusive.
    freq : str
        Which calendar and files of a store to read: "day", "1min", ...
    vwap : {None, "typical"}
        "typical": where there is no vwap, use (high + low + close) / 3.

    Returns
    -------
    Panel
        One group "price". `live` is False where an instrument does not belong to the market.

    Raises
    ------
    DataError
        The file is missing, empty or damaged; a column is missing, not numeric or not a date; a key
        occurs twice. The message names file, column and row.
    ConfigError
        An argument that cannot be used.

    Examples
    --------
    >>> frame = pd.DataFrame({"Date": ["2024-01-02", "2024-01-03"], "Ticker": "A", "Close": [10.0, 11.0]})
    >>> panel = load_prices(frame)
    >>> panel.columns("price"), panel.values("price")[:, 0].tolist()
    (('close',), [10.0, 11.0])
    """
    prices = read_prices(
        source, provider_uri=provider_uri, instruments=instruments, start_time=start_time, end_time=end_time,
        freq=freq, vwap=vwap,
    )  # fmt: skip
    panel = prices.panel
    low, high = panel.date_code_range(start_time, end_time)
    inside = (panel.date_codes >= low) & (panel.date_codes < high)
    if not inside.all() or len(np.unique(panel.date_codes)) < len(panel.datetimes):
        panel = take_rows(panel, np.flatnonzero(inside))
    if panel.n_rows == 0:
        raise DataError(f"no prices between start_time={start_time} and end_time={end_time}.")
    return panel


def read_prices(
    source: Any = None,
    *,
    provider_uri: Any = None,
    instruments: Any = "all",
    start_time: Any = None,
    end_time: Any = None,
    freq: str = "day",
    vwap: str | None = None,
    wanted: Sequence[str] | None = None,
    margin: tuple[int, int] = (0, 0),
) -> Prices:
    """As `load_prices`, with the rows around [start_time, end_time] that expressions may look at.

    Parameters
    ----------
    source, provider_uri, instruments, start_time, end_time, freq, vwap
        As in `load_prices`. The time bounds only save reading; rows outside them may be there.
    wanted : sequence of str, optional
        Fields to read from a store; None reads all that are there.
    margin : (int, int)
        Calendar steps before `start_time` and after `end_time` to read as well.
    """
    if (source is None) == (provider_uri is None):
        raise ConfigError(
            "give either prices (a file, folder or frame) or provider_uri (a Qlib data folder)"
            + (", not both." if source is not None else ".")
        )
    if vwap not in (None, "typical"):
        raise ConfigError(f"vwap must be None or 'typical', got {vwap!r}." + suggest(vwap, ["typical"]))
    if provider_uri is None and isinstance(source, (str, Path)) and is_store(source):
        provider_uri, source = source, None
    if provider_uri is not None:
        store = BinaryStore(provider_uri, freq)
        prices = store.read(instruments, wanted, start_time, end_time, margin)
    else:
        prices = Prices(_members(_panel_of(source), instruments), {})
    return _with_typical_vwap(prices) if vwap == "typical" else prices


def _with_typical_vwap(prices: Prices) -> Prices:
    panel = prices.panel
    names = panel.columns("price")
    if "vwap" in names:
        return prices
    parts = [panel.column(name, "price") for name in ("high", "low", "close")]
    typical = ((parts[0].astype(np.float64) + parts[1] + parts[2]) / 3).astype(np.float32)
    log.info("no vwap in the prices: (high + low + close) / 3 is used")
    values = np.column_stack([panel.values("price"), typical])
    return prices._replace(panel=panel.replace("price", values, (*names, "vwap")))


# ---------------------------------------------------------------- tables: CSV, Parquet, frames
class _Table(NamedTuple):
    """One file or frame: dates, instrument names and float32 columns, row by row."""

    name: str
    dates: pd.DatetimeIndex
    instruments: np.ndarray
    columns: dict[str, np.ndarray]


def _panel_of(source: Any) -> Panel:
    if isinstance(source, Panel):
        return _lower_case(source)
    if isinstance(source, (pd.DataFrame, pd.Series)):
        frame = source.to_frame() if isinstance(source, pd.Series) else source
        return _stack([_table(frame, "the frame", None)])
    if not isinstance(source, (str, Path)):
        raise ConfigError(
            f"prices must be a path, a DataFrame or a Panel, got {type(source).__name__}: {str(source)[:60]!r}"
        )
    path = Path(source).expanduser()
    if path.is_dir():
        files = _files_of(path)
        return _stack([_table(_read_file(file), file.name, _stem(file)) for file in files])
    if not path.exists():
        raise DataError(f"prices: no such file or folder: {path} (looked in {Path.cwd()}).")
    return _stack([_table(_read_file(path), path.name, None)])


def _lower_case(panel: Panel) -> Panel:
    group = "price" if "price" in panel.blocks else next(iter(panel.blocks), "price")
    block = panel.block(group)
    names = tuple(_plain_name(c) for c in block.columns)
    return _dense(replace(panel, blocks={"price": Block(block.values, names)}))


def _files_of(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.name.lower().endswith(CSV_ENDINGS + PARQUET_ENDINGS))
    if not found:
        raise DataError(
            f"prices: the folder {folder} holds neither CSV nor Parquet files ({', '.join(CSV_ENDINGS[:2])}, "
            f"{', '.join(PARQUET_ENDINGS)}), and is no Qlib store (calendars/, instruments/, features/)."
        )
    return found


def _stem(path: Path) -> str:
    return path.name.split(".")[0] if path.name.count(".") <= 2 else path.name.rsplit(".", 1)[0]


def _read_file(path: Path) -> pd.DataFrame:
    if path.name.lower().endswith(PARQUET_ENDINGS):
        return _read_parquet(path)
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes).")
    try:
        header = [str(c) for c in pd.read_csv(path, nrows=0, encoding_errors="replace").columns]
        code = _find(header, INSTRUMENT_NAMES)
        # "000001" must keep its zeros, and a ticker may be called NA
        texts = {code} if code is not None else set()
        missing = {c: ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "-"] for c in header if c not in texts}
        return pd.read_csv(
            path, dtype=dict.fromkeys(texts, str), keep_default_na=False, na_values=missing, low_memory=False
        )  # fmt: skip
    except pd.errors.EmptyDataError:
        raise DataError(f"{path} holds no columns.") from None
    except (pd.errors.ParserError, UnicodeDecodeError, OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read as CSV: {str(error).strip()}") from None


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except ImportError:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow, which is not installed. "
            "Remedy: pip install 'qfast-models[parquet]', or give the prices as CSV."
        ) from None
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise DataError(f"{path} cannot be read as Parquet: {error}") from None


def _table(frame: pd.DataFrame, name: str, instrument: str | None) -> _Table:
    """Keys and numeric columns of a frame; `instrument` names all rows if no column does."""
    if any(level is not None for level in frame.index.names):
        frame = frame.reset_index()
    flat: list[Any] = list(frame.columns)
    frame = frame.set_axis([str(c[-1] if isinstance(c, tuple) else c) for c in flat], axis=1)
    if len(frame) == 0:
        raise DataError(f"{name} has no rows (columns {list(frame.columns)}).")
    date, code = _find(frame.columns, DATETIME_NAMES), _find(frame.columns, INSTRUMENT_NAMES)
    if date is None and isinstance(frame.index, pd.DatetimeIndex):
        frame = frame.assign(datetime=frame.index)
        date = "datetime"
    for what, column, accepted in (("datetime", date, DATETIME_NAMES), ("instrument", code, INSTRUMENT_NAMES)):
        if column is None and not (what == "instrument" and instrument is not None):
            raise DataError(
                f"{name} has no {what} column; found {list(frame.columns)}, accepted names are {list(accepted)} "
                "(upper or lower case)."
            )
    dates = _dates(_column(frame, date, name), name)
    names = np.full(len(frame), instrument, dtype=object) if code is None else _codes(_column(frame, code, name), name)
    columns: dict[str, np.ndarray] = {}
    for position, column in enumerate(frame.columns):
        if column in (date, code):
            continue
        plain = _plain_name(column)
        if plain in columns:
            raise DataError(
                f"{name}: column {column!r} occurs twice (upper and lower case, $ and blanks do not count)."
            )
        values = _numbers(frame.iloc[:, position], plain, name)
        if values is not None:
            columns[plain] = values
    if not columns:
        raise DataError(f"{name} has no price column; found {list(frame.columns)}, expected some of {PRICE_FIELDS}.")
    return _Table(name, dates, names, columns)


def _plain_name(column: Any) -> str:
    plain = str(column).strip().lstrip("$").lower()
    return FIELD_NAMES.get(plain, plain)


def _find(columns: Iterable[str], accepted: Sequence[str]) -> str | None:
    plain = {str(c).strip().lstrip("$").lower(): c for c in reversed(list(columns))}
    return next((plain[name] for name in accepted if name in plain), None)


def _column(frame: pd.DataFrame, column: str | None, name: str) -> pd.Series:
    found: Any = frame[column]
    if isinstance(found, pd.DataFrame):
        raise DataError(f"{name}: column {column!r} occurs {found.shape[1]} times.")
    assert isinstance(found, pd.Series)
    return found


def _codes(values: pd.Series, name: str) -> np.ndarray:
    missing = values.isna().to_numpy() | (values.astype(object) == "").to_numpy()
    if missing.any():
        raise DataError(f"{name}: row {int(np.argmax(missing))} has no instrument (column {values.name!r}).")
    codes, unique = pd.factorize(values)
    texts = np.array([str(u).strip() for u in unique], dtype=object)
    return texts[codes]


def _dates(values: pd.Series, name: str) -> pd.DatetimeIndex:
    missing = values.isna().to_numpy()
    if missing.any():
        raise DataError(f"{name}: row {int(np.argmax(missing))} has no date (column {values.name!r}).")
    if isinstance(values.dtype, pd.DatetimeTZDtype) or values.dtype.kind == "M":
        return pd.DatetimeIndex(values)
    codes, unique = pd.factorize(values)
    if pd.api.types.is_numeric_dtype(values.dtype):
        whole = unique.astype(np.int64)
        if not (whole == unique).all() or not all(int(d) in DAY_AS_NUMBER for d in whole):
            row = int(np.argmax([int(d) not in DAY_AS_NUMBER for d in whole[codes]]))
            raise DataError(
                f"{name}: column {values.name!r} holds numbers, row {row} is {values.iloc[row]}; only dates written "
                "as 20240131 are understood. Remedy: convert it with pandas.to_datetime first."
            )
        unique = pd.Index(whole.astype(str))
    texts = pd.Index([str(u).strip() for u in unique])
    try:
        stamps = pd.DatetimeIndex(pd.to_datetime(texts))
    except (ValueError, TypeError) as error:
        single = [_is_date(text) for text in texts]
        if all(single):
            raise DataError(
                f"{name}: the dates of column {values.name!r} do not share one format or one time zone: {error} "
                "Remedy: convert the column with pandas.to_datetime(..., utc=True) first."
            ) from None
        row = int(np.argmin(np.asarray(single)[codes]))
        raise DataError(
            f"{name}: row {row} is not a date: {values.iloc[row]!r} in column {values.name!r} "
            "(the first row below the header is row 0)."
        ) from None
    return stamps[codes]


def _is_date(text: str) -> bool:
    try:
        return not pd.isna(pd.to_datetime(text))
    except (ValueError, TypeError):
        return False


def _numbers(values: pd.Series, plain: str, name: str) -> np.ndarray | None:
    """float32 values; None for a column of text that no price expression needs."""
    kind = values.dtype
    if pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_complex_dtype(kind):
        return np.asarray(values.to_numpy(dtype=np.float32, na_value=np.nan))
    converted = pd.to_numeric(values, errors="coerce") if kind.kind not in "mM" else None
    if converted is not None:
        bad = (converted.isna() & values.notna()).to_numpy()
        if not bad.any():
            return np.asarray(converted.to_numpy(dtype=np.float32, na_value=np.nan))
    if plain in PRICE_FIELDS + OTHER_KNOWN_FIELDS:
        row = 0 if converted is None else int(np.argmax(bad))
        raise DataError(
            f"{name}: column {values.name!r} is not numeric: row {row} is {values.iloc[row]!r} "
            "(the first row below the header is row 0)."
        )
    log.info("%s: column %r is not numeric and is left out", name, values.name)
    return None


def _stack(tables: list[_Table]) -> Panel:
    """One dense panel of all tables; refuses keys that occur twice."""
    zones = {str(t.dates.tz): t.name for t in tables}
    if len(zones) > 1:
        raise DataError(f"the files differ in time zone: {', '.join(f'{n} has {z}' for z, n in zones.items())}.")
    dates = tables[0].dates.append([t.dates for t in tables[1:]]) if len(tables) > 1 else tables[0].dates
    date_codes, calendar = pd.factorize(dates, sort=True)
    codes, names = pd.factorize(np.concatenate([t.instruments for t in tables]), sort=True)
    key = codes.astype(np.int64) * len(calendar) + date_codes
    order = np.argsort(key, kind="stable")
    same = np.flatnonzero(key[order[1:]] == key[order[:-1]])
    if len(same):
        first, second = (_row_name(tables, int(order[k])) for k in (same[0], same[0] + 1))
        row = order[same[0]]
        raise DataError(
            f"duplicate key: {first} and {second} are both (datetime {dates[row]}, instrument {names[codes[row]]!r}); "
            f"{len(same)} duplicate rows in all. Remedy: keep one row per instrument and datetime."
        )
    columns = list(dict.fromkeys(c for t in tables for c in t.columns))
    columns.sort(key=lambda c: PRICE_FIELDS.index(c) if c in PRICE_FIELDS else len(PRICE_FIELDS))
    values = np.empty((len(key), len(columns)), dtype=np.float32)
    for j, column in enumerate(columns):
        nothing = [np.full(len(t.dates), np.nan, np.float32) if column not in t.columns else None for t in tables]
        parts = [t.columns[column] if n is None else n for t, n in zip(tables, nothing, strict=True)]
        values[:, j] = np.concatenate(parts)[order]
    panel = Panel(
        datetimes=pd.DatetimeIndex(calendar).rename(None),
        instruments=np.asarray(names, dtype=object),
        date_codes=date_codes[order].astype(np.int32),
        instrument_codes=codes[order].astype(np.int32),
        blocks={"price": Block(values, tuple(columns))},
    )
    return _dense(panel)


def _row_name(tables: list[_Table], row: int) -> str:
    if len(tables) == 1:
        return f"row {row} of {tables[0].name}"
    for table in tables:
        if row < len(table.dates):
            return f"row {row} of {table.name}"
        row -= len(table.dates)
    raise IndexError(row)


def _dense(panel: Panel) -> Panel:
    """Insert NaN rows so that every instrument has all calendar dates between its first and last row."""
    starts = np.flatnonzero(np.diff(panel.instrument_codes, prepend=-1))
    stops = np.append(starts[1:], panel.n_rows)
    first, last = panel.date_codes[starts].astype(np.int64), panel.date_codes[stops - 1].astype(np.int64)
    lengths = last - first + 1
    total = int(lengths.sum())
    if total == panel.n_rows:
        return panel
    begin = np.cumsum(lengths) - lengths
    present = panel.instrument_codes[starts]
    group = np.repeat(np.arange(len(starts)), stops - starts)
    target = begin[group] + panel.date_codes - first[group]
    values = np.full((total, len(panel.columns("price"))), np.nan, dtype=panel.values("price").dtype)
    values[target] = panel.values("price")
    return replace(
        panel,
        date_codes=(np.arange(total) - np.repeat(begin - first, lengths)).astype(np.int32),
        instrument_codes=np.repeat(present, lengths).astype(np.int32),
        blocks={"price": Block(values, panel.columns("price"))},
    )


def _members(panel: Panel, instruments: Any) -> Panel:
    """Restrict a table's panel to instruments (and spans); market names cannot be looked up here."""
    if isinstance(instruments, Mapping) and "market" in instruments:
        instruments = _market_of(instruments)
    if instruments is None or isinstance(instruments, str):
        if instruments not in (None, "all"):
            log.info(
                "market %r cannot be looked up in these prices: all %d instruments are used",
                instruments, len(panel.instruments),
            )  # fmt: skip
        return panel
    spans = _given_spans(instruments)
    panel = restrict_rows(panel, list(spans), None, None)
    if all(s is None for s in spans.values()):
        return panel
    live = np.zeros(panel.n_rows, dtype=bool)
    for code, name in enumerate(panel.instruments):
        low, high = np.searchsorted(panel.instrument_codes, [code, code + 1])
        for begin, end in spans[str(name)] or [(None, None)]:
            first, stop = panel.date_code_range(begin, end)
            dates = panel.date_codes[low:high]
            live[low:high] |= (dates >= first) & (dates < stop)
    return replace(panel, live=live)


Spans = dict[str, list[tuple[Any, Any]] | None]  # instrument -> membership; None = always


def _given_spans(instruments: Any) -> Spans:
    if isinstance(instruments, Mapping):
        try:
            return {str(code): [(begin, end) for begin, end in spans] for code, spans in instruments.items()}
        except (TypeError, ValueError):
            raise ConfigError(
                f"instruments: expected {{code: [(start, end), ...]}}, got {str(instruments)[:80]}."
            ) from None
    if isinstance(instruments, (list, tuple, set, np.ndarray, pd.Index)):
        return {str(code): None for code in instruments}
    raise ConfigError(
        "instruments must be a market name, a list of instruments, {code: [(start, end), ...]} or "
        f"{{'market': name}}; got {type(instruments).__name__}: {str(instruments)[:80]}"
    )


def _market_of(config: Mapping[str, Any]) -> str:
    if config.get("filter_pipe"):
        raise ConfigError("instruments: filter_pipe is not available. Remedy: give the instruments as a list.")
    return str(config["market"])


# ---------------------------------------------------------------- Qlib's binary store
def is_store(path: Any) -> bool:
    """True if the folder looks like a Qlib binary store."""
    root = Path(path).expanduser()
    return (root / "calendars").is_dir() and (root / "features").is_dir()


class BinaryStore:
    """Reader of Qlib's binary data folder: calendars/, instruments/ and features/.

    Parameters
    ----------
    provider_uri : path or {freq: path}
    freq : str
        "day", "1min", ...

    Raises
    ------
    DataError
        The folder, its calendar or its features are missing or damaged.
    """

    def __init__(self, provider_uri: Any, freq: str = "day") -> None:
        self.freq = FREQ_NAMES.get(freq.lower(), freq.lower())
        if isinstance(provider_uri, Mapping):
            by_freq = {FREQ_NAMES.get(str(k).lower(), str(k).lower()): v for k, v in provider_uri.items()}
            if self.freq not in by_freq:
                raise ConfigError(f"provider_uri has no entry for freq {self.freq!r}; it has {sorted(by_freq)}.")
            provider_uri = by_freq[self.freq]
        if not isinstance(provider_uri, (str, Path)):
            raise ConfigError(f"provider_uri must be a path, got {type(provider_uri).__name__}: {provider_uri!r}")
        self.root = Path(provider_uri).expanduser()
        if not self.root.is_dir():
            raise DataError(f"provider_uri: no such folder: {self.root}")
        self.calendar = self._read_calendar()

    def markets(self) -> list[str]:
        """Names of the market files."""
        return sorted(p.stem for p in (self.root / "instruments").glob("*.txt"))

    def read(
        self,
        instruments: Any = "all",
        wanted: Sequence[str] | None = None,
        start_time: Any = None,
        end_time: Any = None,
        margin: tuple[int, int] = (0, 0),
    ) -> Prices:
        """Rows stored for `instruments` between the times, widened by `margin` calendar steps.

        Parameters
        ----------
        instruments, start_time, end_time
            As in `load_prices`.
        wanted : sequence of str, optional
            Fields; None reads every field that some instrument has. A field without a file is left out.
        margin : (int, int)
            Calendar steps before and after.
        """
        spans = self._spans(instruments)
        low, high = self._date_range(start_time, end_time)
        if low >= high:
            raise DataError(
                f"no trading day between start_time={start_time} and end_time={end_time}; the calendar of {self.root} "
                f"runs from {self.calendar[0]} to {self.calendar[-1]}."
            )
        low, high = max(0, low - margin[0]), min(len(self.calendar), high + margin[1])
        stored: dict[str, dict[str, tuple[int, np.ndarray]]] = {}
        for code in sorted(spans):
            found = self._read_instrument(code, wanted, low, high)
            if found:
                stored[code] = found
        absent = [code for code in spans if code not in stored]
        if absent:
            log.info("%d of %d instruments have no data in %s, e.g. %s", len(absent), len(spans), self.root, absent[:5])
        if not stored:
            raise DataError(
                f"none of the {len(spans)} instruments ({', '.join(list(spans)[:5])}, ...) has data in "
                f"{self.root / 'features'} for freq {self.freq!r} between {self.calendar[low]} and "
                f"{self.calendar[high - 1]}."
            )
        return self._assemble(stored, spans)

    # ---------------------------------------------------------------- calendar and membership
    def _read_calendar(self) -> pd.DatetimeIndex:
        path = self.root / "calendars" / f"{self.freq}.txt"
        if not path.is_file():
            found = sorted(p.stem for p in (self.root / "calendars").glob("*.txt") if not p.stem.endswith("_future"))
            raise DataError(
                f"{self.root} is no Qlib data folder for freq {self.freq!r}: {path} is missing"
                + (f"; there are calendars for {found}." if found else " and there is no other calendar.")
            )
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line]
        if not lines:
            raise DataError(f"{path} holds no dates.")
        calendar = _dates(pd.Series(lines, name="date", dtype=object), str(path))
        steps = np.flatnonzero(np.diff(calendar.asi8) <= 0)
        if len(steps):
            raise DataError(f"{path}: line {steps[0] + 2} ({lines[steps[0] + 1]}) is not after the line before it.")
        return calendar

    def _date_range(self, begin: Any, end: Any) -> tuple[int, int]:
        """Half-open calendar range of the days between, both inclusive; a date alone means the whole day."""
        empty = np.empty(0, dtype=np.int32)
        return Panel(self.calendar, np.empty(0, dtype=object), empty, empty, {}).date_code_range(begin, end)

    def _spans(self, instruments: Any) -> Spans:
        if instruments is None:
            instruments = "all"
        if isinstance(instruments, Mapping) and "market" in instruments:
            instruments = _market_of(instruments)
        return self._read_market(instruments) if isinstance(instruments, str) else _given_spans(instruments)

    def _read_market(self, market: str) -> Spans:
        path = self.root / "instruments" / f"{market.lower()}.txt"
        if not path.is_file():
            known = self.markets()
            raise DataError(
                f"market {market!r} is not in {self.root / 'instruments'}; there are {known}." + suggest(market, known)
            )
        spans: Spans = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            parts = [part.strip() for part in line.split("\t")]
            if len(parts) < 3 or not parts[0]:
                raise DataError(f"{path}: line {number} is not CODE, start, end with tabs between: {line!r}")
            if not (_is_date(parts[1]) and _is_date(parts[2])):
                raise DataError(f"{path}: line {number} holds something that is not a date: {line!r}")
            spans.setdefault(parts[0], []).append((parts[1], parts[2]))  # type: ignore[union-attr]
        if not spans:
            raise DataError(f"{path} names no instruments.")
        return spans

    # ---------------------------------------------------------------- feature files
    def _folder(self, code: str) -> Path:
        name = f"_qlib_{code}" if code.upper() in WINDOWS_DEVICES else code
        return self.root / "features" / name.lower()

    def _read_instrument(
        self, code: str, wanted: Sequence[str] | None, low: int, high: int
    ) -> dict[str, tuple[int, np.ndarray]]:
        """Field -> (calendar position of the first value, values), cut to [low, high)."""
        folder, ending = self._folder(code), f".{self.freq}.bin"
        names = wanted
        if names is None:
            names = [p.name[: -len(ending)] for p in sorted(folder.glob(f"*{ending}"))] if folder.is_dir() else []
        found = {}
        for name in names:
            part = _read_bin(folder / f"{name}{ending}", low, high, len(self.calendar))
            if part is not None and len(part[1]):
                found[name] = part
        return found

    def _assemble(self, stored: Mapping[str, Mapping[str, tuple[int, np.ndarray]]], spans: Spans) -> Prices:
        names = {field for fields in stored.values() for field in fields}
        columns = [c for c in PRICE_FIELDS if c in names] + sorted(names - set(PRICE_FIELDS))
        first = np.array([min(at for at, _ in f.values()) for f in stored.values()])
        stop = np.array([max(at + len(v) for at, v in f.values()) for f in stored.values()])
        lengths = stop - first
        begin = np.cumsum(lengths) - lengths
        values = np.full((int(lengths.sum()), len(columns)), np.nan, dtype=np.float32)
        extents = {c: Extent(begin.copy(), begin.copy()) for c in columns}
        live = np.zeros(len(values), dtype=bool)
        for i, (code, found) in enumerate(stored.items()):
            for j, column in enumerate(columns):
                if column in found:
                    at, part = found[column]
                    row = int(begin[i] + at - first[i])
                    values[row : row + len(part), j] = part
                    extents[column].start[i], extents[column].stop[i] = row, row + len(part)
            for span in spans[code] or [(None, None)]:
                day, after = (int(np.clip(d, first[i], stop[i])) for d in self._date_range(*span))
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


def _read_bin(path: Path, low: int, high: int, n_dates: int) -> tuple[int, np.ndarray] | None:
    """(calendar position, float32 values) of a .bin file between two calendar positions; None if there is no file."""
    if not path.is_file():
        return None
    size = path.stat().st_size
    if size == 0:
        return None
    if size % 4:
        raise DataError(f"{path} is damaged: {size} bytes are not a whole number of float32 values.")
    start = float(np.fromfile(path, dtype="<f4", count=1)[0])
    if not (np.isfinite(start) and start >= 0 and start == int(start)) or start >= n_dates:
        raise DataError(
            f"{path} is damaged: its first value must be the calendar position of the first day "
            f"(0 to {n_dates - 1}), it is {start}."
        )
    first, stop = max(int(start), low), min(int(start) + size // 4 - 1, high)
    if first >= stop:
        return None
    offset = 4 * (1 + first - int(start))
    return first, np.fromfile(path, dtype="<f4", count=stop - first, offset=offset)
