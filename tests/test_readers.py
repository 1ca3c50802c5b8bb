"""Tables as vendors and spreadsheets write them: dates, names, numbers, shapes and encodings."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import zipfile

import numpy as np
import pandas as pd
import pytest

from qfast import cli, predict
from qfast.data import FactorHandler, ReadOptions, TSDatasetH, load_prices, synthetic
from qfast.data.date_formats import DateColumn, parse_dates, read_dates, times_of_day
from qfast.data.panel import Panel
from qfast.data.source_notes import collected_notes
from qfast.dates import starts_after
from qfast.errors import ConfigError, DataError
from qfast.models import ts
from qfast.workflow.dataset import _factor_frame
from support.stores import write_store
from support.workflows import write_case

DAYS = pd.bdate_range("2020-01-02", periods=30)


def dates_of(*columns: list[object], **options: object) -> list[str]:
    named = [DateColumn(pd.Series(values, name="date"), f"{i}.csv") for i, values in enumerate(columns)]
    return [str(stamp) for column in read_dates(named, **options).columns for stamp in column]


# ---------------------------------------------------------------- dates
@pytest.mark.parametrize(
    "style",
    [
        *("%Y-%m-%d", "%Y%m%d", "%Y/%m/%d", "%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%b-%Y", "%b %d, %Y", "%d/%m/%y"),
        *("%B %d, %Y", "%G-W%V-%u", "%Y-%j", "%Y年%m月%d日", "%Y-%m-%dT%H:%M:%S", "%d/%m/%Y %H:%M", "%d%m%Y"),
    ],
)
def test_one_format_is_inferred_from_all_values(style):
    assert parse_dates(pd.Series(DAYS.strftime(style)), "x").tolist() == DAYS.tolist()


@pytest.mark.parametrize(
    ("values", "first"),
    [
        ([20200102], "2020-01-02"),
        ([1577923200], "2020-01-02"),
        ([1577923200000], "2020-01-02"),
        ([1577923200000000], "2020-01-02"),
        ([1577923200000000000], "2020-01-02"),
        ([43832], "2020-01-02"),
        ([43832.6666667], "2020-01-02 16:00"),
        (["43832.0"], "2020-01-02"),
        ([31122019], "2019-12-31"),
        ([202001020930], "2020-01-02 09:30"),
        (pd.period_range("2020-01-02", periods=1, freq="D"), "2020-01-02"),
        (["02-Jan-2020 4:00 PM"], "2020-01-02 16:00"),
    ],
)
def test_numbers_and_other_types_of_dates(values, first):
    assert parse_dates(pd.Series(values), "x")[0] == pd.Timestamp(first)


def test_a_later_file_decides_for_the_whole_source():
    assert dates_of(["01/06/2020"], ["15/06/2020"]) == ["2020-06-01 00:00:00", "2020-06-15 00:00:00"]
    assert dates_of(["01/06/2020"], ["06/15/2020"]) == ["2020-01-06 00:00:00", "2020-06-15 00:00:00"]


def test_ambiguous_dates_are_refused_with_all_readings():
    values = ["01/06/2020", "02/06/2020"]
    message = r"0\.csv: the dates of column 'date' fit 2 formats. '01/06/2020' in row 0: '%d/%m/%Y' reads 2020-06-01"
    with pytest.raises(DataError, match=rf"{message}.*'%m/%d/%Y' reads 2020-01-06 .*Remedy: --date-format '%d/%m/%Y'"):
        dates_of(values)
    with pytest.raises(DataError, match=r"fit 3 formats.*%y/%m/%d"):
        dates_of(["01/02/20", "01/03/20"])
    assert dates_of(values, date_format="%m/%d/%Y") == ["2020-01-06 00:00:00", "2020-02-06 00:00:00"]
    assert dates_of(["11/11/2020"]) == ["2020-11-11 00:00:00"], "both readings are equal"


def test_years_in_the_future_are_no_reading():
    assert dates_of(["02/01/20", "31/01/20"])[1] == "2020-01-31 00:00:00"
    with pytest.raises(DataError, match="one format only, with implausible years"):
        dates_of(["31/12/60", "30/12/61"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            [["2020-01-02"], ["15/06/2020"]],
            r"1\.csv: row 0 does not have the format .*'%d/%m/%Y', but the others fit ISO",
        ),
        ([["2020-01-02", "soon"]], "row 1 is not a date: 'soon' in column 'date'"),
        ([["2020-W01"]], r"row 0 is not a date: '2020-W01'.*--date-format"),
        ([[2020]], "row 0 is not a date: '2020'"),
        ([["2020-01-02", None]], r"0\.csv: row 1 has no date \(column 'date'\)"),
        (
            [["2020-01-02 09:30"], ["2020-01-02 09:30+01:00"]],
            "do not have one time zone.*'date' of 0.csv",
        ),
        ([["2020-01-02 09:30+09:00", "2020-01-02 09:30+01:00"]], "do not have one time zone.*--freq day"),
    ],
)
def test_dates_refused(columns, message):
    with pytest.raises(DataError, match=message):
        dates_of(*columns)


def test_time_zones():
    new_york = ["2020-01-02 00:00:00-05:00", "2020-07-02 00:00:00-04:00"]
    assert dates_of(new_york) == ["2020-01-02 00:00:00", "2020-07-02 00:00:00"], "midnights are dates"
    bars = ["2020-01-02 09:30:00-05:00", "2020-07-02 09:30:00-04:00"]
    assert dates_of(bars) == ["2020-01-02 14:30:00+00:00", "2020-07-02 13:30:00+00:00"]
    assert dates_of(["2020-01-02"], ["2020-01-03+00:00"]) == ["2020-01-02 00:00:00", "2020-01-03 00:00:00"]
    assert dates_of(["2020-01-02T00:00:00Z"]) == ["2020-01-02 00:00:00+00:00"]
    assert dates_of(["13/06/2020 16:00:00+05:30"]) == ["2020-06-13 16:00:00+05:30"]


def test_times_of_day_have_many_spellings():
    spellings = pd.Index(["16:00", "4:00 PM", "16:00:00", "1600", "160000", "4 pm"])
    hours = (times_of_day(spellings) / pd.Timedelta(hours=1)).tolist()
    assert hours[:5] == [16.0] * 5
    assert np.isnan(hours[5])


def test_a_span_that_starts_within_its_end_date():
    assert not starts_after("2020-01-02 10:00", "2020-01-02")
    assert starts_after("2020-01-03", "2020-01-02")
    assert not starts_after("2020-01-02T00:00:00+05:30", "2020-01-02")
    assert starts_after("2020-01-03T00:00:00+05:30", "2020-01-02T23:00:00")


def test_text_dates_in_the_index_of_a_frame():
    index = pd.MultiIndex.from_product([["13/01/2020", "02/01/2020"], ["A"]], names=["datetime", "instrument"])
    assert Panel.from_frame(pd.DataFrame({"x": [1.0, 2.0]}, index)).datetimes[0] == pd.Timestamp("2020-01-02")
    ambiguous = index.set_levels(["03/01/2020", "02/01/2020"], level=0)
    with pytest.raises(DataError, match=r"fit 2 formats.*pandas\.to_datetime\(\.\.\., format"):
        Panel.from_frame(pd.DataFrame({"x": [1.0, 2.0]}, ambiguous))


# ---------------------------------------------------------------- files
HEADER = "date,symbol,close,volume"
ROWS = ["2020-01-02,A,1.5,100", "2020-01-03,A,2.5,200"]


def read(tmp_path, text: str | bytes, name: str = "p.csv", **options: object):
    (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return load_prices(tmp_path / name, read_options=options)


PLAIN = "\n".join([HEADER, *ROWS]) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        "\ufeff" + PLAIN,
        PLAIN.replace("\n", "\r\n"),
        PLAIN.encode("utf-16"),
        PLAIN.encode("utf-16-le"),
        PLAIN.replace(",", ";"),
        PLAIN.replace(",", "\t"),
        PLAIN.replace(",", "|"),
        PLAIN.replace(",", ";").replace(".", ","),
        "sep=;\n" + PLAIN.replace(",", ";"),
        "\n".join([HEADER, *(f"{row}," for row in ROWS)]),
        "\n".join([f"{HEADER},", *(f"{row}," for row in ROWS)]),
        "\n".join([HEADER, ROWS[0], "", ",,,", ROWS[1], ""]),
        "\n".join([HEADER, ROWS[0], HEADER, ROWS[1]]),
        "\n".join([HEADER, *ROWS, "Total,,4,300"]),
        "\n".join(["Prices of A", "", HEADER, *ROWS]),
        "\n".join([f",{HEADER}", *(f"{i},{row}" for i, row in enumerate(ROWS))]),
        "\n".join([HEADER.upper(), *ROWS]),
        "\n".join(["<DATE>,<TICKER>,<CLOSE>,<VOL>", *ROWS]),
        "\n".join(["日期,代码,收盘,成交量", *ROWS]),
        PLAIN.replace("1.5", '"$1.5"').replace("2.5", '"$2.5"'),
        PLAIN.replace("100", '"0.1K"').replace("200", '"0.2K"'),
        PLAIN.replace("100", '"0,00,100"').replace("200", '"0,000,200"'),  # thousands as in India, and elsewhere
        gzip.compress(PLAIN.encode(), mtime=0),  # the same name of the test at every start
        bz2.compress(PLAIN.encode()),
        lzma.compress(PLAIN.encode()),
    ],
)
def test_shapes_that_are_read_without_options(tmp_path, text):
    panel = read(tmp_path, text)
    assert panel.instruments.tolist() == ["A"]
    assert panel.datetimes.tolist() == [pd.Timestamp("2020-01-02"), pd.Timestamp("2020-01-03")]
    assert panel.column("close").tolist() == [1.5, 2.5]
    assert panel.column("volume").tolist() == [100, 200]
    assert set(panel.columns("price")) == {"close", "volume"}


def test_zip_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.csv.zip", "w") as archive:
        archive.writestr("p.csv", PLAIN)
    assert load_prices(tmp_path / "p.csv.zip").n_rows == 2
    with zipfile.ZipFile(tmp_path / "two.csv.zip", "w") as archive:
        archive.writestr("a.csv", PLAIN)
        archive.writestr("b.csv", PLAIN)
    with pytest.raises(DataError, match="must contain one file, got 2"):
        load_prices(tmp_path / "two.csv.zip")


def test_headers_of_two_and_three_lines(tmp_path):
    three = "Price,close,close,volume,volume\nTicker,A,B,A,B\nDate,,,,\n2020-01-02,1,2,3,4\n2020-01-03,5,6,7,8\n"
    panel = read(tmp_path, three)
    assert panel.instruments.tolist() == ["A", "B"]
    assert panel.column("close").tolist() == [1, 5, 2, 6]
    frame = pd.read_csv(tmp_path / "p.csv", header=[0, 1], index_col=0)
    assert load_prices(frame).content_hash() == panel.content_hash()
    swapped = frame.swaplevel(axis=1)
    swapped.index = pd.DatetimeIndex(swapped.index)
    assert load_prices(swapped).content_hash() == panel.content_hash()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "date,symbol,close,name\n2020-01-02,A,1,平安\n".encode("gb18030"),
            "line 2 contains '平安' as gb18030",
        ),
        ("date,symbol,close,Close\n2020-01-02,A,1,2\n", "column 'Close' occurs twice"),
        ("2020-01-02,A,1,2\n2020-01-03,A,1,2\n", "has no header: its first line is '2020-01-02,A,1,2'"),
        ("date,symbol,close\n2020-01-02,A,1,2\n", "row 0 has 4 columns, but the header has 3"),
        ('date,symbol,close\n2020-01-02,A,"1,234"\n', r"'1,234' in row 0 may be 1234 or 1\.234.*--decimal"),
        ("date;symbol;close;open\n2020-01-02;A;1,5;1.25\n", "column 'close' has decimal commas, but other columns"),
        ("date,symbol,close\n2020-01-02,A,cheap\n", "column 'close' must be numeric, but row 0 is 'cheap'"),
        ("date,symbol,price\n2020-01-02,A,x\n", "no price column"),
    ],
)
def test_files_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, text)


def test_options_decide(tmp_path):
    name = "date,symbol,close,name\n2020-01-02,A,1,平安\n".encode("gb18030")
    assert read(tmp_path, name, encoding="gb18030").n_rows == 1
    thousands = 'date,symbol,close\n2020-01-02,A,"1,234"\n'
    assert read(tmp_path, thousands, decimal=".").column("close").tolist() == [1234]
    assert read(tmp_path, thousands, decimal=",").column("close").tolist() == pytest.approx([1.234])
    assert read(tmp_path, PLAIN.replace(",", "~"), separator="~").n_rows == 2
    other = "date,symbol,close,other\n2020-01-02,A,1,X\n"
    assert read(tmp_path, other, instrument_column="Other").instruments.tolist() == ["X"]
    with pytest.raises(DataError, match=r"no column 'othr' \(--instrument-column\).* Did you mean 'other'"):
        read(tmp_path, other, instrument_column="othr")
    short = "date,symbol,close\n01/06/2020,A,1\n02/06/2020,A,2\n"
    assert read(tmp_path, short, date_format="%m/%d/%Y").datetimes[0] == pd.Timestamp("2020-01-06")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"date_fromat": "iso"}, "read_options has no 'date_fromat'.* Did you mean 'date_format'"),
        ({"decimal": ";"}, "--decimal must be '.' or ','"),
        ({"encoding": "utf-99"}, "--encoding must be a text encoding"),
        ({"date_format": "exel"}, "--date-format must be a format.* Did you mean 'excel'"),
        ({"adjust": "yes"}, "--adjust must be a bool"),
        (5, "read_options must be a mapping or ReadOptions, got int"),
    ],
)
def test_options_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ReadOptions.of(options)


# ---------------------------------------------------------------- instruments
def test_names_of_files_keep_their_dots(tmp_path):
    for name in ("BRK.A.csv", "BRK.B.csv", "600000.SH.csv"):
        (tmp_path / name).write_text("date,close,name\n2020-01-02,1,Company\n")
    (tmp_path / "AAPL.csv.gz").write_bytes(gzip.compress(b"date,close\n2020-01-02,1\n"))
    assert load_prices(tmp_path).instruments.tolist() == ["600000.SH", "AAPL", "BRK.A", "BRK.B"]


def test_symbols_take_precedence_over_names(caplog):
    table = pd.DataFrame({"name": ["Old Inc", "New Inc"], "date": DAYS[:2], "symbol": "A", "close": [1.0, 2.0]})
    assert load_prices(table).instruments.tolist() == ["A"]
    with caplog.at_level(logging.WARNING, logger="qfast"):
        assert len(load_prices(table.drop(columns="symbol")).instruments) == 2
    assert "the instruments are the names in column 'name'" in caplog.text
    indexed = table.rename(columns={"symbol": "instrument"}).assign(symbol="Z").set_index(["date", "instrument"])
    assert load_prices(indexed).instruments.tolist() == ["A"], "index levels take precedence over columns"


def test_codes_that_were_numbers():
    table = pd.DataFrame({"date": DAYS[:1].repeat(2), "symbol": [1.0, 600000.0], "close": [1.0, 2.0]})
    with collected_notes() as notes:
        assert load_prices(table).instruments.tolist() == ["1", "600000"]
    assert any(n.warning and "unequal length" in n.text and "'000001'" in n.text for n in notes)


def test_stores_with_byte_order_marks_and_utf_16(tmp_path):
    root = write_store(tmp_path / "store")
    before = load_prices(root, instruments="all")
    for number, file in enumerate((root / "calendars" / "day.txt", root / "instruments" / "all.txt")):
        text = file.read_text()
        file.write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig" if number else "utf-16"))
    assert load_prices(root, instruments="all").content_hash() == before.content_hash()
    (root / "instruments" / "all.txt").write_bytes(b"AAA\t2020-01-01\t2020-02-01\xff\n")
    with pytest.raises(DataError, match=r"all\.txt is not UTF-8 text: line 1"):
        load_prices(root)


# ---------------------------------------------------------------- stray rows and columns
def test_several_times_on_a_day_are_reported_and_freq_day_repairs_them():
    live = pd.DataFrame({"date": [*DAYS[:3], DAYS[2] + pd.Timedelta("16:00:01")] * 2, "symbol": list("AAAABBBB")})
    live["close"] = np.arange(8.0)
    with collected_notes() as notes:
        assert load_prices(live).n_rows == 8
    assert any(
        n.warning and "1 of 3 days have rows at several times" in n.text and "--freq day" in n.text for n in notes
    )
    panel = load_prices(live, freq="day")
    assert panel.datetimes.tolist() == DAYS[:3].tolist()
    assert panel.column("close").tolist() == [0, 1, 3, 4, 5, 7]
    closes = live.iloc[[0, 1, 2, 4, 5, 6]].copy()
    closes["date"] += pd.to_timedelta(np.where(closes["symbol"] == "A", 15, 16), unit="h")
    with collected_notes() as notes:
        load_prices(closes)
    assert any("3 of 3 days have rows at several times" in n.text for n in notes)
    assert load_prices(closes, read_options={"freq": "day"}).n_rows == 6


def test_intraday_bars_are_not_reported():
    stamps = pd.date_range("2020-01-02 09:30", periods=60, freq="5min")
    with collected_notes() as notes:
        load_prices(pd.DataFrame({"date": stamps, "symbol": "A", "close": 1.0}))
    assert not [n for n in notes if n.warning]


def test_date_and_time_in_two_columns(tmp_path):
    text = "Date,Time,symbol,close\n2020-01-02,09:30,A,1\n2020-01-02,10:00,A,2\n"
    with collected_notes() as notes:
        panel = read(tmp_path, text)
    assert panel.datetimes.tolist() == [pd.Timestamp("2020-01-02 09:30"), pd.Timestamp("2020-01-02 10:00")]
    assert any("dates from columns 'Date' and 'Time'" in n.text for n in notes)
    complete = text.replace("2020-01-02,", "2020-01-02 09:30,", 1).replace("2020-01-02,", "2020-01-02 10:00,")
    assert read(tmp_path, complete).content_hash() == panel.content_hash(), "the dates have times already"


def test_index_columns_and_unnamed_dates(tmp_path):
    table = pd.DataFrame({"date": DAYS, "symbol": "A", "close": 1.0})
    table.to_csv(tmp_path / "p.csv")
    with collected_notes() as notes:
        assert load_prices(tmp_path / "p.csv").columns("price") == ("close",)
    assert any("leaving out 'Unnamed: 0'" in n.text for n in notes)
    table.set_index("date").rename_axis(None).to_csv(tmp_path / "p.csv")
    assert load_prices(tmp_path / "p.csv").datetimes.tolist() == DAYS.tolist()
    kept = table.set_index(["date", "symbol"], drop=False)
    assert load_prices(kept).content_hash() == load_prices(table).content_hash()


def test_adjusted_close():
    table = pd.DataFrame({"date": DAYS[:3], "symbol": "A", "open": [8.0, 2, 2], "close": [8.0, 2, 2], "volume": 1.0})
    table["Adj Close"] = [2.0, 2, 2]
    with collected_notes() as notes:
        load_prices(table)
    assert any("not adjusted for splits" in n.text and "--adjust" in n.text for n in notes)
    panel = load_prices(table, read_options={"adjust": True})
    assert panel.column("close").tolist() == [2, 2, 2]
    assert panel.column("open").tolist() == [2, 2, 2]
    assert panel.column("volume").tolist() == [4, 1, 1]
    assert panel.column("factor").tolist() == [0.25, 1, 1]
    with pytest.raises(DataError, match="has no column for --adjust"):
        load_prices(table.drop(columns="Adj Close"), read_options={"adjust": True})


def test_the_log_states_how_a_source_was_read():
    table = pd.DataFrame({"Date": ["13/01/2020", "14/01/2020"], "Ticker": "A", "close": [1.0, 2.0]})
    with collected_notes() as notes:
        load_prices(table)
    text = "the frame: 2 rows of 1 instrument(s), 2020-01-13 to 2020-01-14; dates from column 'Date' (%d/%m/%Y)"
    assert any(n.text.startswith(text) and n.text.endswith("instruments from column 'Ticker'") for n in notes)


def test_factor_tables_use_the_same_readers(tmp_path):
    table = pd.DataFrame({"Date": ["13/01/2020", "02/01/2020"], "Symbol": ["A", "A"], "f": [1.0, 2.0], "label": 0.0})
    table.to_csv(tmp_path / "f.csv")
    frame = _factor_frame(tmp_path / "f.csv", ReadOptions())
    assert list(frame.columns) == [("feature", "f"), ("label", "label")]
    assert sorted(frame.index.get_level_values("datetime")) == [pd.Timestamp("2020-01-02"), pd.Timestamp("2020-01-13")]


def test_options_of_a_run_are_recorded_and_used_again(tmp_path):
    config, data = write_case(tmp_path)
    table = pd.read_csv(data, parse_dates=["datetime"])
    table["datetime"] = table["datetime"].dt.strftime("%d/%m/%Y")
    table.to_csv(data)
    folder = tmp_path / "run"
    arguments = ["run", str(config), "--data", str(data), "-o", str(folder), "--set", "task.model.kwargs.n_epochs=1"]
    assert cli.main([*arguments, "--date-format", "%d/%m/%Y", "--seed", "1", "-q"]) == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["data"]["read_options"] == {"date_format": "%d/%m/%Y"}
    assert any("dates from column 'datetime' (%d/%m/%Y)" in text for text in manifest["data"]["reading"])
    newest = table.iloc[-12:]  # one day, 10/03/2020, which fits two formats
    newest.to_csv(data, index=False)
    assert predict(folder, data).index[0][0] == pd.Timestamp("2020-03-10")
    with pytest.raises(DataError, match="does not fit --date-format '%Y-%m-%d'"):
        predict(folder, data, read_options={"date_format": "%Y-%m-%d"})


def test_attention_and_predictions_of_zoned_times():
    prices = synthetic.prices(4, 40, seed=0, late=0, delisted=0, holes=0)
    zoned = prices.rename(index=lambda day: day.tz_localize("Asia/Kolkata"), level="datetime")
    features = (["$close/Ref($close, 1) - 1", "EMA($close, 3)/$close"], ["a", "b"])
    handler = FactorHandler(features, data=zoned, learn_processors=[], infer_processors=["Fillna"])
    days = handler.panel("infer").datetimes
    segments = {
        "train": (f"{days[0].isoformat()}", str(days[-1].date())),
        "test": (days[-5].isoformat(), days[-1].date()),
    }
    dataset = TSDatasetH(handler=handler, segments=segments, step_len=3)
    model = ts.GATs(d_feat=2, hidden_size=4, num_layers=1, n_epochs=1, seed=0).fit(dataset)
    by_day = model.attention(dataset, str(days[-2].date()), top=1)
    assert len(by_day) == 4
    pd.testing.assert_frame_equal(by_day, model.attention(dataset, days[-2].tz_convert("UTC"), top=1))
