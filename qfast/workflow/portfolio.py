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
from qfast.dates import normal_date
from qfast.errors import ConfigError, DataError, shown, some, suggest
from qfast.registry import parameters

if TYPE_CHECKING:
    from qfast.workflow.folder import RunFolder

__all__ = ["PortfolioPlan", "PortfolioResult", "write_portfolio"]

log = logging.getLogger("qfast")

FOLDER = "portfolio_analysis"
SAMPLE = 20  # instruments whose prices are looked at beforehand
OPTIONAL_FIELDS = ("volume", "change", "factor")
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
# What is taken only as the reference's default, because another choice would give another result.
FIXED_EXCHANGE: Mapping[str, Sequence[Any]] = {
    "codes": ("all", None), "freq": ("day", "1day", None), "quote_cls": (None,),
}  # fmt: skip
FIXED_EXECUTOR: Mapping[str, Sequence[Any]] = {
    "time_per_step": ("day", "1day"), "trade_type": ("serial",), "settle_type": ("None", None),
    "start_time": (None,), "end_time": (None,), "indicator_config": ({}, None),
}  # fmt: skip
WITHOUT_EFFECT = ("generate_portfolio_metrics", "verbose", "track_data")  # of the executor: what is recorded


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
        _require_fixed("backtest", run, {"pos_type": ("Position",)})
        self.start, self.end = _period(run)
        self.account = run.get("account", 1e9)
        self.benchmark = _benchmark(run.get("benchmark", "SH000300"))
        exchange = run.get("exchange_kwargs") or {}
        _require_keys("exchange_kwargs", exchange, (*parameters(Exchange), *FIXED_EXCHANGE, "subscribe_fields"))
        _require_fixed("exchange_kwargs", exchange, FIXED_EXCHANGE)
        self._exchange = {k: v for k, v in exchange.items() if k in parameters(Exchange)}
        check_account(self.account)
        self.exchange("cn").fields()  # parses its expressions

    def exchange(self, region: str) -> Exchange:
        """The rules of trading; what is not given is the region's."""
        own = dict(self._exchange)
        own.setdefault("trade_unit", LOTS[region])
        if own.get("limit_threshold") is None:
            own["limit_threshold"] = LIMITS[region]
        return Exchange(**{k: v for k, v in own.items() if v is not None or k in ("trade_unit", "limit_threshold")})

    def check_prices(self, handler: Any, region: str = "cn") -> None:
        """Raise a ConfigError if the handler's prices lack a field that is traded at, as far as a few of them tell.

        Parameters
        ----------
        handler : PriceHandler or any other
            One without prices is not looked at.
        region : {"cn", "us", "tw"}
        """
        if not hasattr(handler, "quotes"):
            return
        exchange = self.exchange(region)
        names = [str(name) for name in handler.panel("infer").instruments[:SAMPLE]]
        panel = handler.quotes(names, exchange.fields(), None, None).panel
        there = {str(column).lower() for column in panel.columns("price")}
        missing = [name for name in exchange.fields() if name not in {*there, *OPTIONAL_FIELDS}]
        if missing:
            raise ConfigError(
                f"PortAnaRecord: the prices have no {some(missing)}, which deal_price or limit_threshold "
                f"({shown(exchange.deal_price)}, {shown(exchange.limit_threshold)}) look at."
            )

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
        if self.benchmark is None:
            return None, ["no benchmark was asked for: excess returns and their risk are empty"]
        if isinstance(self.benchmark, pd.Series):
            return self.benchmark, []
        names = [self.benchmark] if isinstance(self.benchmark, str) else [str(name) for name in self.benchmark]
        try:
            found = handler.quotes(names, ["close"], start, end).panel
        except DataError:
            said = ", ".join(names[:5])
            note = f"the prices have no benchmark {said}: the mean return of all instruments is the benchmark"
            return equal_weight_return(panel), [note]
        change = evaluate_all(["$close / Ref($close, 1) - 1"], found)[:, 0]
        there = {str(name).lower() for name in found.instruments}
        missing = [name for name in names if name.lower() not in there]
        notes = [f"the prices have no {some(missing)}: the benchmark is the mean return of the others"]
        return pd.Series(change).groupby(found.datetimes[found.date_codes]).mean(), notes if missing else []


def _day_after(panel: Panel, day: pd.Timestamp) -> pd.Timestamp:
    later = panel.datetimes[panel.datetimes > day]
    return later[0] if len(later) else day


def _period(run: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Start and end of trading."""
    start, end = (_date(name, run.get(name)) for name in ("start_time", "end_time"))
    if start is not None and end is not None and pd.Timestamp(start) > pd.Timestamp(end):
        raise ConfigError(f"PortAnaRecord: backtest: start_time {start} lies after end_time {end}.")
    return start, end


def _date(name: str, value: Any) -> str | None:
    try:
        return normal_date(value)
    except ValueError as error:
        raise ConfigError(f"PortAnaRecord: backtest: {name}: {error}.") from None


def _benchmark(given: Any) -> Any:
    several = isinstance(given, (list, tuple)) and bool(given) and all(isinstance(name, str) for name in given)
    if given is None or isinstance(given, (str, pd.Series)) or several:
        return given
    raise ConfigError(
        f"PortAnaRecord: backtest: benchmark must be an instrument, a list of them or null, got {shown(given)}."
    )


def _require_fixed(where: str, given: Mapping[str, Any], allowed: Mapping[str, Sequence[Any]]) -> None:
    """Refuse what would give other results in the reference and is not simulated here."""
    for name, values in allowed.items():
        if name in given and given[name] not in values:
            raise ConfigError(
                f"PortAnaRecord: {where}: {name} must be {values[0]!r}, got {shown(given[name])}; anything else is not "
                "available. Remedy: leave it out, or --engine qlib."
            )


def _mapping(where: str, given: Any) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"PortAnaRecord: {where} must be a mapping, got {shown(given)}.")
    return given


def _require_keys(where: str, given: Any, known: Sequence[str]) -> None:
    for name in _mapping(where, given):
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
    kwargs = dict(_mapping("strategy: kwargs", spec.get("kwargs") or {}))
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
    kwargs = (spec.get("kwargs") if isinstance(spec, Mapping) else None) or {}
    _require_keys("executor: kwargs", kwargs, (*FIXED_EXECUTOR, *WITHOUT_EFFECT))
    _require_fixed("executor", kwargs, FIXED_EXECUTOR)


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
