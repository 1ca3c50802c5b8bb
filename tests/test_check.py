"""`qfast check`: clean workflows pass, planted mistakes are found and named."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from qfast.cli import main
from qfast.data.expression import parse
from qfast.data.factors import register_function, unregister_function
from qfast.data.handlers.base import RawDataDroppedError
from qfast.data.processors import Processor
from qfast.errors import ConfigError
from qfast.registry import PROCESSORS
from qfast.workflow.check import check
from qfast.workflow.check.expressions import rows_ahead
from qfast.workflow.demo import DEMO, demo_prices
from qfast.workflow.run import run
from support.stores import write_store
from support.workflows import factors, write_case

SHORT = ["task.model.kwargs.hidden_size=4", "task.model.kwargs.n_epochs=3"]
HANDLER = "task.dataset.kwargs.handler.kwargs"
SEGMENTS = "task.dataset.kwargs.segments"
STRATEGY = "task.record.2.kwargs.config.strategy.kwargs"
BACKTEST = "task.record.2.kwargs.config.backtest"


@pytest.fixture(scope="module")
def prices():
    return demo_prices(n_instruments=12, n_days=560)


def levels(report, topic: str) -> list[str]:
    return [f.level for f in report.findings if f.topic == topic]


def text(report, topic: str) -> str:
    return "\n".join(f.text for f in report.findings if f.topic == topic)


def test_labels_of_train_that_are_returns_of_the_next_segment(prices):
    report = check(DEMO, prices, [*SHORT, f"{SEGMENTS}.train=[2018-01-01, 2019-06-27]"], experiments=False)
    assert levels(report, "horizon") == ["warning"]
    assert "labels look 2 days ahead, but the gap between train and the next segment is 1 days" in text(
        report, "horizon"
    )


def test_a_clean_workflow_passes(prices):
    report = check(DEMO, prices, [*SHORT, f"{STRATEGY}.topk=5"])
    assert report.ok
    assert levels(report, "look-ahead") == ["ok", "ok"]
    assert levels(report, "invariance") == ["ok", "ok"]
    assert levels(report, "portfolio")[0] == "ok"
    assert "the prices have no benchmark MARKET" in text(report, "portfolio")
    assert "no feature up to that day changes by a bit" in text(report, "look-ahead")
    assert "no duplicate rows" in text(report, "data")
    assert "a training pass takes about" in text(report, "time")
    assert levels(report, "horizon") == ["ok"]
    assert "labels look 2 days ahead; the gap after train is 2 days" in text(report, "horizon")
    assert all(line[:8].strip() in ("ok", "note", "warning", "error") for line in report.lines())


@pytest.mark.parametrize("kind", ["flat", "gats", "ts"])
def test_every_model_has_the_same_report_for_any_arguments(prices, kind):
    sets = {
        "flat": ["task.model.class=TransformerModel", "task.model.kwargs={d_feat: 6, d_model: 8, n_epochs: 1}"],
        "gats": ["task.model.class=GATs", "task.model.kwargs={d_feat: 6, hidden_size: 4, n_epochs: 1}"],
        "ts": [
            "task.model.module_path=qfast.models.ts",
            "task.model.kwargs.d_feat=360",
            *SHORT,
            "task.dataset.class=TSDatasetH",
            "task.dataset.kwargs.step_len=5",
        ],
    }
    report = check(DEMO, prices, sets[kind])
    assert report.ok, report.lines()


def test_a_fit_window_in_the_future_is_found_both_ways(prices):
    report = check(DEMO, prices, [*SHORT, "task.dataset.kwargs.handler.kwargs.fit_end_time=2020-02-15"])
    assert not report.ok
    assert levels(report, "fit window") == ["error"]
    assert re.search(r"3\d\d feature\(s\) of earlier days change", text(report, "look-ahead"))


def of_factors(*texts: str) -> list[str]:
    """Changes to the demo that make expressions its features."""
    return [
        *SHORT,
        "task.dataset.kwargs.handler.class=FactorHandler",
        f"task.model.kwargs.d_feat={len(texts)}",
        f"{HANDLER}.features={[text.replace(chr(39), chr(34)) for text in texts]}",
    ]


def with_gaps(prices: pd.DataFrame) -> pd.DataFrame:
    """Suspends 5% of the rows and removes the volume of another 5%."""
    result, rng = prices.copy(), np.random.default_rng(3)
    result[rng.random(len(result)) < 0.05] = np.nan
    result.loc[rng.random(len(result)) < 0.05, "volume"] = 0.0
    return result


LOOKS_AHEAD = {
    "suspended tomorrow": ("If(Ref($close, -1) == Ref($close, -1), 1, 0)", 1),
    "delisted in 60 days": ("Count(Ref($close, -60), 1)", 60),
    "no volume tomorrow": ("Sign(Ref($volume, -1))", 1),
}


@pytest.mark.parametrize("case", LOOKS_AHEAD)
def test_an_expression_that_looks_ahead_is_an_error_that_names_it(prices, case):
    expression, rows = LOOKS_AHEAD[case]
    report = check(DEMO, with_gaps(prices), of_factors("$close / Ref($close, 5)", expression))
    assert levels(report, "look-ahead")[:2] == ["error", "error"]  # by its declaration, by its behaviour
    result = text(report, "look-ahead")
    assert f"{rows} row(s), {expression!r}" in result
    assert "1 feature(s) look ahead" in result
    assert f"1 feature(s) of earlier days change: {expression}" in result


def test_the_proof_counts_shifts_but_not_intermediate_rows(prices):
    past = "Ref(Ref($close, -2) / Ref($close, -1) - 1, 3)"  # the label of three days ago
    assert rows_ahead(parse(past)) == -1
    assert rows_ahead(parse("Mean(Delta(Mask($close, 'A'), -4), 10) + Ref($close, 2)")) == 4
    assert rows_ahead(parse("Ref(If(Ref($close, 5) > 1, 1, 0), -3)")) == -2
    report = check(DEMO, prices, of_factors(past, "Mean($close, 5) / $close"))
    assert report.ok, report.lines()
    assert "none of the 2 expressions looks ahead" in text(report, "look-ahead")


def next_row(values: np.ndarray) -> np.ndarray:
    return np.append(values[1:], np.nan)


@pytest.mark.parametrize(
    "sees", [lambda x: np.isnan(next_row(x)).astype(float), lambda x: np.sign(next_row(x))], ids=["missing", "zero"]
)
def test_an_undeclared_reach_is_detected_by_missing_values(prices, sees):
    """The leak is whether a value or a volume exists tomorrow. Random changes of future values do not affect that."""
    register_function("Peeks", sees)
    try:
        report = check(DEMO, with_gaps(prices), of_factors("$close / Ref($close, 5)", "Peeks($volume)"))
    finally:
        unregister_function("Peeks")
    assert levels(report, "look-ahead") == ["ok", "error", "error"]


def test_the_future_is_changed_after_several_days(prices):
    """A leak in the first days of the segment, which a single cut in the middle of the segment would miss."""
    days = prices.index.get_level_values("datetime").unique().sort_values()
    scored = days[days >= "2020-01-01"]

    class PeekEarly(Peek):
        def _apply(self, panel, space):
            early = np.asarray(panel.datetimes < scored[len(scored) // 3])[panel.date_codes]
            values = panel.values("feature").copy()
            values[early] = np.roll(values, -1, axis=0)[early]
            return panel.replace("feature", values)

    report = check_with(PeekEarly, prices)
    assert levels(report, "look-ahead") == ["error", "error"]


def test_a_mask_of_an_instrument_is_checked_with_that_instrument(tmp_path):
    many = demo_prices(n_instruments=130, n_days=540)
    names = sorted(many.index.get_level_values("instrument").unique())
    assert len(names) > 120  # the sample has every third one
    report = check(DEMO, many, of_factors(f"$close / Mask($close, '{names[1]}')", "Mean($close, 5) / $close"))
    assert report.ok, report.lines()
    assert levels(report, "look-ahead") == ["ok"] * 3


def test_a_mask_of_an_instrument_outside_the_market(tmp_path):
    root = write_store(tmp_path, n_days=400)
    changes = [
        *of_factors("$close / Mask($close, 'CCC')", "Mean($close, 5) / $close"),
        f"{HANDLER}.instruments=mixed",
        f"{HANDLER}.start_time=2020-01-01",
        f"{HANDLER}.fit_start_time=2020-01-01",
        f"{HANDLER}.fit_end_time=2020-12-31",
        "task.record=[]",
        f"{SEGMENTS}={{train: [2020-01-01, 2020-12-31], valid: [2021-01-01, 2021-02-28], test: [2021-03-01, null]}}",
    ]
    report = check(DEMO, str(root), changes)
    assert report.ok, report.lines()
    assert levels(report, "look-ahead") == ["ok"] * 3
    assert levels(report, "invariance") == ["ok"] * 2


@pytest.mark.parametrize(("end", "level"), [("null", "ok"), ("2019-06-28", "note")])
def test_only_train_is_cut_if_nothing_is_fitted(prices, end, level):
    """Values inside the fit window may depend on it; that is not a leak."""
    only = [f"{SEGMENTS}={{train: [2018-01-01, 2019-06-28]}}", f"{HANDLER}.end_time={end}", "task.record=[]"]
    report = check(DEMO, prices, [*SHORT, *only])
    assert report.ok, report.lines()
    assert set(levels(report, "look-ahead")) == {level}
    if level == "note":
        assert "processors are fitted up to 2019-06-26, close to the end of the data" in text(report, "look-ahead")


def test_features_since_the_first_day_are_reported(prices):
    report = check(DEMO, prices, of_factors("EMA($close, 5) / $close", "$close / Mean($close, 0)", "Mean($close, 5)"))
    assert report.ok, report.lines()
    assert levels(report, "invariance") == ["ok", "note"]
    result = text(report, "invariance")
    assert (
        "2 feature(s) depend on the first day of the data: EMA($close, 5) / $close, $close / Mean($close, 0)" in result
    )


def test_an_operator_with_a_wrong_reach_changes_the_scores_on_less_data(prices):
    register_function("SoFar", lambda x: np.nancumsum(x) / np.arange(1, len(x) + 1))
    try:
        report = check(DEMO, prices, of_factors("SoFar($close) / $close", "Mean($close, 5) / $close"))
    finally:
        unregister_function("SoFar")
    assert levels(report, "invariance") == ["ok", "warning"]
    assert "with prices from" in text(report, "invariance")


def test_dropped_raw_data_is_an_error_and_does_not_hide_a_leak(prices, tmp_path):
    drop = [*SHORT, f"{HANDLER}.drop_raw=true"]
    report = check(DEMO, prices, drop)
    assert [f.topic for f in report.findings if f.level == "error"] == ["data"]
    assert "would raise RawDataDroppedError. Remedy: remove drop_raw" in text(report, "data")
    assert levels(report, "look-ahead") == ["ok", "ok"]
    with pytest.raises(RawDataDroppedError):
        run(DEMO, prices, drop, output=tmp_path / "run")


class Peek(Processor):
    """Reads the value of the next row, a leak that is invisible in a table."""

    def _apply(self, panel, space):
        values = np.roll(panel.values("feature"), -1, axis=0)
        return panel.replace("feature", values)


class Breaks(Processor):
    """Raises an unexpected error, but only on a sample."""

    def _apply(self, panel, space):
        raise KeyError("of its own")


def check_with(processor, prices):
    """The report on the demo with a custom processor."""
    PROCESSORS.add(processor, modules=("tests",))
    steps = f"{HANDLER}.infer_processors=[{{class: {processor.__name__}}}, {{class: Fillna}}]"
    try:
        return check(DEMO, prices, [*SHORT, steps])
    finally:
        for group in [key for key, value in vars(PROCESSORS).items() if isinstance(value, dict)]:
            vars(PROCESSORS)[group].pop(processor.__name__, None)


def test_a_processor_that_looks_ahead_is_found(prices):
    report = check_with(Peek, prices)
    assert not report.ok
    assert levels(report, "look-ahead") == ["error", "error"]
    assert "scores differ, first" in text(report, "look-ahead")


def test_an_unexpected_error_is_a_finding(prices, monkeypatch):
    report = check_with(Breaks, prices)
    assert [f.level for f in report.findings] == ["ok", "error"]
    assert re.search(r"KeyError: 'of its own' \(raised by _apply, test_check.py line \d+\)", text(report, "data"))

    def broken(*_):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("qfast.workflow.check.check_future_change", broken)
    report = check(DEMO, prices, SHORT)
    assert levels(report, "look-ahead") == ["error"]
    assert levels(report, "invariance") == ["ok", "ok"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (f"{BACKTEST}.exchange_kwargs.deal_price=settle", "the prices have no settle"),
        (
            f"{BACKTEST}={{account: 1e6, start_time: 2031-01-01}}",
            "would skip the backtest: backtest: there is no trading day from",
        ),
        (f"{BACKTEST}={{account: 1e6, end_time: 2019-05-01}}", "would skip the backtest"),
        (
            f"{SEGMENTS}={{train: [2018-01-01, 2019-06-30], valid: [2019-07-01, null]}}",
            "trades on the segment test, but there is only ['train', 'valid']",
        ),
    ],
)
def test_a_backtest_that_cannot_be_is_an_error(prices, change, message):
    report = check(DEMO, prices, [*SHORT, change], experiments=False)
    assert not report.ok
    assert levels(report, "portfolio") == ["error"]
    assert message in text(report, "portfolio")


@pytest.mark.parametrize(
    "change", [f"{BACKTEST}={{account: 1e6, start_time: hello}}", "task.record.1.kwargs={label_col: 1}"]
)
def test_arguments_of_records_are_checked_as_for_a_run(prices, change):
    with pytest.raises(ConfigError, match=r"\n  task\.record\.\d\.kwargs: "):
        check(DEMO, prices, [*SHORT, change])


def test_a_benchmark_of_the_prices_needs_no_note(prices):
    name = prices.index.get_level_values("instrument")[0]
    report = check(DEMO, prices, [*SHORT, f"{BACKTEST}.benchmark={name}"], experiments=False)
    assert not any("benchmark" in f.text for f in report.findings)


def test_overlapping_or_empty_segments_are_reported(prices):
    report = check(DEMO, prices, [*SHORT, "task.dataset.kwargs.segments.valid=[2019-06-01, 2019-12-31]"])
    assert "valid overlaps train, so the model is evaluated on its training data" in text(report, "segments")
    report = check(DEMO, prices, [*SHORT, "task.dataset.kwargs.segments.test=[2031-01-01, null]"])
    assert "test (2031-01-01 to None) contains no rows of the data" in text(report, "segments")
    assert not report.ok


def test_missing_and_constant_columns_are_reported(tmp_path):
    config, _ = write_case(tmp_path)
    frame = factors()
    frame["f1"] = 1.0
    frame["f4"] = np.nan
    frame.iloc[:200, 3] = np.nan
    report = check(config, frame, experiments=False)
    assert "1 column(s) contain a single value: f1" in text(report, "constant")
    assert "1 column(s) contain no value: f4" in text(report, "missing")
    assert re.search(r"f3 2\d\.\d%", text(report, "missing"))
    assert "the data contains its own label" in text(report, "horizon")


def test_a_repeated_row_is_an_error_that_names_it(prices):
    twice = pd.concat([prices, prices.iloc[[7]] * 2])
    report = check(DEMO, twice, SHORT)
    assert not report.ok
    assert "duplicate" in text(report, "data")
    report = check(DEMO, pd.concat([prices, prices.iloc[[7]]]), SHORT, experiments=False)
    assert report.ok
    assert "leaving out 1 row(s) that repeat another one exactly" in text(report, "source")


def test_the_command(prices, tmp_path, capsys):
    file = tmp_path / "prices.csv"
    prices.reset_index().to_csv(file, index=False)
    assert main(["check", str(DEMO), "--data", str(file), *[x for s in SHORT for x in ("--set", s)]]) == 0
    assert "scores are the same" in capsys.readouterr().out
    wrong = "task.dataset.kwargs.handler.kwargs.fit_end_time=2020-02-15"
    assert main(["check", str(DEMO), "--data", str(file), "--no-experiments", "--set", wrong]) == 1
    assert "error   fit window" in capsys.readouterr().out
    with pytest.raises(ConfigError):
        check(DEMO, prices, ["task.model.kwargs.hiden_size=4"])
