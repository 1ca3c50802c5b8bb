"""Names of columns: which ones contain dates, times of day, instruments and prices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = [
    "ADJUSTED",
    "COMPANY_NAMES",
    "DATE_NAMES",
    "FIELD_NAMES",
    "INSTRUMENT_NAMES",
    "OTHER_FIELDS",
    "PRICE_FIELDS",
    "TIME_NAMES",
    "find_column",
    "is_index_name",
    "plain_name",
    "role_name",
]

PRICE_FIELDS = ("open", "high", "low", "close", "volume", "vwap")
OTHER_FIELDS = ("factor", "change", "amount", "money", "turnover")
DATE_NAMES = (
    *("datetime", "date", "timestamp", "trade_date", "tradedate", "trading_date", "date_time", "time", "day"),
    *("日期", "交易日期", "交易日", "日期时间", "时间"),
)
TIME_NAMES = ("time", "trade_time", "tradetime", "bar_time", "时间", "交易时间")
INSTRUMENT_NAMES = (
    *("symbol", "code", "ticker", "instrument", "ts_code", "stock_code", "sec_code", "order_book_id", "wind_code"),
    *("secid", "security", "stock", "asset", "代码", "股票代码", "证券代码", "合约代码", "标的代码"),
)
COMPANY_NAMES = ("name", "company", "company_name", "名称", "股票名称", "证券名称", "股票简称", "证券简称", "简称")
FIELD_NAMES = {
    "vol": "volume",
    "vol.": "volume",
    "average_price": "vwap",
    "open_price": "open",
    "high_price": "high",
    "low_price": "low",
    "close_price": "close",
    "closing_price": "close",
    "开盘": "open",
    "开盘价": "open",
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
}
ADJUSTED = ("adj_close", "adjclose", "adj._close", "adjusted_close", "adjustedclose", "close_adj", "close_adjusted")


def plain_name(column: object) -> str:
    """Name of a column as a price field: without case, $, <>, surrounding blanks and byte-order mark."""
    return str(column).strip().lstrip("\ufeff$<").rstrip(">").strip().lower()


def role_name(column: object) -> str:
    """Name of a column for comparison with the lists of names: `plain_name` with _ for blanks and hyphens.

    >>> role_name(" Trade-Date")
    'trade_date'
    """
    return plain_name(column).replace(" ", "_").replace("-", "_")


def find_column(columns: Iterable[str], accepted: Sequence[str]) -> str | None:
    """The column with the first accepted name; None if there is none."""
    by_role = {role_name(c): c for c in reversed(list(columns))}
    return next((by_role[name] for name in accepted if name in by_role), None)


def is_index_name(column: str) -> bool:
    """True for names that pandas gives to an index that was written or reset without a name."""
    name = plain_name(column)
    return name in ("", "index", "level_0", "level_1") or name.startswith("unnamed:")
