"""Handlers: the three panels, fetch compared with Qlib's, and Alpha360 bit for bit."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfast.data import processors as P
from qfast.data import synthetic
from qfast.data.handlers import Alpha360, Alpha360vwap, DataHandlerLP, build_handler
from qfast.data.panel import Panel
from qfast.errors import ConfigError, DataError
from support.frames import FIT_WINDOW, hostile_frame
from support.stores import alpha360, write_store

LEARN = ["DropnaLabel", {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}}]
INFER = [
    {"class": "RobustZScoreNorm", "kwargs": {**FIT_WINDOW, "fields_group": "feature"}},
    {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
]
RAW = {"infer_processors": [], "learn_processors": []}


def bits(values: np.ndarray) -> np.ndarray:
    """float32 bits as integers, with one value for all NaN."""
    values = np.where(np.isnan(values), np.float32(np.nan), values).astype(np.float32)
    return values.view(np.int32)


def assert_bit_equal(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    assert ours.columns.tolist() == theirs.columns.tolist()
    assert ours.index.tolist() == theirs.index.tolist()
    np.testing.assert_array_equal(bits(ours.to_numpy()), bits(theirs.to_numpy(np.float32)))


@pytest.fixture(scope="module")
def qlib_handler():
    """pyqlib's handler class and its loader for frames."""
    pytest.importorskip("qlib", reason="pyqlib is not installed")
    from qlib.data.dataset.handler import DataHandlerLP as QlibHandler
    from qlib.data.dataset.loader import StaticDataLoader

    def build(frame: pd.DataFrame, **kwargs: object) -> QlibHandler:
        return QlibHandler(data_loader=StaticDataLoader(frame.copy()), **kwargs)

    return build


# ---------------------------------------------------------------- the panels, compared with pyqlib
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("process_type", ["append", "independent"])
@pytest.mark.parametrize("drop_raw", [False, True])
def test_three_panels_equal_qlib(qlib_handler, process_type, drop_raw):
    frame = hostile_frame(3, n_days=9).replace([np.inf, -np.inf], np.nan)
    kwargs = {
        "infer_processors": INFER,
        "learn_processors": LEARN,
        "process_type": process_type,
        "drop_raw": drop_raw,
        "shared_processors": [{"class": "ZScoreNorm", "kwargs": {**FIT_WINDOW, "fields_group": "feature"}}],
    }
    untouched = frame.copy()
    ours, theirs = DataHandlerLP(frame, **kwargs), qlib_handler(frame, **kwargs)
    pd.testing.assert_frame_equal(frame, untouched)
    for key in ("infer", "learn") if drop_raw else ("raw", "infer", "learn"):
        mine, expected = ours.fetch(col_set="__raw", data_key=key), theirs.fetch(col_set="__raw", data_key=key)
        assert mine.index.tolist() == expected.index.tolist()
        assert mine.columns.tolist() == expected.columns.tolist()
        np.testing.assert_allclose(mine, expected, rtol=2e-5, atol=2e-6, equal_nan=True)
    if drop_raw:
        with pytest.raises(AttributeError, match="raw data was dropped"):
            ours.fetch(data_key="raw")


SELECTORS = [
    (slice(None), "datetime"),
    (slice("2024-01-02", "2024-01-04"), "datetime"),
    (("2024-01-03", None), "datetime"),
    (slice(pd.Timestamp("2024-01-02"), pd.Timestamp("2030-01-01")), "datetime"),
    (pd.Timestamp("2024-01-04"), "datetime"),
    ("2024-01-04", "datetime"),
    ("2024-01", "datetime"),
    ("S1", "instrument"),
    (slice("S1", "S3"), "instrument"),
    (slice("S1", "S3"), 1),
    ((pd.Timestamp("2024-01-07"), "S1"), None),
]


@pytest.mark.parametrize("col_set", ["__all", "__raw", "feature", "label", ["label", "feature"], ["feature"]], ids=str)
@pytest.mark.parametrize(("selector", "level"), SELECTORS, ids=str)
def test_fetch_equals_qlib(qlib_handler, selector, level, col_set):
    frame = hostile_frame(3)
    mine = DataHandlerLP(frame).fetch(selector, level, col_set)
    expected = qlib_handler(frame).fetch(selector, level, col_set)
    if isinstance(expected, pd.Series):  # one key of level None: Qlib returns the row itself
        np.testing.assert_array_equal(mine.to_numpy()[0], expected.to_numpy())
        return
    assert mine.index.tolist() == expected.index.tolist()
    assert mine.columns.tolist() == expected.columns.tolist()
    np.testing.assert_array_equal(mine.to_numpy(), expected.to_numpy(np.float32))


@pytest.mark.parametrize("col_set", ["__all", "__raw", "feature", ["feature", "label"]], ids=str)
def test_column_names_equal_qlib(qlib_handler, col_set):
    frame = hostile_frame(3)
    assert DataHandlerLP(frame).get_cols(col_set) == qlib_handler(frame).get_cols(col_set)


def test_panels_share_what_no_step_changed():
    handler = DataHandlerLP(hostile_frame(3), infer_processors=INFER, learn_processors=LEARN)
    raw, infer, learn = (handler.panel(k) for k in ("raw", "infer", "learn"))
    assert learn.values("feature") is infer.values("feature")
    assert raw.values("label") is infer.values("label")
    assert raw.values("feature") is not infer.values("feature")
    assert handler.panel("learn") is learn
    assert learn.n_live < learn.n_rows


def test_independent_learn_data_skips_the_infer_processors():
    frame = hostile_frame(3)
    handler = DataHandlerLP(
        frame, infer_processors=["Fillna"], learn_processors=["DropnaLabel"], process_type="independent"
    )
    learn = handler.fetch(data_key="learn", col_set="__raw")
    pd.testing.assert_frame_equal(learn, frame[frame["label"].notna().all(axis=1)], check_freq=False)


def test_handler_of_a_mapping_and_of_flat_columns():
    frame = hostile_frame(3)
    parts = {"feature": frame["feature"], "label": frame["label"].iloc[3:]}
    assert DataHandlerLP.from_frame(parts).panel("raw").values("label").shape == (len(frame), 1)
    flat = DataHandlerLP.from_frame(frame["feature"])
    assert flat.fetch(col_set="__raw").columns.tolist() == ["x0", "x1", "x2", "x3"]
    assert flat.get_cols() == ["x0", "x1", "x2", "x3"]


def test_proc_func_and_squeeze():
    handler = DataHandlerLP(hostile_frame(3))
    doubled = handler.fetch(col_set="feature", proc_func=lambda f: f * 2)
    pd.testing.assert_frame_equal(doubled, handler.fetch(col_set="feature") * 2)
    assert isinstance(handler.fetch(col_set="label", squeeze=True), pd.Series)


def test_restricting_instruments_and_time():
    frame = hostile_frame(3)
    handler = DataHandlerLP(frame, instruments=["S1", "S3"], start_time="2024-01-03", end_time="2024-01-06")
    keep = frame.index.get_level_values(1).isin(["S1", "S3"])
    dates = frame.index.get_level_values(0)
    keep &= (dates >= "2024-01-03") & (dates <= "2024-01-06")
    assert handler.fetch().index.tolist() == frame.index[keep].tolist()
    assert handler.panel("raw").instruments.tolist() == ["S1", "S3"]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"process_type": "apend"}, ConfigError, r"process_type must be one of .*Did you mean 'append'"),
        ({"infer_processors": ["DropnaLabel"]}, TypeError, r"infer_processors\[0\] is DropnaLabel"),
        ({"infer_processors": "Fillna"}, ConfigError, "infer_processors must be a list"),
        ({"learn_processors": [{"class": "Filna"}]}, ConfigError, r"learn_processors\[0\]: unknown .*'Fillna'"),
        ({"infer_processors": ["ZScoreNorm"]}, ConfigError, "needs fit_start_time and fit_end_time"),
        ({"instruments": ["S1", "XX"]}, DataError, r"1 of the 2 requested are not in the data: XX"),
        ({"start_time": "2030-01-01"}, DataError, "no rows with instruments=None, start_time=2030-01-01"),
    ],
)
def test_handler_refuses(kwargs, error, message):
    with pytest.raises(error, match=message):
        DataHandlerLP(hostile_frame(3), **kwargs)


def test_fetch_refuses():
    handler = DataHandlerLP(hostile_frame(3))
    with pytest.raises(ConfigError, match=r"data_key must be one of .* Did you mean 'learn'\?"):
        handler.fetch(data_key="lern")
    with pytest.raises(DataError, match=r"no column group 'labels'.* Did you mean 'label'\?"):
        handler.fetch(col_set="labels")
    with pytest.raises(ConfigError, match="level must be"):
        handler.fetch(level="date")
    with pytest.raises(DataError, match="matches no rows"):
        handler.fetch("S77", level="instrument")
    with pytest.raises(DataError, match="must be a Panel, a DataFrame, an Arrow table or a mapping"):
        DataHandlerLP([1, 2])
    with pytest.raises(DataError, match="column group 'feature' must be a DataFrame"):
        DataHandlerLP({"feature": [1]})


# ---------------------------------------------------------------- Alpha360
def from_store(root, market: str, label_field: str, start, end, freq: str = "day") -> pd.DataFrame:
    """The expected raw frame, derived with pandas from the store's files."""
    calendar = pd.DatetimeIndex((root / "calendars" / f"{freq}.txt").read_text().split("\n")[:-1])
    members: dict[str, list] = {}
    for line in (root / "instruments" / f"{market}.txt").read_text().splitlines():
        code, begin, stop = line.split("\t")[:3]
        members.setdefault(code, []).append((pd.Timestamp(begin), pd.Timestamp(stop)))
    parts = {}
    for code, spans in members.items():
        frame = alpha360(root, code, label_field, freq)
        frame.index = calendar[frame.index]
        mask = np.zeros(len(frame), dtype=bool)
        for begin, stop in spans:
            mask |= (frame.index >= begin) & (frame.index <= stop)
        frame = frame[mask].loc[start:end]
        if len(frame):
            parts[code] = frame
    return pd.concat(parts, names=["instrument", "datetime"]).swaplevel().sort_index()


TIMES = [(None, None), ("2020-02-15", "2020-04-30"), ("2020-05-30", "2021-01-01"), (None, "2020-01-03")]


@pytest.mark.parametrize(("start", "end"), TIMES, ids=str)
@pytest.mark.parametrize("market", ["all", "mixed"])
@pytest.mark.parametrize(("cls", "field"), [(Alpha360, "close"), (Alpha360vwap, "vwap")])
def test_alpha360_of_a_store_equals_pandas(tmp_path, cls, field, market, start, end):
    root = write_store(tmp_path / "store")
    handler = cls(market, start, end, provider_uri=root, **RAW)
    assert_bit_equal(handler.fetch(data_key="raw"), from_store(root, market, field, start, end))


@pytest.mark.filterwarnings("ignore")
def test_alpha360_of_a_store_equals_qlib(tmp_path):
    qlib = pytest.importorskip("qlib", reason="pyqlib is not installed")
    from qlib.config import C
    from qlib.contrib.data.handler import Alpha360 as QlibAlpha360
    from qlib.data.cache import H

    root = write_store(tmp_path / "store", seed=1)
    H.clear()
    qlib.init(provider_uri=str(root), region="us", kernels=1, logging_level=logging.ERROR)
    C["joblib_backend"] = "threading"
    for market in ("all", "mixed"):
        for start, end in TIMES:
            theirs = QlibAlpha360(market, start, end, **RAW).fetch(col_set="__raw", data_key="raw")
            ours = Alpha360(market, start, end, provider_uri=root, **RAW).fetch(col_set="__raw", data_key="raw")
            assert_bit_equal(ours, theirs)
    codes = ["BBB", "AAA"]
    # the second reads days outside the close's file that only the open has
    for label in (["($close - Ref($open, 3)) / Ref($close, -5) ** 2"], ["Ref($close, -1) / $open - 1"]):
        theirs = QlibAlpha360(codes, "2020-02-15", "2020-05-01", label=label, **RAW).fetch(data_key="raw")
        ours = Alpha360(codes, "2020-02-15", "2020-05-01", label=label, provider_uri=root, **RAW).fetch(data_key="raw")
        assert_bit_equal(ours, theirs)


def test_alpha360_of_intraday_bars(tmp_path):
    root = write_store(tmp_path / "store", freq="5min", n_days=100)
    start, end = "2020-01-02", "2020-01-07"
    handler = Alpha360("all", start, end, "5min", provider_uri=root, **RAW)
    assert_bit_equal(handler.fetch(data_key="raw"), from_store(root, "all", "close", start, end, "5min"))


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0, 0.3))
def test_alpha360_of_a_frame_equals_pandas(seed, share):
    frame = synthetic.prices(4, 75, seed=seed, holes=share, late=0.5, delisted=0.5)
    ours = Alpha360(data=frame, **RAW).fetch(data_key="raw")
    calendar = frame.index.get_level_values(0).unique()
    for code, part in frame.groupby(level="instrument"):
        part = part.droplevel("instrument")
        part = part.reindex(calendar[(calendar >= part.index[0]) & (calendar <= part.index[-1])])
        base = part["close"]
        expected = [
            part[f].shift(i) / base for f in ("close", "open", "high", "low", "vwap") for i in range(59, -1, -1)
        ]
        expected += [part["volume"].shift(i) / (part["volume"] + np.float32(1e-12)) for i in range(59, -1, -1)]
        expected.append(base.shift(-2) / base.shift(-1) - 1)
        mine = ours.xs(code, level="instrument")
        np.testing.assert_array_equal(bits(mine.to_numpy()), bits(np.column_stack(expected).astype(np.float32)))


def test_default_pipeline_equals_qlib(tmp_path):
    qlib = pytest.importorskip("qlib", reason="pyqlib is not installed")
    from qlib.contrib.data.handler import Alpha360 as QlibAlpha360
    from qlib.data.cache import H

    root = write_store(tmp_path / "store", seed=2, n_days=70)
    H.clear()
    qlib.init(provider_uri=str(root), region="us", kernels=1, logging_level=logging.ERROR)
    kwargs = {"fit_start_time": "2020-01-01", "fit_end_time": "2020-03-01"}
    benchmark = {
        "infer_processors": [
            {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature", "clip_outlier": True}},
            {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
        ],
        "learn_processors": LEARN,
        "label": ["Ref($close, -2) / Ref($close, -1) - 1"],
    }
    import copy

    theirs = QlibAlpha360("all", **kwargs, **copy.deepcopy(benchmark))
    before = copy.deepcopy(benchmark)
    ours = Alpha360("all", provider_uri=root, **kwargs, **benchmark)
    assert benchmark == before, "the caller's configuration stays as it was"
    for key in ("infer", "learn"):
        mine, expected = ours.fetch(col_set="__raw", data_key=key), theirs.fetch(col_set="__raw", data_key=key)
        assert mine.index.tolist() == expected.index.tolist()
        assert mine.columns.tolist() == expected.columns.tolist()
        np.testing.assert_allclose(mine, expected, rtol=2e-5, atol=2e-6, equal_nan=True)


def test_default_processors_fill_labels_like_qlib(tmp_path):
    root = write_store(tmp_path / "store")
    handler = Alpha360("all", provider_uri=root, fit_start_time="2020-01-01", fit_end_time="2020-03-01")
    assert np.isnan(handler.panel("raw").values("label")).any()
    assert not np.isnan(handler.panel("infer").values("label")).any()
    assert handler.panel("learn").n_live == handler.panel("raw").n_live


def test_raw_features_are_computed_again_and_labels_are_not(tmp_path):
    root = write_store(tmp_path / "store")
    plain = Alpha360("all", provider_uri=root, **RAW)
    assert plain.panel("raw").table("feature") is plain.panel("infer").table("feature")
    handler = Alpha360(
        "all", provider_uri=root, infer_processors=INFER[1:], learn_processors=LEARN, process_type="independent"
    )
    assert_bit_equal(handler.fetch(data_key="raw"), plain.fetch(data_key="raw"))
    assert_bit_equal(handler.fetch(data_key="raw", col_set="label"), plain.fetch(data_key="raw", col_set="label"))
    assert handler.get_cols(data_key="raw") == plain.get_cols()
    learn = handler.fetch(data_key="learn", col_set="feature")
    assert_bit_equal(learn, plain.fetch(col_set="feature").loc[learn.index])
    dropped = Alpha360("all", provider_uri=root, drop_raw=True, **RAW)
    with pytest.raises(AttributeError, match="raw data was dropped"):
        dropped.fetch(data_key="raw")


def test_missing_vwap_is_logged_and_can_be_replaced(caplog):
    frame = synthetic.prices(3, 70).drop(columns="vwap")
    with caplog.at_level(logging.INFO, logger="qfast"):
        handler = Alpha360("csi300", data=frame, **RAW)
    assert "no column(s) vwap; their features are NaN" in caplog.text
    assert "these prices have no market 'csi300'; using all 3 instruments" in caplog.text
    features = handler.fetch(col_set="feature")
    assert features["VWAP0"].isna().all()
    assert features["OPEN0"].notna().mean() > 0.9
    typical = Alpha360(data=frame, vwap="typical", **RAW).fetch(col_set="feature")["VWAP0"]
    expected = (frame["high"] + frame["low"] + frame["close"]) / 3 / frame["close"]
    np.testing.assert_allclose(typical.reindex(frame.index), expected, rtol=1e-6)


def test_label_forms():
    frame = synthetic.prices(3, 70)
    text = "Ref($close, -1) / $close - 1"
    assert Alpha360(data=frame, label=[text], **RAW).get_cols("label") == [text]
    assert Alpha360(data=frame, label=text, **RAW).get_cols("label") == [text]
    assert Alpha360(data=frame, label=([text], ["Y"]), **RAW).get_cols("label") == ["Y"]
    two = Alpha360(data=frame, label=[[text, "$close"], ["Y", "C"]], **RAW).fetch(col_set="label")
    np.testing.assert_array_equal(two["C"].reindex(frame.index), frame["close"])


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, ConfigError, "exactly one of prices .* and provider_uri"),
        ({"data": "x", "provider_uri": "y"}, ConfigError, "got both"),
        ({"filter_pipe": [1]}, ConfigError, "filter_type must be one of"),
        ({"inst_processors": [1]}, ConfigError, "inst_processors is not available"),
        ({"label": []}, ConfigError, "label must be a list of expressions"),
        ({"label": ["Meen($close, 5)"]}, ConfigError, "function 'Meen' is not available"),
        ({"data": "frame", "label": ["$clos"]}, DataError, r"no column 'clos'.* Did you mean 'close'\?"),
        ({"data": "frame", "instruments": ["S0", "ZZ"]}, DataError, r"1 of the 2 requested are not in the data: ZZ"),
        ({"data": "frame", "infer_processors": ["ZScoreNorm"]}, ConfigError, "needs fit_start_time and fit_end_time"),
        ({"data": "frame", "start_time": "2099-01-01"}, DataError, "no rows with"),
    ],
)
def test_alpha360_refuses(kwargs, error, message):
    if kwargs.get("data") == "frame":
        kwargs = {**kwargs, "data": synthetic.prices(3, 70)}
    with pytest.raises(error, match=message):
        Alpha360(**{**RAW, **kwargs})


def test_build_handler_maps_qlibs_names():
    spec = {"class": "Alpha360", "module_path": "qlib.contrib.data.handler", "kwargs": {**RAW, "instruments": "csi300"}}
    handler = build_handler(spec, data=synthetic.prices(3, 70))
    assert isinstance(handler, Alpha360)
    assert build_handler(handler) is handler
    with pytest.raises(ConfigError, match=r"unknown handler class 'Alpha36'.* Did you mean 'Alpha360'\?"):
        build_handler("Alpha36")
    with pytest.raises(ConfigError, match=r"no argument 'instrument'.* Did you mean 'instruments'\?"):
        build_handler({"class": "Alpha360", "kwargs": {"instrument": "x"}})


def test_owned_features_need_no_second_block():
    """The columns of Alpha360 are normalized in place."""
    frame = synthetic.prices(3, 70)
    handler = Alpha360(data=frame, infer_processors=INFER[1:], learn_processors=LEARN, windows="columns")
    assert handler._raw is None
    assert handler.panel("learn").values("feature") is handler.panel("infer").values("feature")
    space = P.Workspace(["feature"])
    panel = Panel.from_frame(hostile_frame(0))
    assert P.Fillna("feature").run(panel, space).values("feature") is panel.values("feature")
