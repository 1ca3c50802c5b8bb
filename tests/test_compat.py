"""`compat="qlib"`: factors with the bits of pyqlib, where halts make the exact values differ."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qfast import check, predict, run
from qfast.data import Alpha158, Alpha158vwap, Alpha360, Alpha360vwap, FactorHandler, synthetic
from qfast.data.expression import parse
from qfast.data.factor_graph import FROM_THE_FIRST_ROW_IN_QLIB, looks_back_without_end
from qfast.data.factors import evaluate
from qfast.data.halts import halted_rows, sensitive_columns
from qfast.data.handlers import build_handler
from qfast.data.handlers.alpha158 import alpha158_factors
from qfast.data.prices import Prices
from qfast.data.sources import load_prices
from qfast.errors import ConfigError
from qfast.workflow.folder import read_frame
from support.stores import write_halted_store

RAW = {"infer_processors": [], "learn_processors": []}
PERIODS = [{}, {"start_time": "2018-06-04", "end_time": "2018-12-20"}]
needs_pandas_3_1 = pytest.mark.skipif(
    tuple(map(int, pd.__version__.split(".")[:2])) != (3, 1),
    reason=f"the updates are those of pandas 3.1; pandas {pd.__version__} has others",
)


def assert_same_bits(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    assert ours.index.tolist() == theirs.index.tolist()
    assert ours.columns.tolist() == theirs.columns.tolist()
    for name in ours.columns:
        mine, other = ours[name].to_numpy(np.float32), theirs[name].to_numpy(np.float32)
        same = (mine.view(np.int32) == other.view(np.int32)) | (np.isnan(mine) & np.isnan(other))
        assert same.all(), f"{name}: {np.sum(~same)} cells differ, first {mine[~same][0]!r} and {other[~same][0]!r}"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_halted_store(tmp_path_factory.mktemp("halted") / "store")


@pytest.fixture
def qlib_store(store: Path) -> Path:
    qlib = pytest.importorskip("qlib", reason="pyqlib is not installed")
    qlib.init(provider_uri=str(store), region="us", kernels=1, logging_level=logging.ERROR)
    return store


# ---------------------------------------------------------------- compared with pyqlib
@needs_pandas_3_1
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("times", PERIODS, ids=["whole", "part"])
@pytest.mark.parametrize("handler", [Alpha158, Alpha158vwap, Alpha360, Alpha360vwap], ids=lambda c: c.__name__)
def test_every_column_has_the_bits_of_qlib(qlib_store: Path, handler: type, times: dict[str, str]) -> None:
    import qlib.contrib.data.handler as qlib_handlers

    theirs = getattr(qlib_handlers, handler.__name__)("all", **times, **RAW)
    ours = handler("all", provider_uri=qlib_store, compat="qlib", **times, **RAW)
    for group in ("feature", "label"):
        assert_same_bits(ours.fetch(col_set=group), theirs.fetch(col_set=group))


EXPRESSIONS = [
    *(f"{name}($close, {n})" for name in ("Mean", "Sum", "Std", "Var", "Max", "Min", "Med", "Mad") for n in (1, 7, 0)),
    *(f"{name}($volume, {n})" for name in ("Skew", "Kurt", "Rank", "IdxMax", "IdxMin", "WMA", "Count") for n in (7, 0)),
    *(f"{name}($close, {n})" for name in ("Slope", "Rsquare", "Resi", "EMA") for n in (2, 20, 0)),
    *(f"{name}($close, $volume, 20)" for name in ("Corr", "Cov")),
    *(f"Quantile($volume, {n}, {q})" for n in (5, 0) for q in (0.3, 1)),
    "EMA($close, 0.1)",
    "Mean($close, 0.2)",
    "Delta($close, 3)",
    "Mean(Delta($close, 5), 3)",
    "Std(Std($close, 5), 5)",
    "Std($close > Ref($close, 1), 20)",
    "Std(If($close > $open, $volume, 0), 10)",
    "Mean(Mask($close, 'S01'), 7) / $close",
]


@needs_pandas_3_1
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("times", PERIODS, ids=["whole", "part"])
def test_every_function_has_the_bits_of_qlib(qlib_store: Path, times: dict[str, str]) -> None:
    from qlib.data import D

    texts = [text.replace("Mask($close, 'S01')", "ChangeInstrument('S01', $close)") for text in EXPRESSIONS]
    theirs = D.features(D.instruments("all"), texts, freq="day", **times)
    theirs = theirs.swaplevel().sort_index().set_axis(EXPRESSIONS, axis=1)
    ours = FactorHandler(
        (EXPRESSIONS, EXPRESSIONS), "all", provider_uri=qlib_store, compat="qlib", **times, **RAW
    ).fetch(col_set="feature")
    assert_same_bits(ours, theirs.reindex(ours.index))


# ---------------------------------------------------------------- without pyqlib
def test_flat_windows_differ_and_others_do_not(store: Path) -> None:
    """Other families are equal up to float32 rounding."""
    exact, like_qlib = (
        Alpha158("all", provider_uri=store, compat=compat, **RAW).fetch(col_set="feature") for compat in (None, "qlib")
    )
    differ = [
        name
        for name in exact.columns
        if not np.allclose(exact[name], like_qlib[name], rtol=1e-4, atol=1e-9, equal_nan=True)
    ]
    families = {name.rstrip("0123456789") for name in differ}
    expected = {"WVMA", "VSTD", "BETA", "RSQR", "RESI"}
    assert expected <= families <= expected | {"STD", "CORR", "CORD"}


def test_none_is_the_default_and_changes_nothing(store: Path) -> None:
    frames = [Alpha158("all", provider_uri=store, **kwargs, **RAW).fetch() for kwargs in ({}, {"compat": None})]
    assert_same_bits(*frames)


def test_values_depend_on_the_first_row_only_where_qlib_updates_sums() -> None:
    texts, names = alpha158_factors()
    dependent = {
        name.rstrip("0123456789")
        for text, name in zip(texts, names, strict=True)
        if looks_back_without_end(parse(text), "qlib")
    }
    assert {"MA", "STD", "BETA", "CORR", "SUMP", "WVMA"} <= dependent
    assert not {"MAX", "MIN", "QTLU", "RANK", "IMAX", "ROC", "KMID"} & dependent
    assert not any(looks_back_without_end(parse(text)) for text in texts)
    assert "Max" not in FROM_THE_FIRST_ROW_IN_QLIB


def test_series_begin_where_qlib_begins_to_load() -> None:
    """Mean(x, 5) loads four rows before the start, so a row before them leaves no rounding error."""
    days = pd.bdate_range("2024-01-01", periods=30)
    frame = pd.DataFrame({"datetime": days, "instrument": "A", "close": 0.1})
    frame.loc[:4, "close"] = 1e9
    kwargs = {"data": frame, "label": ["$close"], "compat": "qlib", **RAW}
    features = ([f"Std($close * {i}, 5)" for i in (1, 3)], ["a", "b"])
    whole = FactorHandler(features, **kwargs).fetch(col_set="feature").iloc[9:]
    part = FactorHandler(features, start_time=days[9], **kwargs).fetch(col_set="feature")
    assert (part == 0).all(axis=None)
    assert whole.shape == part.shape


def test_an_unknown_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="compat must be None or 'qlib', got 'pandas'"):
        Alpha158(data=synthetic.prices(3, 70), compat="pandas", **RAW)
    with pytest.raises(ConfigError, match="compat must be None or 'qlib', got True"):
        evaluate("$close", load_prices(synthetic.prices(3, 70)), compat=True)  # type: ignore[arg-type]


def test_configurations_accept_it() -> None:
    spec = {"class": "Alpha158", "module_path": "qlib.contrib.data.handler", "kwargs": {**RAW, "compat": "qlib"}}
    assert build_handler(spec, data=synthetic.prices(3, 70)).compat == "qlib"


def test_the_cache_keeps_both(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    config = {"rolling": {"windows": [5], "include": ["WVMA", "RSQR"]}}
    frames = {}
    for _ in range(2):  # the second time from the cache
        for compat in (None, "qlib"):
            handler = Alpha158("all", provider_uri=store, config=config, cache=tmp_path, compat=compat, **RAW)
            frame = handler.fetch(col_set="feature")
            assert_same_bits(frames.setdefault(compat, frame), frame)
    assert not frames[None].equals(frames["qlib"])
    assert len(list(tmp_path.iterdir())) == 2


# ---------------------------------------------------------------- where the choice matters
CONFIG = {"rolling": {"windows": [5, 20], "include": ["WVMA", "STD", "RSQR", "RESI", "MAX"]}}


def test_halted_rows() -> None:
    days = pd.bdate_range("2024-01-01", periods=6)
    frame = pd.concat(
        pd.DataFrame({"datetime": days, "instrument": name, "close": close})
        for name, close in (("A", [1, 2, 2, 2, 3, 3]), ("B", [3, 4, np.inf, 4, 4, np.nan]), ("C", [4, 5, 5, 6, 6, 6]))
    )
    prices = Prices(load_prices(frame), {})
    expected = [0, 0, 0, 1, 0, 0, *[0, 0, 1, 1, 1, 1], *[0, 0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(halted_rows(prices, ["close", "volume"], 3), expected)
    assert sensitive_columns(["Max($close, 5)", "Std($close, 0)", "Slope($close, 9)"]) == {2: 9}


def test_halts_are_logged_and_counted(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="qfast"):
        exact = Alpha158("all", provider_uri=store, config=CONFIG, **RAW)
        like_qlib = Alpha158("all", provider_uri=store, config=CONFIG, compat="qlib", **RAW)
    assert "rows follow 5 equal values of close/volume, or an infinite value" in caplog.text
    assert "This run has the exact values" in caplog.text
    assert "This run has Qlib's values" in caplog.text
    ours, theirs = exact.fetch(col_set="feature"), like_qlib.fetch(col_set="feature")
    differ = ~(np.isclose(ours, theirs, rtol=1e-4, atol=0, equal_nan=True))
    expected = {name: int(n) for name, n in zip(ours.columns, differ.sum(axis=0), strict=True) if n}
    assert exact.cells_unlike_qlib() == like_qlib.cells_unlike_qlib() == expected
    assert "MAX5" not in expected


def test_removed_features_are_neither_logged_nor_counted(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = {"class": "FilterCol", "kwargs": {"fields_group": "feature", "col_list": ["KMID", "MAX5"]}}
    every = Alpha158("all", provider_uri=store, config=CONFIG, **RAW).cells_unlike_qlib()
    assert every
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="qfast"):
        handler = Alpha158("all", provider_uri=store, config=CONFIG, **{**RAW, "infer_processors": [kept]})
    assert "compat='qlib'" not in caplog.text
    assert handler.cells_unlike_qlib() == {}
    name = next(iter(every))
    kept["kwargs"]["col_list"] = ["KMID", name]
    handler = Alpha158("all", provider_uri=store, config=CONFIG, **{**RAW, "infer_processors": [kept]})
    assert handler.cells_unlike_qlib() == {name: every[name]}
    assert Alpha360("all", provider_uri=store, vwap="typical", **RAW).cells_unlike_qlib() == {}


def test_nothing_is_logged_without_halts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="qfast"):
        handler = Alpha158(data=synthetic.prices(3, 70), config=CONFIG, **RAW)
    assert "compat" not in caplog.text
    assert handler.cells_unlike_qlib() == {}


WORKFLOW = """
task:
  model:
    class: LSTM
    module_path: qlib.contrib.model.pytorch_lstm
    kwargs: {d_feat: 10, hidden_size: 4, num_layers: 1, n_epochs: 1, batch_size: 800, GPU: 0}
  dataset:
    class: DatasetH
    module_path: qlib.data.dataset
    kwargs:
      handler:
        class: Alpha158
        module_path: qlib.contrib.data.handler
        kwargs:
          instruments: all
          start_time: 2018-03-01
          end_time: 2019-01-31
          compat: qlib
          config: {rolling: {windows: [5, 20], include: [WVMA, STD, RSQR, RESI, MAX]}}
          infer_processors: [{class: ProcessInf}, {class: Fillna, kwargs: {fields_group: feature}}]
          learn_processors: [DropnaLabel]
      segments: {train: [2018-03-01, 2018-09-28], valid: [2018-10-01, 2018-11-30], test: [2018-12-03, 2019-01-31]}
  record: [{class: SignalRecord, module_path: qlib.workflow.record_temp}]
"""


@pytest.mark.filterwarnings("ignore")
def test_a_workflow_runs_predicts_and_is_checked_with_it(store: Path, tmp_path: Path) -> None:
    config = tmp_path / "compat.yaml"
    config.write_text(WORKFLOW)
    folder = run(config, data=store, output=tmp_path / "run").path
    assert "compat: qlib" in (folder / "config.yaml").read_text()
    assert '"compat": "qlib"' in (folder / "model.json").read_text()
    scores = read_frame(folder, "pred")["score"]
    np.testing.assert_array_equal(predict(folder, store).reindex(scores.index), scores)
    late = predict(folder, store, start="2018-12-03", end="2019-01-31")  # features still begin as in training
    np.testing.assert_array_equal(late, scores.reindex(late.index))
    report = "\n".join(check(config, data=store).lines())
    assert "cells of" in report
    assert "This run has those of Qlib" in report
    assert "compat='qlib': running sums" in report
