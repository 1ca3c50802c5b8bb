"""Every kind of price source yields the same panel, and every kind of damage has its own message."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfast.data import synthetic
from qfast.data.panel import Panel
from qfast.data.sources import BinaryStore, load_prices, read_prices
from qfast.errors import ConfigError, DataError
from support.stores import minutes, read_series, write_store


@pytest.fixture
def prices() -> pd.DataFrame:
    """Prices with holes, late listings and delistings, indexed (datetime, instrument)."""
    return synthetic.prices(6, 40, seed=1, late=0.5, delisted=0.5, holes=0.1, missing=0.05)


def expected(prices: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Prices of each instrument on every calendar date from its first to its last row."""
    calendar = prices.index.get_level_values(0).unique().sort_values()
    parts = {}
    for code, part in prices.groupby(level="instrument"):
        part = part.droplevel("instrument").sort_index()
        parts[str(code)] = part.reindex(calendar[(calendar >= part.index[0]) & (calendar <= part.index[-1])])
    return parts


def assert_holds(panel: Panel, prices: pd.DataFrame, rtol: float = 0) -> None:
    wanted = expected(prices)
    assert panel.instruments.tolist() == sorted(wanted)
    for code, name in enumerate(panel.instruments):
        rows = np.flatnonzero(panel.instrument_codes == code)
        assert np.all(np.diff(rows) == 1)
        part = wanted[name]
        assert panel.datetimes[panel.date_codes[rows]].tolist() == part.index.tolist()
        for column in part.columns:
            np.testing.assert_allclose(
                panel.column(column)[rows], part[column].to_numpy(np.float32), rtol=rtol, equal_nan=True
            )


def test_csv_parquet_folder_and_frame_agree(tmp_path, prices):
    flat = prices.reset_index()
    shuffled = flat.sample(frac=1, random_state=0)
    shuffled.to_csv(tmp_path / "all.csv", index=False)
    shuffled.to_csv(tmp_path / "all.csv.gz", index=False)
    for kind in ("csv", "parquet"):
        (tmp_path / kind).mkdir()
    for code, part in flat.groupby("instrument"):
        part.drop(columns="instrument").to_csv(tmp_path / "csv" / f"{code}.csv", index=False)
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        part.drop(columns="instrument").to_parquet(tmp_path / "parquet" / f"{code}.parquet")
    shuffled.astype({"instrument": "category"}).to_parquet(tmp_path / "all.parquet")
    before = shuffled.copy()
    for source in (
        prices,
        prices.swaplevel(),
        shuffled,
        flat.set_index("datetime"),
        tmp_path / "all.parquet",
        str(tmp_path / "parquet"),
        load_prices(prices),
    ):
        assert_holds(load_prices(source), prices)
    for source in (tmp_path / "all.csv", tmp_path / "all.csv.gz", tmp_path / "csv"):
        assert_holds(load_prices(source), prices, rtol=1e-6)
    pd.testing.assert_frame_equal(shuffled, before)
    assert load_prices(prices).columns("price") == ("open", "high", "low", "close", "volume", "vwap")


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    date=st.sampled_from(["datetime", "Date", "DATE", "timestamp", "trade_date"]),
    code=st.sampled_from(["instrument", "Symbol", "ticker", "ts_code", "Name"]),
    order=st.permutations(["open", "high", "low", "close", "volume", "vwap"]),
    style=st.sampled_from([str, str.upper, str.title, lambda c: f"${c}", lambda c: f" {c} "]),
)
def test_names_and_order_of_columns_do_not_matter(seed, date, code, order, style):
    frame = synthetic.prices(3, 12, seed=seed, holes=0.2)
    table = frame.reset_index().rename(columns={"datetime": date, "instrument": code})
    table = table[[*order, code, date]].rename(columns={c: style(c) for c in order})
    assert_holds(load_prices(table), frame)


def test_codes_stay_text(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("date,symbol,close\n2024-01-02,000001,1.5\n2024-01-02,NA,\n2024-01-02,nan,2\n")
    panel = load_prices(path)
    assert panel.instruments.tolist() == ["000001", "NA", "nan"]
    np.testing.assert_array_equal(panel.column("close"), [1.5, np.nan, 2])
    numbers = pd.DataFrame({"date": [20240131, 20240201], "code": [600000, 600000], "close": [1.0, 2.0]})
    panel = load_prices(numbers)
    assert panel.instruments.tolist() == ["600000"]
    assert panel.datetimes.tolist() == [pd.Timestamp("2024-01-31"), pd.Timestamp("2024-02-01")]


def test_intraday_and_time_zones(tmp_path):
    stamps = minutes(30)
    frame = pd.DataFrame({"time": stamps, "ticker": "A", "close": np.arange(30.0)})
    assert load_prices(frame, end_time="2020-01-02").n_rows == 24, "a date means the whole day"
    assert load_prices(frame, start_time="2020-01-01 10:00", end_time="2020-01-01 10:10").n_rows == 3
    zoned = frame.assign(time=stamps.tz_localize("Asia/Shanghai"))
    panel = load_prices(zoned)
    assert str(panel.datetimes.tz) == "Asia/Shanghai"
    zoned.to_csv(tmp_path / "z.csv", index=False)
    assert load_prices(tmp_path / "z.csv").datetimes.tz_convert("UTC").tolist() == panel.datetimes.tolist()
    mixed = frame.assign(time=["2024-01-02 09:30:00+08:00"] + ["2024-01-02 09:30:00+09:00"] * 29)
    with pytest.raises(DataError, match=r"do not have one time zone: .* has \+08:00, .* has \+09:00"):
        load_prices(mixed)


def test_instruments_and_times_are_restricted(prices):
    names = sorted(expected(prices))
    panel = load_prices(prices, instruments=names[1:3], start_time="2015-01-10", end_time="2015-02-10")
    assert panel.instruments.tolist() == names[1:3]
    assert panel.datetimes[0] >= pd.Timestamp("2015-01-10")
    assert panel.datetimes[-1] <= pd.Timestamp("2015-02-10")
    spans = {names[0]: [("2015-01-05", "2015-01-09"), ("2015-02-02", "2015-02-03")]}
    panel = load_prices(prices, instruments=spans)
    live = panel.datetimes[panel.date_codes[panel.live_rows()]]
    assert panel.n_live < panel.n_rows
    assert all("2015-01-05" <= str(d.date()) <= "2015-01-09" or d.month == 2 for d in live)


def test_text_columns_are_excluded_and_logged(prices, caplog):
    table = prices.reset_index().assign(sector="tech")
    with caplog.at_level(logging.INFO, logger="qfast"):
        panel = load_prices(table)
    assert "sector" not in panel.columns("price")
    assert "ignoring column 'sector', which is not numeric" in caplog.text


def test_numbers_written_as_text_are_numbers():
    frame = pd.DataFrame({"date": ["2024-01-02"] * 2, "code": ["A", "B"], "close": ["1.5", None]})
    np.testing.assert_array_equal(load_prices(frame).column("close"), [1.5, np.nan])


def test_typical_vwap(prices):
    with_it = load_prices(prices.drop(columns="vwap"), vwap="typical")
    typical = (with_it.column("high").astype(float) + with_it.column("low") + with_it.column("close")) / 3
    np.testing.assert_allclose(with_it.column("vwap"), typical, rtol=1e-6)
    np.testing.assert_array_equal(
        load_prices(prices, vwap="typical").column("vwap"), load_prices(prices).column("vwap")
    )


# ---------------------------------------------------------------- damaged and unsuitable tables
def table(**changes: object) -> pd.DataFrame:
    columns = {"date": ["2024-01-02", "2024-01-03", "2024-01-04"], "symbol": ["A"] * 3, "close": [1.0, 2.0, 3.0]}
    return pd.DataFrame({**columns, **changes}).dropna(axis=1, how="all")


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (
            table(date=None),
            r"no datetime column; its columns are .*, accepted names are \['datetime', 'date'",
        ),
        (
            table(symbol=None),
            r"no instrument column; its columns are .*, accepted names are \['symbol'.*--instrument-column",
        ),
        (table(date=["2024-01-02", "2024-13-45", "x"]), "row 1 is not a date: '2024-13-45' in column 'date'"),
        (table(date=["2024-01-02", None, "2024-01-04"]), r"row 1 has no date \(column 'date'\)"),
        (table(symbol=["A", "B", None]), r"row 2 has no instrument \(column 'symbol'\)"),
        (table(date=["2024-01-02", "2024-01-03", "2024-01-02"]), r"rows? 0 of the frame and row 2 of the frame"),
        (table(close=["1", "2;5", "3"]), "column 'close' must be numeric, but row 1 is '2;5'"),
        (table(date=[20240101, 20240102, 17]), "row 2 is not a date: '17' in column 'date'"),
        (table(close=None), r"no price column; its columns are \['date', 'symbol'\]"),
        (table(Close=[1, 2, 3]), "column 'Close' occurs twice"),
        (table().iloc[:0], r"the frame has no rows"),
    ],
)
def test_table_refuses(frame, message):
    with pytest.raises(DataError, match=message):
        load_prices(frame)


def test_files_refuse(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"no such file or folder: .*nothing\.csv \(current folder "):
        load_prices(tmp_path / "nothing.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match=r"empty\.csv is empty \(0 bytes\)"):
        load_prices(tmp_path / "empty.csv")
    (tmp_path / "header.csv").write_text("date,symbol,close\n")
    with pytest.raises(DataError, match=r"header\.csv has no rows"):
        load_prices(tmp_path / "header.csv")
    (tmp_path / "ragged.csv").write_text("date,symbol,close\n2024-01-02,A,1\n2024-01-03,A,1,2,3\n")
    with pytest.raises(DataError, match=r"ragged\.csv cannot be read as CSV: .*line 3"):
        load_prices(tmp_path / "ragged.csv")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and then the disk was full")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    with pytest.raises(DataError, match=r"cut\.parquet cannot be read as Parquet"):
        load_prices(tmp_path / "cut.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow.* pip install 'qfast-models\[parquet\]'"):
        load_prices(tmp_path / "cut.parquet")


def test_folders_refuse(tmp_path):
    with pytest.raises(DataError, match="contains neither CSV nor Parquet files"):
        load_prices(tmp_path)
    (tmp_path / "a.csv").write_text("date,symbol,close\n2024-01-02,A,1\n")
    (tmp_path / "b.csv").write_text("date,symbol,close\n2024-01-03,A,1\n2024-01-02,A,2\n")
    with pytest.raises(DataError, match=r"row 0 of a\.csv and row 1 of b\.csv are both \(datetime 2024-01-02"):
        load_prices(tmp_path)
    (tmp_path / "b.csv").write_text("date,symbol,close\n2024-01-03T09:30:00Z,A,1\n")
    with pytest.raises(DataError, match="do not have one time zone"):
        load_prices(tmp_path)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "exactly one of prices"),
        ({"source": 3}, "prices must be a path, a DataFrame, an Arrow table or a Panel, got int"),
        ({"source": table(), "vwap": "typcal"}, r"vwap must be None or 'typical'.* Did you mean 'typical'\?"),
        ({"source": table(), "instruments": {"A": 5}}, r"must be \{code: \[\(start, end\), \.\.\.\]\}"),
        ({"source": table(), "instruments": 5}, "instruments must be a market name, a list"),
        ({"provider_uri": 5}, "provider_uri must be a path, got int"),
        ({"provider_uri": {"1min": "x"}}, r"no entry for freq 'day'; it has \['1min'\]"),
    ],
)
def test_arguments_refused(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        load_prices(**kwargs)


# ---------------------------------------------------------------- Qlib's binary store
def test_a_store_has_the_values_of_its_files(tmp_path):
    root = write_store(tmp_path / "store")
    panel, extents = read_prices(provider_uri=root)
    assert panel.instruments.tolist() == ["AAA", "BBB", "CCC", "CON", "DDD", "EEE"]
    for code, name in enumerate(panel.instruments):
        for field in panel.columns("price"):
            series = read_series(root, name, field)
            rows = slice(extents[field].start[code], extents[field].stop[code])
            assert rows.stop - rows.start == len(series)
            if len(series):
                assert panel.date_codes[rows].tolist() == list(series.index)
                np.testing.assert_array_equal(panel.column(field)[rows], series.to_numpy())
                assert set(panel.instrument_codes[rows]) == {code}
    assert load_prices(root).content_hash() == load_prices(provider_uri={"day": str(root)}).content_hash()


def test_store_market_spans(tmp_path):
    root = write_store(tmp_path / "store")
    panel = load_prices(provider_uri=root, instruments="MIXED")
    assert panel.instruments.tolist() == ["AAA", "BBB", "DDD"]
    a = panel.live_rows()[panel.instrument_codes[panel.live_rows()] == 0]
    assert panel.date_codes[a].tolist() == [*range(10, 41), *range(60, 120)]
    assert BinaryStore(root).markets() == ["all", "mixed"]
    assert load_prices(provider_uri=root, instruments={"market": "mixed"}).n_live == panel.n_live
    listed = load_prices(provider_uri=root, instruments=["BBB", "GONE"])
    assert listed.instruments.tolist() == ["BBB"]
    assert listed.live is None


def test_a_store_reads_only_the_needed_files(tmp_path):
    root = write_store(tmp_path / "store")
    bounds = {"start_time": "2020-02-15", "end_time": "2020-03-13"}
    panel, _ = read_prices(provider_uri=root, wanted=["close"], margin=(4, 2), **bounds)
    inside = pd.bdate_range(bounds["start_time"], bounds["end_time"])
    assert panel.columns("price") == ("close",)
    assert len(np.unique(panel.date_codes)) == len(inside) + 6
    np.testing.assert_array_equal(load_prices(provider_uri=root, **bounds).datetimes, inside)


def broken(root, what: str):
    folder = root / "features" / "aaa"
    raw = np.fromfile(folder / "close.day.bin", dtype="<f4")
    if what == "truncated":
        (folder / "close.day.bin").write_bytes(raw.tobytes()[:-3])
    elif what == "start":
        np.concatenate([[np.nan], raw[1:]]).astype("<f4").tofile(folder / "close.day.bin")
    elif what == "late":
        np.concatenate([[5000], raw[1:]]).astype("<f4").tofile(folder / "close.day.bin")
    elif what == "calendar":
        (root / "calendars" / "day.txt").unlink()
    elif what == "blank":
        (root / "calendars" / "day.txt").write_text("\n")
    elif what == "order":
        (root / "calendars" / "day.txt").write_text("2020-01-02\n2020-01-03\n2020-01-03\n")
    elif what == "market":
        (root / "instruments" / "all.txt").write_text("AAA 2020-01-01 2020-02-01\n")
    elif what == "market date":
        (root / "instruments" / "all.txt").write_text("AAA\t2020-01-01\tsoon\n")
    elif what == "nobody":
        (root / "instruments" / "all.txt").write_text("")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", r"close\.day\.bin is damaged: 481 bytes are not a whole number of float32 values"),
        ("start", r"close\.day\.bin is damaged: its first value must be the calendar position .* got nan"),
        ("late", r"from 0 to 119, got 5000\.0"),
        ("calendar", r"not a Qlib data folder for freq 'day': .*day\.txt is missing, and it has no other calendar"),
        ("blank", r"day\.txt contains no dates"),
        ("order", r"line 3 \(2020-01-03\) is not after the line before it"),
        ("market", r"all\.txt: line 1 must be CODE, start and end separated by tabs"),
        ("market date", r"all\.txt: line 1 must contain two dates"),
        ("nobody", r"all\.txt contains no instruments"),
    ],
)
def test_damaged_stores(tmp_path, what, message):
    root = write_store(tmp_path / "store")
    broken(root, what)
    with pytest.raises(DataError, match=message):
        load_prices(provider_uri=root)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"instruments": "mxied"},
            r"market 'mxied' is not in .*, which has \['all', 'mixed'\]\. Did you mean 'mixed'\?",
        ),
        ({"instruments": ["X", "Y"]}, r"none of the 2 instruments \(X, Y, \.\.\.\) has data"),
        ({"start_time": "2030-01-01"}, r"no trading day between start_time=2030-01-01 and end_time=None; the calendar"),
        ({"freq": "1min"}, r"freq '1min': .*1min\.txt is missing; it has calendars for \['day'\]"),
        ({"provider_uri": "/nowhere/at/all"}, "provider_uri: no such folder: /nowhere/at/all"),
    ],
)
def test_stores_refuse(tmp_path, kwargs, message):
    root = write_store(tmp_path / "store")
    with pytest.raises(DataError, match=message):
        load_prices(**{"provider_uri": root, **kwargs})
    with pytest.raises(ConfigError, match="filter_pipe is not available"):
        load_prices(provider_uri=root, instruments={"market": "all", "filter_pipe": [1]})
