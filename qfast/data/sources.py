"""Reads prices from CSV or Parquet files, folders of them, pandas frames, or Qlib's binary store.

Every source becomes a panel with the group "price": open, high, low, close, volume and vwap if available, and all other
fields of the source, float32. Between the first and the last row of an instrument, every date of the calendar has a
row, which is NaN if the source has none. A shift by n rows is therefore a shift by n trading days.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from qfast.data.panel import Panel
from qfast.data.prices import Instruments, Prices, PriceSource, StorePath, market_of, membership
from qfast.data.rows import restrict_rows, take_rows
from qfast.data.store import BinaryStore, is_store
from qfast.data.tables import panel_of
from qfast.dates import DateLike
from qfast.errors import ConfigError, DataError, naming_data_page, shown, suggest
from qfast.read_options import ReadOptions, ReadSettings

__all__ = ["BinaryStore", "Prices", "load_prices", "read_prices"]

log = logging.getLogger("qfast.data")

DEFAULTS = ReadOptions()


def load_prices(
    source: PriceSource | None = None,
    *,
    provider_uri: StorePath | None = None,
    instruments: Instruments = "all",
    start_time: DateLike | None = None,
    end_time: DateLike | None = None,
    freq: str | None = None,
    vwap: str | None = None,
    read_options: ReadSettings = None,
) -> Panel:
    """Read prices from any source.

    Parameters
    ----------
    source : path, DataFrame, Arrow table or Panel
        A CSV or Parquet file; a folder with one such file per instrument, whose name is the instrument unless a column
        contains it; a frame with datetime and instrument as index levels or columns; a table of Polars, Arrow or
        DuckDB; or the folder of a Qlib binary store.
    provider_uri : path or {freq: path}
        Folder of a Qlib binary store, as an alternative to `source`.
    instruments : str, list, {code: [(start, end), ...]} or {"market": name}
        The name of a market, or instruments. Only a store has markets; for other sources a market means all
        instruments.
    start_time, end_time : date-like, optional
        First and last time, both inclusive.
    freq : str, optional
        Calendar and files of a store: "day" (default), "1min", ... For tables, "day" normalizes times to dates.
    vwap : {None, "typical"}
        "typical": if the source has no vwap, use (high + low + close) / 3.
    read_options : ReadOptions or mapping, optional
        How to read tables: format of the dates, encoding, separator and so on.

    Returns
    -------
    Panel
        One group "price". `live` is False where an instrument does not belong to the market.

    Raises
    ------
    DataError
        A file is missing, empty or damaged; a column is missing, not numeric or not a date; or a key occurs twice. The
        message names the file, the column and the row.
    ConfigError
        An argument is invalid.

    Examples
    --------
    >>> import pandas as pd
    >>> frame = pd.DataFrame({"Date": ["2024-01-02", "2024-01-03"], "Ticker": "A", "Close": [10.0, 11.0]})
    >>> panel = load_prices(frame)
    >>> panel.columns("price"), panel.values("price")[:, 0].tolist()
    (('close',), [10.0, 11.0])
    """
    prices = read_prices(
        source,
        provider_uri=provider_uri,
        instruments=instruments,
        start_time=start_time,
        end_time=end_time,
        vwap=vwap,
        options=ReadOptions.of(read_options).over(ReadOptions(freq=freq)),
    )
    panel = prices.panel
    low, high = panel.date_code_range(start_time, end_time)
    inside = (panel.date_codes >= low) & (panel.date_codes < high)
    if not inside.all() or len(np.unique(panel.date_codes)) < len(panel.datetimes):
        panel = take_rows(panel, np.flatnonzero(inside))
    if panel.n_rows == 0:
        dates = prices.panel.datetimes
        span = f"from {dates[0]} to {dates[-1]}" if len(dates) else "none"
        raise DataError(f"no prices between start_time={start_time} and end_time={end_time}; the data has {span}.")
    return panel


def read_prices(
    source: PriceSource | None = None,
    *,
    provider_uri: StorePath | None = None,
    instruments: Instruments = "all",
    start_time: DateLike | None = None,
    end_time: DateLike | None = None,
    vwap: str | None = None,
    options: ReadOptions = DEFAULTS,
    wanted: Sequence[str] | None = None,
    margin: tuple[int, int] = (0, 0),
) -> Prices:
    """Like `load_prices`, but includes the rows around [start_time, end_time] that expressions read.

    Parameters
    ----------
    source, provider_uri, instruments, start_time, end_time, vwap
        As in `load_prices`. The times limit what is read from a store; the result may contain rows outside them.
    options : ReadOptions
        The frequency of a store, and how to read a table.
    wanted : sequence of str, optional
        Fields to read from a store. Default: all.
    margin : (int, int)
        Additional calendar steps before `start_time` and after `end_time`.

    Returns
    -------
    Prices

    Raises
    ------
    DataError, ConfigError
        As in `load_prices`.
    """
    if (source is None) == (provider_uri is None):
        raise ConfigError(
            "exactly one of prices (a file, folder or frame) and provider_uri (a Qlib data folder) is required, got "
            + (f"both: a {type(source).__name__} and {shown(provider_uri)}." if source is not None else "neither.")
        )
    if vwap not in (None, "typical"):
        raise ConfigError(f"vwap must be None or 'typical', got {vwap!r}." + suggest(vwap, ["typical"]))
    if provider_uri is None and isinstance(source, (str, Path)) and is_store(source):
        provider_uri, source = source, None
    if provider_uri is not None:
        with naming_data_page():
            store = BinaryStore(provider_uri, options.freq or "day")
            prices = store.read(instruments, wanted, start_time, end_time, margin)
    else:
        assert source is not None
        prices = Prices(_members(panel_of(source, options), instruments), {})
    return _with_typical_vwap(prices) if vwap == "typical" else prices


def _with_typical_vwap(prices: Prices) -> Prices:
    panel = prices.panel
    names = panel.columns("price")
    if "vwap" in names:
        return prices
    parts = [panel.column(name, "price") for name in ("high", "low", "close")]
    typical = ((parts[0].astype(np.float64) + parts[1] + parts[2]) / 3).astype(np.float32)
    log.info("the prices have no vwap; using (high + low + close) / 3")
    values = np.column_stack([panel.values("price"), typical])
    return prices._replace(panel=panel.replace("price", values, (*names, "vwap")))


def _members(panel: Panel, instruments: Instruments) -> Panel:
    """Restrict the panel of a table to instruments and spans. A table has no markets."""
    if isinstance(instruments, Mapping) and "market" in instruments:
        instruments = market_of(instruments)
    if instruments is None or isinstance(instruments, str):
        if instruments not in (None, "all"):
            log.info("these prices have no market %r; using all %d instruments", instruments, len(panel.instruments))
        return panel
    spans = membership(instruments)
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
