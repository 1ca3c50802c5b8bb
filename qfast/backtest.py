"""A portfolio that follows scores: the reference's daily TopkDropout simulation, over arrays of all instruments.

Every evening the best instruments that are not held replace the worst that are; orders of a day are filled at that
day's prices, with costs, price limits, suspensions and round lots. The state is one array per quantity over all
instruments; only a day's few orders are gone through one by one, because each of them changes the cash.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from qfast.data.expression import fields
from qfast.data.factors import evaluate_all
from qfast.data.panel import Panel
from qfast.data.prices import Prices
from qfast.errors import ConfigError, DataError, shown

__all__ = ["Backtest", "Exchange", "Market", "TopkDropout", "backtest", "risk_analysis"]

YEAR = 238  # trading days, the reference's
NOTHING = 1e-5  # a trade of a smaller value is none
NO_PRICE = 1e-8  # a deal price up to here is none; the close is used
LOTS = {"cn": 100, "us": 1, "tw": 1000}  # shares of a round lot, by the reference's regions
LIMITS = {"cn": 0.095, "us": None, "tw": 0.1}
MARKET_FIELDS = ("close", "volume", "change", "factor")


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
        if not _is_number(self.risk_degree) or not 0 < self.risk_degree <= 1:
            raise ConfigError(f"TopkDropoutStrategy: risk_degree must be a number in (0, 1], got {self.risk_degree!r}.")


@dataclass(frozen=True)
class Exchange:
    """Prices and rules of trading.

    Parameters
    ----------
    deal_price : str or (buy, sell)
        Field or expression; "close" is "$close".
    limit_threshold : float, None or (buy, sell)
        A day's change from which nothing is bought (or, downwards, sold); None: no limit; two expressions: true where
        buying, and where selling, is impossible.
    open_cost, close_cost : float
        Shares of a purchase and of a sale.
    min_cost : float
        Of a trade, in money.
    impact_cost : float
        Times the squared share of the day's volume, added to the cost ratio.
    trade_unit : int or None
        Shares of a round lot, used where the prices have a factor; None: none.

    Raises
    ------
    ConfigError
        A negative cost, a threshold or lot that is no number.
    """

    deal_price: str | Sequence[str] = "close"
    limit_threshold: float | Sequence[str] | None = None
    open_cost: float = 0.0015
    close_cost: float = 0.0025
    min_cost: float = 5.0
    impact_cost: float = 0.0
    trade_unit: int | None = 100

    def __post_init__(self) -> None:
        for name in ("open_cost", "close_cost", "min_cost", "impact_cost"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < math.inf:
                raise ConfigError(f"exchange: {name} must be a number from 0, got {value!r}.")
        pair = (self.deal_price, self.deal_price) if isinstance(self.deal_price, str) else self.deal_price
        if not _is_pair_of_texts(pair):
            raise ConfigError(f"exchange: deal_price must be a field or (buy, sell), got {self.deal_price!r}.")
        limit = self.limit_threshold
        if limit is not None and not _is_number(limit) and not _is_pair_of_texts(limit):
            raise ConfigError(f"exchange: limit_threshold must be a number or (buy, sell), got {limit!r}.")
        if self.trade_unit is not None and not (_is_number(self.trade_unit) and self.trade_unit > 0):
            raise ConfigError(f"exchange: trade_unit must be a whole number from 1 or None, got {self.trade_unit!r}.")

    def deal_texts(self) -> tuple[str, str]:
        """Expressions of the buying and the selling price."""
        pair = (self.deal_price, self.deal_price) if isinstance(self.deal_price, str) else tuple(self.deal_price)
        buy, sell = (text if "$" in text else f"${text}" for text in pair)
        return buy, sell

    def limit_texts(self) -> list[str]:
        """Expressions of the limits, where they are given so."""
        if self.limit_threshold is None or isinstance(self.limit_threshold, (int, float)):
            return []
        return list(self.limit_threshold)

    def fields(self) -> list[str]:
        """Price fields that trading needs."""
        texts = [*self.deal_texts(), *self.limit_texts()]
        return list(dict.fromkeys([*MARKET_FIELDS, *(field for text in texts for field in fields(text))]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_pair_of_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(part, str) for part in value)


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


@dataclass(frozen=True)
class Backtest:
    """What a simulation gives.

    Attributes
    ----------
    report : DataFrame
        By day: account, return (before costs), total_turnover, turnover, total_cost, cost, value, cash, bench.
    positions : DataFrame
        By (datetime, instrument), at the end of the day: amount, price, weight, count_day.
    indicators : DataFrame
        By day: ffr (share of the orders' amounts that was filled), pa, pos, deal_amount, value, count.
    """

    report: pd.DataFrame
    positions: pd.DataFrame
    indicators: pd.DataFrame

    def risk(self) -> pd.DataFrame:
        """Risk of the excess return over the benchmark, without and with costs; (analysis, measure) by "risk"."""
        excess = self.report["return"] - self.report["bench"]
        return pd.concat(
            {
                "excess_return_without_cost": risk_analysis(excess),
                "excess_return_with_cost": risk_analysis(excess - self.report["cost"]),
            }
        )

    def orders(self) -> pd.DataFrame:
        """Means of ffr, pa and pos over all orders; column "value"."""
        weight = self.indicators["count"]
        parts = self.indicators[["ffr", "pa", "pos"]].mul(weight, axis=0).sum() / weight.sum()
        return parts.to_frame("value")

    def metrics(self) -> dict[str, float]:
        """The numbers above under the reference's names, "1day.excess_return_with_cost.information_ratio", ..."""
        risk, orders = self.risk()["risk"], self.orders()["value"]
        found = {f"1day.{'.'.join(key)}": float(value) for key, value in zip(risk.index, risk, strict=True)}
        return found | {f"1day.{name}": float(value) for name, value in orders.items()}


def risk_analysis(returns: pd.Series, year: int = YEAR) -> pd.DataFrame:
    """Mean, deviation, annualised return, information ratio and largest drawdown of daily returns, added up.

    Parameters
    ----------
    returns : Series
        Daily, not compounded.
    year : int
        Days of a year.

    Returns
    -------
    DataFrame
        One column "risk".

    Source
    ------
    risk_analysis of pyqlib 0.9.7, qlib/contrib/evaluate.py, mode "sum".

    Examples
    --------
    >>> risk_analysis(pd.Series([0.01, -0.02, 0.03]))["risk"].round(4).to_dict()["max_drawdown"]
    -0.02
    """
    mean, deviation = returns.mean(), returns.std(ddof=1)
    total = returns.cumsum()
    with np.errstate(all="ignore"):
        ratio = mean / deviation * math.sqrt(year)
    values = {
        "mean": mean, "std": deviation, "annualized_return": mean * year, "information_ratio": ratio,
        "max_drawdown": (total - total.cummax()).min(),
    }  # fmt: skip
    return pd.Series(values).to_frame("risk")


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
    book = _Book(market, exchange, float(account))
    for day, signal in enumerate(signals):
        orders = [] if signal is None else _orders(book, day, signal, strategy)
        book.trade(day, orders)
    return book.result(benchmark)


def check_account(account: Any) -> None:
    """Raise a ConfigError for what is no amount of money."""
    if not _is_number(account) or not 0 < account < math.inf:
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


def _orders(book: _Book, day: int, signal: np.ndarray, strategy: TopkDropout) -> list[tuple[int, float]]:
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


class _Book:
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


def equal_weight_return(panel: Panel) -> pd.Series:
    """Mean over the instruments of each day's close / yesterday's close - 1; by day."""
    change = evaluate_all(["$close / Ref($close, 1) - 1"], panel)[:, 0].astype(np.float64)
    change[~np.isfinite(change)] = np.nan
    return pd.Series(change).groupby(panel.datetimes[panel.date_codes]).mean().rename("bench")
