"""How a signal behaves over time: IC by month, IC decay, turnover; and how a portfolio is invested."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from qfast.backtest import Backtest
from qfast.metrics import ic_decay, score_turnover
from qfast.workflow.results import SegmentResult

__all__ = ["SignalQuality", "investment", "monthly_means"]


@dataclass(frozen=True)
class SignalQuality:
    """Tables of one segment.

    Attributes
    ----------
    segment : str
    monthly : DataFrame
        Mean daily rank IC of each month, see `monthly_means`.
    decay : DataFrame
        Result of `qfast.metrics.ic_decay`.
    turnover : Series
        Mean daily turnover of the fifth with the highest and of the fifth with the lowest scores, "top" and "bottom".
    """

    segment: str
    monthly: pd.DataFrame
    decay: pd.DataFrame
    turnover: pd.Series

    @classmethod
    def of(cls, result: SegmentResult) -> SignalQuality:
        """Compute the tables of a segment."""
        decay = ic_decay(result.score, result.label)
        return cls(result.name, monthly_means(result.rank_ic), decay, score_turnover(result.score).mean())


def monthly_means(daily: pd.Series) -> pd.DataFrame:
    """Means of a daily series by month and by year.

    Parameters
    ----------
    daily : Series
        Indexed by datetime. NaN days are ignored.

    Returns
    -------
    DataFrame
        float64, one row per year, with the columns 1 to 12 and "year". NaN for a month without values.

    Examples
    --------
    >>> days = pd.to_datetime(["2024-01-02", "2024-01-03", "2024-02-01"])
    >>> monthly_means(pd.Series([1.0, 3.0, 8.0], days))[[1, 2, "year"]].values.tolist()
    [[2.0, 8.0, 4.0]]
    """
    daily = daily.dropna()
    dates = pd.DatetimeIndex(daily.index)
    months = daily.groupby([dates.year, dates.month]).mean().unstack().reindex(columns=range(1, 13))
    months["year"] = daily.groupby(dates.year).mean()
    return months.rename_axis(index="year", columns=None).astype(float)


def investment(backtest: Backtest) -> pd.DataFrame:
    """How much of the account is invested, in how many instruments, and how much is traded.

    Returns
    -------
    DataFrame
        Rows "exposure" (value of the positions / account), "holdings" (number of instruments) and "turnover" (traded
        value / account of the day before), columns "mean", "lowest" and "highest" over days.
    """
    report = backtest.report
    holdings = backtest.positions.groupby(level="datetime").size().reindex(report.index, fill_value=0)
    daily = {"exposure": report["value"] / report["account"], "holdings": holdings, "turnover": report["turnover"]}
    return pd.DataFrame({n: [d.mean(), d.min(), d.max()] for n, d in daily.items()}, ["mean", "lowest", "highest"]).T
