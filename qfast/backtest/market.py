"""Prices and restrictions of trading, as arrays over days and instruments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from qfast.backtest.exchange import MARKET_FIELDS, Exchange
from qfast.data.factors import evaluate_all
from qfast.data.panel import Panel
from qfast.data.prices import Prices
from qfast.dates import DateLike
from qfast.errors import DataError

__all__ = ["Market", "equal_weight_return"]

NO_PRICE = 1e-8  # deal prices up to this value are missing and replaced by the close


@dataclass(frozen=True)
class Market:
    """Prices and restrictions of trading: float64 or bool arrays [D, N] over days and instruments.

    Attributes
    ----------
    days : DatetimeIndex
        D trading days.
    instruments : ndarray
        N names, sorted.
    close : ndarray
        Closing price. NaN: suspended.
    buy_price, sell_price, volume : ndarray
    factor : ndarray or None
        Adjustment factor. None: the prices are adjusted, so there are no round lots.
    no_buying, no_selling : ndarray
        bool, True where buying, or selling, is impossible.
    """

    days: pd.DatetimeIndex
    instruments: np.ndarray
    close: np.ndarray
    buy_price: np.ndarray
    sell_price: np.ndarray
    volume: np.ndarray
    factor: np.ndarray | None
    no_buying: np.ndarray
    no_selling: np.ndarray

    @classmethod
    def of(
        cls, prices: Prices, exchange: Exchange, start: DateLike | None, end: DateLike | None
    ) -> tuple[Market, list[str]]:
        """Build the market between two days, both inclusive, and notes about its prices.

        Parameters
        ----------
        prices : Prices
            They should begin a day before `start`, so the change of the first day is defined.
        exchange : Exchange
        start, end : date-like or None
        """
        panel, extents = prices
        days = panel.datetimes
        low, high = panel.date_code_range(start, end)
        if low >= high:
            raise DataError(
                f"backtest: there is no trading day from {start} to {end} in the prices, which "
                + (f"are from {days[0].date()} to {days[-1].date()}." if len(days) else "are empty.")
            )
        columns = {c.lower() for c in panel.columns("price")}
        notes = []
        change = "$change"
        if "change" not in columns:
            change = "$close / Ref($close, 1) - 1"
            if isinstance(exchange.limit_threshold, (int, float)):
                notes.append("the prices have no column change; price limits use close / yesterday's close - 1")
        texts = ["$close", *exchange.deal_texts(), "$volume", change, "$factor", *exchange.limit_texts()]
        rows = np.flatnonzero((panel.date_codes >= low) & (panel.date_codes < high))
        values = evaluate_all(texts, panel, rows=rows, extents=extents, optional=(*MARKET_FIELDS, "change", "factor"))
        table = np.full((len(texts), high - low, len(panel.instruments)), np.nan)
        table[:, panel.date_codes[rows] - low, panel.instrument_codes[rows]] = values.T
        close, buy, sell, volume, returns, factor = table[:6]
        invalid = np.isinf(close) | (close <= 0)
        if invalid.any():
            close[invalid] = np.nan
            first = panel.instruments[int(np.flatnonzero(invalid.any(0))[0])]
            notes.append(
                f"{int(invalid.sum())} closing prices are infinite, zero or negative, the first one of {first}: they "
                "count as missing, and the instrument is not traded on these days"
            )
        suspended = np.isnan(close)
        if exchange.limit_texts():
            no_buying, no_selling = (np.isnan(side) | (side != 0) | suspended for side in table[6:])
        elif exchange.limit_threshold is None:
            no_buying = no_selling = suspended
        else:
            limit = float(exchange.limit_threshold)  # type: ignore[arg-type]
            # float32 as in Qlib, so changes equal to the threshold are treated in the same way
            no_buying = (returns.astype(np.float32) >= limit) | suspended
            no_selling = (returns.astype(np.float32) <= -limit) | suspended
        buy, sell = (np.where(np.isfinite(price) & (price > NO_PRICE), price, close) for price in (buy, sell))
        adjusted = bool((np.isnan(factor) & ~suspended).any())
        if adjusted and exchange.trade_unit not in (None, 1):
            notes.append(
                "the prices have no complete column factor, so they are treated as adjusted, without round lots"
            )
        market = cls(
            days=panel.datetimes[low:high],
            instruments=panel.instruments,
            close=close,
            buy_price=buy,
            sell_price=sell,
            volume=volume,
            factor=None if adjusted or exchange.trade_unit is None else factor,
            no_buying=no_buying,
            no_selling=no_selling,
        )
        return market, notes


def equal_weight_return(panel: Panel) -> pd.Series:
    """Mean return of all instruments by day, where a return is close / yesterday's close - 1."""
    change = evaluate_all(["$close / Ref($close, 1) - 1"], panel)[:, 0].astype(np.float64)
    change[~np.isfinite(change)] = np.nan
    return pd.Series(change).groupby(panel.datetimes[panel.date_codes]).mean().rename("bench")
