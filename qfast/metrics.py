"""How well scores rank the instruments of each day: IC, rank IC, ICIR, IC decay, long-short returns, turnover.

All days are computed at once from sums by date, without a loop over days. Definitions and missing values follow pandas'
`Series.corr`, which Qlib applies day by day (qlib/contrib/eva/alpha.py: calc_ic, calc_long_short_return).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd

from qfast.errors import DataError

__all__ = ["daily_ic", "ic_decay", "ic_summary", "long_short_return", "long_short_summary", "score_turnover"]

DATE = "datetime"
LAGS = (0, 1, 2, 3, 5, 10, 20)


def daily_ic(score: pd.Series, label: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Correlation of score and label over the instruments of each day.

    Parameters
    ----------
    score, label : Series
        Indexed by (datetime, instrument), in any order. The indices may differ: only pairs without NaN count.

    Returns
    -------
    ic, rank_ic : Series
        float64, indexed by datetime in ascending order: Pearson's correlation, and Spearman's with average ranks for
        ties. NaN for a day with fewer than two pairs, a constant score or a constant label. Pearson's is also NaN for
        a day with an infinite value.

    Raises
    ------
    DataError
        The index is not (datetime, instrument) or contains a duplicate.

    Source: qlib/contrib/eva/alpha.py, calc_ic.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.to_datetime(["2024-01-02"]), ["A", "B", "C"]],
    ...                                    names=["datetime", "instrument"])
    >>> ic, rank_ic = daily_ic(pd.Series([1.0, 2.0, 4.0], index), pd.Series([1.0, 3.0, 2.0], index))
    >>> round(float(ic.iloc[0]), 4), round(float(rank_ic.iloc[0]), 4)
    (0.3273, 0.5)
    """
    days = _Days.of(score, label)
    paired = ~(np.isnan(days.score) | np.isnan(days.label))
    day, x, y = days.day[paired], days.score[paired], days.label[paired]
    n = len(days.dates)
    ic = _correlation(day, x, y, n)
    rank_ic = _correlation(day, _ranks(day, x), _ranks(day, y), n)
    index = days.dates.rename(DATE)
    return pd.Series(ic, index, name="ic"), pd.Series(rank_ic, index, name="rank_ic")


def ic_summary(ic: pd.Series, rank_ic: pd.Series) -> dict[str, float]:
    """Summarize daily ICs: means over days (IC, Rank IC), and mean / standard deviation (ICIR, Rank ICIR).

    Parameters
    ----------
    ic, rank_ic : Series
        Daily values of `daily_ic`. NaN days are ignored.

    Returns
    -------
    dict
        "IC", "ICIR", "Rank IC" and "Rank ICIR". The standard deviation has ddof 1, so the ratios are NaN with fewer
        than two days.

    Source: qlib/workflow/record_temp.py, SigAnaRecord.

    Examples
    --------
    >>> ic = pd.Series([0.1, 0.3])
    >>> {k: round(v, 3) for k, v in ic_summary(ic, ic).items()}
    {'IC': 0.2, 'ICIR': 1.414, 'Rank IC': 0.2, 'Rank ICIR': 1.414}
    """
    return {
        "IC": float(ic.mean()),
        "ICIR": _ratio(ic),
        "Rank IC": float(rank_ic.mean()),
        "Rank ICIR": _ratio(rank_ic),
    }


def ic_decay(score: pd.Series, label: pd.Series, lags: Sequence[int] = LAGS) -> pd.DataFrame:
    """Mean IC of the scores of a day with the labels of a later day. It shows how fast the signal becomes stale.

    Parameters
    ----------
    score, label : Series
        Indexed by (datetime, instrument).
    lags : sequence of int
        Distances in days that occur in `score` or `label`. 0 is the IC of `daily_ic`.

    Returns
    -------
    DataFrame
        Columns "IC" and "Rank IC", float64, indexed by "lag": means over days. NaN if no day has two pairs.

    Raises
    ------
    DataError
        As for `daily_ic`, or a lag is negative.

    Source: the definition is common in factor analysis.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=3), list("ABC")],
    ...                                    names=["datetime", "instrument"])
    >>> label = pd.Series([1, 2, 3, 3, 2, 1, 1, 2, 3.0], index)
    >>> ic_decay(label, label, [0, 1])["IC"].round(1).tolist()
    [1.0, -1.0]
    """
    score, label = _checked("score", score), _checked("label", label)
    if any(lag < 0 for lag in lags):
        raise DataError(f"lags must not be negative, got {list(lags)!r}.")
    scores, labels = _matrices(score, label)
    means = []
    for lag in lags:
        x, y = scores[: max(len(scores) - lag, 0)], labels[lag:]
        paired = ~(np.isnan(x) | np.isnan(y))
        day = np.nonzero(paired)[0]
        x_rank, y_rank = (_ranks_of_rows(np.where(paired, values, np.nan)) for values in (x, y))
        daily = (_correlation(day, a[paired], b[paired], len(scores)) for a, b in ((x, y), (x_rank, y_rank)))
        means.append([pd.Series(values).mean() for values in daily])
    return pd.DataFrame(means, pd.Index(lags, name="lag"), ["IC", "Rank IC"], dtype=np.float64)


def score_turnover(score: pd.Series, quantile: float = 0.2) -> pd.DataFrame:
    """Share of the best and of the worst scored instruments of a day that were not in that group before.

    Parameters
    ----------
    score : Series
        Indexed by (datetime, instrument).
    quantile : float
        Fraction of the day's instruments in each group, in (0, 0.5]. Their number is rounded down.

    Returns
    -------
    DataFrame
        Columns "top" and "bottom", float64, indexed by datetime. The group before consists of the instruments of the
        same day, ordered by their previous scores. NaN on the first day, and if the groups are empty.

    Raises
    ------
    DataError
        As for `daily_ic`, or `quantile` is out of range.

    Source: qlib/contrib/report/analysis_model/analysis_model_performance.py, _pred_turnover.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=2), list("ABCD")],
    ...                                    names=["datetime", "instrument"])
    >>> score_turnover(pd.Series([4, 3, 2, 1, 4, 1, 3, 2.0], index), 0.5)["top"].tolist()
    [nan, 0.5]
    """
    _check_quantile(quantile)
    score = _checked("score", score).sort_index()
    days = _Days.of(score, score.groupby(level="instrument").shift(1))
    n = len(days.dates)
    count = (np.bincount(days.day, minlength=n) * quantile).astype(np.int64)
    columns = {}
    for name, sign in (("top", -1.0), ("bottom", 1.0)):
        keys = (np.where(np.isnan(values), np.inf, sign * values) for values in (days.score, days.label))
        now, before = (_first_rows(days.day, key, count) for key in keys)
        stayed = np.bincount(days.day[np.intersect1d(now, before)], minlength=n)
        with np.errstate(invalid="ignore", divide="ignore"):
            columns[name] = np.where(np.arange(n) == 0, np.nan, 1 - stayed / count)
    return pd.DataFrame(columns, days.dates.rename(DATE))


def long_short_return(score: pd.Series, label: pd.Series, quantile: float = 0.2) -> tuple[pd.Series, pd.Series]:
    """Half the daily return of the best minus the worst scored instruments, and the mean return of all.

    Parameters
    ----------
    score, label : Series
        Indexed by (datetime, instrument). `label` is the raw return, before normalization.
    quantile : float
        Fraction of the day's instruments on each side, in (0, 0.5]. Their number is rounded down.

    Returns
    -------
    long_short, average : Series
        float64, indexed by datetime: (mean of the top - mean of the bottom) / 2, and the mean of all. `long_short` is
        NaN on a day with fewer than 1 / quantile instruments.

    Raises
    ------
    DataError
        As for `daily_ic`, or `quantile` is out of range.

    Source: qlib/contrib/eva/alpha.py, calc_long_short_return.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.to_datetime(["2024-01-02"]), list("ABCDE")],
    ...                                    names=["datetime", "instrument"])
    >>> score, label = pd.Series([5, 4, 3, 2, 1.0], index), pd.Series([0.04, 0, 0, 0, -0.02], index)
    >>> round(float(long_short_return(score, label)[0].iloc[0]), 4)
    0.03
    """
    _check_quantile(quantile)
    days = _Days.of(score, label)
    n = len(days.dates)
    size = np.bincount(days.day, minlength=n)
    count = (size * quantile).astype(np.int64)  # rounded down, like int() in Qlib
    top = _mean_of_first(days, np.where(np.isnan(days.score), np.inf, -days.score), count)
    bottom = _mean_of_first(days, np.where(np.isnan(days.score), np.inf, days.score), count)
    average = _nanmean(days.day, days.label, n)
    index = days.dates.rename(DATE)
    return pd.Series((top - bottom) / 2, index, name="long_short"), pd.Series(average, index, name="average")


def long_short_summary(long_short: pd.Series, average: pd.Series, ann_scaler: float = 252) -> dict[str, float]:
    """Annualized return and Sharpe ratio of the two daily series of `long_short_return`.

    Parameters
    ----------
    long_short, average : Series
        Daily returns. NaN days are ignored.
    ann_scaler : float
        Number of trading days in a year.

    Returns
    -------
    dict
        "Long-Short Ann Return", "Long-Short Ann Sharpe", "Long-Avg Ann Return" and "Long-Avg Ann Sharpe".

    Source: qlib/workflow/record_temp.py, SigAnaRecord.

    Examples
    --------
    >>> r = pd.Series([0.01, 0.03])
    >>> round(long_short_summary(r, r)["Long-Short Ann Return"], 2)
    5.04
    """
    out: dict[str, float] = {}
    for name, daily in (("Long-Short", long_short), ("Long-Avg", average)):
        out[f"{name} Ann Return"] = float(daily.mean() * ann_scaler)
        out[f"{name} Ann Sharpe"] = float(_ratio(daily) * ann_scaler**0.5)
    return out


# ---------------------------------------------------------------- helpers
@dataclass(frozen=True)
class _Days:
    """Aligned scores and labels (float64), sorted by date. `day` is the position of each row's date in `dates`."""

    dates: pd.Index
    day: np.ndarray
    score: np.ndarray
    label: np.ndarray

    @classmethod
    def of(cls, score: pd.Series, label: pd.Series) -> _Days:
        frame = pd.DataFrame({"score": _checked("score", score), "label": _checked("label", label)})
        day, dates = pd.factorize(frame.index.get_level_values(DATE), sort=True)
        order = np.argsort(day, kind="stable")
        return cls(
            dates,
            day[order],
            frame["score"].to_numpy(dtype=np.float64, na_value=np.nan)[order],
            frame["label"].to_numpy(dtype=np.float64, na_value=np.nan)[order],
        )


def _matrices(*series: pd.Series) -> list[np.ndarray]:
    """The values of each series as float64 [dates, instruments] over the keys of all; NaN where a key is missing."""
    used = [cast(pd.MultiIndex, one.index).remove_unused_levels() for one in series]
    levels = [[index.levels[level] for index in used] for level in (0, 1)]
    dates, instruments = (pd.Index(np.unique(np.concatenate([np.asarray(i) for i in parts]))) for parts in levels)
    matrices = []
    for one in series:
        index = cast(pd.MultiIndex, one.index)
        rows = dates.get_indexer(index.levels[0])[index.codes[0]]
        columns = instruments.get_indexer(index.levels[1])[index.codes[1]]
        matrix = np.full((len(dates), len(instruments)), np.nan)
        matrix[rows, columns] = one.to_numpy(dtype=np.float64, na_value=np.nan)
        matrices.append(matrix)
    return matrices


def _checked(name: str, series: pd.Series) -> pd.Series:
    """Return the series with index levels (datetime, instrument), or raise a DataError."""
    index = series.index
    if not isinstance(index, pd.MultiIndex) or set(index.names) != {DATE, "instrument"}:
        raise DataError(
            f"{name} must be indexed by (datetime, instrument), got {type(index).__name__} with level "
            f"names {list(index.names)}."
        )
    if not index.is_unique:
        first = index[index.duplicated()][0]
        raise DataError(f"{name} contains the key {tuple(first)} twice; each (datetime, instrument) may occur once.")
    return series if index.names[0] == DATE else series.swaplevel()


def _ratio(daily: pd.Series) -> float:
    """Mean over standard deviation (ddof 1). NaN if the deviation is NaN, infinite if it is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.float64(daily.mean()) / np.float64(daily.std()))


def _correlation(day: np.ndarray, x: np.ndarray, y: np.ndarray, n_days: int) -> np.ndarray:
    """Pearson's correlation by day, in two passes. `day` is ascending."""
    count = np.bincount(day, minlength=n_days)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        x, y = _standardized(day, x, count), _standardized(day, y, count)
        covariance = np.bincount(day, x * y, n_days)
        scale = np.sqrt(np.bincount(day, x * x, n_days)) * np.sqrt(np.bincount(day, y * y, n_days))
        out = np.clip(covariance / scale, -1.0, 1.0)
    out[count < 2] = np.nan
    return out


def _standardized(day: np.ndarray, values: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Deviations from the day's mean, divided by the day's range; NaN for constant days.

    Division by the range prevents overflow of the squares. The range of a constant day is exactly 0, whereas deviations
    from its rounded mean may not be.
    """
    low, high = np.full(len(count), np.inf), np.full(len(count), -np.inf)
    np.minimum.at(low, day, values)
    np.maximum.at(high, day, values)
    spread = np.where(high > low, high - low, np.nan)
    return (values - (np.bincount(day, values, len(count)) / count)[day]) / spread[day]


def _ranks(day: np.ndarray, values: np.ndarray) -> np.ndarray:
    """1-based rank within the day, averaged over ties. `day` is ascending; `values` contains no NaN."""
    if not len(values):
        return values
    order = np.lexsort((values, day))
    ordered, ordered_day = values[order], day[order]
    new = np.r_[True, (ordered[1:] != ordered[:-1]) | (ordered_day[1:] != ordered_day[:-1])]
    starts = np.flatnonzero(new)
    ends = np.r_[starts[1:], len(values)]
    day_start = np.searchsorted(ordered_day, ordered_day[starts], "left")
    average = (starts + ends + 1) / 2.0 - day_start
    out = np.empty(len(values))
    out[order] = np.repeat(average, ends - starts)
    return out


def _ranks_of_rows(values: np.ndarray) -> np.ndarray:
    """1-based ranks within each row of a matrix, averaged over ties. NaN remains NaN."""
    order = np.argsort(values, axis=1)  # NaN is last
    ordered = np.take_along_axis(values, order, axis=1)
    new = np.ones(ordered.shape, dtype=bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    starts = np.flatnonzero(new)
    ends = np.r_[starts[1:], values.size]
    average = (starts + ends + 1) / 2.0 - starts // max(values.shape[1], 1) * values.shape[1]
    out = np.empty(ordered.shape)
    np.put_along_axis(out, order, np.repeat(average, ends - starts).reshape(ordered.shape), axis=1)
    out[np.isnan(values)] = np.nan
    return out


def _check_quantile(quantile: float) -> None:
    if not 0.0 < quantile <= 0.5:
        raise DataError(f"quantile must be in (0, 0.5], got {quantile!r}.")


def _first_rows(day: np.ndarray, key: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Positions of the `count[day]` rows of each day with the smallest key, in order. `day` is ascending."""
    order = np.lexsort((key, day))  # stable: equal keys keep their order
    start = np.searchsorted(day, np.arange(len(count)), "left")
    place = np.arange(len(order)) - start[day]
    return order[place < count[day]]


def _mean_of_first(days: _Days, key: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Mean label by day of the rows of `_first_rows`."""
    chosen = _first_rows(days.day, key, count)
    return _nanmean(days.day[chosen], days.label[chosen], len(count))


def _nanmean(day: np.ndarray, values: np.ndarray, n_days: int) -> np.ndarray:
    present = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        total = np.bincount(day[present], values[present], n_days)
        return total / np.bincount(day[present], minlength=n_days)
