"""The rules of trading: deal prices, costs, price limits, round lots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

from qfast.data.expression import fields
from qfast.errors import ConfigError

__all__ = ["LIMITS", "LOTS", "MARKET_FIELDS", "Exchange", "is_number", "is_pair_of_texts"]

LOTS = {"cn": 100, "us": 1, "tw": 1000}  # shares of a round lot by Qlib's region
LIMITS = {"cn": 0.095, "us": None, "tw": 0.1}
MARKET_FIELDS = ("close", "volume", "change", "factor")


@dataclass(frozen=True)
class Exchange:
    """Deal prices and rules of trading.

    Parameters
    ----------
    deal_price : str or (buy, sell)
        A price field or an expression. "close" means "$close".
    limit_threshold : float, None or (buy, sell)
        Number: instruments whose daily change is at least this value cannot be bought, and those whose change is at
        most minus this value cannot be sold. None: no limit. Two expressions: true where buying, and where selling, is
        impossible.
    open_cost, close_cost : float
        Costs of a purchase and of a sale as fractions of their value.
    min_cost : float
        Smallest cost of a trade, in money.
    impact_cost : float
        Market impact: this value times (trade value / value traded that day)^2 is added to the cost ratio.
    trade_unit : int or None
        Shares of a round lot, which applies if the prices have a factor. None: no round lots.

    Raises
    ------
    ConfigError
        A cost is negative, or a price, limit or lot has another type.

    Source: Exchange of pyqlib 0.9.7, qlib/backtest/exchange.py.
    """

    deal_price: str | Sequence[str] = "close"
    limit_threshold: float | Sequence[str] | None = None
    open_cost: float = 0.0015
    close_cost: float = 0.0025
    min_cost: float = 5.0
    impact_cost: float = 0.0
    trade_unit: int | None = 100

    def __post_init__(self) -> None:
        for name in ("open_cost", "close_cost", "min_cost", "impact_cost"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < math.inf:
                raise ConfigError(f"exchange: {name} must be a number of at least 0, got {value!r}.")
        pair = (self.deal_price, self.deal_price) if isinstance(self.deal_price, str) else self.deal_price
        if not is_pair_of_texts(pair):
            raise ConfigError(f"exchange: deal_price must be a field or (buy, sell), got {self.deal_price!r}.")
        limit = self.limit_threshold
        if limit is not None and not is_number(limit) and not is_pair_of_texts(limit):
            raise ConfigError(f"exchange: limit_threshold must be a number or (buy, sell), got {limit!r}.")
        if self.trade_unit is not None and not (is_number(self.trade_unit) and self.trade_unit > 0):
            raise ConfigError(f"exchange: trade_unit must be a positive whole number or None, got {self.trade_unit!r}.")

    def deal_texts(self) -> tuple[str, str]:
        """Expressions of the buying price and of the selling price."""
        pair = (self.deal_price, self.deal_price) if isinstance(self.deal_price, str) else tuple(self.deal_price)
        buy, sell = (text if "$" in text else f"${text}" for text in pair)
        return buy, sell

    def limit_texts(self) -> list[str]:
        """Expressions of the limits; empty if `limit_threshold` is a number or None."""
        if self.limit_threshold is None or isinstance(self.limit_threshold, (int, float)):
            return []
        return list(self.limit_threshold)

    def fields(self) -> list[str]:
        """Price fields that trading needs."""
        texts = [*self.deal_texts(), *self.limit_texts()]
        return list(dict.fromkeys([*MARKET_FIELDS, *(field for text in texts for field in fields(text))]))


def is_number(value: object) -> TypeGuard[float]:
    """True for an int or a float, but not for a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_pair_of_texts(value: object) -> bool:
    """True for a list or tuple of two strings."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(part, str) for part in value)
