"""Simulate a portfolio that trades on daily scores, as Qlib's TopkDropout backtest does.

The scores of a day determine the orders of the next: the best instruments outside the portfolio replace the worst
inside. Orders are filled at the prices of their day, with costs, price limits, suspensions and round lots.

The state of the simulation is one array per quantity over all instruments. Only the few orders of a day are processed
one by one, because each of them changes the cash.
"""

from qfast.backtest.exchange import LIMITS, LOTS, MARKET_FIELDS, Exchange
from qfast.backtest.market import Market, equal_weight_return
from qfast.backtest.result import YEAR, Backtest, risk_analysis
from qfast.backtest.simulation import backtest, check_account
from qfast.backtest.strategy import TopkDropout

__all__ = [
    "LIMITS",
    "LOTS",
    "MARKET_FIELDS",
    "YEAR",
    "Backtest",
    "Exchange",
    "Market",
    "TopkDropout",
    "backtest",
    "check_account",
    "equal_weight_return",
    "risk_analysis",
]
