"""Cash and positions of a simulated account, and the rows that each day adds to the tables of the backtest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from qfast.backtest.exchange import Exchange
from qfast.backtest.market import Market
from qfast.backtest.result import Backtest

__all__ = ["Book"]

SMALLEST_TRADE = 1e-5  # trades of a smaller value are ignored


class ReportRow(NamedTuple):
    """One day of `Backtest.report`; the field names are its columns, except that `return_` is "return"."""

    account: float
    return_: float
    total_turnover: float
    turnover: float
    total_cost: float
    cost: float
    value: float
    cash: float


class IndicatorRow(NamedTuple):
    """One day of `Backtest.indicators`; the field names are its columns, except that `orders` is "count"."""

    ffr: float
    pa: float
    pos: float
    deal_amount: float
    value: float
    orders: int


class HoldingRows(NamedTuple):
    """The holdings at the end of one day: arrays of one length, one element per instrument held."""

    day: np.ndarray
    instrument: np.ndarray
    amount: np.ndarray
    price: np.ndarray
    weight: np.ndarray
    count_day: np.ndarray


class Fill(NamedTuple):
    """The filled part of an order: shares (negative for a sale), their value, and the cost of the trade."""

    shares: float
    value: float
    cost: float


NO_FILL = Fill(0.0, 0.0, 0.0)


class Book:
    """Cash and positions, and their records.

    Attributes
    ----------
    cash : float
    amount, price : ndarray
        float64 [N]: shares in the portfolio, and their last price.
    count : ndarray
        int64 [N]: days since the purchase.
    cost, turnover : float
        Cumulative costs and traded value.
    """

    def __init__(self, market: Market, exchange: Exchange, account: float) -> None:
        self.market, self.exchange, self.account = market, exchange, account
        n = len(market.instruments)
        self.cash = account
        self.amount, self.price = np.zeros(n), np.zeros(n)
        self.count = np.zeros(n, dtype=np.int64)
        self.cost = self.turnover = 0.0
        self._report: list[ReportRow] = []
        self._indicators: list[IndicatorRow] = []
        self._holdings: list[HoldingRows] = []

    def tradable(self, day: int, side: str | None) -> np.ndarray:
        """bool [N]: instruments that can be traded on a side, "buy" or "sell"; None: on both sides."""
        market = self.market
        blocked = {"buy": market.no_buying[day], "sell": market.no_selling[day]}
        return ~(blocked[side] if side else blocked["buy"] | blocked["sell"])

    def rounded(self, day: int, i: int, amount: float) -> float:
        """Round a number of shares down to whole lots."""
        factor, unit = self.market.factor, self.exchange.trade_unit
        if factor is None or unit is None or not np.isfinite(amount):
            return float(amount)
        return float((amount * factor[day, i] + 0.1) // unit * unit / factor[day, i])

    def filled(self, day: int, i: int, amount: float, cash: float) -> Fill:
        """The part of an order that can be filled with `cash`.

        Parameters
        ----------
        day, i : int
            Positions of the day and of the instrument in the market.
        amount : float
            Shares; negative for a sale.
        cash : float
        """
        rules, selling = self.exchange, amount < 0
        blocked = self.market.no_selling if selling else self.market.no_buying
        if blocked[day, i]:
            return NO_FILL
        price = float((self.market.sell_price if selling else self.market.buy_price)[day, i])
        shares = abs(amount)
        traded = self.market.volume[day, i] * price  # by everyone
        impact = 1.0 if not traded > 0 else (shares * price / traded) ** 2
        ratio = (rules.close_cost if selling else rules.open_cost) + rules.impact_cost * impact
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
        if not SMALLEST_TRADE < value < math.inf:  # NaN is not, either: one missing price must not spoil the account
            return NO_FILL
        return Fill(math.copysign(shares, amount), value, max(value * ratio, rules.min_cost))

    def trade(self, day: int, orders: Sequence[tuple[int, float]]) -> None:
        """Fill the orders of a day, update prices to its close, and record the day."""
        before = self._report[-1].account if self._report else self.account
        costs = values = shares = 0.0
        filled = []
        for i, amount in orders:
            dealt, value, cost = self.filled(day, i, amount, self.cash)
            filled.append(dealt / amount if amount else math.nan)
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
        priced = held & ~np.isnan(self.market.close[day])
        self.price[priced] = self.market.close[day, priced]
        self.count[held] += 1
        self.cost += costs
        self.turnover += values
        stock = float(self.amount[held] @ self.price[held])
        account = stock + self.cash
        self._report.append(
            ReportRow(
                account=account,
                return_=(account - before + costs) / before,
                total_turnover=self.turnover,
                turnover=values / before,
                total_cost=self.cost,
                cost=costs / before,
                value=stock,
                cash=self.cash,
            )
        )
        advantage = math.nan if not orders else 0.0  # orders are filled at the day's own price
        rate = float(np.nanmean(filled)) if np.isfinite(filled).any() else math.nan
        self._indicators.append(
            IndicatorRow(ffr=rate, pa=advantage, pos=advantage, deal_amount=shares, value=values, orders=len(orders))
        )
        rows = np.flatnonzero(held)
        self._holdings.append(
            HoldingRows(
                day=np.full(len(rows), day),
                instrument=rows,
                amount=self.amount[rows],
                price=self.price[rows],
                weight=self.amount[rows] * self.price[rows] / account,
                count_day=self.count[rows],
            )
        )

    def result(self, benchmark: pd.Series | None) -> Backtest:
        """The tables of the days traded so far; `benchmark` is a daily return by day."""
        days = self.market.days.rename("datetime")
        report = pd.DataFrame(self._report, days).rename(columns={"return_": "return"})
        report["bench"] = math.nan if benchmark is None else benchmark.reindex(days).fillna(0.0).to_numpy(float)
        indicators = pd.DataFrame(self._indicators, days).rename(columns={"orders": "count"})
        holdings = HoldingRows(*(np.concatenate(column) for column in zip(*self._holdings, strict=True)))
        index = pd.MultiIndex.from_arrays(
            [days[holdings.day], self.market.instruments[holdings.instrument]], names=["datetime", "instrument"]
        )
        columns = ("amount", "price", "weight", "count_day")
        positions = pd.DataFrame({name: getattr(holdings, name) for name in columns}, index)
        return Backtest(report, positions, indicators)
