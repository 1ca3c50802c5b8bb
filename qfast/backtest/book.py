"""Cash and holdings of a simulated account, and the record of each day."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from qfast.backtest.exchange import Exchange
from qfast.backtest.market import Market
from qfast.backtest.result import Backtest

__all__ = ["Book"]

NOTHING = 1e-5  # a trade of a smaller value is none


class Book:
    """Cash, holdings and what is recorded of them."""

    def __init__(self, market: Market, exchange: Exchange, account: float) -> None:
        self.market, self.exchange, self.account = market, exchange, account
        n = len(market.instruments)
        self.cash = account
        self.amount, self.price = np.zeros(n), np.zeros(n)
        self.count = np.zeros(n, dtype=np.int64)
        self.cost = self.turnover = 0.0
        self._report: list[tuple[float, ...]] = []
        self._indicators: list[tuple[float, ...]] = []
        self._positions: list[tuple[np.ndarray, ...]] = []

    def tradable(self, day: int, side: str | None) -> np.ndarray:
        """bool [N]: what can be bought or sold that day; None: both."""
        market = self.market
        blocked = {"buy": market.no_buying[day], "sell": market.no_selling[day]}
        return ~(blocked[side] if side else blocked["buy"] | blocked["sell"])

    def rounded(self, day: int, i: int, amount: float) -> float:
        """Shares in whole lots."""
        factor, unit = self.market.factor, self.exchange.trade_unit
        if factor is None or unit is None or not np.isfinite(amount):
            return float(amount)
        return float((amount * factor[day, i] + 0.1) // unit * unit / factor[day, i])

    def filled(self, day: int, i: int, amount: float, cash: float) -> tuple[float, float, float]:
        """(shares, value, cost) of an order's filled part; a sale's shares are negative."""
        rules, selling = self.exchange, amount < 0
        blocked = self.market.no_selling if selling else self.market.no_buying
        if blocked[day, i]:
            return 0.0, 0.0, 0.0
        price = float((self.market.sell_price if selling else self.market.buy_price)[day, i])
        shares = abs(amount)
        everything = self.market.volume[day, i] * price
        share = 1.0 if not everything > 0 else (shares * price / everything) ** 2
        ratio = (rules.close_cost if selling else rules.open_cost) + rules.impact_cost * share
        value = shares * price
        cost = max(value * ratio, rules.min_cost)
        if selling:
            if cash + value < cost:
                shares = 0.0
        elif cash < cost:
            shares = 0.0
        elif cash < value + cost:
            least = rules.min_cost / ratio + rules.min_cost if ratio > 0 else math.inf
            most = cash / (1 + ratio) if cash >= least else cash - rules.min_cost
            shares = self.rounded(day, i, min(max(most, 0.0) / price, shares))
        else:
            shares = self.rounded(day, i, shares)
        value = shares * price
        if not NOTHING < value < math.inf:  # nor NaN: one price that is none must not spoil the account
            return 0.0, 0.0, 0.0
        return math.copysign(shares, amount), value, max(value * ratio, rules.min_cost)

    def trade(self, day: int, orders: Sequence[tuple[int, float]]) -> None:
        """Fill a day's orders, take over its closing prices, write down how things stand."""
        before = self._report[-1][0] if self._report else self.account
        costs = values = shares = 0.0
        filled = []
        for i, wanted in orders:
            dealt, value, cost = self.filled(day, i, wanted, self.cash)
            filled.append(dealt / wanted if wanted else math.nan)
            shares += abs(dealt)
            values += value
            if not value:
                continue
            costs += cost
            self.cash += (value if dealt < 0 else -value) - cost
            self.amount[i] = 0.0 if dealt < 0 else dealt
            self.price[i] = (self.market.sell_price if dealt < 0 else self.market.buy_price)[day, i]
            self.count[i] = 0
        held = self.amount > 0
        known = held & ~np.isnan(self.market.close[day])
        self.price[known] = self.market.close[day, known]
        self.count[held] += 1
        self.cost += costs
        self.turnover += values
        stock = float(self.amount[held] @ self.price[held])
        account = stock + self.cash
        self._report.append(
            (account, (account - before + costs) / before, self.turnover, values / before, self.cost, costs / before,
             stock, self.cash)
        )  # fmt: skip
        none = math.nan if not orders else 0.0  # orders are filled at the day's own price: no advantage in it
        rate = float(np.nanmean(filled)) if np.isfinite(filled).any() else math.nan
        self._indicators.append((rate, none, none, shares, values, float(len(orders))))
        rows = np.flatnonzero(held)
        self._positions.append(
            (np.full(len(rows), day), rows, self.amount[rows], self.price[rows],
             self.amount[rows] * self.price[rows] / account, self.count[rows])
        )  # fmt: skip

    def result(self, benchmark: pd.Series | None) -> Backtest:
        days = self.market.days.rename("datetime")
        report = pd.DataFrame(
            self._report, days,
            columns=["account", "return", "total_turnover", "turnover", "total_cost", "cost", "value", "cash"],
        )  # fmt: skip
        report["bench"] = math.nan if benchmark is None else benchmark.reindex(days).fillna(0.0).to_numpy(float)
        columns = ["ffr", "pa", "pos", "deal_amount", "value", "count"]
        day, who, *rest = (np.concatenate(part) for part in zip(*self._positions, strict=True))
        index = pd.MultiIndex.from_arrays([days[day], self.market.instruments[who]], names=["datetime", "instrument"])
        names = ("amount", "price", "weight", "count_day")
        positions = pd.DataFrame(dict(zip(names, rest, strict=True)), index)
        indicators = pd.DataFrame(self._indicators, days, columns=columns).astype({"count": np.int64})
        return Backtest(report, positions, indicators)
