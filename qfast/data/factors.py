"""Factors: expressions of Qlib's language over the panel, all evaluated in one pass.

All expressions are merged into one graph, in which a shared part is computed once. All windows of one statistic over
one series are a single pass of a native kernel (`qfast.data.rolling`). The graph runs over a few instruments at a time,
whose series stay in the cache, and writes their rows of the float32 result.

    >>> import pandas as pd
    >>> from qfast.data.panel import Panel
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=3), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"close": [1.0, 2.0, 6.0]}, index=index), group="price")
    >>> evaluate_all(["Mean($close, 2)", "$close > Ref($close, 1)"], panel).tolist()
    [[1.0, 0.0], [1.5, 1.0], [4.0, 1.0]]
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

from qfast._renamed import renamed_names
from qfast.data.expression import parse
from qfast.data.expression_functions import register_function, unregister_function
from qfast.data.factor_chunk import Chunk, mask_values
from qfast.data.factor_graph import Graph, looks_back_without_end
from qfast.data.panel import Panel
from qfast.data.prices import Extent, Prices
from qfast.dates import DateLike
from qfast.errors import ConfigError, shown

__all__ = ["depends_on_the_start", "evaluate", "evaluate_all", "register_function", "unregister_function"]

ROW_CHUNK = 1 << 15  # rows evaluated at a time; their results and intermediate series fit in the caches


def evaluate(
    text: str,
    panel: Panel,
    *,
    extents: Mapping[str, Extent] | None = None,
    optional: Collection[str] = frozenset(),
    compat: str | None = None,
) -> np.ndarray:
    """Value of one expression at every row of a panel.

    Parameters
    ----------
    text : str
        For example "Ref($close, -2) / Ref($close, -1) - 1".
    panel, extents, optional, compat
        As in `evaluate_all`.

    Returns
    -------
    float32 [R]

    Raises
    ------
    ExpressionError, DataError
        As in `evaluate_all`.

    Examples
    --------
    >>> import pandas as pd
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=3), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"close": [1.0, 2.0, 3.0]}, index=index), group="price")
    >>> evaluate("Ref($close, -1) / $close - 1", panel).tolist()
    [1.0, 0.5, nan]
    """
    return evaluate_all([text], panel, extents=extents, optional=optional, compat=compat)[:, 0]


def evaluate_all(
    texts: Sequence[str],
    panel: Panel,
    *,
    rows: np.ndarray | None = None,
    extents: Mapping[str, Extent] | None = None,
    optional: Collection[str] = frozenset(),
    start_time: DateLike | None = None,
    others: Mapping[str, Prices] | None = None,
    out: np.ndarray | None = None,
    compat: str | None = None,
) -> np.ndarray:
    """Values of expressions at rows of a panel.

    `Ref(x, n)` is the value n rows of the same instrument earlier (later for negative n) and NaN where no such row
    exists. A window of n is the last n rows, fewer at the start of an instrument. Windows ignore missing values.

    Parameters
    ----------
    texts : sequence of str
        C expressions.
    panel : Panel
        `$name` is its column `name`; the case of letters does not matter.
    rows : int64 [M], optional
        Ascending panel rows to compute. Default: all R. Every value may read all rows of the panel.
    extents : mapping, optional
        Field -> rows in which that field is stored. Default: all rows of each instrument. Outside the rows in which one
        of its fields is stored, a series has no value.
    optional : collection of str
        Fields that are NaN if the panel lacks them. Any other missing field is an error.
    start_time : date-like, optional
        The first requested day. Like Qlib, EMA and windows of 0 rows start n - 1 rows before that day, so their values
        depend on it. No other function does.
    others : mapping, optional
        Prices of instruments that `Mask` names and the panel lacks, by name.
    out : float32 [M, C], optional
        Written to and returned.
    compat : {None, "qlib"}
        "qlib": windows are computed with the row-by-row updates of pandas 3.1 and Qlib and begin where Qlib begins to
        load rows. All values equal Qlib's bit for bit, including rounding errors of the updates, and depend on
        `start_time`. None: windows are computed anew for every row.

    Returns
    -------
    float32 [M, C]
        Types are those of Qlib: fields are float32, numbers do not widen them, windows are computed in float64.

    Raises
    ------
    ConfigError
        `compat` is neither None nor "qlib".
    ExpressionError
        A text is not an expression, or calls a function that is not available. The message points at the place.
    DataError
        The data lacks a field or an instrument.

    Notes
    -----
    Source: the expression engine of pyqlib 0.9.7 (qlib/data/ops.py).

    Examples
    --------
    >>> import pandas as pd
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=2), ["A", "B"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"close": [1.0, 2.0, 3.0, 6.0]}, index=index), group="price")
    >>> evaluate_all(["Delta($close, 1)", "$close / Mask($close, 'A')"], panel, rows=np.array([1, 3])).tolist()
    [[2.0, 1.0], [4.0, 2.0]]
    """
    rows = np.arange(panel.n_rows) if rows is None else rows
    if out is None:
        out = np.empty((len(rows), len(texts)), dtype=np.float32)
    graph = Graph(texts, panel, extents or {}, optional, start_time, others or {}, checked_compat(compat))
    masks = mask_values(graph)
    bounds = np.searchsorted(panel.instrument_codes, np.arange(len(panel.instruments) + 1))
    begin = 0
    while begin < len(panel.instruments):
        end = int(np.searchsorted(bounds, bounds[begin] + ROW_CHUNK, side="right")) - 1
        # The rolling kernel runs one instrument per thread, so give every thread at least one.
        end = min(max(end, begin + torch.get_num_threads()), len(panel.instruments))
        low, high = bounds[begin], bounds[end]
        first, stop = np.searchsorted(rows, [low, high])
        if first < stop:
            chunk_rows = rows[first:stop] - low
            chunk = Chunk(graph, masks, begin, end, bounds)
            with np.errstate(all="ignore"):
                table = chunk.table()
            out[first:stop] = (table if len(chunk_rows) == high - low else table[:, chunk_rows]).T
        begin = end
    return out


def checked_compat(compat: object) -> str | None:
    """The argument `compat` itself.

    Raises
    ------
    ConfigError
        It is neither None nor "qlib".
    """
    if compat is not None and compat != "qlib":
        raise ConfigError(f"compat must be None or 'qlib', got {shown(compat)}.")
    return None if compat is None else "qlib"


def depends_on_the_start(text: str, compat: str | None = None) -> bool:
    """True if an expression depends on all earlier rows (EMA, a window of 0 rows), and so on the first day of the data.

    With compat="qlib", sums and moments of windows do so too.

    >>> depends_on_the_start("EMA($close, 5)"), depends_on_the_start("Mean($close, 5)")
    (True, False)
    >>> depends_on_the_start("Mean($close, 5)", compat="qlib"), depends_on_the_start("Max($close, 5)", compat="qlib")
    (True, False)
    """
    return looks_back_without_end(parse(text), compat)


__getattr__ = renamed_names(
    __name__,
    {
        "register_operator": "qfast.data.expression_functions.register_function",
        "unregister_operator": "qfast.data.expression_functions.unregister_function",
    },
)
