"""Findings about runs that cannot mean anything, which `check` and `run` report before training."""

from __future__ import annotations

import json
import logging

import numpy as np
import pandas as pd
import pytest

from qfast import check, run
from qfast.data import Alpha158, Alpha360vwap, DataHandlerLP, DatasetH, FactorHandler, TSDatasetH, synthetic
from qfast.errors import ConfigError, DataError
from qfast.workflow.check.calendar import calendar_findings
from qfast.workflow.check.data import check_data
from qfast.workflow.check.findings import CheckReport
from qfast.workflow.check.meaning import _window_findings, check_meaning
from qfast.workflow.check.price_jumps import price_findings
from qfast.workflow.config import load_config
from qfast.workflow.demo import DEMO, demo_prices
from qfast.workflow.validation import check_workflow
from support.workflows import factors, write_case

SPANS = {
    "train": ("2020-01-01", "2020-02-05"),
    "valid": ("2020-02-06", "2020-02-20"),
    "test": ("2020-02-21", "2020-03-05"),
}


def grouped(frame: pd.DataFrame) -> pd.DataFrame:
    groups = ["label" if name.startswith("label") else "feature" for name in frame.columns]
    return frame.set_axis(pd.MultiIndex.from_arrays([groups, frame.columns]), axis=1)


def findings(tmp_path, frame, segments=SPANS, learn=("DropnaLabel",), sets=()):
    config, _ = write_case(tmp_path)
    workflow = check_workflow(load_config(config, sets).values)
    report = CheckReport()
    handler = DataHandlerLP(grouped(frame), learn_processors=list(learn))
    check_meaning(report, workflow, DatasetH(handler, segments))
    return [(f.level, f.topic, f.text) for f in report.findings]


def topics(found, *levels):
    return [topic for level, topic, _ in found if level in (levels or ("warning", "error"))]


def test_a_sound_run_has_no_findings(tmp_path):
    assert findings(tmp_path, factors()) == []


@pytest.mark.parametrize("name", ["val", "validation", "Valid", "dev", "vaild"])
def test_a_misspelled_valid(tmp_path, name):
    segments = {"train": SPANS["train"], name: SPANS["valid"], "test": SPANS["test"]}
    ((level, topic, text),) = findings(tmp_path, factors(), segments)
    assert (level, topic) == ("warning", "segments")
    assert f"does not use the segment {name!r}. Did you mean 'valid'?" in text
    assert "n_epochs=3 epochs without early stopping" in text
    assert "metric has no effect" in text


def test_no_valid_at_all_is_a_note(tmp_path):
    ((level, _, text),) = findings(tmp_path, factors(), {"train": SPANS["train"], "test": SPANS["test"]})
    assert level == "note"
    assert "there is no segment 'valid'" in text


def test_a_misspelled_test_and_train(tmp_path):
    segments = {"train": SPANS["train"], "valid": SPANS["valid"], "testing": SPANS["test"]}
    assert "Did you mean 'test'?" in findings(tmp_path, factors(), segments)[0][2]
    config, _ = write_case(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no 'train'.*Rename 'trian'"):
        check_workflow(load_config(config, ["task.dataset.kwargs.segments={trian: [2020-01-01, 2020-02-01]}"]).values)


def test_segments_beyond_the_data_and_overlaps(tmp_path):
    segments = {**SPANS, "test": ("2020-02-15", "2030-01-01")}
    texts = [text for _, _, text in findings(tmp_path, factors(), segments)]
    assert "test is from 2020-02-15 to 2030-01-01, but the data is from 2020-01-01 to 2020-03-10" in texts[0]
    assert "valid and test have 6 days in common" in texts[1]


def test_one_instrument_ranked_across_the_day(tmp_path):
    found = findings(tmp_path, factors(n_stocks=1), learn=["DropnaLabel", "CSRankNorm"])
    (train, valid) = [f for f in found if f[1] == "label"]
    assert train[0] == "error"
    assert "all 36 labels of train are 1.73" in train[2]
    assert "one instrument per day, and CSRankNorm compares the instruments of a day" in train[2]
    assert valid[0] == "warning"


def test_labels_that_are_equal_within_a_day(tmp_path):
    frame = factors()
    frame["label"] = frame.groupby("datetime")["label"].transform("mean")
    found = findings(tmp_path, frame)
    assert topics(found) == ["label", "label"]
    assert "all instruments have the same label on 36 of 36 days of train" in found[0][2]


def test_no_labels_in_valid(tmp_path):
    frame = factors()
    dates = frame.index.get_level_values("datetime")
    frame.loc[(dates >= "2020-02-06") & (dates <= "2020-02-20"), "label"] = np.nan
    assert findings(tmp_path, frame)[0] == ("error", "label", "valid has no rows after the learn processors")


@pytest.mark.parametrize("scale", [1.0, -2.5])
def test_a_feature_that_contains_the_label(tmp_path, scale):
    frame = factors()
    frame["f3"] = scale * frame["label"] + 1.0
    ((level, topic, text),) = findings(tmp_path, frame)
    assert (level, topic) == ("error", "look-ahead")
    assert "1 feature(s) equal the label or a linear function of it: f3" in text


def test_a_portfolio_of_all_instruments(tmp_path):
    sets = ["task.record.2.kwargs.config.strategy.kwargs.topk=12"]
    ((level, topic, text),) = findings(tmp_path, factors(), sets=sets)
    assert (level, topic) == ("warning", "strategy")
    assert "topk is 12, but test has 12 instruments per day" in text


@pytest.mark.parametrize("name", ["n_epochs", "lr"])
def test_a_model_that_is_not_trained(tmp_path, name):
    ((level, topic, text),) = findings(tmp_path, factors(), sets=[f"task.model.kwargs.{name}=0"])
    assert (level, topic) == ("warning", "training")
    assert text == f"{name} is 0, so nothing is trained and the scores are those of untrained weights"


# ---------------------------------------------------------------- prices and calendars
def prices(days: pd.DatetimeIndex, n_stocks: int = 3, **columns) -> FactorHandler:
    rng = np.random.default_rng(1)
    index = pd.MultiIndex.from_product([days, [f"S{i}" for i in range(n_stocks)]], names=["datetime", "instrument"])
    moves = rng.normal(0, 0.01, (len(days), n_stocks)).cumsum(axis=0)
    frame = pd.DataFrame({"close": 10 * np.exp(moves).ravel(), **columns}, index)
    return handler_of(frame)


def handler_of(frame: pd.DataFrame) -> FactorHandler:
    return FactorHandler((["$close / Ref($close, 1)"], ["R"]), data=frame, learn_processors=[])


DAYS = pd.bdate_range("2020-01-01", "2020-08-31")


def test_sound_prices_and_calendars():
    handler = prices(DAYS)
    assert [*price_findings(handler), *calendar_findings(handler)] == []
    crypto = prices(pd.date_range("2020-01-01", "2020-08-31"))
    assert list(calendar_findings(crypto)) == []
    weekly = prices(pd.date_range("2018-01-01", "2020-08-31", freq="W"))
    assert list(calendar_findings(weekly)) == []


def split(handler: FactorHandler) -> pd.DataFrame:
    frame = handler.prices.to_frame("price").astype(np.float64)
    late = frame.index.get_level_values("datetime") >= "2020-05-04"
    frame.loc[late & (frame.index.get_level_values("instrument") == "S1"), "close"] /= 4
    return frame


def test_a_split_without_an_adjusted_close():
    (finding,) = price_findings(handler_of(split(prices(DAYS))))
    assert finding.level == "warning"
    assert "1 closing price(s) change by a factor of more than 1.8" in finding.text
    assert "S1 on 2020-05-04 -7" in finding.text


@pytest.mark.parametrize("name", ["Adj Close", "adj_close", "AdjClose", "adjusted close"])
def test_a_split_next_to_an_adjusted_close(name):
    before = prices(DAYS)
    frame = split(before)
    frame[name] = before.prices.to_frame("price")["close"]
    (finding,) = price_findings(handler_of(frame))
    assert "close is not adjusted for 1 split(s)" in finding.text
    assert "S1 on 2020-05-04 -7" in finding.text
    assert "--adjust" in finding.text


def test_check_reports_a_split_next_to_an_adjusted_close_once():
    frame = demo_prices(4, 560)
    frame["adj_close"] = frame["close"]
    late = frame.index.get_level_values("datetime") >= frame.index.get_level_values("datetime")[300]
    frame.loc[late, "close"] /= 4
    texts = [finding.text for finding in check(DEMO, frame, experiments=False).findings]
    assert sum("not adjusted for" in text for text in texts) == 1


def test_instruments_that_never_change_or_repeat_another_one():
    frame = prices(DAYS).prices.to_frame("price")
    name = frame.index.get_level_values("instrument")
    assert not list(price_findings(handler_of(frame)))
    copied = frame.xs("S1", level="instrument", drop_level=False).rename(index={"S1": "S1 copy"})
    (finding,) = price_findings(handler_of(pd.concat([frame, copied])))
    assert "1 instrument(s) have the same closes as another one: S1 copy has those of S1" in finding.text
    frame.loc[name == "S2", "close"] = 10.0
    (finding,) = price_findings(handler_of(frame))
    assert finding.level == "warning"
    assert "the close of 1 instrument(s) never changes: S2" in finding.text


def test_labels_without_later_prices_and_windows_longer_than_the_data():
    frame = demo_prices(4, 560)
    sets = ["task.dataset.kwargs.handler.kwargs.label=['$close / Ref($close, 1) - 1']"]
    texts = [f.text for f in check(DEMO, frame, sets, experiments=False).findings if f.level == "warning"]
    assert any("reads no later prices, so it is known when the features are" in text for text in texts)
    texts = [f.text for f in check(DEMO, frame, experiments=False).findings]
    assert not any("reads no later prices" in text or "step_len is" in text for text in texts)
    handler = handler_of(frame)
    dataset = TSDatasetH(handler, {"train": (None, None)}, step_len=900)
    assert ["step_len is 900, but the data has 560 days" in f.text for f in _window_findings(dataset)] == [True]


def test_prices_that_are_not_positive():
    frame = prices(DAYS).prices.to_frame("price")
    frame.iloc[5, 0] = 0.0
    assert "1 closing prices are zero or negative" in next(price_findings(handler_of(frame))).text


def swapped(days: pd.DatetimeIndex) -> pd.DatetimeIndex:
    """The dates with day and month swapped where that is a date."""
    return pd.DatetimeIndex([d.replace(day=d.month, month=d.day) if d.day <= 12 else d for d in days]).sort_values()


def test_swapped_dates():
    found = list(calendar_findings(prices(swapped(DAYS))))
    assert [f.topic for f in found] == ["calendar"] * len(found)
    assert "all are before the 13th of a month: day and month may be swapped" in found[0].text


def test_dates_up_to_the_twelfth():
    days = DAYS[DAYS.day <= 12]
    assert "no date is after the 12th of a month" in next(calendar_findings(prices(days))).text


def test_gaps_and_missing_weekdays():
    gap = DAYS[(DAYS < "2020-03-02") | (DAYS > "2020-04-10")]
    assert "2020-02-28 to 2020-04-13 (30 weekdays)" in next(calendar_findings(prices(gap))).text
    rng = np.random.default_rng(0)
    holes = DAYS[rng.random(len(DAYS)) > 0.25]
    assert "weekdays between" in next(calendar_findings(prices(holes))).text


def test_incomplete_days():
    frame = prices(DAYS, n_stocks=6).prices.to_frame("price")
    day = frame.index.get_level_values("datetime") == DAYS[60]
    frame = frame[~day | frame.index.get_level_values("instrument").isin(["S0", "S1"])]
    (finding,) = calendar_findings(handler_of(frame))
    assert f"1 day(s) lack more than half of the instruments: {DAYS[60]:%Y-%m-%d} 2 of about 6" in finding.text


# ---------------------------------------------------------------- columns
def test_columns_that_filter_col_drops_are_not_reported(caplog):
    without_vwap = synthetic.prices(4, 90).drop(columns="vwap")
    keep = [{"class": "FilterCol", "kwargs": {"fields_group": "feature", "col_list": ["KMID", "STD5"]}}]
    with caplog.at_level(logging.WARNING, "qfast"):
        handler = Alpha158(data=without_vwap, infer_processors=keep)
    assert caplog.text == ""
    report = CheckReport()
    check_data(report, DatasetH(handler, SPANS), 0.0)
    assert "VWAP0" not in "\n".join(report.lines())
    with caplog.at_level(logging.WARNING, "qfast"):
        Alpha158(data=without_vwap)
    assert "no column(s) vwap; their features are NaN" in caplog.text


def test_an_empty_column_does_not_contradict_the_rest():
    frame = factors()
    frame = frame.fillna(0.0).assign(f1=np.nan)
    report = CheckReport()
    check_data(report, DatasetH(DataHandlerLP(grouped(frame)), SPANS), 0.0)
    text = "\n".join(report.lines())
    assert "1 column(s) contain no value: f1" in text
    assert "the other columns have no missing values" in text


def test_the_label_that_drops_all_rows_is_named(caplog):
    with pytest.raises(
        DataError, match=r"dropped all \d+ rows, because these columns contain no value: LABEL0 \(label"
    ):
        Alpha360vwap(data=synthetic.prices(3, 70).drop(columns="vwap"), infer_processors=[])
    assert "so the label Ref($vwap, -2)/Ref($vwap, -1) - 1 is NaN. vwap='typical'" in caplog.text


# ---------------------------------------------------------------- run
def test_a_run_reports_them_before_training(tmp_path, caplog):
    config, data = write_case(tmp_path)
    segments = "task.dataset.kwargs.segments={train: [2020-01-01, 2020-02-05], val: [2020-02-06, 2020-02-20]}"
    with caplog.at_level(logging.WARNING, "qfast"):
        run(config, data, output=tmp_path / "run", sets=["task.model.kwargs.n_epochs=1", segments, "task.record=[]"])
    assert "Did you mean 'valid'?" in caplog.text
    notes = json.loads((tmp_path / "run" / "manifest.json").read_text())["notes"]
    assert any("Did you mean 'valid'?" in note for note in notes)
