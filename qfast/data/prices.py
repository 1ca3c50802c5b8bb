"""Field names, dates and instrument arguments that all sources of prices share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd

from qfast.data.arrow_tables import ArrowTable
from qfast.data.column_names import PRICE_FIELDS as PRICE_FIELDS
from qfast.data.panel import Panel
from qfast.errors import ConfigError, shown

Instruments: TypeAlias = str | Iterable[str] | Mapping[str, Any] | None
"""A market name, a list of instruments, {code: [(start, end), ...]}, {"market": name}, or None for all."""

PriceSource: TypeAlias = str | Path | pd.DataFrame | pd.Series | Panel | ArrowTable
"""A file, a folder of files, a frame or a panel of prices, or a table of Polars, Arrow or DuckDB."""

StorePath: TypeAlias = str | Path | Mapping[str, str | Path]
"""The folder of a Qlib binary store, or {freq: folder}."""

Spans = dict[str, list[tuple[Any, Any]] | None]  # instrument -> (start, end) of each membership; None: always a member


class Extent(NamedTuple):
    """Rows in which a series exists: panel rows start[i] to stop[i] - 1 of instrument i, int64 [N] each."""

    start: np.ndarray
    stop: np.ndarray


class Prices(NamedTuple):
    """A price panel and the rows in which each field is stored.

    Attributes
    ----------
    panel : Panel
        Group "price". `live` is True where the instrument belongs to the market; None: everywhere.
    extents : dict of str to Extent
        Rows in which a field is stored. Fields that are not listed are stored in all rows.
    """

    panel: Panel
    extents: dict[str, Extent]


def membership(instruments: Iterable[str] | Mapping[str, Any]) -> Spans:
    """Membership of a list of instruments or of {code: [(start, end), ...]}.

    Raises
    ------
    ConfigError
        The argument is neither.

    Examples
    --------
    >>> membership(["A", "B"])
    {'A': None, 'B': None}
    """
    if isinstance(instruments, Mapping):
        try:
            return {str(code): [(begin, end) for begin, end in spans] for code, spans in instruments.items()}
        except (TypeError, ValueError):
            raise ConfigError(f"instruments must be {{code: [(start, end), ...]}}, got {shown(instruments)}.") from None
    if isinstance(instruments, (list, tuple, set, np.ndarray, pd.Index)):
        return {str(code): None for code in instruments}
    raise ConfigError(
        "instruments must be a market name, a list of instruments, {code: [(start, end), ...]} or "
        f"{{'market': name}}, got {type(instruments).__name__}: {shown(instruments)}."
    )


def market_of(config: Mapping[str, Any]) -> str:
    """The name in {"market": name}. Raises a ConfigError for a filter_pipe, which only handlers have."""
    if config.get("filter_pipe"):
        raise ConfigError(
            f"instruments: filter_pipe is not available, got {shown(config['filter_pipe'])} here. Remedy: use "
            "a handler (FactorHandler, Alpha158, Alpha360), or pass the instruments as a list."
        )
    return str(config["market"])
