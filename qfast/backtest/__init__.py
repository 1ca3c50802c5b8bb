"""A portfolio that follows scores: Qlib's daily TopkDropout simulation, over arrays of all instruments.

Every evening the best instruments that are not held replace the worst that are; orders of a day are filled at that
day's prices, with costs, price limits, suspensions and round lots. The state is one array per quantity over all
instruments; only a day's few orders are gone through one by one, because each of them changes the cash.
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
