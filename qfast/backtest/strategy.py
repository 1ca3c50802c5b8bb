"""The TopkDropout strategy: which instruments to buy and sell on the scores of a day."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from qfast.backtest.book import Book
from qfast.backtest.exchange import is_number
from qfast.errors import ConfigError

__all__ = ["TopkDropout", "orders_of_day"]


@dataclass(frozen=True)
class TopkDropout:
    """Keep `topk` instruments in the portfolio and replace up to `n_drop` of them each day.

    Parameters
    ----------
    topk : int
        Number of instruments in the portfolio, at least 1.
    n_drop : int
        Largest number of instruments to replace in a day, at least 0.
    hold_thresh : int
        Smallest number of days between the purchase and the sale of an instrument.
    only_tradable : bool
        Rank only instruments that can be traded that day.
    forbid_all_trade_at_limit : bool
        True: neither buy nor sell an instrument at its price limit. False: only trades in the direction of the limit
        are impossible.
    risk_degree : float
        Fraction of the cash to spend, in (0, 1].

    Raises
    ------
    ConfigError
        An argument is out of range or has another type.

    Source
    ------
    TopkDropoutStrategy of pyqlib 0.9.7, with method_sell="bottom" and method_buy="top".
    """

    topk: int
    n_drop: int
    hold_thresh: int = 1
    only_tradable: bool = False
    forbid_all_trade_at_limit: bool = True
    risk_degree: float = 0.95

    def __post_init__(self) -> None:
        for name, least in (("topk", 1), ("n_drop", 0), ("hold_thresh", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(
                    f"TopkDropoutStrategy: {name} must be a whole number of at least {least}, got {value!r}."
                )
        for name in ("only_tradable", "forbid_all_trade_at_limit"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"TopkDropoutStrategy: {name} must be true or false, got {getattr(self, name)!r}.")
        if not is_number(self.risk_degree) or not 0 < self.risk_degree <= 1:
            raise ConfigError(f"TopkDropoutStrategy: risk_degree must be a number in (0, 1], got {self.risk_degree!r}.")


def orders_of_day(book: Book, day: int, signal: np.ndarray, strategy: TopkDropout) -> list[tuple[int, float]]:
    """The orders of a day, sales first.

    Parameters
    ----------
    book : Book
        Cash and positions before the orders.
    day : int
        Position of the day in the market.
    signal : ndarray
        float64 [2, n]: instrument codes and their scores.
    strategy : TopkDropout

    Returns
    -------
    list of (int, float)
        Instrument code and number of shares, which is negative for a sale.
    """
    codes, scores = signal[0].astype(np.int64), signal[1]
    held = np.flatnonzero(book.amount > 0)
    score_of = dict(zip(codes.tolist(), scores.tolist(), strict=True))
    tradable = book.tradable(day, None)

    def can_be_traded(some: np.ndarray) -> np.ndarray:
        inside = some < len(tradable)  # codes from N on have no prices
        return inside & tradable[np.where(inside, some, 0)]

    last = _ranked(held, score_of)
    fresh = _ranked(codes[~np.isin(codes, held)], score_of)
    if strategy.only_tradable:
        fresh = fresh[can_be_traded(fresh)]
    today = fresh[: max(0, strategy.n_drop + strategy.topk - len(last))]
    together = _ranked(np.concatenate([last, today]), score_of)
    if strategy.only_tradable:
        together = together[can_be_traded(together)]
    worst = together[len(together) - min(strategy.n_drop, len(together)) :]
    sell = last[np.isin(last, worst)]
    buy = today[: max(0, len(sell) + strategy.topk - len(last))]

    both_ways = strategy.forbid_all_trade_at_limit
    may_sell = tradable if both_ways else book.tradable(day, "sell")
    may_buy = tradable if both_ways else book.tradable(day, "buy")
    sold = [i for i in sorted(sell.tolist()) if may_sell[i] and book.count[i] >= strategy.hold_thresh]
    cash = book.cash
    for i in sold:
        fill = book.filled(day, i, -book.amount[i], cash)
        cash += fill.value - fill.cost
    each = cash * strategy.risk_degree / len(buy) if len(buy) else 0.0
    bought = [
        (i, book.rounded(day, i, each / book.market.buy_price[day, i]))
        for i in buy.tolist()
        if i < len(may_buy) and may_buy[i]
    ]
    return [(i, -float(book.amount[i])) for i in sold] + bought


def _ranked(codes: np.ndarray, score_of: Mapping[int, float]) -> np.ndarray:
    """Sort codes by descending score. Codes without a score are last, and ties are in the order of their names."""
    codes = np.sort(codes)
    scores = np.array([score_of.get(int(code), math.nan) for code in codes])
    return codes[np.argsort(-scores, kind="stable")]
