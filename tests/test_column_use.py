"""Features that no processor result depends on are not computed, and nothing else changes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from qfast.data import Alpha158, FactorHandler, synthetic
from qfast.data.handlers.prices import PriceHandler
from qfast.data.processors import CSZFillna, Fillna, FilterCol, Processor, RobustZScoreNorm
from qfast.data.processors.column_use import unread_columns
from qfast.workflow.predict import predict
from qfast.workflow.run import run

FEATURES = (
    [
        "$close / Ref($close, 3)",
        "Mean($close, 5) / $close",
        "Std($close, 7)",
        "$vwap / $close",
        "Corr($close, $high, 9)",
    ],
    ["A", "B", "C", "D", "E"],
)
FIT = {"fit_start_time": "2000-01-01", "fit_end_time": "2100-01-01"}


class Demean(Processor):
    """A processor of a user that reads all columns together."""

    def _apply(self, panel, space):
        values = panel.values("feature")
        return panel.replace("feature", values - values[:, :1])


class LikeFillna(Fillna):
    """A subclass may do anything."""


def step(name: str, group: object = "feature", **kwargs: object) -> dict[str, Any]:
    return {"class": name, "kwargs": {"fields_group": group, **kwargs}}


KEEP = step("FilterCol", col_list=["B", "D"])
LABEL = ["DropnaLabel", step("CSRankNorm", "label")]
# name: (infer processors, learn processors, other arguments, number of computed features)
CASES: dict[str, tuple[list[Any], list[Any], dict[str, Any], int]] = {
    "filter first": ([KEEP, step("RobustZScoreNorm"), step("Fillna")], LABEL, {}, 2),
    "filter only": ([KEEP], [], {}, 2),
    "columns alone": ([step("CSZFillna"), step("CSZScoreNorm"), "ProcessInf", "TanhProcess", KEEP], LABEL, {}, 2),
    "in two steps": ([step("FilterCol", col_list=["A", "B", "C", "nobody"]), KEEP], LABEL, {}, 1),
    "drop": ([{"class": "DropCol", "kwargs": {"col_list": ["A", "E", "nobody"]}}], LABEL, {}, 3),
    "in two steps, each by itself": (
        [step("FilterCol", col_list=["A", "B", "nobody"]), KEEP],
        [step("FilterCol", col_list=["A", "B", "C"]), step("FilterCol", col_list=["C", "A"])],
        {"process_type": "independent"},
        3,
    ),
    "rows of all columns": ([step("DropnaProcessor"), KEEP], LABEL, {}, 5),
    "rows of one column": ([step("DropnaProcessor", ("feature", "E")), KEEP], LABEL, {}, 3),
    "rows of the label": ([step("DropnaProcessor", "label"), KEEP], LABEL, {}, 2),
    "constants": ([step("RobustZScoreNorm"), KEEP], LABEL, {}, 5),
    "constants of one column": ([step("ZScoreNorm", ("feature", "A")), KEEP], LABEL, {}, 3),
    "rank of one column": ([step("CSRankNorm", ("feature", "A")), KEEP], LABEL, {}, 3),
    "a user's processor": ([Demean(), KEEP], LABEL, {}, 5),
    "a user's processor later": ([KEEP, Demean()], LABEL, {}, 2),
    "a subclass": ([LikeFillna("feature"), KEEP], LABEL, {}, 5),
    "learning filters more": ([KEEP], [*LABEL, step("FilterCol", col_list=["D"])], {}, 2),
    "only learning filters": ([], [*LABEL, KEEP], {}, 5),
    "independent": ([KEEP], [*LABEL, step("FilterCol", col_list=["C"])], {"process_type": "independent"}, 3),
    "independent, all to learn": ([KEEP], LABEL, {"process_type": "independent"}, 5),
    "shared": ([step("Fillna")], LABEL, {"shared_processors": [KEEP], "process_type": "independent"}, 2),
    "raw dropped": ([KEEP, step("Fillna")], LABEL, {"drop_raw": True}, 2),
    "nothing is kept": ([KEEP, {"class": "DropCol", "kwargs": {"col_list": ["B", "D"]}}], LABEL, {}, 5),
    "a label of the same name": ([KEEP], [], {"label": (["Ref($close, -1)"], ["A"])}, 5),
    "compat": ([KEEP], LABEL, {"compat": "qlib"}, 2),
}


@pytest.fixture(scope="module")
def prices() -> pd.DataFrame:
    frame = synthetic.prices(6, 60, seed=3)
    frame.iloc[200:204] = np.nan
    return frame


def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of expressions of the calls that compute features."""
    counts: list[int] = []
    original = FactorHandler._computed

    def spy(self: FactorHandler, texts: Any, *rest: Any) -> np.ndarray:
        counts.append(len(texts))
        return original(self, texts, *rest)

    monkeypatch.setattr(FactorHandler, "_computed", spy)
    return counts


def without_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FactorHandler, "_computes_columns_separately", PriceHandler._computes_columns_separately)


@pytest.mark.parametrize("case", CASES)
def test_every_result_is_the_same(case, prices, monkeypatch, caplog):
    infer, learn, kwargs, number = CASES[case]

    def build() -> FactorHandler:
        return FactorHandler(
            FEATURES, data=prices, vwap="typical", infer_processors=infer, learn_processors=learn, **FIT, **kwargs
        )

    def warnings() -> list[str]:
        messages = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
        caplog.clear()
        return messages

    counts = computed(monkeypatch)
    handler, logged = build(), warnings()
    assert counts == [number]
    without_selection(monkeypatch)
    expected = build()
    assert logged == warnings()
    keys = ("infer", "learn") if handler.drop_raw else ("raw", "infer", "learn")
    for key in keys:
        pd.testing.assert_frame_equal(handler.fetch(data_key=key), expected.fetch(data_key=key), check_exact=True)
        assert handler.get_cols(data_key=key) == handler.fetch(data_key=key).columns.tolist()
    for ours, theirs in zip(handler.get_all_processors(), expected.get_all_processors(), strict=True):
        assert {k: v.tolist() for k, v in ours.state().items()} == {k: v.tolist() for k, v in theirs.state().items()}


def test_a_selection_of_alpha158(monkeypatch):
    prices = synthetic.prices(8, 90, seed=1)
    names = ["RESI5", "WVMA5", "KLEN", "CORR10", "ROC60", "VSTD5", "RSQR60", "STD5", "CORD60", "KLOW", "QTLU20"]
    stages = {"infer_processors": [step("FilterCol", col_list=names)], "learn_processors": LABEL}
    whole = Alpha158(data=prices, learn_processors=[]).fetch(col_set="feature")
    counts = computed(monkeypatch)
    part = Alpha158(data=prices, **stages).fetch(col_set="feature")
    assert counts == [len(names)]
    pd.testing.assert_frame_equal(part, whole[[name for name in whole if name in names]], check_exact=True)


def test_a_handler_that_computes_features_itself_computes_all(prices):
    class Doubled(FactorHandler):
        def _feature_values(self, prices, rows):
            return 2 * super()._feature_values(prices, rows)

    handlers = [
        cls(FEATURES, data=prices, infer_processors=[KEEP], learn_processors=[]) for cls in (FactorHandler, Doubled)
    ]
    ours, doubled = (handler.fetch(col_set="feature") for handler in handlers)
    pd.testing.assert_frame_equal(2 * ours, doubled)


def test_a_processor_whose_method_is_replaced_may_read_anything():
    columns = {"feature": ["x", "y"], "label": ["z"]}
    replaced = Fillna()
    keep = FilterCol("feature", ["y"])
    assert unread_columns(columns, [], [replaced, keep], [], False) == {"x"}
    replaced.run = lambda panel, space: panel
    assert unread_columns(columns, [], [replaced, keep], [], False) == set()


def test_frozen_processors_and_new_settings(prices, monkeypatch):
    robust = RobustZScoreNorm(None, None, "feature")
    stages = {"infer_processors": [KEEP, robust, CSZFillna("feature")], "learn_processors": LABEL}
    handler = FactorHandler(FEATURES, data=prices, **stages)
    before = handler.fetch(col_set="feature")
    days = handler.panel("infer").datetimes
    handler.config(start_time=days[30])
    handler.setup_data(init_type="load_state")
    again = handler.fetch(col_set="feature")
    without_selection(monkeypatch)
    handler.setup_data(init_type="load_state")
    pd.testing.assert_frame_equal(handler.fetch(col_set="feature"), again, check_exact=True)
    assert len(again) < len(before)


def test_the_cache_contains_what_was_computed(prices, tmp_path, monkeypatch):
    handlers = [FactorHandler(FEATURES, data=prices, infer_processors=[KEEP], cache=tmp_path) for _ in range(2)]
    whole = FactorHandler(FEATURES, data=prices, cache=tmp_path).fetch(col_set="feature")
    assert len(list(tmp_path.iterdir())) == 2
    for handler in handlers:
        pd.testing.assert_frame_equal(handler.fetch(col_set="feature"), whole[["B", "D"]], check_exact=True)


WORKFLOW = """
experiment_name: selection
task:
  model:
    class: LSTM
    module_path: qfast.models
    kwargs: {{d_feat: 2, hidden_size: 4, num_layers: 1, n_epochs: 1, seed: 0, GPU: -1}}
  dataset:
    class: DatasetH
    kwargs:
      handler:
        class: FactorHandler
        kwargs:
          features: {features}
          fit_start_time: 2000-01-01
          fit_end_time: 2100-01-01
          infer_processors: {infer}
          learn_processors: [DropnaLabel]
      segments: {{train: [{0}, {1}], valid: [{1}, {2}], test: [{2}, {3}]}}
  record: []
"""


def test_a_run_and_its_predictions(prices, tmp_path, monkeypatch):
    infer = [step("CSZScoreNorm"), KEEP, step("RobustZScoreNorm"), step("Fillna")]
    days = prices.index.get_level_values("datetime").unique().sort_values().strftime("%Y-%m-%d")
    bounds = [days[position] for position in (9, 30, 40, -1)]
    text = WORKFLOW.format(*bounds, features=json.dumps(FEATURES), infer=json.dumps(infer))
    (tmp_path / "w.yaml").write_text(text)
    prices.to_parquet(tmp_path / "prices.parquet")

    def outcome(name: str) -> list[object]:
        folder: Path = run(tmp_path / "w.yaml", tmp_path / "prices.parquet", output=tmp_path / name).path
        files = [(folder / file).read_bytes() for file in ("processors.safetensors", "best.safetensors")]
        return [*files, predict(folder, tmp_path / "prices.parquet").to_numpy().tobytes()]

    counts = computed(monkeypatch)
    selected = outcome("selected")
    assert set(counts) == {2}
    without_selection(monkeypatch)
    assert outcome("all") == selected
