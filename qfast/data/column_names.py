"""Names of columns: which ones contain dates, times of day, instruments and prices."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = [
    "ADJUSTED",
    "COMPANY_NAMES",
    "DATE_NAMES",
    "DATE_PARTS",
    "FIELD_NAMES",
    "INSTRUMENT_NAMES",
    "OTHER_FIELDS",
    "PRICE_FIELDS",
    "TIME_NAMES",
    "cell_text",
    "field_names",
    "find_column",
    "is_field",
    "is_index_name",
    "plain_name",
    "role_name",
]

PRICE_FIELDS = ("open", "high", "low", "close", "volume", "vwap")
OTHER_FIELDS = ("factor", "change", "amount", "money", "turnover")
DATE_NAMES = (
    *("datetime", "date", "timestamp", "trade_date", "tradedate", "trading_date", "date_time", "time", "day"),
    *("日期", "交易日期", "交易日", "日期时间", "时间"),
    *("trading_day", "tradingday", "price_date", "quote_date", "as_of_date", "gmt_time", "local_time"),
    *("datadate", "dlycaldt", "caldt", "trddt"),  # WRDS and CSMAR
    *("open_time", "opentime", "window_start", "candle_begin_time", "bar_start"),  # exchanges of cryptocurrencies
    *("trade_time", "交易时间", "trade_date_time", "日付", "날짜", "일자"),
)
TIME_NAMES = ("time", "trade_time", "tradetime", "bar_time", "时间", "交易时间")
DATE_PARTS = (("year", "yr", "年"), ("month", "mon", "月"), ("day", "日"))
INSTRUMENT_NAMES = (
    *("symbol", "code", "ticker", "instrument", "ts_code", "stock_code", "sec_code", "order_book_id", "wind_code"),
    *("secid", "security", "stock", "asset", "代码", "股票代码", "证券代码", "合约代码", "标的代码"),
    *("tic", "ric", "act_symbol", "contract", "pair", "product_id", "bbg_ticker", "stkcd", "secucode", "stock_id"),
    *("代碼", "股票代號", "證券代號", "證券代碼", "コード", "銘柄コード", "종목코드"),
    *("permno", "isin", "figi", "cusip", "sedol", "gvkey", "sid", "证券内码"),
)
COMPANY_NAMES = (
    *("name", "company", "company_name", "名称", "股票名称", "证券名称", "股票简称", "证券简称", "简称"),
    *("證券名稱", "銘柄名", "종목명", "comnam", "conm"),
)
FIELD_NAMES = {
    "vol": "volume",
    "vol.": "volume",
    "average_price": "vwap",
    "avg_price": "vwap",
    "weighted_average": "vwap",
    "volume_weighted_average_price": "vwap",
    **{f"{field}_price": field for field in ("open", "high", "low", "close")},
    **{f"price_{field}": field for field in ("open", "high", "low", "close")},
    **{f"px_{field}": field for field in ("open", "high", "low", "close", "volume", "vwap")},
    **{f"{field}price": field for field in ("open", "high", "low", "close")},
    "closing_price": "close",
    "last_price": "close",
    "price_last": "close",
    "px_last": "close",
    "close/last": "close",
    "volume_traded": "volume",
    "total_volume": "volume",
    "openprc": "open",  # CRSP: daily stock file
    "askhi": "high",
    "bidlo": "low",
    "prc": "close",
    "dlyopen": "open",
    "dlyhigh": "high",
    "dlylow": "low",
    "dlyprc": "close",
    "dlyvol": "volume",
    "prcod": "open",  # Compustat
    "prchd": "high",
    "prcld": "low",
    "prccd": "close",
    "cshtrd": "volume",
    "opnprc": "open",  # CSMAR
    "hiprc": "high",
    "loprc": "low",
    "clsprc": "close",
    "dnshrtrd": "volume",
    "开盘": "open",
    "开盘价": "open",
    "今开": "open",
    "最高": "high",
    "最高价": "high",
    "最低": "low",
    "最低价": "low",
    "收盘": "close",
    "收盘价": "close",
    "成交量": "volume",
    "均价": "vwap",
    "成交均价": "vwap",
    "成交额": "amount",
    "成交金额": "amount",
    "换手率": "turnover",
    "開盤": "open",
    "開盤價": "open",
    "最高價": "high",
    "最低價": "low",
    "收盤": "close",
    "收盤價": "close",
    "成交股數": "volume",
    "成交金額": "amount",
    "始値": "open",
    "高値": "high",
    "安値": "low",
    "終値": "close",
    "出来高": "volume",
    "시가": "open",
    "고가": "high",
    "저가": "low",
    "종가": "close",
    "거래량": "volume",
}
GENERAL_CLOSE = ("price", "last", "last_trade")  # the close only next to open, high and low
UNITS = (
    *("元", "股", "手", "万股", "万元", "千元", "元/股", "张", "份", "点", "不复权", "前复权", "后复权"),
    *("usd", "us$", "$", "eur", "€", "gbp", "gbx", "cny", "rmb", "hkd", "inr", "jpy", "shares", "lots", "local"),
)
ADJUSTED = ("adj_close", "adjclose", "adj._close", "adjusted_close", "adjustedclose", "close_adj", "close_adjusted")


INVISIBLE = " \t\r\n\f\v\u00a0\u2007\u202f\u3000\ufeff\u200b\u200e\u200f"


def plain_name(column: object) -> str:
    """Name of a column as a price field: without case, $, <>, surrounding blanks and byte-order mark."""
    return str(column).strip().lstrip("\ufeff$<").rstrip(">").strip().lower()


def role_name(column: object) -> str:
    """Name of a column for comparison with the lists of names: `plain_name` with _ for blanks and hyphens.

    >>> role_name(" Trade-Date")
    'trade_date'
    """
    return plain_name(column).replace(" ", "_").replace("-", "_")


def _field_of(column: object) -> str | None:
    """The field that another name means: "close" for "PX_LAST", "4. close" and "收盘价(元)". None for other names."""
    name = re.sub(r"^\d+[.)]\s*", "", plain_name(column))
    unit = re.fullmatch(r"(.+?)\s*[(（\[]([^()（）\[\]]*)[)）\]]", name)
    if unit is not None and unit[2].strip().lower() in UNITS:
        name = unit[1]
    name = name.replace(" ", "_").replace("-", "_")
    return name if name in PRICE_FIELDS else FIELD_NAMES.get(name)


def is_field(column: object) -> bool:
    """True if a name means a field of prices, in the spelling of any vendor.

    >>> is_field("PX_LAST"), is_field("最高价(元)"), is_field("pe")
    (True, True, False)
    """
    return _field_of(column) is not None


def field_names(columns: Iterable[object]) -> list[str]:
    """Plain names of columns, with the names of vendors translated to those of the fields.

    A column that has the field's own name takes precedence, then the first one. "price" and "last" are the close if
    there are open, high and low but no close.

    >>> field_names(["PX_LAST", "1. open", "vol", "Volume", "pe"])
    ['close', 'open', 'vol', 'volume', 'pe']
    """
    plain = [plain_name(column) for column in columns]
    used = set(plain)
    for position, name in enumerate(plain):
        field = _field_of(name)
        if field is not None and field not in used:
            plain[position] = field
            used.add(field)
    if "close" not in used and {"open", "high", "low"} <= used:
        general = next((name for name in GENERAL_CLOSE if name in plain), None)
        if general is not None:
            plain[plain.index(general)] = "close"
    return plain


def find_column(columns: Iterable[str], accepted: Sequence[str]) -> str | None:
    """The column with the first accepted name; None if there is none."""
    by_role = {role_name(c): c for c in reversed(list(columns))}
    return next((by_role[name] for name in accepted if name in by_role), None)


def is_index_name(column: str) -> bool:
    """True for names that pandas gives to an index that was written or reset without a name."""
    name = plain_name(column)
    return name in ("", "index", "level_0", "level_1") or name.startswith("unnamed:")


def cell_text(value: object) -> str:
    """Text of a cell without blanks, invisible characters, and what spreadsheets add to keep text: ="1" and '1.

    >>> cell_text('="600000"'), cell_text("'600000"), cell_text(b"AAPL ")
    ('600000', '600000', 'AAPL')
    """
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    text = text.strip(INVISIBLE)
    formula = re.fullmatch(r'="(.*)"', text)
    return (formula[1] if formula is not None else text.removeprefix("'")).strip(INVISIBLE)
