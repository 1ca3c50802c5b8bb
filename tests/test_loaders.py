"""Data loaders and market filters: the values of handlers, of frames, and of pyqlib where it is installed."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest

from qfast import Callback, check, predict, run
from qfast.data import DataHandlerLP, FactorHandler, synthetic
from qfast.data.filters import ExpressionDFilter, NameDFilter, build_filters
from qfast.data.loaders import Alpha158DL, Alpha360DL, NestedDataLoader, QlibDataLoader, StaticDataLoader, build_loader
from qfast.errors import ConfigError, DataError
from support.stores import write_store

FEATURES = (["$close / Ref($close, 1) - 1", "Mean($close, 5) / $close"], ["R1", "MA5"])
LABEL = (["Ref($close, -2) / Ref($close, -1) - 1"], ["LABEL0"])
CONFIG = {"feature": FEATURES, "label": LABEL}


@pytest.fixture(scope="module")
def prices():
    return synthetic.prices(4, 60, holes=0.0)


def static_columns(prices: pd.DataFrame) -> pd.DataFrame:
    values = np.arange(len(prices), dtype=np.float32)
    return pd.DataFrame({("feature", "A0"): values, ("feature", "R1"): -values}, prices.index)


# ---------------------------------------------------------------- loaders
def test_expressions_equal_the_factor_handler(prices):
    expected = FactorHandler(FEATURES, data=prices, label=LABEL, learn_processors=[])
    handler = DataHandlerLP(data_loader={"class": "QlibDataLoader", "kwargs": {"config": CONFIG}}, data=prices)
    for key in ("raw", "infer", "learn"):
        pd.testing.assert_frame_equal(
            handler.fetch(col_set="__raw", data_key=key), expected.fetch(col_set="__raw", data_key=key)
        )
    assert handler.label_horizon == 2
    assert handler.lookback == expected.lookback
    assert handler.prices is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = handler.nothing


def test_further_groups_and_no_label(prices):
    loader = QlibDataLoader({"feature": ["$close"], "weight": (["$volume"], ["w"])})
    assert loader.load(data=prices).columns.tolist() == [("feature", "$close"), ("weight", "w")]
    only_label = QlibDataLoader({"label": LABEL}).load(data=prices)
    assert only_label.columns.tolist() == [("label", "LABEL0")]
    assert QlibDataLoader(FEATURES).load(data=prices).columns.tolist() == [("feature", "R1"), ("feature", "MA5")]


def test_alpha_loaders_equal_their_handlers(prices):
    from qfast.data import Alpha158, Alpha360

    for loader, kind in ((Alpha158DL, Alpha158), (Alpha360DL, Alpha360)):
        expected = kind(data=prices, infer_processors=[], learn_processors=[])
        found = loader({"label": LABEL}).load(data=prices)
        pd.testing.assert_frame_equal(found["feature"], expected.fetch(col_set="feature", data_key="raw"), rtol=2e-6)


def test_nested_loaders_join_sort_and_replace(prices):
    nested = NestedDataLoader(
        [
            {"class": "qlib.data.dataset.loader.QlibDataLoader", "kwargs": {"config": CONFIG}},
            StaticDataLoader(static_columns(prices).iloc[10:]),
        ]
    )
    frame = nested.load(data=prices)
    assert frame.columns.tolist() == [("feature", "A0"), ("feature", "MA5"), ("feature", "R1"), ("label", "LABEL0")]
    assert len(frame) == len(prices)
    assert frame["feature", "A0"].isna().sum() == 10
    assert (frame["feature", "R1"].iloc[10:] == -frame["feature", "A0"].iloc[10:]).all()
    inner = NestedDataLoader(nested.data_loader_l, join="inner").load(data=prices)
    assert len(inner) == len(prices) - 10


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_static_files(tmp_path, prices, ending):
    frame = static_columns(prices)
    file = tmp_path / f"factors.{ending}"
    if ending == "parquet":
        frame.to_parquet(file)
    else:
        frame.droplevel(0, axis=1).assign(label=1.0).reset_index().to_csv(file, index=False)
    loaded = StaticDataLoader(str(file)).load(["S1", "unknown"], "2015-01-10", "2015-02-20")
    expected = frame[frame.index.get_level_values("instrument") == "S1"].loc["2015-01-10":"2015-02-20"]
    np.testing.assert_array_equal(loaded["feature"], expected["feature"])
    assert ("label" in loaded.columns.get_level_values(0)) == (ending == "csv")


def test_static_groups(prices):
    frame = static_columns(prices)["feature"]
    loader = StaticDataLoader({"feature": frame[["A0"]], "label": frame[["R1"]].iloc[3:]})
    assert loader.load().columns.tolist() == [("feature", "A0"), ("label", "R1")]
    assert len(loader.load()) == len(frame)
    assert len(StaticDataLoader(loader.config, join="inner").load()) == len(frame) - 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"class": "StaticDataLoader", "kwargs": {"config": "x.pkl"}}, r"pickle file, which can run code.*to_parquet"),
        ({"class": "StaticDataLoader", "kwargs": {"config": {"feature": "x.pkl"}}}, "pickle file"),
        ({"class": "DataLoaderDH"}, "NestedDataLoader, or --engine qlib"),
        ({"class": "NestedDataLoader", "kwargs": {"dataloader_l": []}}, "must be a list of loaders"),
        ({"class": "NestedDataLoder"}, "Did you mean 'NestedDataLoader'"),
        ({"class": "QlibDataLoader", "kwargs": {"config": {}}}, "at least one group"),
        ({"class": "QlibDataLoader", "kwargs": {"config": CONFIG, "inst_processors": [1]}}, "--engine qlib"),
        ({"class": "StaticDataLoader", "kwargs": {"config": "a.parquet", "join": "both"}}, "join must be one of"),
    ],
)
def test_loaders_that_cannot_be_built(spec, message):
    with pytest.raises(ConfigError, match=message):
        build_loader(spec)


def test_either_columns_or_a_loader(prices):
    with pytest.raises(ConfigError, match=r"either source .* or data_loader, got neither"):
        DataHandlerLP()
    with pytest.raises(ConfigError, match="got both"):
        DataHandlerLP(static_columns(prices), data_loader=QlibDataLoader(CONFIG))
    with pytest.raises(ConfigError, match=r"no/such.parquet' does not exist"):
        DataHandlerLP(data_loader=StaticDataLoader("no/such.parquet"))


WORKFLOW = """
task:
  model:
    class: GRU
    module_path: qlib.contrib.model.pytorch_gru_ts
    kwargs: {d_feat: 3, hidden_size: 4, num_layers: 1, n_epochs: 1, batch_size: 32, seed: 1, GPU: -1}
  dataset:
    class: TSDatasetH
    kwargs:
      handler:
        class: DataHandlerLP
        module_path: qlib.data.dataset.handler
        kwargs:
          instruments: csi300
          data_loader:
            class: NestedDataLoader
            kwargs:
              dataloader_l:
                - class: qlib.contrib.data.loader.Alpha158DL
                  kwargs:
                    config:
                      feature: [["$close / Ref($close, 1) - 1", "Mean($close, 5) / $close"], ["R1", "MA5"]]
                      label: [["Ref($close, -2) / Ref($close, -1) - 1"], ["LABEL0"]]
                - {class: qlib.data.dataset.loader.StaticDataLoader, kwargs: {config: factors.parquet}}
          infer_processors: [{class: Fillna, kwargs: {fields_group: feature}}]
          learn_processors: [DropnaLabel]
      segments: {train: [2015-01-01, 2015-02-10], valid: [2015-02-11, 2015-02-25], test: [2015-02-26, 2015-03-20]}
      step_len: 3
  record: []
"""


def test_a_workflow_with_nested_loaders(tmp_path, monkeypatch, prices):
    monkeypatch.chdir(tmp_path)
    static_columns(prices)[[("feature", "A0")]].to_parquet("factors.parquet")
    (tmp_path / "nested.yaml").write_text(WORKFLOW)
    result = run("nested.yaml", prices, output="run")
    assert result.dataset.handler.get_cols("feature") == ["A0", "MA5", "R1"]
    scores = predict("run", prices, start="2015-02-26", end="2015-03-20")
    expected = result.model.predict(result.dataset, "test").rename("score").sort_index()
    pd.testing.assert_series_equal(scores, expected, check_freq=False)


def test_files_of_a_static_loader_are_next_to_the_workflow_file(tmp_path, monkeypatch, prices):
    folder, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    static_columns(prices)[[("feature", "A0")]].to_parquet(folder / "factors.parquet")
    (folder / "nested.yaml").write_text(WORKFLOW.replace("n_epochs: 1", "n_epochs: 2"))
    monkeypatch.chdir(elsewhere)

    class Interrupt(Callback):
        def on_epoch_end(self, estimator):
            raise KeyboardInterrupt

    whole = run(folder / "nested.yaml", prices, output=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(folder / "nested.yaml", prices, output=tmp_path / "run", callbacks=[Interrupt()])
    monkeypatch.chdir(tmp_path)
    resumed = run(resume=tmp_path / "run", data=prices)
    assert len(resumed.model.history_) == 2
    pd.testing.assert_series_equal(resumed.model.predict(resumed.dataset), whole.model.predict(whole.dataset))
    assert check(folder / "nested.yaml", prices, experiments=False).ok
    assert len(predict(tmp_path / "run", prices, start="2015-02-26", end="2015-03-20"))
    monkeypatch.chdir(folder)
    static_columns(prices)[[("feature", "A0")]].mul(2).to_parquet(elsewhere / "factors.parquet")
    monkeypatch.chdir(elsewhere)
    own = run(folder / "nested.yaml", prices, output=tmp_path / "own").dataset.handler.fetch(col_set="feature")
    pd.testing.assert_series_equal(own["A0"], whole.dataset.handler.fetch(col_set="feature")["A0"] * 2)


def test_a_static_loader_has_options_for_reading(tmp_path, prices):
    frame = static_columns(prices)[[("feature", "A0")]].droplevel(0, axis=1).reset_index()
    frame = frame[frame["datetime"].dt.day <= 12]
    frame.assign(datetime=frame["datetime"].dt.strftime("%d/%m/%Y")).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(DataError, match="fit 2 formats"):
        StaticDataLoader(tmp_path / "a.csv").load()
    loaded = StaticDataLoader(tmp_path / "a.csv", read_options={"date_format": "%d/%m/%Y"}).load()
    assert loaded[("feature", "A0")].tolist() == frame.sort_values(["datetime", "instrument"])["A0"].tolist()


@pytest.mark.parametrize("what", ["instrument", "datetime", None])
def test_loaders_without_common_keys_are_reported(what, prices, caplog):
    frame = static_columns(prices)[[("feature", "A0")]]
    if what == "instrument":
        frame = frame.rename(index=str.lower, level="instrument")
    if what == "datetime":
        frame = frame.set_axis(frame.index.set_levels(frame.index.levels[0].tz_localize("UTC"), level=0))
    loader = NestedDataLoader([QlibDataLoader(CONFIG), StaticDataLoader(frame)], join="left")
    handler = DataHandlerLP(data_loader=loader, data=prices)
    assert handler.fetch(data_key="raw")["A0"].isna().all() == (what is not None)
    assert (f"StaticDataLoader has no {what} of the loaders before it" in caplog.text) == (what is not None)


# ---------------------------------------------------------------- filters
def rows_of(prices, filter_pipe, **kwargs) -> pd.MultiIndex:
    handler = FactorHandler(FEATURES, data=prices, label=LABEL, learn_processors=[], filter_pipe=filter_pipe, **kwargs)
    return handler.fetch(data_key="raw").index


def test_a_name_filter_between_two_dates(prices):
    kept = rows_of(prices, [NameDFilter("S[12]", "2015-01-20", "2015-02-10")])
    dates, names = prices.index.get_level_values(0), prices.index.get_level_values(1)
    inside = (dates >= "2015-01-20") & (dates <= "2015-02-10")
    handler = FactorHandler(FEATURES, data=prices, label=LABEL, learn_processors=[])
    every = handler.fetch(data_key="raw").index
    allowed = set(prices.index[~inside | names.isin(["S1", "S2"])])
    gaps = set(every) - set(prices.index)  # days on which an instrument pauses
    assert set(kept) - gaps == allowed


def test_an_expression_filter_reads_earlier_rows(prices):
    rule = {"filter_type": "ExpressionDFilter", "rule_expression": "$close > Ref($close, 5)", "keep": False}
    start = "2015-02-02"
    kept = rows_of(prices, [rule], start_time=start)
    handler = FactorHandler((["$close > Ref($close, 5)"], ["rule"]), data=prices, learn_processors=[])
    value = handler.fetch(slice(start, None), col_set="feature", data_key="raw")["rule"]
    assert list(kept) == list(value.index[value != 0])
    assert 0 < len(kept) < len(value)


def test_filters_are_applied_in_order_and_inside_instruments(prices):
    pipe = [
        {"filter_type": "NameDFilter", "name_rule_re": "S[0-2]", "filter_start_time": None, "filter_end_time": None},
        ExpressionDFilter("$volume > 0", fend_time="2015-02-01"),
    ]
    kept = rows_of(prices, pipe)
    assert set(kept.get_level_values("instrument")) == {"S0", "S1", "S2"}
    assert list(rows_of(prices, None, instruments={"market": "all", "filter_pipe": pipe})) == list(kept)


def test_filters_are_ignored_for_a_list(prices, caplog):
    with caplog.at_level(logging.WARNING, "qfast.data"):
        kept = rows_of(prices, [NameDFilter("S1")], instruments=["S0", "S1"])
    assert set(kept.get_level_values("instrument")) == {"S0", "S1"}
    assert "filter_pipe is ignored, as in Qlib" in caplog.text


@pytest.mark.parametrize(
    ("pipe", "message"),
    [
        ([{"filter_type": "Other"}], r"filter_type must be one of .*--engine qlib"),
        ([{"filter_type": "NameDFiltr"}], "Did you mean 'NameDFilter'"),
        ([{"filter_type": "NameDFilter"}], "requires 'name_rule_re'"),
        ([{"filter_type": "NameDFilter", "name_rule_re": "("}], "not a regular expression"),
        ([{"filter_type": "NameDFilter", "name_rule_re": "S", "keep": True}], "has no setting 'keep'"),
        ([{"filter_type": "ExpressionDFilter", "rule_expression": "$close >"}], "expression"),
        ([{"filter_type": "NameDFilter", "name_rule_re": "S", "filter_start_time": "soon"}], "filter_start_time"),
        ({"filter_type": "NameDFilter"}, "must be a list of filters"),
        ([1], "filter_type must be one of"),
    ],
)
def test_wrong_filters(pipe, message):
    with pytest.raises(ConfigError, match=message):
        build_filters("all", pipe)


def test_a_filter_of_a_missing_field(prices):
    with pytest.raises(Exception, match="turnover"):
        rows_of(prices, [ExpressionDFilter("$turnover > 0")])


# ---------------------------------------------------------------- pyqlib
@pytest.fixture(scope="module")
def store(tmp_path_factory):
    qlib = pytest.importorskip("qlib")
    root = write_store(tmp_path_factory.mktemp("filters"), n_days=120)
    qlib.init(provider_uri=str(root), region="us", logging_level=40, kernels=1, joblib_backend="threading")
    return root


PIPES = [
    [NameDFilter("[AB]", "2020-02-01", "2020-04-10").to_config()],
    [ExpressionDFilter("$close > Ref($close, 3)").to_config()],
    [
        ExpressionDFilter("Mean($close, 10) - $close", "2020-03-01", "2020-05-01", keep=True).to_config(),
        NameDFilter("A|C", "2020-04-01").to_config(),
    ],
]


@pytest.mark.parametrize("market", ["all", "mixed"])
@pytest.mark.parametrize("pipe", PIPES, ids=["name", "expression", "both"])
@pytest.mark.parametrize("start", [None, "2020-02-15"])
def test_filters_equal_qlib(store, market, pipe, start):
    from qlib.data.dataset.loader import QlibDataLoader as Expected

    expected = Expected(config=CONFIG, filter_pipe=pipe).load(market, start, None)
    actual = QlibDataLoader(CONFIG, filter_pipe=pipe).load(market, start, None, provider_uri=store)
    assert list(actual.index) == list(expected.index)
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-7)


def test_nested_loaders_equal_qlib(store, tmp_path):
    from qlib.data.dataset.loader import NestedDataLoader as Expected

    base = QlibDataLoader(CONFIG).load("all", provider_uri=store)
    base[[("feature", "MA5")]].rename(columns={"MA5": "Z"}, level=1).iloc[7:].to_parquet(tmp_path / "z.parquet")
    specs = [
        {"class": "qlib.data.dataset.loader.QlibDataLoader", "kwargs": {"config": CONFIG}},
        {"class": "qlib.data.dataset.loader.StaticDataLoader", "kwargs": {"config": str(tmp_path / "z.parquet")}},
    ]
    expected = Expected(specs).load("all", "2020-02-01", "2020-05-01")
    actual = NestedDataLoader(specs).load("all", "2020-02-01", "2020-05-01", provider_uri=store)
    assert list(actual.columns) == list(expected.columns)
    assert list(actual.index) == list(expected.index)
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-7)
