"""Handlers and datasets under Qlib's names: from_df, to_pickle, load, config, setup_data."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import numpy as np
import pandas as pd
import pytest

from qfast.data import Alpha158, DataHandlerLP, DatasetH, FactorHandler, TSDatasetH, synthetic
from qfast.errors import CheckpointError, ConfigError

FIT = {"fit_start_time": "2015-01-01", "fit_end_time": "2015-02-01"}
INFER = [{"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature"}}, "Fillna"]
LEARN = ["DropnaLabel", {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}}]
SEGMENTS = {"train": ("2015-01-01", "2015-02-01"), "test": ("2015-02-02", None)}


@pytest.fixture(scope="module")
def prices():
    return synthetic.prices(4, 60)


def factor_handler(prices, **kwargs):
    features = (["$close / Ref($close, 1) - 1", "Mean($close, 5) / $close"], ["R1", "MA5"])
    return FactorHandler(features, data=prices, infer_processors=INFER, learn_processors=LEARN, **FIT, **kwargs)


def same(one, other, keys=("raw", "infer", "learn")):
    for key in keys:
        pd.testing.assert_frame_equal(
            one.fetch(col_set="__raw", data_key=key), other.fetch(col_set="__raw", data_key=key), check_freq=False
        )


@pytest.mark.parametrize("zone", [None, "Asia/Shanghai"])
def test_a_handler_in_a_file(tmp_path, prices, zone):
    if zone is not None:
        prices = prices.tz_localize(zone, level="datetime")
    handler = factor_handler(prices)
    handler.to_pickle(tmp_path / "handler", dump_all=True)
    loaded = DataHandlerLP.load(tmp_path / "handler")
    same(loaded, handler)
    assert list(map(type, loaded.get_all_processors())) == list(map(type, handler.get_all_processors()))
    assert all(processor.frozen for processor in loaded.get_all_processors())
    for one, other in zip(loaded.get_all_processors(), handler.get_all_processors(), strict=True):
        for name, value in other.state().items():
            np.testing.assert_array_equal(one.state()[name], value)
    with pytest.raises(ConfigError, match="no longer has its source"):
        loaded.setup_data()


def test_dropped_raw_data_stays_dropped(tmp_path, prices):
    handler = factor_handler(prices, drop_raw=True)
    handler.to_pickle(tmp_path / "handler")
    loaded = DataHandlerLP.load(tmp_path / "handler")
    same(loaded, handler, keys=("infer", "learn"))
    with pytest.raises(AttributeError):
        loaded.panel("raw")


def test_from_df_keeps_flat_columns(tmp_path):
    frame = synthetic.factors(3, 20, 4)
    flat = frame.droplevel(0, axis=1)
    for columns in (frame, flat):
        handler = DataHandlerLP.from_df(columns)
        handler.to_pickle(tmp_path / "handler", dump_all=True)
        pd.testing.assert_frame_equal(
            DataHandlerLP.load(tmp_path / "handler").fetch(), handler.fetch(), check_freq=False
        )


def test_a_dataset_in_a_file(tmp_path, prices):
    dataset = TSDatasetH(handler=factor_handler(prices), segments=SEGMENTS, step_len=7)
    dataset.config(dump_all=True, recursive=True)
    dataset.to_pickle(tmp_path / "dataset")
    loaded = TSDatasetH.load(tmp_path / "dataset")
    assert loaded.segments == {"train": ("2015-01-01", "2015-02-01"), "test": ("2015-02-02", None)}
    assert loaded.step_len == 7
    one, other = (d.prepare("test", col_set=["feature", "label"], data_key="infer") for d in (loaded, dataset))
    np.testing.assert_array_equal(one[list(range(len(one)))], other[list(range(len(other)))])
    with pytest.raises(CheckpointError, match="must be a DatasetH, got a TSDatasetH"):
        DatasetH.load(tmp_path / "dataset")
    with pytest.raises(CheckpointError, match="must be a handler of format 1"):
        DataHandlerLP.load(tmp_path / "dataset")


class Explosive:
    def __reduce__(self):
        return pytest.fail, ("the pickle was read",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_files_are_refused_unread(tmp_path, protocol):
    (tmp_path / "handler.pkl").write_bytes(pickle.dumps(Explosive(), protocol=protocol))
    for kind in (DataHandlerLP, DatasetH):
        with pytest.raises(CheckpointError):
            kind.load(tmp_path / "handler.pkl")
    if protocol >= 2:
        with pytest.raises(CheckpointError, match=r"is a pickle file, as Qlib writes it.*from_df"):
            DataHandlerLP.load(tmp_path / "handler.pkl")


def test_files_that_cannot_be_read_or_written(tmp_path, prices):
    handler = factor_handler(prices)
    handler.to_pickle(tmp_path / "handler")
    content = (tmp_path / "handler").read_bytes()
    (tmp_path / "handler").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="may be truncated"):
        DataHandlerLP.load(tmp_path / "handler")
    with pytest.raises(CheckpointError, match="is not a file"):
        DataHandlerLP.load(tmp_path / "missing")
    with pytest.raises(ConfigError, match="is a folder"):
        handler.to_pickle(tmp_path)
    with pytest.raises(ConfigError, match="no option 'dump'"):
        handler.to_pickle(tmp_path / "x", dump=True)


# ---------------------------------------------------------------- config and setup_data
def handlers(prices, **kwargs):
    frame = factor_handler(prices).fetch(col_set="__raw", data_key="raw")
    processors = {"infer_processors": INFER, "learn_processors": LEARN, **FIT}
    loader = {"class": "StaticDataLoader", "kwargs": {"config": frame}}
    return {
        "frame": DataHandlerLP(frame, **processors, **kwargs),
        "loader": DataHandlerLP(data_loader=loader, **processors, **kwargs),
        "prices": factor_handler(prices, **kwargs),
    }


@pytest.mark.parametrize("kind", ["frame", "loader", "prices"])
def test_other_dates_with_refitted_processors(prices, kind):
    handler = handlers(prices, end_time="2015-02-15")[kind]
    handler.config(start_time="2015-01-10", end_time="2015-03-01", processor_kwargs={"fit_end_time": "2015-02-10"})
    handler.setup_data()
    changed = {**FIT, "fit_end_time": "2015-02-10"}
    expected = handlers(prices, start_time="2015-01-10", end_time="2015-03-01")[kind]
    for processor in expected.get_all_processors():
        processor.config(**changed)
    expected.setup_data()
    same(handler, expected)
    assert handler.fetch().index.get_level_values(0).max() == pd.Timestamp("2015-02-27")


@pytest.mark.parametrize("kind", ["frame", "loader", "prices"])
def test_other_dates_with_the_fitted_processors(prices, kind):
    handler = handlers(prices, end_time="2015-02-15")[kind]
    before = handler.fetch(slice(None, "2015-02-10"), col_set="feature")
    state = {k: v.copy() for k, v in handler.infer_processors[0].state().items()}
    handler.config(start_time="2015-01-20", end_time="2015-02-10")
    handler.setup_data(init_type="load_state")
    after = handler.fetch(col_set="feature")
    pd.testing.assert_frame_equal(after, before.loc["2015-01-20":], check_freq=False)
    for name, value in handler.infer_processors[0].state().items():
        np.testing.assert_array_equal(value, state[name])
    assert not handler.infer_processors[0].frozen


def test_datasets_pass_settings_on(prices):
    dataset = DatasetH(factor_handler(prices), SEGMENTS)
    dataset.config(handler_kwargs={"end_time": "2015-02-20"}, segments={"test": ("2015-02-02", "2015-02-28")})
    dataset.setup_data(handler_kwargs={"init_type": "load_state"})
    assert dataset.prepare("test").index.get_level_values(0).max() == pd.Timestamp("2015-02-20")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h: h.config(start="2015-01-01"), r"no setting 'start'.*Did you mean 'start_time'"),
        (lambda h: h.setup_data("fit_ind"), "--engine qlib"),
        (lambda h: h.setup_data("again"), "init_type must be one of"),
        (lambda h: DatasetH(h, SEGMENTS).config(segment={}), "Did you mean 'segments'"),
    ],
)
def test_wrong_settings(prices, call, message):
    with pytest.raises(ConfigError, match=message):
        call(factor_handler(prices))


def test_copies_do_not_carry_the_source_and_handlers_are_freed(prices):
    handler = factor_handler(prices)
    for duplicate in (copy.deepcopy(handler), pickle.loads(pickle.dumps(handler))):
        same(duplicate, handler)
        with pytest.raises(ConfigError, match="no longer has its source"):
            duplicate.setup_data()
    gc.disable()
    try:
        reference = weakref.ref(handler)
        del handler
        assert reference() is None  # no reference cycle keeps the data alive
    finally:
        gc.enable()


def test_empty_mappings_are_no_processors(prices):
    handler = Alpha158(data=prices, infer_processors={}, learn_processors={})
    assert handler.get_all_processors() == []
