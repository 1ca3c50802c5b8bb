"""The tables of a finished backtest, and the risk of its returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

__all__ = ["YEAR", "Backtest", "risk_analysis"]

YEAR = 238  # trading days in a year, as in Qlib


@dataclass(frozen=True)
class Backtest:
    """The tables of a simulation.

    Attributes
    ----------
    report : DataFrame
        Columns by day: account, return (before costs), total_turnover, turnover, total_cost, cost, value, cash, bench.
        Turnover and cost are fractions of the account of the day before, the totals are in money.
    positions : DataFrame
        Columns by (datetime, instrument), at the end of the day: amount, price, weight, count_day.
    indicators : DataFrame
        Columns by day: ffr (mean filled fraction of the orders), pa, pos, deal_amount, value, count.
    """

    report: pd.DataFrame
    positions: pd.DataFrame
    indicators: pd.DataFrame

    def risk(self) -> pd.DataFrame:
        """Risk of the excess return over the benchmark, with and without costs: "risk" by (analysis, measure)."""
        excess = self.report["return"] - self.report["bench"]
        return pd.concat(
            {
                "excess_return_without_cost": risk_analysis(excess),
                "excess_return_with_cost": risk_analysis(excess - self.report["cost"]),
            }
        )

    def orders(self) -> pd.DataFrame:
        """Means of ffr, pa and pos over all orders: column "value"."""
        weight = self.indicators["count"]
        parts = self.indicators[["ffr", "pa", "pos"]].mul(weight, axis=0).sum() / weight.sum()
        return parts.to_frame("value")

    def metrics(self) -> dict[str, float]:
        """`risk` and `orders` under Qlib's names, for example "1day.excess_return_with_cost.information_ratio"."""
        risk, orders = self.risk()["risk"], self.orders()["value"]
        metrics = {f"1day.{'.'.join(key)}": float(value) for key, value in zip(risk.index, risk, strict=True)}
        return metrics | {f"1day.{name}": float(value) for name, value in orders.items()}


def risk_analysis(returns: pd.Series, year: int = YEAR) -> pd.DataFrame:
    """Mean, standard deviation, annualized return, information ratio and maximum drawdown of daily returns.

    Parameters
    ----------
    returns : Series
        Daily returns. They are summed, not compounded.
    year : int
        Number of trading days in a year.

    Returns
    -------
    DataFrame
        Column "risk", indexed by measure.

    Source: risk_analysis of pyqlib 0.9.7, qlib/contrib/evaluate.py, mode "sum".

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
        "mean": mean,
        "std": deviation,
        "annualized_return": mean * year,
        "information_ratio": ratio,
        "max_drawdown": (total - total.cummax()).min(),
    }
    return pd.Series(values).to_frame("risk")
