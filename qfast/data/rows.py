"""Selects rows of a panel by instrument, by time, or by the selectors of `fetch`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from qfast.data.panel import ROW_CHUNK, Block, Panel
from qfast.data.protocols import Selector
from qfast.data.storage import Storage
from qfast.dates import DateLike
from qfast.errors import ConfigError, DataError, shown, some, suggest

__all__ = ["restrict_rows", "select_rows", "take_rows"]


def restrict_rows(
    panel: Panel,
    instruments: Sequence[str] | None,
    start: DateLike | None,
    end: DateLike | None,
    storage: Storage | None = None,
) -> Panel:
    """The rows of `instruments` from `start` to `end`, both inclusive.

    Parameters
    ----------
    panel : Panel
    instruments : sequence of str or None
        None: all.
    start, end : date-like or None
        None: unbounded.
    storage : Storage, optional
        Allocates the copy. Default: in memory.

    Returns
    -------
    Panel
        The panel itself if it contains only such rows, otherwise a copy.

    Raises
    ------
    DataError
        The panel lacks one of the instruments.
    """
    keep = None
    if instruments is not None:
        selected = [str(i) for i in ([instruments] if isinstance(instruments, str) else instruments)]
        names = [str(i) for i in panel.instruments]
        unknown = sorted(set(selected) - set(names))
        if unknown:
            other_case = {name.casefold(): name for name in names}.get(unknown[0].casefold())
            hint = f" Did you mean {other_case!r}?" if other_case is not None else suggest(unknown[0], names)
            raise DataError(
                f"instruments: {len(unknown)} of the {len(set(selected))} requested are not in the data: "
                f"{some(unknown, 5)}.{hint}"
            )
        keep = np.isin(names, selected)[panel.instrument_codes]
    if start is not None or end is not None:
        low, high = panel.date_code_range(start, end)
        inside = (panel.date_codes >= low) & (panel.date_codes < high)
        keep = inside if keep is None else keep & inside
    return panel if keep is None or keep.all() else take_rows(panel, np.flatnonzero(keep), storage=storage)


def take_rows(
    panel: Panel, rows: np.ndarray, groups: Sequence[str] | None = None, storage: Storage | None = None
) -> Panel:
    """A copy of some rows, without the dates and instruments that none of them has.

    Parameters
    ----------
    panel : Panel
    rows : int64 [M]
        Ascending.
    groups : sequence of str, optional
        Column groups to copy. Default: all.
    storage : Storage, optional
        Allocates the copy. Default: in memory.
    """
    dates, date_codes = np.unique(panel.date_codes[rows], return_inverse=True)
    instruments, instrument_codes = np.unique(panel.instrument_codes[rows], return_inverse=True)
    blocks = {}
    for group in panel.blocks if groups is None else groups:
        block = panel.block(group)
        table = block.table
        values = (storage or Storage()).empty((len(rows), len(block.columns)), table.dtype)
        for start in range(0, len(rows), ROW_CHUNK):
            values[start : start + ROW_CHUNK] = table[rows[start : start + ROW_CHUNK]]
        blocks[group] = Block(values, block.columns)
    return replace(
        panel,
        datetimes=panel.datetimes[dates],
        instruments=panel.instruments[instruments],
        date_codes=date_codes.astype(np.int32),
        instrument_codes=instrument_codes.astype(np.int32),
        blocks=blocks,
        live=None if panel.live is None else panel.live[rows],
    )


def select_rows(panel: Panel, selector: Selector, level: str | int | None) -> np.ndarray:
    """Live rows that match a selector of `DataHandlerLP.fetch`, sorted by (datetime, instrument).

    Parameters
    ----------
    panel : Panel
    selector : slice, pair, date-like, str, list or Index
    level : {"datetime", "instrument"}, 0, 1 or None

    Raises
    ------
    ConfigError
        `level` is none of these.
    DataError
        The selector matches no key of the data.
    """
    if isinstance(selector, (tuple, list)) and level is not None and len(selector) in (2, 3):
        selector = slice(*selector)
    if level not in ("datetime", "instrument", 0, 1, None):
        raise ConfigError(f"level must be 'datetime', 'instrument', 0, 1 or None, got {level!r}.")
    if isinstance(selector, slice):
        if selector == slice(None):
            return panel.by_date(panel.live_rows())
        if level in ("datetime", 0) and selector.step is None:
            return panel.by_date(panel.rows_between(selector.start, selector.stop))
    rows = panel.by_date(panel.live_rows())
    numbers = pd.DataFrame({"row": rows}, index=panel.index(rows))
    key: Any = selector
    if level is not None and not isinstance(selector, pd.MultiIndex):
        key = (selector, slice(None)) if level in ("datetime", 0) else (slice(None), selector)
    try:
        matches = numbers.loc(axis=0)[key]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"selector {shown(selector)} with level={level!r} matches no rows of the data: {error}"
        ) from None
    return np.atleast_1d(matches["row"].to_numpy() if isinstance(matches, pd.DataFrame) else np.asarray(matches["row"]))
