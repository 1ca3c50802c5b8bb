"""Where Qlib's row-by-row updates and windows computed anew differ: equal values and infinite values.

Both ways agree to float32 rounding elsewhere. In a window of equal values the exact deviation is 0, and Qlib's updates
leave what earlier values rounded to. After an infinite value Qlib's regressions are missing for good.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from qfast.data.expression import Call, Field, Node, parse, walk
from qfast.data.factors import evaluate_all
from qfast.data.prices import PRICE_FIELDS, Prices
from qfast.dates import DateLike

__all__ = ["cells_unlike_qlib", "halted_rows", "sensitive_columns"]

# Functions whose result in a window of equal values is a rounding error in Qlib, or NaN after an infinite value.
SENSITIVE = frozenset(("Std", "Var", "Skew", "Kurt", "Corr", "Slope", "Rsquare", "Resi"))
CALL = re.compile(rf"\b({'|'.join(SENSITIVE)})\b")
SAME = 1e-4  # largest relative difference of cells that count as equal; the rounding of float32 is far smaller


def sensitive_columns(texts: Sequence[str]) -> dict[int, int]:
    """Places of the expressions that halts affect, and the shortest window of each.

    >>> sensitive_columns(["Mean($close, 5)", "Std($close, 20) / Std($close, 10)"])
    {1: 10}
    """
    windows = {place: _shortest_window(text) for place, text in enumerate(texts) if CALL.search(text)}
    return {place: window for place, window in windows.items() if window is not None}


@functools.lru_cache(maxsize=4096)  # handlers are built many times over the same expressions
def _nodes(text: str) -> tuple[Node, ...]:
    return tuple(walk(parse(text)))


def _shortest_window(text: str) -> int | None:
    lengths = [
        int(node.settings[0])
        for node in _nodes(text)
        if isinstance(node, Call) and node.function in SENSITIVE and node.settings[0] >= 1
    ]
    return min(lengths, default=None)


def fields_of(texts: Sequence[str]) -> list[str]:
    """The fields that expressions read, each once.

    >>> fields_of(["Std($close, 5)", "$volume / $close"])
    ['close', 'volume']
    """
    return list(dict.fromkeys(node.name for text in texts for node in _nodes(text) if isinstance(node, Field)))


def halted_rows(prices: Prices, names: Sequence[str], window: int) -> np.ndarray:
    """Rows that end a stretch of `window` equal values of a field, or that follow an infinite value of one.

    Parameters
    ----------
    prices : Prices
    names : sequence of str
        Fields in lower case. Fields that the prices lack are ignored.
    window : int
        Rows, at least 2.

    Returns
    -------
    bool [R]
    """
    panel = prices.panel
    columns = {column.lower(): column for column in panel.columns("price")}
    rows = np.arange(panel.n_rows)
    first_rows = np.searchsorted(panel.instrument_codes, np.arange(len(panel.instruments)))
    halted = np.zeros(panel.n_rows, dtype=bool)
    for name in names:
        if name not in columns:
            continue
        values = panel.column(columns[name])
        changes = np.ones(panel.n_rows, dtype=bool)
        changes[1:] = values[1:] != values[:-1]
        changes[first_rows[first_rows < panel.n_rows]] = True
        halted |= rows - np.maximum.accumulate(np.where(changes, rows, 0)) >= window - 1
        infinite = np.isinf(values)
        if infinite.any():
            latest = np.maximum.accumulate(np.where(infinite, rows, -1))
            halted |= latest >= first_rows[panel.instrument_codes]
    return halted


def cells_unlike_qlib(
    texts: Sequence[str],
    names: Sequence[str],
    prices: Prices,
    rows: np.ndarray,
    start_time: DateLike | None,
    others: Mapping[str, Prices],
) -> dict[str, int]:
    """Number of cells in which the exact value differs from Qlib's by more than rounding, by column.

    Both are computed for the columns and instruments that halts affect, see `sensitive_columns` and `halted_rows`.

    Parameters
    ----------
    texts, names : sequence of str
        Expressions and their columns.
    prices, rows, start_time, others
        As in `qfast.data.factors.evaluate_all`.

    Returns
    -------
    dict of str to int
        Columns with at least one such cell, most cells first.
    """
    windows = sensitive_columns(texts)
    if not windows:
        return {}
    affected = [texts[place] for place in windows]
    halted = halted_rows(prices, fields_of(affected), max(2, min(windows.values())))
    codes = prices.panel.instrument_codes
    rows = rows[np.isin(codes[rows], np.unique(codes[halted]))]
    if not len(rows):
        return {}
    exact, like_qlib = (
        evaluate_all(
            affected,
            prices.panel,
            rows=rows,
            extents=prices.extents,
            optional=PRICE_FIELDS,
            start_time=start_time,
            others=others,
            compat=compat,
        )
        for compat in (None, "qlib")
    )
    same = (exact == like_qlib) | (np.isnan(exact) & np.isnan(like_qlib))
    with np.errstate(all="ignore"):
        same |= np.abs(exact - like_qlib) <= SAME * np.abs(like_qlib)
    counts = np.sum(~same, axis=0)
    order = np.argsort(-counts, kind="stable")
    return {names[list(windows)[i]]: int(counts[i]) for i in order if counts[i]}
