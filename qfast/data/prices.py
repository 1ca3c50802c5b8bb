"""Field names, dates and instrument arguments that all sources of prices share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd

from qfast.data.panel import Panel
from qfast.errors import ConfigError, DataError, shown

PRICE_FIELDS = ("open", "high", "low", "close", "volume", "vwap")
DAY_AS_NUMBER = range(1800_01_01, 2200_12_32)  # 20240131

Instruments: TypeAlias = str | Iterable[str] | Mapping[str, Any] | None
"""A market name, a list of instruments, {code: [(start, end), ...]}, {"market": name}, or None for all."""

PriceSource: TypeAlias = str | Path | pd.DataFrame | pd.Series | Panel
"""A file, a folder of files, a frame or a panel of prices."""

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


def parse_dates(values: pd.Series, name: str) -> pd.DatetimeIndex:
    """The timestamps of a column.

    Parameters
    ----------
    values : Series
        Timestamps, text, or numbers such as 20240131.
    name : str
        The file or frame, for messages.

    Raises
    ------
    DataError
        A value is missing or not a date. The message contains the name, the column and the first such row.
    """
    missing = values.isna().to_numpy()
    if missing.any():
        raise DataError(f"{name}: row {int(np.argmax(missing))} has no date (column {values.name!r}).")
    if isinstance(values.dtype, pd.DatetimeTZDtype) or values.dtype.kind == "M":
        return pd.DatetimeIndex(values)
    codes, unique = pd.factorize(values)
    if pd.api.types.is_numeric_dtype(values.dtype):
        whole = unique.astype(np.int64)
        if not (whole == unique).all() or not all(int(d) in DAY_AS_NUMBER for d in whole):
            row = int(np.argmax([int(d) not in DAY_AS_NUMBER for d in whole[codes]]))
            raise DataError(
                f"{name}: numbers in column {values.name!r} must be dates such as 20240131, got {values.iloc[row]} in "
                f"row {row}. Remedy: convert the column with pandas.to_datetime first."
            )
        unique = pd.Index(whole.astype(str))
    texts = pd.Index([str(u).strip() for u in unique])
    try:
        stamps = pd.DatetimeIndex(pd.to_datetime(texts))
    except (ValueError, TypeError) as error:
        single = [is_date(text) for text in texts]
        if all(single):
            raise DataError(
                f"{name}: the dates of column {values.name!r} do not share one format or one time zone: {error} "
                "Remedy: convert the column with pandas.to_datetime(..., utc=True) first."
            ) from None
        row = int(np.argmin(np.asarray(single)[codes]))
        raise DataError(
            f"{name}: row {row} is not a date: {values.iloc[row]!r} in column {values.name!r} "
            "(row 0 is the first row below the header)."
        ) from None
    return stamps[codes]


def is_date(text: str) -> bool:
    """True if pandas reads the text as a date or time."""
    try:
        return not pd.isna(pd.to_datetime(text))
    except (ValueError, TypeError):
        return False


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
    """The name in {"market": name}. Raises a ConfigError for a filter_pipe, which qfast does not have."""
    if config.get("filter_pipe"):
        raise ConfigError(
            f"instruments: filter_pipe is not available, got {shown(config['filter_pipe'])}. Remedy: pass the "
            "instruments as a list."
        )
    return str(config["market"])
