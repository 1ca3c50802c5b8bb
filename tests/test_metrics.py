"""Metrics compared with scipy and pandas day by day, and with pyqlib where it is installed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfast.errors import DataError
from qfast.metrics import daily_ic, ic_decay, ic_summary, long_short_return, long_short_summary, score_turnover


def market(n_days: int = 30, n_stocks: int = 25, seed: int = 0, ties: bool = False) -> tuple[pd.Series, pd.Series]:
    rng = np.random.default_rng(seed)
    index = pd.MultiIndex.from_product(
        [pd.date_range("2020-01-01", periods=n_days), [f"S{i:03d}" for i in range(n_stocks)]],
        names=["datetime", "instrument"],
    )
    label = rng.standard_normal(len(index)) * 0.02
    score = 0.3 * label / 0.02 + rng.standard_normal(len(index))
    if ties:
        score, label = np.round(score), np.round(label, 2)
    score[rng.random(len(index)) < 0.05] = np.nan
    label[rng.random(len(index)) < 0.05] = np.nan
    return pd.Series(score.astype(np.float32), index, name="score"), pd.Series(label, index, name="label")


@pytest.mark.parametrize("ties", [False, True])
def test_daily_ic_equals_scipy_on_each_day(ties):
    stats = pytest.importorskip("scipy.stats")
    score, label = market(ties=ties)
    ic, rank_ic = daily_ic(score, label)
    assert len(ic) == 30
    for day in ic.index:
        x, y = score.xs(day).to_numpy(float), label.xs(day).to_numpy(float)
        both = ~(np.isnan(x) | np.isnan(y))
        assert ic[day] == pytest.approx(stats.pearsonr(x[both], y[both])[0], abs=1e-13)
        assert rank_ic[day] == pytest.approx(stats.spearmanr(x[both], y[both])[0], abs=1e-13)


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_equal_qlib(ties):
    alpha = pytest.importorskip("qlib.contrib.eva.alpha")
    score, label = market(n_stocks=40, seed=3, ties=ties)
    label = label.drop(label.index[:90])  # different indices: outer join as in Qlib
    ours, theirs = daily_ic(score, label), alpha.calc_ic(score, label)
    for mine, other in zip(ours, theirs, strict=True):
        pd.testing.assert_series_equal(mine, other, check_names=False, check_freq=False, rtol=1e-12, atol=1e-14)
    mine, other = long_short_return(score, label), alpha.calc_long_short_return(score, label)
    for a, b in zip(mine, other, strict=True):
        pd.testing.assert_series_equal(a, b, check_names=False, check_freq=False, rtol=1e-12, atol=1e-16)
    result = ic_summary(*ours)
    ic, ric = theirs
    expected = [ic.mean(), ic.mean() / ic.std(), ric.mean(), ric.mean() / ric.std()]
    assert list(result.values()) == pytest.approx(expected, rel=1e-12)


def test_row_order_and_level_order_do_not_matter():
    score, label = market()
    expected = daily_ic(score, label)
    shuffled = score.sample(frac=1.0, random_state=1).swaplevel()
    for a, b in zip(daily_ic(shuffled, label), expected, strict=True):
        pd.testing.assert_series_equal(a, b, check_freq=False, rtol=1e-12)


def test_days_without_a_correlation_are_nan_and_excluded_from_the_means():
    score, label = market(n_days=6)
    day = score.index.levels[0]
    score.loc[day[0]] = np.float32(0.1)  # constant: the mean of equal floats need not be that float
    label.loc[day[1]] = np.nan
    one = score.index.get_level_values(0) == day[2]
    score[one] = np.where(np.arange(one.sum()) == 4, 1.0, np.nan)
    label[one] = 1.0
    values = score.to_numpy(copy=True)
    values[np.flatnonzero(score.index.get_level_values(0) == day[3])[0]] = np.inf
    score = pd.Series(values, score.index)
    label = label.where(score.index != (day[3], "S000"), 0.5)
    ic, rank_ic = daily_ic(score, label)
    assert ic.isna().tolist() == [True, True, True, True, False, False]
    assert rank_ic.isna().tolist() == [True, True, True, False, False, False]
    assert ic_summary(ic, rank_ic)["IC"] == pytest.approx(ic.iloc[4:].mean())


def test_huge_and_tiny_values_do_not_overflow():
    score, label = market()
    expected = daily_ic(score, label)[0]
    big, small = score.astype(float) * 1e200, label * 1e-200
    np.testing.assert_allclose(daily_ic(big, small)[0], expected, rtol=1e-9)


def test_empty_series_give_empty_results():
    score, label = (s.iloc[:0] for s in market())
    ic, rank_ic = daily_ic(score, label)
    assert len(ic) == len(rank_ic) == 0
    assert all(np.isnan(v) for v in ic_summary(ic, rank_ic).values())


def test_one_day_has_no_ratio():
    result = ic_summary(*daily_ic(*market(n_days=1)))
    assert np.isfinite(result["IC"])
    assert np.isnan(result["ICIR"])


def test_too_few_instruments_for_a_side_give_nan():
    long_short, average = long_short_return(*market(n_stocks=4))
    assert long_short.isna().all()
    assert average.notna().all()


def test_long_short_summary_annualises():
    daily = pd.Series([0.01, -0.02, 0.03])
    result = long_short_summary(daily, daily * 2, ann_scaler=100)
    assert result["Long-Short Ann Return"] == pytest.approx(100 * daily.mean())
    assert result["Long-Avg Ann Sharpe"] == pytest.approx(10 * daily.mean() / daily.std())


def test_a_wrong_index_is_reported():
    score, label = market()
    with pytest.raises(DataError, match=r"score must be indexed by \(datetime, instrument\), got RangeIndex"):
        daily_ic(score.reset_index(drop=True), label)
    with pytest.raises(DataError, match=r"label contains the key .*S000.* twice"):
        daily_ic(score, pd.concat([label, label.iloc[:1]]))
    with pytest.raises(DataError, match=r"quantile must be in \(0, 0.5\], got 0.9"):
        long_short_return(score, label, quantile=0.9)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.tuples(st.integers(0, 3), st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=40))
def test_any_small_panel_equals_pandas(values):
    day, x, y = (np.array(v, dtype=float) for v in zip(*values, strict=True))
    index = pd.MultiIndex.from_arrays(
        [pd.Timestamp("2020-01-01") + pd.to_timedelta(day, "D"), [f"i{k}" for k in range(len(day))]],
        names=["datetime", "instrument"],
    )
    score, label = pd.Series(x, index), pd.Series(y, index)
    ic, rank_ic = daily_ic(score, label)
    for date in ic.index:
        a, b = score.xs(date), label.xs(date)
        constant = a.nunique() == 1 or b.nunique() == 1
        for mine, method in ((ic, "pearson"), (rank_ic, "spearman")):
            expected = np.nan if constant else a.corr(b, method=method)
            assert mine[date] == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_ic_decay_is_the_ic_with_later_labels():
    score, label = market()
    decay = ic_decay(score, label, (0, 1, 4))
    wide = label.unstack("instrument")
    for lag, row in decay.iterrows():
        ic, rank_ic = daily_ic(score, wide.shift(-int(lag)).stack())
        assert row.tolist() == pytest.approx([ic.mean(), rank_ic.mean()], abs=1e-15)
    assert decay["IC"].loc[0] > 0.2 > abs(decay["IC"].loc[1])
    assert ic_decay(score, label, (40,)).isna().all(axis=None)
    with pytest.raises(DataError, match=r"lags must not be negative, got \[-1\]"):
        ic_decay(score, label, [-1])


@pytest.mark.parametrize("quantile", [0.2, 0.5])
def test_turnover_equals_qlibs_definition(quantile):
    score = market()[0].fillna(0.0).sample(frac=0.9, random_state=1)  # shuffled rows, and gaps
    turnover = score_turnover(score, quantile)
    frame = pd.DataFrame({"score": score.sort_index()})
    frame["last"] = frame.groupby(level="instrument")["score"].shift(1)
    for day, rows in list(frame.groupby(level="datetime"))[1:]:
        n = int(len(rows) * quantile)
        for name, largest in (("top", True), ("bottom", False)):
            now, before = (rows[c].sort_values(ascending=not largest, kind="stable").index[:n] for c in rows)
            assert turnover.loc[day, name] == pytest.approx(1 - now.isin(before).sum() / n)
    assert turnover.iloc[0].isna().all()


def test_turnover_of_bad_or_small_input():
    score = market(n_days=3, n_stocks=4)[0]
    assert score_turnover(score).isna().all(axis=None)  # a fifth of four instruments is none
    assert score_turnover(score[:0]).empty
    with pytest.raises(DataError, match="quantile"):
        score_turnover(score, 0.6)
