"""The portfolio simulation compared with pyqlib's on the same scores, and computed by hand."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qfast.backtest import Exchange, Market, TopkDropout, backtest, risk_analysis
from qfast.data import FactorHandler, synthetic
from qfast.data.sources import load_prices, read_prices
from qfast.errors import ConfigError, DataError
from qfast.workflow.portfolio import PortfolioPlan
from qfast.workflow.records import PortAnaRecord
from support.stores import write_market

START, END = "2020-02-03", "2020-06-10"


def scores(root: Path, seed: int = 0) -> pd.Series:
    """Scores that predict returns weakly, with missing days and missing stocks."""
    rng = np.random.default_rng(seed)
    panel = read_prices(provider_uri=root).panel
    close = pd.Series(panel.column("close").astype(float), panel.index(np.arange(panel.n_rows)))
    result = close.groupby(level="instrument").pct_change(fill_method=None).fillna(0) * 3
    result += rng.standard_normal(len(result))
    days = result.index.get_level_values("datetime")
    keep = (rng.random(len(result)) < 0.95) & (days != days.unique()[50])
    return result[keep].astype(np.float32).rename("score")


def ours(root: Path, score: pd.Series, strategy: TopkDropout, exchange: Exchange, account: float = 1e6):
    prices = read_prices(provider_uri=root, wanted=exchange.fields(), start_time=START, end_time=END, margin=(1, 0))
    market, notes = Market.of(prices, exchange, START, END)
    days = prices.panel.datetimes
    before = days[days < market.days[0]][-1]
    bench = pd.Series(0.001, market.days)
    return backtest(score, market, strategy, exchange, account=account, benchmark=bench, day_before=before), notes


CASES = [
    ("cn", {}, {}),
    ("us", {}, {"limit_threshold": 0.03}),
    ("cn", {"only_tradable": True}, {"limit_threshold": 0.02}),
    ("cn", {"hold_thresh": 4, "forbid_all_trade_at_limit": False}, {"limit_threshold": 0.02, "deal_price": "open"}),
    ("us", {"risk_degree": 1.0}, {"min_cost": 500, "deal_price": ["$open", "$close"]}),
    ("cn", {"topk": 12}, {"impact_cost": 0.1}),
    ("us", {"n_drop": 8}, {"open_cost": 0.01, "close_cost": 0.02}),
    ("cn", {}, {"limit_threshold": ("$close > 30", "$close < 15")}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("region", "strategy", "rules"), CASES, ids=str)
@pytest.mark.parametrize("factor", [True, False], ids=["factor", "adjusted"])
def test_report_equals_qlib(tmp_path, region, strategy, rules, factor):
    qlib = pytest.importorskip("qlib", reason="pyqlib is not installed")
    root = write_market(tmp_path / "store", factor=factor)
    qlib.init(provider_uri=str(root), region=region, kernels=1, logging_level=logging.CRITICAL)
    from qlib.backtest import backtest as qlib_backtest
    from qlib.contrib.evaluate import indicator_analysis
    from qlib.contrib.evaluate import risk_analysis as qlib_risk_analysis

    score = scores(root)
    strategy = {"topk": 8, "n_drop": 2, **strategy}
    rules = {"limit_threshold": 0.05, "open_cost": 0.0005, "close_cost": 0.0015, "min_cost": 5, **rules}
    metrics, indicators = qlib_backtest(
        start_time=START,
        end_time=END,
        strategy={
            "class": "TopkDropoutStrategy",
            "module_path": "qlib.contrib.strategy",
            "kwargs": {"signal": score.to_frame(), **strategy},
        },
        executor={
            "class": "SimulatorExecutor",
            "module_path": "qlib.backtest.executor",
            "kwargs": {"time_per_step": "day", "generate_portfolio_metrics": True},
        },
        account=1e6,
        benchmark=pd.Series(0.001, pd.bdate_range(START, END)),
        exchange_kwargs=dict(rules),
    )
    report, positions = metrics["1day"]
    orders = indicators["1day"][0].astype(float)
    exchange = Exchange(**rules, trade_unit={"cn": 100, "us": 1}[region])
    result, _ = ours(root, score, TopkDropout(**strategy), exchange)
    assert result.report.index.tolist() == report.index.tolist()
    assert result.report["turnover"].sum() > 0.5
    for column in report:
        np.testing.assert_allclose(result.report[column], report[column], rtol=1e-6, atol=1e-9, err_msg=column)
    for column in ("ffr", "deal_amount", "value", "count"):
        np.testing.assert_allclose(result.indicators[column], orders[column], rtol=1e-6, err_msg=column)
    np.testing.assert_allclose(result.orders()["value"], indicator_analysis(orders)["value"], rtol=1e-6)
    excess = report["return"] - report["bench"]
    for name, series in {"without": excess, "with": excess - report["cost"]}.items():
        expected = qlib_risk_analysis(series, freq="day")["risk"]
        np.testing.assert_allclose(result.risk().loc[f"excess_return_{name}_cost"]["risk"], expected, rtol=1e-5)
    for day in report.index[::9]:
        held = {k: v for k, v in positions[day].position.items() if isinstance(v, dict)}
        mine = result.positions.loc[day] if held else None
        assert held == {} or sorted(held) == sorted(mine.index)
        for code, facts in held.items():
            for name in ("amount", "price", "weight", "count_day"):
                assert mine.loc[code, name] == pytest.approx(facts[name], rel=1e-6)


def test_two_days_by_hand():
    """10 in cash is split between two stocks. One doubles, and the worse one is sold for a third."""
    days = pd.bdate_range("2024-01-01", periods=4)
    frame = pd.DataFrame(
        [
            (d, s, p)
            for d, row in zip(days, ([1, 1, 1], [1, 2, 1], [2, 2, 1], [2, 2, 4]), strict=True)
            for s, p in zip("ABC", map(float, row), strict=True)
        ],
        columns=["datetime", "instrument", "close"],
    )
    score = pd.Series(
        [3.0, 2.0, 1.0, 3.0, 1.0, 2.0],
        pd.MultiIndex.from_product([days[[0, 2]], list("ABC")], names=["datetime", "instrument"]),
    )
    exchange = Exchange(open_cost=0.0, close_cost=0.5, min_cost=0.0)
    market, notes = Market.of(read_prices(frame), exchange, days[1], None)
    assert notes == ["the prices have no complete column factor, so they are treated as adjusted, without round lots"]
    result = backtest(score, market, TopkDropout(2, 1, risk_degree=1.0), exchange, account=10, day_before=days[0])
    held = result.positions["amount"].unstack()
    assert held.loc[days[1]].to_dict() == pytest.approx({"A": 5.0, "B": 2.5, "C": np.nan}, nan_ok=True)
    # the score of day 2 prefers C to B: 2.5 shares of B are sold at 2 minus half, and 2.5 buys 2.5 / 4 shares of C
    assert held.loc[days[3]].to_dict() == pytest.approx({"A": 5.0, "B": np.nan, "C": 0.625}, nan_ok=True)
    assert result.report["account"].tolist() == pytest.approx([10.0, 15.0, 12.5])
    assert result.report["return"].tolist() == pytest.approx([0.0, 0.5, 0.0])
    assert result.report["cost"].tolist() == pytest.approx([0.0, 0.0, 2.5 / 15])
    assert result.report["bench"].isna().all()
    assert result.indicators["count"].tolist() == [2.0, 0.0, 2.0]


def test_nothing_is_dropped_where_none_may_be():
    """Qlib slices the last n_drop entries of a list. For 0 that is the whole list, so it sells everything every day."""
    frame = synthetic.prices(6, 20)
    market, _ = Market.of(read_prices(frame), Exchange(min_cost=0.0), None, None)
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product([market.days, market.instruments], names=["datetime", "instrument"])
    result = backtest(
        pd.Series(rng.standard_normal(len(index)), index), market, TopkDropout(3, 0), Exchange(min_cost=0.0)
    )
    held = result.positions["amount"].unstack().notna()
    assert (held.sum(axis=1) == 3).all()
    assert (held == held.iloc[0]).all(axis=None)


def test_nothing_is_traded_without_scores_or_prices():
    frame = synthetic.prices(5, 30)
    panel = load_prices(frame)
    exchange = Exchange(min_cost=0.0)
    market, _ = Market.of(read_prices(frame), exchange, None, None)
    old = pd.Series(
        1.0, pd.MultiIndex.from_product([[pd.Timestamp("1999-01-04")], ["S0"]], names=["datetime", "instrument"])
    )
    with pytest.raises(DataError, match=r"no day from .* follows a day with scores"):
        backtest(old, market, TopkDropout(2, 1), exchange)
    unknown = pd.Series(1.0, pd.MultiIndex.from_product([panel.datetimes, ["ZZ"]], names=["datetime", "instrument"]))
    result = backtest(unknown, market, TopkDropout(2, 1), exchange, account=100)
    assert (result.report["account"] == 100).all()
    assert len(result.positions) == 0
    assert np.isnan(result.metrics()["1day.ffr"])
    with pytest.raises(DataError, match="no trading day from 2099"):
        Market.of(read_prices(frame), exchange, "2099-01-01", None)
    with pytest.raises(ConfigError, match="account must be a positive amount of money, got 0"):
        backtest(unknown, market, TopkDropout(2, 1), exchange, account=0)


@pytest.mark.parametrize("price", [0.0, np.inf, -1.0])
def test_a_missing_price_has_no_other_effect(price):
    frame = synthetic.prices(n_instruments=6, n_days=30)
    panel = load_prices(frame)
    exchange = Exchange(trade_unit=None)
    rng = np.random.default_rng(0)
    index = panel.index(np.arange(panel.n_rows))
    score = pd.Series(rng.standard_normal(panel.n_rows), index)
    whole = backtest(score, Market.of(read_prices(frame), exchange, None, None)[0], TopkDropout(2, 1), exchange)
    (day, bought), *_ = whole.positions[whole.positions["count_day"] == 1].index[4:]
    keys = frame.set_index(["datetime", "instrument"]).index if "datetime" in frame else frame.index
    here = np.array([pd.Timestamp(d) == day and str(i) == str(bought) for d, i in keys])
    assert here.sum() == 1
    broken = frame.copy()
    broken.loc[here, ["open", "high", "low", "close"]] = price
    market, notes = Market.of(read_prices(broken), exchange, None, None)
    assert "1 closing prices are infinite, zero or negative" in notes[0]
    result = backtest(score, market, TopkDropout(2, 1), exchange)
    assert np.isfinite(result.report["account"]).all()
    assert (day, bought) not in result.positions.index
    before = result.report.index < day
    pd.testing.assert_frame_equal(result.report[before], whole.report[before])


def test_scores_that_are_refused():
    frame = synthetic.prices(n_instruments=4, n_days=20)
    panel = load_prices(frame)
    market, _ = Market.of(read_prices(frame), Exchange(), None, None)
    score = pd.Series(1.0, panel.index(np.arange(panel.n_rows)))
    for wrong, message in (
        (pd.concat([score, score.iloc[:2]]), "2 row.s. with a duplicate .*, first .*2"),
        (score.to_frame(), "must be a Series .* got a DataFrame"),
        (score.rename_axis([None, None]), "got a Series indexed by"),
    ):
        with pytest.raises(DataError, match=message):
            backtest(wrong, market, TopkDropout(2, 1), Exchange())


def test_notes_about_the_benchmark(tmp_path):
    root = write_market(tmp_path / "store")
    handler = FactorHandler(["$close"], "all", provider_uri=root, learn_processors=[])
    config = {
        "strategy": {"class": "TopkDropoutStrategy", "kwargs": {"topk": 2, "n_drop": 1}},
        "backtest": {"start_time": START, "end_time": END, "account": 1e6, "benchmark": None},
    }
    result = PortfolioPlan(config).run(scores(root), handler)
    assert result.notes == ["without a benchmark, excess returns and their risk are empty"]
    config["backtest"]["benchmark"] = ["S09", "NOPE"]
    result = PortfolioPlan(config).run(scores(root), handler)
    assert result.notes == ["the prices have no NOPE: the benchmark is the mean return of the others"]
    config["backtest"]["exchange_kwargs"] = {"deal_price": "settle"}
    with pytest.raises(ConfigError, match="the prices have no settle, which deal_price"):
        PortfolioPlan(config).check_prices(handler)


def test_any_handler_with_prices_is_traded(tmp_path):
    class Wrapper:
        """A handler of a user: it has prices and inherits nothing of qfast."""

        def __init__(self, handler):
            self.handler = handler

        def panel(self, data_key="infer"):
            return self.handler.panel(data_key)

        def quotes(self, instruments, wanted, start_time, end_time):
            return self.handler.quotes(instruments, wanted, start_time, end_time)

    root = write_market(tmp_path / "store")
    handler = FactorHandler(["$close"], "all", provider_uri=root, learn_processors=[])
    config = {
        "strategy": {"class": "TopkDropoutStrategy", "kwargs": {"topk": 2, "n_drop": 1}},
        "backtest": {"start_time": START, "end_time": END, "account": 1e6, "benchmark": "S09"},
    }
    plan = PortfolioPlan(config)
    plan.check_prices(Wrapper(handler))
    expected = plan.run(scores(root), handler).backtest.report
    pd.testing.assert_frame_equal(plan.run(scores(root), Wrapper(handler)).backtest.report, expected)
    with pytest.raises(DataError, match="the backtest needs prices, but object has none"):
        plan.run(scores(root), object())


def test_risk_of_compounding_by_sums():
    result = risk_analysis(pd.Series([0.01, -0.03, 0.02, 0.01]))["risk"]
    assert result["annualized_return"] == pytest.approx(0.0025 * 238)
    assert result["max_drawdown"] == pytest.approx(-0.03)
    assert result["information_ratio"] == pytest.approx(result["mean"] / result["std"] * 238**0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": {"class": "WeightStrategyBase"}}, "strategy 'WeightStrategyBase' is not supported"),
        ({"strategy": {"class": "TopkDropoutStrategy", "kwargs": {"topk": 5}}}, "TopkDropoutStrategy requires n_drop"),
        ({"strategy": {"class": "TopkDropoutStrategy", "kwargs": {"topk": 5, "n_dorp": 1}}}, "Did you mean 'n_drop'"),
        ({"strategy": {"class": "TopkDropoutStrategy", "kwargs": {"topk": 0, "n_drop": 1}}}, "topk must be a whole"),
        (
            {"strategy": {"class": "TopkDropoutStrategy", "kwargs": {"topk": 5, "n_drop": 1, "method_buy": "random"}}},
            "method_buy must be 'top'",
        ),
        (
            {"strategy": {"class": "TopkDropoutStrategy", "kwargs": {"topk": 5, "n_drop": 1, "signal": "x.pkl"}}},
            "signal must be <PRED>",
        ),
        ({"backtest": {"acount": 1}}, "Did you mean 'account'"),
        ({"backtest": {"exchange_kwargs": {"volume_threshold": 1}}}, "has no 'volume_threshold'"),
        ({"backtest": {"exchange_kwargs": {"open_cost": -1}}}, "open_cost must be a number of at least 0"),
        ({"backtest": {"exchange_kwargs": {"limit_threshold": "x"}}}, "limit_threshold must be a number or"),
        ({"backtest": {"account": {"cash": 5}}}, "account must be a positive amount of money"),
        ({"backtest": {"exchange_kwargs": {"deal_price": "$close +"}}}, "does not parse"),
        ({"executor": {"class": "NestedExecutor"}}, "executor 'NestedExecutor' is not supported"),
        (
            {"executor": {"class": "SimulatorExecutor", "kwargs": {"time_per_step": "30min"}}},
            "time_per_step must be 'day', got '30min'",
        ),
        ({"executor": {"class": "SimulatorExecutor", "kwargs": {"settle_type": "cash"}}}, "settle_type must be 'None'"),
        ({"executor": {"class": "SimulatorExecutor", "kwargs": {"trade_type": "parallel"}}}, "must be 'serial'"),
        ({"executor": {"class": "SimulatorExecutor", "kwargs": {"verbos": True}}}, "Did you mean 'verbose'"),
        ({"executor": {"class": "SimulatorExecutor", "kwargs": [1]}}, r"kwargs must be a mapping, got \[1\]"),
        ({"backtest": {"exchange_kwargs": [1]}}, r"exchange_kwargs must be a mapping, got \[1\]"),
        ({"backtest": {"exchange_kwargs": {"codes": ["S01"]}}}, r"codes must be 'all', got \['S01'\]"),
        ({"backtest": {"exchange_kwargs": {"freq": "1min"}}}, "freq must be 'day', got '1min'"),
        ({"backtest": {"exchange_kwargs": {"deal_price": 3}}}, "deal_price must be a field or"),
        ({"backtest": {"exchange_kwargs": {"trade_unit": "1"}}}, "trade_unit must be a positive whole number"),
        ({"backtest": {"pos_type": "InfPosition"}}, "pos_type must be 'Position', got 'InfPosition'"),
        ({"backtest": {"benchmark": 5}}, "benchmark must be an instrument, a list of them or null, got 5"),
        ({"backtest": {"start_time": "hello"}}, "start_time: expected a date .* got 'hello'"),
        ({"backtest": {"start_time": 20170101}}, "start_time: expected a date .* got the int 20170101"),
        ({"backtest": {"start_time": "2017-02-01", "end_time": "2017-01-01"}}, "2017-02-01 is after end_time"),
        ({"strategy": {"class": "TopkDropoutStrategy", "kwargs": [1]}}, r"kwargs must be a mapping, got \[1\]"),
        (
            {"strategy": {"class": "TopkDropoutStrategy", "kwargs": {"topk": 5, "n_drop": 1, "risk_degree": "0.9"}}},
            "risk_degree must be a number in",
        ),
        (
            {"strategy": {"class": "TopkDropoutStrategy", "kwargs": {"topk": 5, "n_drop": 1, "only_tradable": "no"}}},
            "only_tradable must be true or false, got 'no'",
        ),
        ({"portfolio": {}}, "config has no 'portfolio'"),
    ],
)
def test_configurations_that_are_refused(changes, message):
    good = {"strategy": {"class": "TopkDropoutStrategy", "kwargs": {"topk": 5, "n_drop": 1}}, "backtest": {}}
    PortfolioPlan(good)
    with pytest.raises(ConfigError, match=message):
        PortAnaRecord({**good, **changes})


def test_qlibs_default_is_a_plan():
    plan = PortAnaRecord().plan
    assert (plan.strategy.topk, plan.strategy.n_drop, plan.benchmark) == (50, 5, "SH000300")
    assert plan.exchange("cn").trade_unit == 100
    for name, value in (("risk_analysis_freq", "week"), ("indicator_analysis_method", "value_weighted")):
        with pytest.raises(ConfigError, match=f"{name} must be"):
            PortAnaRecord(**{name: value})


def test_plan_over_a_store_reads_the_benchmark_with_the_market(tmp_path):
    root = write_market(tmp_path / "store")
    handler = FactorHandler(["$close"], ["S01", "S02", "S03", "S04"], provider_uri=root, learn_processors=[])
    score = scores(root)
    score = score[score.index.get_level_values("instrument").isin(["S01", "S02", "S03", "S04"])]
    config = {
        "strategy": {"class": "TopkDropoutStrategy", "kwargs": {"topk": 2, "n_drop": 1}},
        "backtest": {"start_time": START, "end_time": END, "account": 1e6, "benchmark": "S09"},
    }
    result = PortfolioPlan(config).run(score, handler)
    close = read_prices(provider_uri=root, instruments=["S09"]).panel
    change = pd.Series(close.column("close"), close.datetimes[close.date_codes]).pct_change(fill_method=None).fillna(0)
    np.testing.assert_allclose(result.backtest.report["bench"], change.reindex(result.backtest.report.index), rtol=1e-4)
    assert result.notes == []
    config["backtest"] = {**config["backtest"], "benchmark": "SH000300", "start_time": None, "end_time": None}
    result = PortfolioPlan(config).run(score, handler)
    assert "no benchmark SH000300: the mean return of all instruments" in result.notes[0]
    assert result.backtest.report.index[0] == score.index.get_level_values("datetime").min()
