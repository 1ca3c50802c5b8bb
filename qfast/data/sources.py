"""Prices from a CSV or Parquet file or folder, a pandas frame, or Qlib's binary store.

Every source ends in one panel with the group "price" (open, high, low, close, volume, vwap where there
is one, and whatever else the source holds), float32, instrument by instrument. Between an instrument's
first and last row every date of the calendar has a row, NaN where the source had none: a shift by n
rows is then a shift by n trading days.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from qfast.data.panel import Panel
from qfast.data.prices import Instruments, Prices, PriceSource, StorePath, given_spans, market_of
from qfast.data.rows import restrict_rows, take_rows
from qfast.data.store import BinaryStore, is_store
from qfast.data.tables import panel_of
from qfast.dates import DateLike
from qfast.errors import ConfigError, DataError, suggest

__all__ = ["BinaryStore", "Prices", "load_prices", "read_prices"]

log = logging.getLogger("qfast.data")


def load_prices(
    source: PriceSource | None = None,
    *,
    provider_uri: StorePath | None = None,
    instruments: Instruments = "all",
    start_time: DateLike | None = None,
    end_time: DateLike | None = None,
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
    >>> import pandas as pd
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
    source: PriceSource | None = None,
    *,
    provider_uri: StorePath | None = None,
    instruments: Instruments = "all",
    start_time: DateLike | None = None,
    end_time: DateLike | None = None,
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
        assert source is not None
        prices = Prices(_members(panel_of(source), instruments), {})
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


def _members(panel: Panel, instruments: Instruments) -> Panel:
    """Restrict a table's panel to instruments (and spans); market names cannot be looked up here."""
    if isinstance(instruments, Mapping) and "market" in instruments:
        instruments = market_of(instruments)
    if instruments is None or isinstance(instruments, str):
        if instruments not in (None, "all"):
            log.info(
                "market %r cannot be looked up in these prices: all %d instruments are used",
                instruments, len(panel.instruments),
            )  # fmt: skip
        return panel
    spans = given_spans(instruments)
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
