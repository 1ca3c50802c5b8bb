"""Tables as vendors export them: names of columns, codes, shapes, damaged files, and other zones."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from qfast.data import load_prices
from qfast.data.column_names import field_names
from qfast.data.source_notes import collected_notes
from qfast.errors import ConfigError, DataError

FIELDS = ["open", "high", "low", "close", "volume"]


def prices(names: tuple[str, ...] = ("AAPL", "IBM"), days: int = 20) -> pd.DataFrame:
    dates = pd.bdate_range("2021-03-01", periods=days)
    rows = [(day, name, 10 + i, 12 + i, 9 + i, 11 + i, 1000 + i) for name in names for i, day in enumerate(dates)]
    return pd.DataFrame(rows, columns=["date", "symbol", *FIELDS])


def text(frame: pd.DataFrame, columns: list[str] | None = None, style: str = "%Y-%m-%d", **arguments: object) -> str:
    table = frame.assign(date=frame["date"].dt.strftime(style))
    return (table if columns is None else table.set_axis(columns, axis=1)).to_csv(index=False, **arguments)


def read(tmp_path, content: str | bytes, name: str = "p.csv", **options: object):
    """The panel of one file, and the notes about it."""
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return noted(tmp_path / name, **options)


def noted(source, **options: object):
    with collected_notes() as notes:
        panel = load_prices(source, read_options=options)
    return panel, notes


def warnings_of(notes) -> str:
    return " | ".join(note.text for note in notes if note.warning)


def assert_prices(panel, frame: pd.DataFrame, fields: list[str] = FIELDS) -> None:
    expected = frame.set_index(["date", "symbol"])[fields].sort_index()
    actual = panel.to_frame("price")[fields].sort_index()
    assert actual.index.tolist() == expected.index.tolist()
    assert np.array_equal(actual.to_numpy(), expected.to_numpy(np.float32), equal_nan=True)


# ---------------------------------------------------------------- names of columns
@pytest.mark.parametrize(
    "columns",
    [
        ["Date", "Ticker", "PX_OPEN", "PX_HIGH", "PX_LOW", "PX_LAST", "PX_VOLUME"],  # Bloomberg
        ["Date", "Instrument", "Price Open", "Price High", "Price Low", "Price Close", "Volume"],  # Refinitiv
        ["日期", "代码", "开盘价(元)", "最高价(元)", "最低价(元)", "收盘价(元)", "成交量(股)"],  # Wind
        ["交易时间", "证券代码", "开盘价", "最高价", "最低价", "收盘价", "成交量"],  # Choice
        ["日期", "證券代號", "開盤價", "最高價", "最低價", "收盤價", "成交股數"],  # Taiwan
        ["日付", "コード", "始値", "高値", "安値", "終値", "出来高"],
        ["날짜", "종목코드", "시가", "고가", "저가", "종가", "거래량"],
        ["timestamp", "symbol", "1. open", "2. high", "3. low", "4. close", "5. volume"],  # Alpha Vantage
        ["Date", "Symbol", "Open", "High", "Low", "Close/Last", "Volume"],  # Nasdaq
        ["Date", "ISIN", "Open", "High", "Low", "Last", "Volume"],  # Euronext
        ["Trddt", "Stkcd", "Opnprc", "Hiprc", "Loprc", "Clsprc", "Dnshrtrd"],  # CSMAR
        ["datadate", "tic", "prcod", "prchd", "prcld", "prccd", "cshtrd"],  # Compustat
        ["caldt", "PERMNO", "OPENPRC", "ASKHI", "BIDLO", "PRC", "VOL"],  # CRSP
        ["Date", "RIC", "Open Price", "High Price", "Low Price", "Closing Price", "Vol."],
    ],
)
def test_column_names_of_vendors(tmp_path, columns):
    panel, notes = read(tmp_path, text(prices(), columns))
    assert_prices(panel, prices())
    assert not warnings_of(notes)


def test_the_own_name_of_a_field_takes_precedence():
    assert field_names(["PX_LAST", "close", "vol"]) == ["px_last", "close", "volume"]
    assert field_names(["price", "open"]) == ["price", "open"], "not a table of prices"
    assert field_names(["price", "open", "high", "low"]) == ["close", "open", "high", "low"]
    assert field_names(["Close (Prev)", "close(元)"]) == ["close (prev)", "close"]


def test_negative_prices_of_crsp_are_averages(tmp_path):
    frame = prices()
    content = text(frame.assign(close=frame["close"].where(frame.index != 3, -frame["close"])))
    panel, notes = read(tmp_path, content.replace("close", "PRC", 1))
    assert_prices(panel, frame)
    assert "1 negative value(s), averages of bid and ask" in notes[0].text
    assert load_prices(pd.read_csv(tmp_path / "p.csv").rename(columns={"PRC": "close"})).column("close").min() < 0


def test_year_month_and_day_in_columns(tmp_path):
    frame = prices()
    dates = frame["date"].dt
    table = frame.assign(Year=dates.year, Month=dates.month, Day=dates.day).drop(columns="date")
    panel, notes = read(tmp_path, table.to_csv(index=False))
    assert_prices(panel, frame)
    assert "dates from the columns 'Year', 'Month', 'Day'" in notes[0].text
    assert_prices(noted(table.astype({"Day": float}))[0], frame)


def test_another_column_of_codes_is_reported():
    frame = prices(("FB", "META"))
    _, notes = noted(frame.assign(permno=13407))
    assert "column 'symbol' (2), but column 'permno' has 1. --instrument-column 'permno'" in warnings_of(notes)
    _, notes = noted(frame.assign(isin=frame["symbol"] + "1"))
    assert not warnings_of(notes)


def test_instruments_in_another_case_are_suggested():
    with pytest.raises(DataError, match=r"not in the data: aapl. Did you mean 'AAPL'\?"):
        load_prices(prices(), instruments=["aapl"])


# ---------------------------------------------------------------- cells
def test_text_in_the_notation_of_spreadsheets(tmp_path):
    frame = prices(("600000", "000001"))
    table = frame.assign(
        symbol='="' + frame["symbol"] + '"', date=frame["date"].dt.strftime('="%Y-%m-%d"'), close="'11"
    )
    panel, _ = read(tmp_path, table.to_csv(index=False))
    assert_prices(panel, frame.assign(close=11))
    assert_prices(load_prices(frame.assign(symbol=frame["symbol"].str.encode("ascii") + b" ")), frame)
    invisible = frame.assign(symbol="\u200b" + frame["symbol"] + "\u00a0")
    assert_prices(load_prices(invisible), frame)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (prices().assign(symbol=[("A", "US")] * 40), r"row 0 of column 'symbol' must be text or a number, got \('A'"),
        (prices().assign(close=1j), "column 'close' has complex numbers"),
        (prices().melt(["date", "symbol"]), "one row per field: column 'variable' contains open, high"),
        (prices().pivot(index="date", columns="symbol", values="close"), r"may be instruments \(AAPL, IBM\).*stack"),
        (prices(("A",)).drop(columns="symbol"), r"one row per date.*assign\(symbol='AAPL'\)"),
        (
            prices().set_index(["symbol", "date"]).rename_axis(["date", "symbol"]),
            "names of the keys are swapped: 'symbol' contains dates, and 'date' contains 'AAPL'",
        ),
        (pd.concat([prices(), prices().head(1).assign(low=1)]), "but low is 9 and 1; 1 duplicate rows in all"),
        (prices().assign(date=prices()["date"].dt.strftime("%Y-%m-%d 16:00 EST")), "'EST' is not a UTC offset"),
        (prices().assign(date="1. März 2021"), "names of months and days must be English"),
    ],
)
def test_frames_refused(frame, message):
    with pytest.raises(DataError, match=message):
        load_prices(frame)


def test_an_index_level_without_a_name():
    keyed = prices().set_index(["date", "symbol"])
    assert_prices(load_prices(keyed.rename_axis(["date", None])), prices())
    assert_prices(load_prices(keyed.rename_axis([None, "symbol"])), prices())


def test_rows_that_repeat_another_one_are_left_out():
    frame = prices()
    frame.loc[1, "volume"] = np.nan
    panel, notes = noted(pd.concat([frame, frame.iloc[[1, 1, 5]]], ignore_index=True))
    assert_prices(panel, frame)
    assert "leaving out 3 row(s) that repeat another one exactly" in warnings_of(notes)


def test_names_that_differ_in_case_or_width_are_reported():
    _, notes = noted(prices(("AAPL", "aapl", "６００", "600")))
    assert "2 name(s) differ" in warnings_of(notes)
    assert "'AAPL' and 'aapl'" in warnings_of(notes)


def test_infinite_values_and_text_among_numbers_are_reported(tmp_path):
    _, notes = read(tmp_path, text(prices()).replace("1003", "1e300").replace("1004", "inf"))
    assert "column 'volume' has 4 value(s) that are infinite or above 3.4e38, the first in row 3" in warnings_of(notes)
    returns = prices().assign(ret=["C", *(f"{i / 100}" for i in range(39))])
    assert "ignoring column 'ret', which is not numeric: row 0 is 'C'" in warnings_of(noted(returns)[1])
    assert not warnings_of(noted(prices().assign(note="x1"))[1])


# ---------------------------------------------------------------- dates
@pytest.mark.parametrize("style", ["%a %m/%d/%Y", "%Y%m%d %H:%M:%S", "%Y-%m-%d %H:%M:%S"])
def test_more_formats_of_dates(tmp_path, style):
    assert_prices(read(tmp_path, text(prices(), style=style))[0], prices())


def test_names_of_time_zones(tmp_path):
    for style in ("%Y-%m-%d 16:00:00 America/New_York", "%Y%m%d 16:00 America/New_York"):
        panel, _ = read(tmp_path, text(prices(), style=style))
        assert str(panel.datetimes.tz) == "America/New_York"
        assert str(panel.datetimes[[0, -1]]) == str(
            pd.DatetimeIndex(["2021-03-01 16:00", "2021-03-26 16:00"], tz="America/New_York")
        ), "local times on both sides of the change of clocks"
    panel, _ = read(tmp_path, text(prices(), style="%Y-%m-%dT16:00-05:00[America/New_York]"))
    assert panel.datetimes[0] == pd.Timestamp("2021-03-01 16:00-05:00")


def test_the_option_time_zone(tmp_path):
    frame = prices()
    utc = frame["date"].dt.tz_localize("Asia/Shanghai").dt.tz_convert("UTC")
    forms = {
        "unix": frame.assign(date=[int(stamp.timestamp()) for stamp in utc]),
        "text": frame.assign(date=utc.dt.strftime("%Y-%m-%dT%H:%M:%SZ")),
        "aware": frame.assign(date=utc),
        "offsets": frame.assign(date=[str(t if i % 2 else t.tz_convert("Asia/Tokyo")) for i, t in enumerate(utc)]),
    }
    for name, table in forms.items():
        panel = load_prices(table, read_options={"time_zone": "Asia/Shanghai", "freq": "day"})
        assert_prices(panel, frame), name
    for name in ("unix", "text", "aware"):
        for options in ({}, {"freq": "day"}):
            assert "probably one day early. Remedy: --time-zone" in warnings_of(noted(forms[name], **options)[1])
    aware = load_prices(frame, read_options={"time_zone": "Europe/Paris"})
    assert aware.datetimes[0] == pd.Timestamp("2021-03-01", tz="Europe/Paris"), "dates are local dates"
    with pytest.raises(ConfigError, match=r"--time-zone must be a zone.*Did you mean 'Asia/Shanghai'"):
        load_prices(frame, read_options={"time_zone": "Asia/Shangai"})
    hour = frame.head(1).assign(date="2021-03-28 02:30")
    with pytest.raises(DataError, match="--time-zone Europe/Paris: a local time of column 'date'"):
        load_prices(hour, read_options={"time_zone": "Europe/Paris"})


def test_suspicious_dates_are_reported():
    frame = prices()
    _, notes = noted(frame.assign(date=frame["date"] + pd.DateOffset(years=200)))
    assert "20 of 20 dates are in the future" in warnings_of(notes)
    _, notes = noted(frame.assign(date=frame["date"].where(frame.index != 0, pd.Timestamp("1970-01-01"))))
    assert "the longest is from 1970-01-01 to 2021-03-01" in warnings_of(notes)


def test_partial_days_of_intraday_bars_are_reported():
    bars = pd.date_range("2021-03-01 09:30", periods=10, freq="30min")
    days = [bars + pd.Timedelta(days=day) for day in range(3)]
    times = np.concatenate([day.to_numpy() for day in days])
    whole = pd.DataFrame({"date": np.tile(times, 2), "symbol": np.repeat(["A", "B"], len(times)), "close": 1.0})
    assert not warnings_of(noted(whole)[1])
    _, notes = noted(whole.iloc[:-4])
    assert (
        "1 of 3 days are partial, with fewer than 90% of the usual 10 bars for some instruments. The latest is "
        "2021-03-03: 1 of 2 instrument(s), the fewest with 6 bar(s)" in warnings_of(notes)
    )


# ---------------------------------------------------------------- files
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (text(prices()).replace("IBM", "I\0BM", 1), "line 22 contains NUL bytes"),
        (text(prices()) + "\0" * 9, "line 42 contains NUL bytes"),
        ("<html><body>404</body></html>", "is HTML or XML"),
        ('{"date": []}', "is JSON"),
        (b"ARROW1\0\0", "is a Feather file"),
        (b"\x80\x05\x95\0\0", "is a pickle"),
        (b"PK\x03\x04abcd", "damaged zip archive or Excel workbook"),
    ],
)
def test_files_that_are_not_tables(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, content)


def test_shapes_of_files(tmp_path):
    frame = prices()
    dated = frame.assign(date=frame["date"].dt.strftime("%Y-%m-%d"))
    assert_prices(read(tmp_path, dated.to_string())[0], frame)
    assert_prices(read(tmp_path, text(frame).encode("utf-32"))[0], frame)
    assert_prices(read(tmp_path, text(frame) + "#downloaded today\n")[0], frame)
    assert_prices(read(tmp_path, text(frame) + "*** End of file ***\n")[0], frame)
    frame.to_parquet(tmp_path / "parquet")
    assert_prices(load_prices(tmp_path / "parquet"), frame)
    (tmp_path / "wrong.parquet").write_text(text(frame))
    with pytest.raises(DataError, match=r"rename it to \.csv"):
        load_prices(tmp_path / "wrong.parquet")


def test_incomplete_files_are_reported(tmp_path):
    _, notes = read(tmp_path, text(prices()).rstrip().rsplit(",", 1)[0])
    assert "the last line has 6 cells and the line before it 7, so the file is probably incomplete" in (
        warnings_of(notes)
    )
    assert not warnings_of(read(tmp_path, text(prices()))[1])


def folder(tmp_path, files: dict[str, pd.DataFrame]):
    tmp_path.mkdir(exist_ok=True)
    for name, frame in files.items():
        (tmp_path / name).write_text(text(frame) if "date" in frame else frame.to_csv(index=False))
    return tmp_path


def test_folders(tmp_path):
    one = prices(("A",)).drop(columns="symbol")
    parts = {f"A_{month}.csv": part for month, part in one.groupby(one["date"].dt.strftime("2021-%d"))}
    _, notes = noted(folder(tmp_path / "parts", parts))
    assert "follow each other, so these files may contain one instrument, but count as 20" in warnings_of(notes)
    _, notes = noted(folder(tmp_path / "futures", {"IF2003.csv": one, "IF2006.csv": one}))
    assert not warnings_of(notes)
    _, notes = noted(folder(tmp_path / "copies", {"A.csv": one, "A (1).csv": one}))
    assert "A (1) may be copies of A" in warnings_of(notes)
    _, notes = noted(folder(tmp_path / "fields", {"A.csv": one, "B.csv": one.rename(columns={"close": "adj"})}))
    assert "1 of 2 file(s) have no close, so it is missing there: B.csv" in warnings_of(notes)
    panel, notes = noted(folder(tmp_path / "empty", {"A.csv": one, "B.csv": one.iloc[:0].astype({"date": "M8[ns]"})}))
    assert panel.instruments.tolist() == ["A"]
    assert "leaving out 1 file(s) with a header but no rows: B.csv" in warnings_of(notes)
    days = {f"{day:%Y%m%d}.csv": part.drop(columns="date") for day, part in prices().groupby("date")}
    assert_prices(noted(folder(tmp_path / "days", days))[0], prices())
    mixed = folder(tmp_path / "mixed", {"A.csv": one.assign(symbol="X"), "B.csv": one})
    assert "instruments from column 'symbol'; B.csv: dates from" in noted(mixed)[1][-1].text
    with pytest.raises(DataError, match="It has the folders copies, days, "):
        load_prices(folder(tmp_path, {}))
