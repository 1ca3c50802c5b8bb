"""The daily simulation: scores of one day become orders of the next."""

from __future__ import annotations

import itertools
import math
from typing import Any

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
    """Trade on scores: those of one day are acted on the next.

    Parameters
    ----------
    score : Series
        By (datetime, instrument), in any order; higher is better.
    market : Market
        The days traded.
    strategy : TopkDropout
    exchange : Exchange
    account : float
        Money at the start.
    benchmark : Series, optional
        Daily return by day; days it has not count as 0. None: no benchmark, NaN.
    day_before : Timestamp, optional
        The trading day before the first, whose scores are used on it.

    Raises
    ------
    ConfigError
        No money.
    DataError
        Not one day of the market follows a day with scores; scores that are no Series by (datetime, instrument), or
        two of one instrument on one day.

    Source
    ------
    The daily backtest of pyqlib 0.9.7: TopkDropoutStrategy, SimulatorExecutor, Exchange, Account.
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


def check_account(account: Any) -> None:
    """Raise a ConfigError for what is no amount of money."""
    if not is_number(account) or not 0 < account < math.inf:
        raise ConfigError(f"backtest: account must be an amount of money, got {shown(account)}.")


def _signals(score: pd.Series, market: Market, day_before: pd.Timestamp | None) -> list[np.ndarray | None]:
    """For each day the scores of the day before, [2, n]: instrument codes and values; None where there are none."""
    if not isinstance(score, pd.Series) or not {"datetime", "instrument"} <= set(score.index.names):
        raise DataError(
            f"backtest: score must be a Series by (datetime, instrument), got a {type(score).__name__}"
            + (f" indexed by {list(score.index.names)}." if isinstance(score, (pd.Series, pd.DataFrame)) else ".")
        )
    twice = score.index.duplicated()
    if twice.any():
        raise DataError(
            f"backtest: score has {int(twice.sum())} row(s) whose (datetime, instrument) occurs before, first "
            f"{tuple(map(str, score.index[int(np.argmax(twice))]))}. Remedy: score[~score.index.duplicated()]."
        )
    days = score.index.get_level_values("datetime")
    place = pd.Index(market.instruments).get_indexer(score.index.get_level_values("instrument"))
    values = score.to_numpy(dtype=np.float64)
    before = [day_before, *market.days[:-1]]
    codes = pd.DatetimeIndex([d for d in before if d is not None]).get_indexer(days)
    out: list[np.ndarray | None] = [] if day_before is not None else [None]
    # An instrument without prices cannot be traded, but it takes its rank all the same: codes from N on.
    place = np.where(place < 0, len(market.instruments) + np.cumsum(place < 0), place)
    order = np.lexsort((place, codes))
    bounds = np.searchsorted(codes[order], np.arange(len(before) - len(out) + 1))
    for low, high in itertools.pairwise(bounds):
        some = order[low:high]
        out.append(np.array([place[some], values[some]]) if len(some) else None)
    return out
