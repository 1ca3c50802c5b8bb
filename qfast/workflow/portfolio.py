"""The backtest of a run: what a workflow file says of it, its prices, its files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from qfast.backtest import (
    LIMITS,
    LOTS,
    Backtest,
    Exchange,
    Market,
    TopkDropout,
    backtest,
    check_account,
    equal_weight_return,
)
from qfast.data.factors import evaluate_all
from qfast.data.panel import Panel
from qfast.errors import ConfigError, DataError, shown, suggest
from qfast.registry import parameters

if TYPE_CHECKING:
    from qfast.workflow.folder import RunFolder

__all__ = ["PortfolioPlan", "PortfolioResult", "write_portfolio"]

log = logging.getLogger("qfast")

FOLDER = "portfolio_analysis"
DEFAULT: Mapping[str, Any] = {
    "strategy": {"class": "TopkDropoutStrategy", "kwargs": {"signal": "<PRED>", "topk": 50, "n_drop": 5}},
    "backtest": {
        "account": 1e8, "benchmark": "SH000300",
        "exchange_kwargs": {
            "limit_threshold": 0.095, "deal_price": "close", "open_cost": 0.0005, "close_cost": 0.0015, "min_cost": 5,
        },
    },
}  # fmt: skip
SECTIONS = ("strategy", "backtest", "executor")
BACKTEST_KEYS = ("start_time", "end_time", "account", "benchmark", "exchange_kwargs", "pos_type")
ORDERS = {"method_sell": "bottom", "method_buy": "top"}  # the reference's other choice draws at random
TAKEN_AS_IS = ("codes", "freq", "subscribe_fields", "quote_cls")  # of the exchange: nothing to be said by them here


@dataclass
class PortfolioResult:
    """A backtest, and what has to be said of it."""

    backtest: Backtest
    notes: list[str] = field(default_factory=list)


class PortfolioPlan:
    """A checked `config` of PortAnaRecord.

    Parameters
    ----------
    config : mapping or None
        The reference's: "strategy" (TopkDropoutStrategy), "backtest" and "executor" (SimulatorExecutor, a day a step).

    Raises
    ------
    ConfigError
        Something in it that is not known or not available.
    """

    def __init__(self, config: Mapping[str, Any] | None) -> None:
        given = DEFAULT if config is None else config
        _require_keys("config", given, SECTIONS)
        for name in ("strategy", "backtest"):
            if name not in given:
                raise ConfigError(f"PortAnaRecord: config has no {name!r}.")
        self.strategy = _strategy(given["strategy"])
        _check_executor(given.get("executor"))
        run = given["backtest"]
        _require_keys("backtest", run, BACKTEST_KEYS)
        self.start, self.end = run.get("start_time"), run.get("end_time")
        self.account = run.get("account", 1e9)
        self.benchmark = run.get("benchmark", "SH000300")
        self._exchange = dict(run.get("exchange_kwargs") or {})
        check_account(self.account)
        self.exchange("cn").fields()  # parses its expressions

    def exchange(self, region: str) -> Exchange:
        """The rules of trading; what is not given is the region's."""
        own = {k: v for k, v in self._exchange.items() if k not in TAKEN_AS_IS}
        known = tuple(parameters(Exchange))
        _require_keys("exchange_kwargs", own, known)
        own.setdefault("trade_unit", LOTS.get(region, LOTS["cn"]))
        if own.get("limit_threshold") is None:
            own["limit_threshold"] = LIMITS.get(region, LIMITS["cn"])
        return Exchange(**{k: v for k, v in own.items() if v is not None or k in ("trade_unit", "limit_threshold")})

    def run(self, score: pd.Series, handler: Any, region: str = "cn") -> PortfolioResult:
        """Trade on scores over the handler's prices.

        Parameters
        ----------
        score : Series
            By (datetime, instrument).
        handler : PriceHandler
        region : {"cn", "us", "tw"}

        Raises
        ------
        DataError
            No prices, or none in the time asked for.
        """
        if not hasattr(handler, "quotes"):
            raise DataError(f"the backtest needs prices, and {type(handler).__name__} has none.")
        exchange = self.exchange(region)
        days = score.index.get_level_values("datetime")
        start = days.min() if self.start is None else self.start
        names = [str(name) for name in score.index.get_level_values("instrument").unique()]
        prices = handler.quotes(names, exchange.fields(), start, self.end)
        end = self.end if self.end is not None else _day_after(prices.panel, days.max())
        market, notes = Market.of(prices, exchange, start, end)
        before = prices.panel.datetimes[prices.panel.datetimes < market.days[0]]
        bench, more = self._benchmark(handler, prices.panel, start, end)
        found = backtest(
            score, market, self.strategy, exchange, account=self.account, benchmark=bench,
            day_before=before[-1] if len(before) else None,
        )  # fmt: skip
        return PortfolioResult(found, [*notes, *more])

    def _benchmark(self, handler: Any, panel: Panel, start: Any, end: Any) -> tuple[pd.Series | None, list[str]]:
        """Daily return of the benchmark, and what has to be said of it."""
        if self.benchmark is None or isinstance(self.benchmark, pd.Series):
            return self.benchmark, []
        names = [self.benchmark] if isinstance(self.benchmark, str) else [str(name) for name in self.benchmark]
        try:
            found = handler.quotes(names, ["close"], start, end).panel
        except DataError:
            said = ", ".join(names[:5])
            note = f"the prices have no benchmark {said}: the mean return of all instruments is the benchmark"
            return equal_weight_return(panel), [note]
        change = evaluate_all(["$close / Ref($close, 1) - 1"], found)[:, 0]
        return pd.Series(change).groupby(found.datetimes[found.date_codes]).mean(), []


def _day_after(panel: Panel, day: pd.Timestamp) -> pd.Timestamp:
    later = panel.datetimes[panel.datetimes > day]
    return later[0] if len(later) else day


def _require_keys(where: str, given: Any, known: Sequence[str]) -> None:
    if not isinstance(given, Mapping):
        raise ConfigError(f"PortAnaRecord: {where} must be a mapping, got {shown(given)}.")
    for name in given:
        if name not in known:
            raise ConfigError(f"PortAnaRecord: {where} has no {name!r}; it has {list(known)}." + suggest(name, known))


def _strategy(spec: Any) -> TopkDropout:
    if not isinstance(spec, Mapping) or "class" not in spec:
        raise ConfigError(f"PortAnaRecord: strategy must be a mapping with a class, got {shown(spec)}.")
    name = str(spec["class"]).rsplit(".", 1)[-1]
    if name != "TopkDropoutStrategy":
        raise ConfigError(
            f"PortAnaRecord: strategy {name!r} is not available, only TopkDropoutStrategy. Remedy: that one, or leave "
            "PortAnaRecord out and trade on the scores of the run with a simulation of your own."
        )
    kwargs = dict(spec.get("kwargs") or {})
    signal = kwargs.pop("signal", "<PRED>")
    if not (isinstance(signal, str) and signal == "<PRED>"):
        raise ConfigError(f"PortAnaRecord: the strategy's signal must be <PRED>, got {shown(signal)}.")
    for key, value in ORDERS.items():
        given = kwargs.pop(key, value)
        if given != value:
            raise ConfigError(f"TopkDropoutStrategy: {key} must be {value!r}, got {given!r}; drawing is not available.")
    known = tuple(parameters(TopkDropout))
    _require_keys("TopkDropoutStrategy", kwargs, (*known, "signal", *ORDERS))
    missing = [key for key in ("topk", "n_drop") if key not in kwargs]
    if missing:
        raise ConfigError(f"TopkDropoutStrategy needs {' and '.join(missing)}.")
    return TopkDropout(**kwargs)


def _check_executor(spec: Any) -> None:
    if spec is None:
        return
    name = str(spec.get("class") if isinstance(spec, Mapping) else spec).rsplit(".", 1)[-1]
    if name != "SimulatorExecutor":
        raise ConfigError(f"PortAnaRecord: executor {name!r} is not available, only SimulatorExecutor.")
    step = (spec.get("kwargs") or {}).get("time_per_step", "day") if isinstance(spec, Mapping) else "day"
    if step not in ("day", "1day"):
        raise ConfigError(f"PortAnaRecord: time_per_step {step!r} of the executor is not available, only 'day'.")


def write_portfolio(run_folder: RunFolder, result: PortfolioResult) -> dict[str, float]:
    """Write a backtest's tables under the reference's names into `portfolio_analysis`; its metrics.

    Parameters
    ----------
    run_folder : RunFolder
    result : PortfolioResult
    """
    found = result.backtest
    (run_folder / FOLDER).mkdir(exist_ok=True)
    run_folder.write_frame(f"{FOLDER}/report_normal_1day", found.report)
    run_folder.write_frame(f"{FOLDER}/positions_normal_1day", found.positions)
    run_folder.write_frame(f"{FOLDER}/indicators_normal_1day", found.indicators)
    run_folder.write_frame(f"{FOLDER}/port_analysis_1day", found.risk())
    run_folder.write_frame(f"{FOLDER}/indicator_analysis_1day", found.orders())
    metrics = found.metrics()
    run_folder.write_json(f"{FOLDER}/metrics.json", {k: v if np.isfinite(v) else None for k, v in metrics.items()})
    return metrics
