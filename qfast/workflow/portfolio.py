"""The portfolio backtest of a run: its configuration in a workflow file, its prices, its files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

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
from qfast.data.protocols import Handler, PricedHandler
from qfast.dates import DateLike, normal_date, starts_after
from qfast.errors import ConfigError, DataError, shown, some, suggest
from qfast.registry import parameters

if TYPE_CHECKING:
    from qfast.workflow.folder import RunFolder

__all__ = ["PortfolioPlan", "PortfolioResult", "write_portfolio"]

log = logging.getLogger("qfast")

FOLDER = "portfolio_analysis"
SAMPLE = 20  # instruments whose prices are checked before training
OPTIONAL_FIELDS = ("volume", "change", "factor")
DEFAULT: Mapping[str, Any] = {
    "strategy": {"class": "TopkDropoutStrategy", "kwargs": {"signal": "<PRED>", "topk": 50, "n_drop": 5}},
    "backtest": {
        "account": 1e8,
        "benchmark": "SH000300",
        "exchange_kwargs": {
            "limit_threshold": 0.095,
            "deal_price": "close",
            "open_cost": 0.0005,
            "close_cost": 0.0015,
            "min_cost": 5,
        },
    },
}
SECTIONS = ("strategy", "backtest", "executor")
BACKTEST_KEYS = ("start_time", "end_time", "account", "benchmark", "exchange_kwargs", "pos_type")
ORDERS = {"method_sell": "bottom", "method_buy": "top"}  # Qlib's alternatives are random
# Arguments that only accept Qlib's default, because other values would change the result and are not simulated.
FIXED_EXCHANGE: Mapping[str, Sequence[Any]] = {
    "codes": ("all", None),
    "freq": ("day", "1day", None),
    "quote_cls": (None,),
}
FIXED_EXECUTOR: Mapping[str, Sequence[Any]] = {
    "time_per_step": ("day", "1day"),
    "trade_type": ("serial",),
    "settle_type": ("None", None),
    "start_time": (None,),
    "end_time": (None,),
    "indicator_config": ({}, None),
}
WITHOUT_EFFECT = ("generate_portfolio_metrics", "verbose", "track_data")  # arguments of the executor about its records


@dataclass
class PortfolioResult:
    """A finished backtest, and notes about its data for the log and the report."""

    backtest: Backtest
    notes: list[str] = field(default_factory=list)


class PortfolioPlan:
    """A checked `config` of PortAnaRecord.

    Parameters
    ----------
    config : mapping or None
        Qlib's configuration: "strategy" (TopkDropoutStrategy), "backtest" and "executor" (SimulatorExecutor with daily
        steps). None: Qlib's default.

    Raises
    ------
    ConfigError
        A key is unknown or a value is not supported.

    Examples
    --------
    >>> plan = PortfolioPlan(None)
    >>> plan.strategy.topk, plan.benchmark, plan.exchange("us").trade_unit
    (50, 'SH000300', 1)
    """

    def __init__(self, config: Mapping[str, Any] | None) -> None:
        config = DEFAULT if config is None else config
        _require_keys("config", config, SECTIONS)
        for name in ("strategy", "backtest"):
            if name not in config:
                raise ConfigError(f"PortAnaRecord: config must contain {name!r}, got {list(config)}.")
        self.strategy = _strategy(config["strategy"])
        _check_executor(config.get("executor"))
        run = config["backtest"]
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
        self.exchange("cn").fields()  # raises for invalid expressions

    def exchange(self, region: str) -> Exchange:
        """The rules of trading, with the defaults of a region: "cn", "us" or "tw"."""
        rules = dict(self._exchange)
        rules.setdefault("trade_unit", LOTS[region])
        if rules.get("limit_threshold") is None:
            rules["limit_threshold"] = LIMITS[region]
        return Exchange(**{k: v for k, v in rules.items() if v is not None or k in ("trade_unit", "limit_threshold")})

    def check_prices(self, handler: Handler, region: str = "cn") -> None:
        """Check on a few instruments that the prices contain every field that trading needs.

        Parameters
        ----------
        handler : PricedHandler or another handler
            A handler without prices is not checked.
        region : {"cn", "us", "tw"}

        Raises
        ------
        ConfigError
            The prices lack a field of `deal_price` or `limit_threshold`.
        """
        if not hasattr(handler, "quotes"):
            return
        priced = cast(PricedHandler, handler)
        exchange = self.exchange(region)
        names = [str(name) for name in priced.panel("infer").instruments[:SAMPLE]]
        panel = priced.quotes(names, exchange.fields(), None, None).panel
        present = {str(column).lower() for column in panel.columns("price")}
        missing = [name for name in exchange.fields() if name not in {*present, *OPTIONAL_FIELDS}]
        if missing:
            raise ConfigError(
                f"PortAnaRecord: the prices have no {some(missing)}, which deal_price or limit_threshold "
                f"({shown(exchange.deal_price)}, {shown(exchange.limit_threshold)}) needs."
            )

    def run(self, score: pd.Series, handler: Handler, region: str = "cn") -> PortfolioResult:
        """Simulate trading on scores at the handler's prices.

        Parameters
        ----------
        score : Series
            Indexed by (datetime, instrument).
        handler : PricedHandler
        region : {"cn", "us", "tw"}

        Raises
        ------
        DataError
            The handler has no prices, or none in the period of the backtest.
        """
        if not hasattr(handler, "quotes"):
            raise DataError(f"the backtest needs prices, but {type(handler).__name__} has none.")
        priced = cast(PricedHandler, handler)
        exchange = self.exchange(region)
        days = score.index.get_level_values("datetime")
        start = days.min() if self.start is None else self.start
        names = [str(name) for name in score.index.get_level_values("instrument").unique()]
        prices = priced.quotes(names, exchange.fields(), start, self.end)
        end = self.end if self.end is not None else _day_after(prices.panel, days.max())
        market, notes = Market.of(prices, exchange, start, end)
        before = prices.panel.datetimes[prices.panel.datetimes < market.days[0]]
        bench, bench_notes = self._benchmark(priced, prices.panel, start, end)
        result = backtest(
            score,
            market,
            self.strategy,
            exchange,
            account=self.account,
            benchmark=bench,
            day_before=before[-1] if len(before) else None,
        )
        return PortfolioResult(result, [*notes, *bench_notes])

    def _benchmark(
        self, handler: PricedHandler, panel: Panel, start: DateLike | None, end: DateLike | None
    ) -> tuple[pd.Series | None, list[str]]:
        """Daily return of the benchmark, and notes about it."""
        if self.benchmark is None:
            return None, ["without a benchmark, excess returns and their risk are empty"]
        if isinstance(self.benchmark, pd.Series):
            return self.benchmark, []
        names = [self.benchmark] if isinstance(self.benchmark, str) else [str(name) for name in self.benchmark]
        try:
            quotes = handler.quotes(names, ["close"], start, end).panel
        except DataError:
            listed = ", ".join(names[:5])
            note = f"the prices have no benchmark {listed}: the mean return of all instruments is the benchmark"
            return equal_weight_return(panel), [note]
        change = evaluate_all(["$close / Ref($close, 1) - 1"], quotes)[:, 0]
        present = {str(name).lower() for name in quotes.instruments}
        missing = [name for name in names if name.lower() not in present]
        notes = [f"the prices have no {some(missing)}: the benchmark is the mean return of the others"]
        return pd.Series(change).groupby(quotes.datetimes[quotes.date_codes]).mean(), notes if missing else []


def _day_after(panel: Panel, day: pd.Timestamp) -> pd.Timestamp:
    later = panel.datetimes[panel.datetimes > day]
    return later[0] if len(later) else day


def _period(run: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Start and end of the backtest."""
    start, end = (_date(name, run.get(name)) for name in ("start_time", "end_time"))
    if start is not None and end is not None and starts_after(start, end):
        raise ConfigError(f"PortAnaRecord: backtest: start_time {start} is after end_time {end}.")
    return start, end


def _date(name: str, value: object) -> str | None:
    try:
        return normal_date(value)
    except ValueError as error:
        raise ConfigError(f"PortAnaRecord: backtest: {name}: {error}.") from None


def _benchmark(benchmark: Any) -> str | Sequence[str] | pd.Series | None:
    several = isinstance(benchmark, (list, tuple)) and bool(benchmark) and all(isinstance(n, str) for n in benchmark)
    if benchmark is None or isinstance(benchmark, (str, pd.Series)) or several:
        return benchmark
    raise ConfigError(
        f"PortAnaRecord: backtest: benchmark must be an instrument, a list of them or null, got {shown(benchmark)}."
    )


def _require_fixed(where: str, arguments: Mapping[str, Any], allowed: Mapping[str, Sequence[Any]]) -> None:
    """Raise a ConfigError for values that Qlib supports but this simulation does not."""
    for name, values in allowed.items():
        if name in arguments and arguments[name] not in values:
            raise ConfigError(
                f"PortAnaRecord: {where}: {name} must be {values[0]!r}, got {shown(arguments[name])}; other values are "
                "not supported. Remedy: remove it, or use --engine qlib."
            )


def _mapping(where: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"PortAnaRecord: {where} must be a mapping, got {shown(value)}.")
    return value


def _require_keys(where: str, value: object, allowed: Sequence[str]) -> None:
    for name in _mapping(where, value):
        if name not in allowed:
            raise ConfigError(
                f"PortAnaRecord: {where} has no {name!r}; allowed: {list(allowed)}." + suggest(name, allowed)
            )


def _strategy(spec: object) -> TopkDropout:
    if not isinstance(spec, Mapping) or "class" not in spec:
        raise ConfigError(f"PortAnaRecord: strategy must be a mapping with a class, got {shown(spec)}.")
    name = str(spec["class"]).rsplit(".", 1)[-1]
    if name != "TopkDropoutStrategy":
        raise ConfigError(
            f"PortAnaRecord: strategy {name!r} is not supported, only TopkDropoutStrategy. Remedy: use that one, or "
            "--engine qlib, or remove PortAnaRecord and trade on the scores of the run with your own simulation."
        )
    kwargs = dict(_mapping("strategy: kwargs", spec.get("kwargs") or {}))
    signal = kwargs.pop("signal", "<PRED>")
    if not (isinstance(signal, str) and signal == "<PRED>"):
        raise ConfigError(f"PortAnaRecord: the strategy's signal must be <PRED>, got {shown(signal)}.")
    for key, value in ORDERS.items():
        actual = kwargs.pop(key, value)
        if actual != value:
            raise ConfigError(
                f"TopkDropoutStrategy: {key} must be {value!r}, got {actual!r}; random choices are not supported. "
                "Remedy: remove it, or use --engine qlib."
            )
    _require_keys("TopkDropoutStrategy", kwargs, (*parameters(TopkDropout), "signal", *ORDERS))
    missing = [key for key in ("topk", "n_drop") if key not in kwargs]
    if missing:
        raise ConfigError(f"TopkDropoutStrategy requires {' and '.join(missing)}, got {sorted(kwargs)}.")
    return TopkDropout(**kwargs)


def _check_executor(spec: object) -> None:
    if spec is None:
        return
    name = str(spec.get("class") if isinstance(spec, Mapping) else spec).rsplit(".", 1)[-1]
    if name != "SimulatorExecutor":
        raise ConfigError(
            f"PortAnaRecord: executor {name!r} is not supported, only SimulatorExecutor. Remedy: use --engine qlib."
        )
    kwargs = (spec.get("kwargs") if isinstance(spec, Mapping) else None) or {}
    _require_keys("executor: kwargs", kwargs, (*FIXED_EXECUTOR, *WITHOUT_EFFECT))
    _require_fixed("executor", kwargs, FIXED_EXECUTOR)


def write_portfolio(run_folder: RunFolder, result: PortfolioResult) -> dict[str, float]:
    """Write the tables of a backtest to `portfolio_analysis` under Qlib's names.

    Parameters
    ----------
    run_folder : RunFolder
    result : PortfolioResult

    Returns
    -------
    dict
        The metrics of the backtest.
    """
    tables = result.backtest
    (run_folder / FOLDER).mkdir(exist_ok=True)
    run_folder.write_frame(f"{FOLDER}/report_normal_1day", tables.report)
    run_folder.write_frame(f"{FOLDER}/positions_normal_1day", tables.positions)
    run_folder.write_frame(f"{FOLDER}/indicators_normal_1day", tables.indicators)
    run_folder.write_frame(f"{FOLDER}/port_analysis_1day", tables.risk())
    run_folder.write_frame(f"{FOLDER}/indicator_analysis_1day", tables.orders())
    metrics = tables.metrics()
    run_folder.write_json(f"{FOLDER}/metrics.json", {k: v if np.isfinite(v) else None for k, v in metrics.items()})
    return metrics
