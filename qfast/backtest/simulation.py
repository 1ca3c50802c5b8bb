"""The daily simulation: the scores of a day determine the orders of the next day."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd

from qfast.backtest.book import Book
from qfast.backtest.exchange import Exchange, is_number
from qfast.backtest.market import Market
from qfast.backtest.result import Backtest
from qfast.backtest.strategy import TopkDropout, orders_of_day
from qfast.errors import ConfigError, DataError, shown

__all__ = ["backtest", "check_account"]


def backtest(
    score: pd.Series,
    market: Market,
    strategy: TopkDropout,
    exchange: Exchange,
    *,
    account: float = 1e8,
    benchmark: pd.Series | None = None,
    day_before: pd.Timestamp | None = None,
) -> Backtest:
    """Simulate trading on daily scores. The scores of a day determine the orders of the next day.

    Parameters
    ----------
    score : Series
        Indexed by (datetime, instrument), in any order. Higher is better.
    market : Market
        Prices of the trading days.
    strategy : TopkDropout
    exchange : Exchange
    account : float
        Initial amount of money.
    benchmark : Series, optional
        Daily returns by day. Missing days count as 0. Without a benchmark, its column is NaN.
    day_before : Timestamp, optional
        The trading day before the first one, whose scores determine the first orders.

    Raises
    ------
    ConfigError
        `account` is not a positive number.
    DataError
        No trading day follows a day with scores, `score` is not a Series indexed by (datetime, instrument), or its
        index contains duplicates.

    Source: the daily backtest of pyqlib 0.9.7, TopkDropoutStrategy, SimulatorExecutor, Exchange and Account.
    """
    check_account(account)
    signals = _signals(score, market, day_before)
    if not any(signal is not None for signal in signals):
        raise DataError(
            f"backtest: no day from {market.days[0].date()} to {market.days[-1].date()} follows a day with scores."
        )
    book = Book(market, exchange, float(account))
    for day, signal in enumerate(signals):
        orders = [] if signal is None else orders_of_day(book, day, signal, strategy)
        book.trade(day, orders)
    return book.result(benchmark)


def check_account(account: object) -> None:
    """Raise a ConfigError if `account` is not a positive finite number."""
    if not is_number(account) or not 0 < account < math.inf:
        raise ConfigError(f"backtest: account must be a positive amount of money, got {shown(account)}.")


def _signals(score: pd.Series, market: Market, day_before: pd.Timestamp | None) -> list[np.ndarray | None]:
    """For each day, the scores of the day before, float64 [2, n]: instrument codes and values. None without scores."""
    if not isinstance(score, pd.Series) or not {"datetime", "instrument"} <= set(score.index.names):
        raise DataError(
            f"backtest: score must be a Series indexed by (datetime, instrument), got a {type(score).__name__}"
            + (f" indexed by {list(score.index.names)}." if isinstance(score, (pd.Series, pd.DataFrame)) else ".")
        )
    duplicate = score.index.duplicated()
    if duplicate.any():
        raise DataError(
            f"backtest: score has {int(duplicate.sum())} row(s) with a duplicate (datetime, instrument), first "
            f"{tuple(map(str, score.index[int(np.argmax(duplicate))]))}. Remedy: score[~score.index.duplicated()]."
        )
    days = score.index.get_level_values("datetime")
    position = pd.Index(market.instruments).get_indexer(score.index.get_level_values("instrument"))
    values = score.to_numpy(dtype=np.float64)
    before = [day_before, *market.days[:-1]]
    codes = pd.DatetimeIndex([d for d in before if d is not None]).get_indexer(days)
    signals: list[np.ndarray | None] = [] if day_before is not None else [None]
    # An instrument without prices cannot be traded, but it has a rank. Its code is at least N.
    position = np.where(position < 0, len(market.instruments) + np.cumsum(position < 0), position)
    order = np.lexsort((position, codes))
    bounds = np.searchsorted(codes[order], np.arange(len(before) - len(signals) + 1))
    for low, high in itertools.pairwise(bounds):
        rows = order[low:high]
        signals.append(np.array([position[rows], values[rows]]) if len(rows) else None)
    return signals
