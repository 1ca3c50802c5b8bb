"""Alpha158 compared with pyqlib and pandas; its configuration; the cache of factors on disk."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qfast.data import Alpha158, Alpha158vwap, FactorHandler, load_prices, synthetic
from qfast.data.expression import ExpressionError
from qfast.data.factor_cache import FactorCache
from qfast.data.factors import register_function, unregister_function
from qfast.data.handlers import build_handler
from qfast.data.handlers.alpha158 import ROLLING, alpha158_factors
from qfast.data.panel import Panel
from qfast.errors import ConfigError, DataError
from support.pandas_factors import by_pandas
from support.stores import FIELDS, read_series, write_store

RAW = {"infer_processors": [], "learn_processors": []}
START, END = "2020-03-02", "2020-05-20"


def assert_equal_as_float32(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    """Asserts equality up to float32 rounding of differently summed windows, and NaN in the same places."""
    assert ours.index.tolist() == theirs.index.tolist()
    assert ours.columns.tolist() == theirs.columns.tolist()
    theirs = without_what_is_left_of_sums(ours, theirs)
    for place, column in enumerate(ours.columns):
        np.testing.assert_allclose(
            ours.iloc[:, place], theirs.iloc[:, place].to_numpy(np.float32), rtol=3e-6, atol=2e-6, err_msg=str(column)
        )


def without_what_is_left_of_sums(ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.DataFrame:
    """WVMA of a flat price is 0 / 1e-12.

    Qlib's running deviation of zeros is not 0 but about 1e-5, left over from earlier values, so its factor is about
    1e7. qfast's is exactly 0.
    """
    theirs = theirs.astype(np.float32)
    for column in [c for c in ours.columns if str(c).startswith("WVMA")]:
        left = (ours[column] == 0).to_numpy() & (theirs[column] != 0).to_numpy()
        assert left.mean() < 0.2
        theirs.loc[left, column] = 0.0
    return theirs


# ---------------------------------------------------------------- the factors
def test_names_and_order():
    texts, names = alpha158_factors()
    assert len(texts) == len(names) == len(set(names)) == 158
    assert names[:13] == [
        "KMID",
        "KLEN",
        "KMID2",
        "KUP",
        "KUP2",
        "KLOW",
        "KLOW2",
        "KSFT",
        "KSFT2",
        "OPEN0",
        "HIGH0",
        "LOW0",
        "VWAP0",
    ]
    assert names[13:] == [f"{family}{d}" for family in ROLLING for d in (5, 10, 20, 30, 60)]


CONFIGS = [
    None,
    {"kbar": {}},
    {"price": {}},
    {"volume": {}},
    {"rolling": {}},
    {"volume": {"windows": [0, 3]}},
    {"price": {"windows": [0, 1, 7], "feature": ["CLOSE", "HIGH"]}, "kbar": {}},
    {"rolling": {"windows": [3, 8], "include": ["ROC", "LOW", "VSUMD", "CORD"]}},
    {"rolling": {"windows": [4], "exclude": ["RANK", "LOW", "CORR"]}},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_configurations_equal_qlib(config):
    pytest.importorskip("qlib", reason="pyqlib is not installed")
    from qlib.contrib.data.loader import Alpha158DL

    theirs = Alpha158DL.get_feature_config() if config is None else Alpha158DL.get_feature_config(config)
    ours = alpha158_factors(config)
    assert ours[1] == theirs[1]
    assert [t.replace(" ", "") for t in ours[0]] == [t.replace(" ", "") for t in theirs[0]]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rollin": {}}, r"no section 'rollin'.* Did you mean 'rolling'\?"),
        ({"rolling": {"window": [5]}}, r"no setting 'window'.* Did you mean 'windows'\?"),
        ({"rolling": {"include": ["ROX"]}}, r"got 'ROX'. Did you mean 'ROC'\?"),
        ({"rolling": {"windows": [0]}}, "must be whole numbers of at least 1, got 0"),
        ({"price": {"windows": [1.5]}}, "must be whole numbers of at least 0, got 1.5"),
        ({"price": {"feature": "OPEN"}}, "price.feature of Alpha158 must be a list"),
        ({"price": [1]}, "section 'price' of Alpha158 must be a mapping"),
        ({}, "must select at least one factor, got"),
        ([], "must be a mapping"),
    ],
)
def test_configurations_that_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        alpha158_factors(config)


@pytest.mark.filterwarnings("ignore")
def test_every_factor_equals_pandas(tmp_path):
    """Data with holes, late listings, files of different length, zero volume and a zero price."""
    root = write_store(tmp_path / "store")
    ours = Alpha158("all", provider_uri=root, **RAW).fetch(col_set="feature")
    texts, names = alpha158_factors()
    compared = 0
    for code in ours.index.get_level_values("instrument").unique():
        series = {field: read_series(root, code, field) for field in FIELDS}
        mine = ours.xs(code, level="instrument")
        calendar = pd.bdate_range("2020-01-01", periods=120)
        for text, name in zip(texts, names, strict=True):
            try:
                expected = by_pandas(text, series)
            except (ValueError, IndexError):
                continue  # series of unequal length compared, or none at all
            compared += 1
            expected = expected.set_axis(calendar[expected.index]).reindex(mine.index).to_numpy()
            got = mine[name].to_numpy()
            if code == "DDD":  # a zero price makes infinite ratios; then Qlib's sums are NaN or drift
                clear = np.isfinite(expected) & np.isfinite(got)
                expected, got = np.where(clear, expected, 0), np.where(clear, got, 0)
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6, err_msg=f"{code} {name}")
    assert compared > 400


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("market", ["all", "mixed"])
@pytest.mark.parametrize("times", [{}, {"start_time": START, "end_time": END}], ids=["whole", "part"])
@pytest.mark.parametrize("classes", [("Alpha158", Alpha158), ("Alpha158vwap", Alpha158vwap)], ids=lambda c: c[0])
def test_features_and_label_equal_qlib(tmp_path, market, times, classes):
    qlib = pytest.importorskip("qlib", reason="pyqlib is not installed")
    import qlib.contrib.data.handler as qlib_handlers

    root = write_even_store(tmp_path / "store")
    qlib.init(provider_uri=str(root), region="us", kernels=1, logging_level=logging.ERROR)
    theirs = getattr(qlib_handlers, classes[0])(market, **times, **RAW)
    ours = classes[1](market, provider_uri=root, **times, **RAW)
    for group in ("feature", "label"):
        mine, other = ours.fetch(col_set=group), theirs.fetch(col_set=group)
        assert_equal_as_float32(mine, other)


def write_even_store(root: Path) -> Path:
    """A store in which all fields of a stock have the same days. Qlib raises an error for others."""
    write_store(root)
    for folder in (root / "features").iterdir():
        first, close = read_bin(folder / "close.day.bin")
        close[close == 0] = np.nan
        close[20:45] = close[20:21]  # a flat price: no deviation
        for field in FIELDS:
            begin, values = read_bin(folder / f"{field}.day.bin")
            if field == "close" or (begin, len(values)) != (first, len(close)):
                values = close
            np.concatenate([[first], values]).astype("<f4").tofile(folder / f"{field}.day.bin")
    return root


def read_bin(file: Path) -> tuple[float, np.ndarray]:
    """(position of the first day, values) of a file; no values if the file is missing."""
    values = np.fromfile(file, dtype="<f4") if file.exists() else np.zeros(1, dtype="<f4")
    return float(values[0]), values[1:]


@pytest.mark.filterwarnings("ignore")
def test_workflow_pipeline_equals_qlib(tmp_path):
    """The benchmark files' processors: twenty columns, robust z-score, fill; ranks of the label."""
    qlib = pytest.importorskip("qlib", reason="pyqlib is not installed")
    from qlib.contrib.data.handler import Alpha158 as QlibAlpha158

    root = write_even_store(tmp_path / "store")
    qlib.init(provider_uri=str(root), region="us", kernels=1, logging_level=logging.ERROR)
    columns = ["RESI5", "WVMA5", "RSQR5", "KLEN", "CORR5", "CORD5", "ROC60", "STD5", "KLOW"]
    kwargs = {
        "start_time": "2020-01-20",
        "end_time": END,
        "fit_start_time": "2020-01-20",
        "fit_end_time": "2020-04-15",
        "infer_processors": [
            {"class": "FilterCol", "kwargs": {"fields_group": "feature", "col_list": columns}},
            {"class": "RobustZScoreNorm", "kwargs": {"fields_group": "feature", "clip_outlier": True}},
            {"class": "Fillna", "kwargs": {"fields_group": "feature"}},
        ],
        "learn_processors": ["DropnaLabel", {"class": "CSRankNorm", "kwargs": {"fields_group": "label"}}],
        "label": ["Ref($close, -2) / Ref($close, -1) - 1"],
    }
    ours, theirs = Alpha158("all", provider_uri=root, **kwargs), QlibAlpha158("all", **kwargs)
    for key in ("raw", "infer", "learn"):
        mine, other = ours.fetch(col_set="__all", data_key=key), theirs.fetch(col_set="__all", data_key=key)
        assert mine.columns.tolist() == other.columns.tolist()
        if key == "raw":
            other = without_what_is_left_of_sums(mine, other)
        np.testing.assert_allclose(mine, other.to_numpy(np.float32), rtol=2e-4, atol=2e-5)


def test_custom_handlers():
    class Mine(Alpha158):
        def get_feature_config(self):
            return ["$close / Ref($close, 5)"], ["BACK5"]

        def get_label_config(self):
            return ["Ref($close, -1) / $close - 1"], ["NEXT"]

    frame = synthetic.prices(3, 70)
    handler = Mine(data=frame, **RAW)
    assert (handler.get_cols("feature"), handler.get_cols("label")) == (["BACK5"], ["NEXT"])
    assert (handler.lookback, handler.label_horizon) == (6, 1)
    few = Alpha158(data=frame, config={"rolling": {"windows": [5], "include": ["MA"]}}, **RAW)
    expected = FactorHandler((["Mean($close, 5) / $close"], ["MA5"]), data=frame, **RAW)
    pd.testing.assert_frame_equal(few.fetch(), expected.fetch())
    spec = {"class": "Alpha158", "module_path": "qlib.contrib.data.handler", "kwargs": {**RAW, "config": {"kbar": {}}}}
    assert len(build_handler(spec, data=frame).get_cols("feature")) == 9
    against = FactorHandler(["$close / Mask($close, 'S0')"], data=frame, **RAW)
    assert against.fetch(col_set="feature").shape[1] == 1


def test_an_instrument_outside_the_market_can_be_looked_at(tmp_path):
    root = write_store(tmp_path / "store")
    handler = FactorHandler(["Mask($close, 'CCC')"], "mixed", provider_uri=root, label=["$close"], **RAW)
    frame = handler.fetch(col_set="feature")
    assert "CCC" not in frame.index.get_level_values("instrument")
    expected = read_series(root, "CCC", "close").to_numpy()
    days = pd.bdate_range("2020-01-01", periods=120)
    assert np.array_equal(
        frame.iloc[:, 0].to_numpy(),
        pd.Series(expected, days[:60]).reindex(frame.index.get_level_values("datetime")).to_numpy(np.float32),
        equal_nan=True,
    )


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"features": []}, ConfigError, "features must be a list of expressions"),
        ({"features": ["$clos"]}, DataError, r"no column 'clos'.* Did you mean 'close'\?"),
        ({"features": ["Mask($close, 'ZZ')"]}, DataError, r"1 of the 1 requested are not in the data: ZZ"),
        ({"features": ["$close"], "cache": __file__}, ConfigError, "cache must be a folder, but .* is a file"),
        ({"features": ["$close"], "cache": True}, ConfigError, "cache must be the path of a folder or None, got True"),
        ({"features": ["$close"], "cache": 3}, ConfigError, "cache must be the path of a folder or None, got 3"),
        ({"features": ["$close"], "cache": ""}, ConfigError, "cache must be the path of a folder or None, got ''"),
        ({"features": ["$close"], "filter_pipe": [1]}, ConfigError, "filter_type must be one of"),
    ],
)
def test_factor_handler_refuses(kwargs, error, message):
    with pytest.raises(error, match=message):
        FactorHandler(data=synthetic.prices(3, 70), **RAW, **kwargs)


# ---------------------------------------------------------------- the cache
CONFIG = {"kbar": {}, "rolling": {"windows": [5], "include": ["MA", "STD"]}}


def cached(folder: Path, frame: pd.DataFrame, **kwargs: object) -> pd.DataFrame:
    return Alpha158(data=frame, config=CONFIG, cache=folder, **{**RAW, **kwargs}).fetch(col_set="feature")


def test_a_second_run_reads_what_the_first_computed(tmp_path, monkeypatch):
    frame = synthetic.prices(4, 60)
    first = cached(tmp_path / "c", frame)
    assert len(list((tmp_path / "c").iterdir())) == 1
    monkeypatch.setattr(Alpha158, "_evaluated", only_labels(Alpha158._evaluated))
    pd.testing.assert_frame_equal(cached(tmp_path / "c", frame), first)
    assert len(list((tmp_path / "c").iterdir())) == 1


def only_labels(evaluated):
    def wrapper(self, texts, prices, rows, out=None):
        assert len(texts) == 1, "factors were computed though they are on disk"
        return evaluated(self, texts, prices, rows, out)

    return wrapper


def test_other_data_rows_or_factors_are_another_file(tmp_path):
    frame = synthetic.prices(4, 60)
    changed = frame.copy()
    changed.iloc[17, 0] *= 1.01
    first = cached(tmp_path, frame)
    assert not cached(tmp_path, changed).equals(first)
    days = frame.index.get_level_values("datetime").unique().sort_values()
    part = cached(tmp_path, frame, start_time=days[30])
    pd.testing.assert_frame_equal(part, first.loc[days[30] :])
    Alpha158(data=frame, config={"kbar": {}}, cache=tmp_path, **RAW)
    assert len(list(tmp_path.iterdir())) == 4


def values_of(folder: Path) -> Path:
    """The file with the factors of a cache folder with one entry."""
    (file,) = folder.glob("factors-*/contents-*/block-0.values")
    return file


def test_cached_factors_are_mapped_and_not_copied(tmp_path):
    frame = synthetic.prices(4, 60)
    kwargs = {"data": frame, "config": CONFIG, "cache": tmp_path}
    handlers = [Alpha158(**kwargs, infer_processors=infer, learn_processors=[]) for infer in ([], [], ["Fillna"])]
    plain = Alpha158(data=frame, config=CONFIG, **RAW).panel("raw").values("feature")
    for handler in handlers:
        raw = handler.panel("raw").values("feature")
        assert not raw.flags.writeable
        np.testing.assert_array_equal(raw, plain)
    np.testing.assert_array_equal(handlers[2].panel("infer").values("feature"), np.nan_to_num(plain))
    (entry,) = tmp_path.iterdir()
    stored = Panel.open(entry)  # the keys are those of the handler
    assert stored.index().equals(handlers[0].panel("infer").index())


def test_a_damaged_file_is_logged_and_recomputed(tmp_path, caplog):
    frame = synthetic.prices(4, 60)
    first = cached(tmp_path, frame)
    whole = values_of(tmp_path).read_bytes()
    middle = len(whole) // 2
    scratched = whole[: middle - 64] + b"\xff" * 128 + whole[middle + 64 :]
    for damaged in (whole[: len(whole) // 2], b"", b"PAR1 no", scratched):
        values_of(tmp_path).write_bytes(damaged)
        with caplog.at_level(logging.WARNING, logger="qfast"):
            pd.testing.assert_frame_equal(cached(tmp_path, frame), first)
        assert "cannot read cached factors" in caplog.text
        caplog.clear()
        assert values_of(tmp_path).read_bytes() == whole


def test_damage_anywhere_never_yields_a_wrong_value(tmp_path):
    texts, values = ["$close", "$open"], np.arange(20, dtype=np.float32).reshape(10, 2)
    keys = load_prices(synthetic.prices(1, 10, late=0, delisted=0, holes=0))
    cache = FactorCache(tmp_path)
    np.testing.assert_array_equal(cache.write("key", texts, keys, lambda out: np.copyto(out, values)), values)
    for file in filter(Path.is_file, cache.path("key").rglob("*")):
        whole = file.read_bytes()
        for place in range(0, len(whole), 1 if len(whole) < 400 else 7):
            damaged = bytearray(whole)
            damaged[place] ^= 8
            file.write_bytes(damaged)
            result = cache.read("key", texts, len(values))
            assert result is None or np.array_equal(result, values), (file.name, place)
        file.write_bytes(whole)
    assert np.array_equal(cache.read("key", texts, len(values)), values)
    assert cache.read("key", texts, 9) is None
    assert cache.read("key", ["$close", "$low"], 10) is None


@pytest.mark.parametrize("content", ["a file", "other files", "an old file"])
def test_what_is_not_a_folder_of_factors_is_left_alone(tmp_path, content, caplog):
    frame = synthetic.prices(4, 60)
    first = cached(tmp_path, frame)
    (entry,) = tmp_path.iterdir()
    shutil.rmtree(entry)
    if content == "a file":
        entry.write_text("mine")
    elif content == "other files":
        entry.mkdir()
        (entry / "mine.txt").write_text("mine")
    else:
        (tmp_path / f"{entry.name}.parquet").write_bytes(b"PAR1")
    pd.testing.assert_frame_equal(cached(tmp_path, frame), first)
    assert ("factors are not cached" in caplog.text) == (content != "an old file")
    assert len([p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size == 4]) == 1


def test_an_error_of_an_expression_is_not_an_error_of_the_cache(tmp_path):
    with pytest.raises(ExpressionError, match="cannot be subtracted"):
        FactorHandler(["($close > 1) - ($open > 1)"], data=synthetic.prices(3, 20), cache=tmp_path, **RAW)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_full_disk_costs_the_file_and_not_the_run(tmp_path, monkeypatch, caplog):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    frame = synthetic.prices(4, 60)
    first = cached(tmp_path / "a", frame)
    monkeypatch.setattr("os.replace", full)
    with caplog.at_level(logging.WARNING, logger="qfast"):
        pd.testing.assert_frame_equal(cached(tmp_path / "b", frame), first)
    assert "factors are not cached" in caplog.text
    assert [p for p in (tmp_path / "b").rglob("*") if p.is_file()] == []


def _fill(folder: str) -> None:
    cached(Path(folder), synthetic.prices(20, 120))


def test_two_processes_fill_one_cache(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_fill, args=(str(tmp_path),)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    (file,) = tmp_path.iterdir()
    cache = FactorCache(tmp_path)
    texts = alpha158_factors(CONFIG)[0]
    key = file.stem.removeprefix("factors-")
    frame = synthetic.prices(20, 120)
    expected = Alpha158(data=frame, config=CONFIG, **RAW).panel("raw").values("feature")
    np.testing.assert_array_equal(cache.read(key, texts, len(expected)), expected)


def test_factors_with_custom_functions_are_not_cached(tmp_path):
    register_function("Twice", lambda x: 2 * x)
    try:
        FactorHandler(["Twice($close)"], data=synthetic.prices(3, 20), cache=tmp_path, **RAW)
    finally:
        unregister_function("Twice")
    assert list(tmp_path.iterdir()) == []
