"""Filters of a market by name or by an expression: Qlib's `filter_pipe`.

Source: qlib/data/filter.py of pyqlib 0.9.7.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from qfast.data.expression import fields, parse, reach
from qfast.data.panel import Panel
from qfast.data.prices import Instruments
from qfast.dates import DateLike, normal_date
from qfast.errors import ConfigError, shown, suggest

__all__ = ["ExpressionDFilter", "FilterSpec", "MarketFilter", "NameDFilter", "apply_filters", "build_filters"]

log = logging.getLogger("qfast.data")

Evaluate: TypeAlias = Callable[[str, np.ndarray], np.ndarray]
"""Values float32 [M] of an expression at panel rows int64 [M]."""


class MarketFilter(Protocol):
    """A rule that removes rows from a market between two dates."""

    filter_start_time: str | None
    filter_end_time: str | None

    def to_config(self) -> dict[str, Any]:
        """The filter as Qlib's configuration."""

    def keeps(self, panel: Panel, rows: np.ndarray, evaluate: Evaluate) -> np.ndarray:
        """For each of `rows` (int64 [M]), whether it remains: bool [M]."""


FilterSpec: TypeAlias = "MarketFilter | Mapping[str, Any]"
"""A filter, or Qlib's configuration of one."""


class _Period:
    """The dates between which a filter applies, both inclusive. Outside, the market is unchanged."""

    def __init__(self, fstart_time: DateLike | None, fend_time: DateLike | None) -> None:
        try:
            self.filter_start_time = normal_date(fstart_time or None)
            self.filter_end_time = normal_date(fend_time or None)
        except ValueError as error:
            raise ConfigError(f"{type(self).__name__}: filter_start_time and filter_end_time: {error}.") from None


class NameDFilter(_Period):
    """Keeps the instruments whose names match a regular expression.

    Parameters
    ----------
    name_rule_re : str
        A regular expression, which is compared with the beginning of the name.
    fstart_time, fend_time : date-like, optional
        The filter applies between these dates, both inclusive. Outside, all instruments remain.

    Raises
    ------
    ConfigError
        `name_rule_re` is not a regular expression, or a date is not a date.

    Examples
    --------
    >>> NameDFilter("SH6").to_config()["name_rule_re"]
    'SH6'
    """

    def __init__(
        self, name_rule_re: str, fstart_time: DateLike | None = None, fend_time: DateLike | None = None
    ) -> None:
        super().__init__(fstart_time, fend_time)
        try:
            self._pattern = re.compile(name_rule_re)
        except (re.error, TypeError) as error:
            raise ConfigError(
                f"NameDFilter: name_rule_re {name_rule_re!r} is not a regular expression: {error}."
            ) from None
        self.name_rule_re = name_rule_re

    def to_config(self) -> dict[str, Any]:
        """The filter as Qlib's configuration."""
        return {
            "filter_type": "NameDFilter",
            "name_rule_re": self.name_rule_re,
            "filter_start_time": self.filter_start_time,
            "filter_end_time": self.filter_end_time,
        }

    def keeps(self, panel: Panel, rows: np.ndarray, evaluate: Evaluate) -> np.ndarray:
        """For each of `rows` (int64 [M]), whether the name of its instrument matches: bool [M]."""
        matches = np.array([self._pattern.match(str(name)) is not None for name in panel.instruments], dtype=bool)
        return np.asarray(matches[panel.instrument_codes[rows]])


class ExpressionDFilter(_Period):
    """Keeps the rows in which an expression is not 0.

    Parameters
    ----------
    rule_expression : str
        For example "$close / Ref($close, 5) > 1.02". Like in Qlib, NaN counts as true; a comparison with NaN is false.
    fstart_time, fend_time : date-like, optional
        The filter applies between these dates, both inclusive. Outside, all rows remain.
    keep : bool
        Part of Qlib's interface: whether instruments without data in the period remain. They have no rows there, so it
        changes nothing.

    Raises
    ------
    ConfigError
        The expression cannot be parsed, or a date is not a date.

    Examples
    --------
    >>> ExpressionDFilter("$close > 5", fstart_time="2020-01-01").filter_start_time
    '2020-01-01'
    """

    def __init__(
        self,
        rule_expression: str,
        fstart_time: DateLike | None = None,
        fend_time: DateLike | None = None,
        keep: bool = False,
    ) -> None:
        super().__init__(fstart_time, fend_time)
        parse(rule_expression)
        self.rule_expression, self.keep = rule_expression, bool(keep)

    def to_config(self) -> dict[str, Any]:
        """The filter as Qlib's configuration."""
        return {
            "filter_type": "ExpressionDFilter",
            "rule_expression": self.rule_expression,
            "filter_start_time": self.filter_start_time,
            "filter_end_time": self.filter_end_time,
            "keep": self.keep,
        }

    def keeps(self, panel: Panel, rows: np.ndarray, evaluate: Evaluate) -> np.ndarray:
        """For each of `rows` (int64 [M]), whether the value of the expression is not 0: bool [M]."""
        return np.asarray(evaluate(self.rule_expression, rows) != 0)


SETTINGS: Mapping[str, tuple[type[NameDFilter | ExpressionDFilter], tuple[str, ...]]] = {
    "NameDFilter": (NameDFilter, ("name_rule_re",)),
    "ExpressionDFilter": (ExpressionDFilter, ("rule_expression", "keep")),
}
PERIOD = {"filter_start_time": "fstart_time", "filter_end_time": "fend_time"}


def build_filters(
    instruments: Instruments, filter_pipe: Iterable[FilterSpec] | None
) -> tuple[Instruments, list[MarketFilter]]:
    """The market, and its filters in order.

    Parameters
    ----------
    instruments : str, list, {code: [(start, end), ...]}, {"market": name} or {"market": name, "filter_pipe": [...]}
    filter_pipe : list of filters or of Qlib's configurations, optional

    Returns
    -------
    (instruments, list of filters)
        Instruments without a filter_pipe.

    Raises
    ------
    ConfigError
        A filter is unknown or has a wrong setting.

    Notes
    -----
    Like in Qlib, `filter_pipe` is ignored, with a warning, unless `instruments` is the name of a market.

    Examples
    --------
    >>> build_filters("csi300", [{"filter_type": "NameDFilter", "name_rule_re": "SH"}])[1][0].name_rule_re
    'SH'
    """
    inner: object = None
    described = isinstance(instruments, Mapping) and "market" in instruments
    if isinstance(instruments, Mapping) and described:
        inner = instruments.get("filter_pipe")
        instruments = str(instruments["market"])
    for name, pipe in (("filter_pipe", filter_pipe), ("instruments.filter_pipe", inner)):
        if pipe is not None and (isinstance(pipe, (str, Mapping)) or not isinstance(pipe, Sequence)):
            raise ConfigError(f"{name} must be a list of filters, got {shown(pipe)}.")
    if filter_pipe and (described or not (instruments is None or isinstance(instruments, str))):
        log.warning("filter_pipe is ignored, as in Qlib, because instruments is not the name of a market")
        filter_pipe = None
    specs: Sequence[Any] = list(filter_pipe or inner or ())  # type: ignore[call-overload]
    return instruments, [_build(spec, f"filter_pipe[{number}]") for number, spec in enumerate(specs)]


def _build(spec: Any, path: str) -> MarketFilter:
    if isinstance(spec, (NameDFilter, ExpressionDFilter)):
        return spec
    config = spec.to_config() if hasattr(spec, "to_config") else spec  # an instance of Qlib's filter
    kind = config.get("filter_type") if isinstance(config, Mapping) else None
    if not isinstance(kind, str) or kind not in SETTINGS:
        raise ConfigError(
            f"{path}: filter_type must be one of {list(SETTINGS)}, got {shown(spec)}."
            + suggest(kind, SETTINGS)
            + " Qlib's engine accepts filters of your own: --engine qlib."
        )
    factory, names = SETTINGS[kind]
    allowed = [*names, *PERIOD]
    for name in config:
        if name not in ("filter_type", *allowed):
            raise ConfigError(f"{path}: {kind} has no setting {name!r}; allowed: {allowed}." + suggest(name, allowed))
    if names[0] not in config:
        raise ConfigError(f"{path}: {kind} requires {names[0]!r}, got {list(config)}.")
    settings = {PERIOD.get(name, name): value for name, value in config.items() if name != "filter_type"}
    return factory(**settings)


def filter_expressions(filters: Iterable[MarketFilter]) -> list[str]:
    """The expressions that the filters evaluate."""
    return [f.rule_expression for f in filters if isinstance(f, ExpressionDFilter)]


def filter_fields(filters: Iterable[MarketFilter]) -> list[str]:
    """Price fields that the filters read."""
    return [field for text in filter_expressions(filters) for field in fields(text)]


def filter_reach(filters: Iterable[MarketFilter]) -> list[tuple[int, int]]:
    """Rows before and after the current one that each expression reads."""
    return [reach(text) for text in filter_expressions(filters)]


def apply_filters(panel: Panel, rows: np.ndarray, filters: Iterable[MarketFilter], evaluate: Evaluate) -> Panel:
    """The panel without the rows that the filters remove. Values are shared.

    Parameters
    ----------
    panel : Panel
    rows : int64 [M]
        Rows to filter; the others remain.
    filters : iterable of filters
        Applied in order.
    evaluate : callable
        Evaluates an expression at panel rows.
    """
    for market_filter in filters:
        first, stop = panel.date_code_range(market_filter.filter_start_time, market_filter.filter_end_time)
        inside = rows[(panel.date_codes[rows] >= first) & (panel.date_codes[rows] < stop)]
        mask = np.ones(panel.n_rows, dtype=bool)
        mask[inside] = market_filter.keeps(panel, inside, evaluate)
        panel = panel.keep(mask)
    return panel
