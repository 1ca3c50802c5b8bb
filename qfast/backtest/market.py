"""What can be traded at which price, as arrays over days and instruments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from qfast.backtest.exchange import MARKET_FIELDS, Exchange
from qfast.data.factors import evaluate_all
from qfast.data.panel import Panel
from qfast.data.prices import Prices
from qfast.errors import DataError

__all__ = ["Market", "equal_weight_return"]

NO_PRICE = 1e-8  # a deal price up to here is none; the close is used


@dataclass(frozen=True)
class Market:
    """What can be traded at which price: float64 or bool [D, N] over days and instruments."""

    days: pd.DatetimeIndex
    instruments: np.ndarray
    close: np.ndarray  # NaN: suspended
    buy_price: np.ndarray
    sell_price: np.ndarray
    volume: np.ndarray
    factor: np.ndarray | None  # None: adjusted prices, no round lots
    no_buying: np.ndarray
    no_selling: np.ndarray

    @classmethod
    def of(cls, prices: Prices, exchange: Exchange, start: Any, end: Any) -> tuple[Market, list[str]]:
        """The market between two days, both inclusive, and what has to be said of it.

        Parameters
        ----------
        prices : Prices
            At least one day more than wanted, so that the first day's change is known.
        exchange : Exchange
        start, end : date-like or None
        """
        panel, extents = prices
        low, high = panel.date_code_range(start, end)
        if low >= high:
            raise DataError(f"backtest: there is no trading day from {start} to {end} in the prices.")
        columns = {c.lower() for c in panel.columns("price")}
        notes = []
        change = "$change"
        if "change" not in columns:
            change = "$close / Ref($close, 1) - 1"
            if isinstance(exchange.limit_threshold, (int, float)):
                notes.append("the prices have no column change; price limits look at close / yesterday's close - 1")
        texts = ["$close", *exchange.deal_texts(), "$volume", change, "$factor", *exchange.limit_texts()]
        rows = np.flatnonzero((panel.date_codes >= low) & (panel.date_codes < high))
        found = evaluate_all(texts, panel, rows=rows, extents=extents, optional=(*MARKET_FIELDS, "change", "factor"))
        table = np.full((len(texts), high - low, len(panel.instruments)), np.nan)
        table[:, panel.date_codes[rows] - low, panel.instrument_codes[rows]] = found.T
        close, buy, sell, volume, moved, factor = table[:6]
        wrong = np.isinf(close) | (close <= 0)
        if wrong.any():
            close[wrong] = np.nan
            first = panel.instruments[int(np.flatnonzero(wrong.any(0))[0])]
            notes.append(
                f"{int(wrong.sum())} closing prices are infinite, zero or negative, the first of {first}: they count "
                "as missing, nothing is traded on those days"
            )
        suspended = np.isnan(close)
        if exchange.limit_texts():
            no_buying, no_selling = (np.isnan(side) | (side != 0) | suspended for side in table[6:])
        elif exchange.limit_threshold is None:
            no_buying = no_selling = suspended
        else:
            limit = float(exchange.limit_threshold)  # type: ignore[arg-type]
            # float32 like the reference's, so that a change of just the threshold counts alike
            no_buying = (moved.astype(np.float32) >= limit) | suspended
            no_selling = (moved.astype(np.float32) <= -limit) | suspended
        buy, sell = (np.where(np.isfinite(price) & (price > NO_PRICE), price, close) for price in (buy, sell))
        adjusted = bool((np.isnan(factor) & ~suspended).any())
        if adjusted and exchange.trade_unit not in (None, 1):
            notes.append("the prices have no (whole) column factor, so they count as adjusted: no round lots")
        return cls(
            panel.datetimes[low:high], panel.instruments, close, buy, sell, volume,
            None if adjusted or exchange.trade_unit is None else factor, no_buying, no_selling,
        ), notes  # fmt: skip


def equal_weight_return(panel: Panel) -> pd.Series:
    """Mean over the instruments of each day's close / yesterday's close - 1; by day."""
    change = evaluate_all(["$close / Ref($close, 1) - 1"], panel)[:, 0].astype(np.float64)
    change[~np.isfinite(change)] = np.nan
    return pd.Series(change).groupby(panel.datetimes[panel.date_codes]).mean().rename("bench")
