"""The TopkDropout strategy: which instruments a day's scores buy and sell."""

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
    """Hold `topk` instruments and replace up to `n_drop` of them a day.

    Parameters
    ----------
    topk, n_drop : int
    hold_thresh : int
        Days that an instrument is held at least.
    only_tradable : bool
        Rank only what can be traded that day.
    forbid_all_trade_at_limit : bool
        At a limit neither buy nor sell; otherwise only not in the limit's direction.
    risk_degree : float
        Share of the cash that is spent.

    Raises
    ------
    ConfigError
        Numbers that make no sense.

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
                raise ConfigError(f"TopkDropoutStrategy: {name} must be a whole number from {least}, got {value!r}.")
        for name in ("only_tradable", "forbid_all_trade_at_limit"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"TopkDropoutStrategy: {name} must be true or false, got {getattr(self, name)!r}.")
        if not is_number(self.risk_degree) or not 0 < self.risk_degree <= 1:
            raise ConfigError(f"TopkDropoutStrategy: risk_degree must be a number in (0, 1], got {self.risk_degree!r}.")


def orders_of_day(book: Book, day: int, signal: np.ndarray, strategy: TopkDropout) -> list[tuple[int, float]]:
    """A day's orders, sales first: (instrument, shares), negative for a sale."""
    codes, scores = signal[0].astype(np.int64), signal[1]
    held = np.flatnonzero(book.amount > 0)
    score_of = dict(zip(codes.tolist(), scores.tolist(), strict=True))
    tradable = book.tradable(day, None)

    def can_be_traded(some: np.ndarray) -> np.ndarray:
        inside = some < len(tradable)
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
        _, value, cost = book.filled(day, i, -book.amount[i], cash)
        cash += value - cost
    each = cash * strategy.risk_degree / len(buy) if len(buy) else 0.0
    bought = [
        (i, book.rounded(day, i, each / book.market.buy_price[day, i]))
        for i in buy.tolist()
        if i < len(may_buy) and may_buy[i]
    ]
    return [(i, -float(book.amount[i])) for i in sold] + bought


def _ranked(codes: np.ndarray, score_of: Mapping[int, float]) -> np.ndarray:
    """Codes from the best score to the worst; without a score last, equal ones in the order of their names."""
    codes = np.sort(codes)
    scores = np.array([score_of.get(int(code), math.nan) for code in codes])
    return codes[np.argsort(-scores, kind="stable")]
