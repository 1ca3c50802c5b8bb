"""`qfast check`: clean workflows pass, planted mistakes are found and named."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from workflow_case import factors, write_case

from qfast.cli import main
from qfast.data.processors import Processor
from qfast.errors import ConfigError
from qfast.registry import PROCESSORS
from qfast.workflow.check import check
from qfast.workflow.demo import DEMO, demo_prices

SHORT = ["task.model.kwargs.hidden_size=4", "task.model.kwargs.n_epochs=3"]


@pytest.fixture(scope="module")
def prices():
    return demo_prices(n_instruments=12, n_days=560)


def levels(report, topic: str) -> list[str]:
    return [f.level for f in report.findings if f.topic == topic]


def text(report, topic: str) -> str:
    return "\n".join(f.text for f in report.findings if f.topic == topic)


def test_a_clean_workflow_passes(prices):
    report = check(DEMO, prices, SHORT)
    assert report.ok
    assert levels(report, "look-ahead") == ["ok", "ok"]
    assert levels(report, "invariance") == ["ok"]
    assert "no feature of that day or before moves by a bit" in text(report, "look-ahead")
    assert "no key occurs twice" in text(report, "data")
    assert "a training pass takes about" in text(report, "time")
    assert "labels look 2 days ahead, and 0 days lie between" in text(report, "horizon")
    assert all(line[:8].strip() in ("ok", "note", "warning", "error") for line in report.lines())


@pytest.mark.parametrize("kind", ["flat", "gats", "ts"])
def test_every_kind_of_model_is_the_same_whatever_is_asked_for(prices, kind):
    sets = {
        "flat": ["task.model.class=TransformerModel", "task.model.kwargs={d_feat: 6, d_model: 8, n_epochs: 1}"],
        "gats": ["task.model.class=GATs", "task.model.kwargs={d_feat: 6, hidden_size: 4, n_epochs: 1}"],
        "ts": ["task.model.module_path=qfast.models.ts", "task.model.kwargs.d_feat=360", *SHORT,
               "task.dataset.class=TSDatasetH", "task.dataset.kwargs.step_len=5"],
    }  # fmt: skip
    report = check(DEMO, prices, sets[kind])
    assert report.ok, report.lines()


def test_a_fit_window_in_the_future_is_found_both_ways(prices):
    report = check(DEMO, prices, [*SHORT, "task.dataset.kwargs.handler.kwargs.fit_end_time=2020-02-15"])
    assert not report.ok
    assert levels(report, "fit window") == ["error"]
    assert re.search(r"3\d\d feature\(s\) of earlier days move", text(report, "look-ahead"))


class Peek(Processor):
    """Takes the next row's value: the leak that nobody sees in a table."""

    def _apply(self, panel, space):
        values = np.roll(panel.values("feature"), -1, axis=0)
        return panel.replace("feature", values)


def test_a_processor_that_looks_ahead_is_found(prices, monkeypatch):
    PROCESSORS.add(Peek, modules=("tests",))
    steps = "task.dataset.kwargs.handler.kwargs.infer_processors=[{class: Peek}, {class: Fillna}]"
    try:
        report = check(DEMO, prices, [*SHORT, steps])
    finally:
        for known in [key for key, value in vars(PROCESSORS).items() if isinstance(value, dict)]:
            vars(PROCESSORS)[known].pop("Peek", None)
    assert not report.ok
    assert levels(report, "look-ahead") == ["error", "error"]
    assert "scores differ, first" in text(report, "look-ahead")


def test_segments_that_overlap_or_are_empty_are_named(prices):
    report = check(DEMO, prices, [*SHORT, "task.dataset.kwargs.segments.valid=[2019-06-01, 2019-12-31]"])
    assert "valid overlaps train: what is learnt is tested on itself" in text(report, "segments")
    report = check(DEMO, prices, [*SHORT, "task.dataset.kwargs.segments.test=[2031-01-01, null]"])
    assert "test (2031-01-01 to None) holds no rows of the data" in text(report, "segments")
    assert not report.ok


def test_missing_and_constant_columns_are_named(tmp_path):
    config, _ = write_case(tmp_path)
    frame = factors()
    frame["f1"] = 1.0
    frame["f4"] = np.nan
    frame.iloc[:200, 3] = np.nan
    report = check(config, frame, experiments=False)
    assert "1 column(s) hold one value only: f1" in text(report, "constant")
    assert "1 column(s) hold no value at all: f4" in text(report, "missing")
    assert re.search(r"f3 2\d\.\d%", text(report, "missing"))
    assert "the label is the user's own" in text(report, "horizon")


def test_a_repeated_row_is_an_error_that_names_it(prices):
    twice = pd.concat([prices, prices.iloc[[7]]])
    report = check(DEMO, twice, SHORT)
    assert not report.ok
    assert "duplicate" in text(report, "data")


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
