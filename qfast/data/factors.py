"""Factors: expressions of Qlib's language over a panel, all of them in one pass.

Expressions are merged into one graph, so that what several of them share is computed once, and all windows of
one function on one series are one sweep of a native kernel (`qfast.data.rolling`). The graph is run over a few
instruments at a time, whose series stay in the cache; what leaves is the float32 table of the results.

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

__all__ = ["depends_on_the_start", "evaluate", "evaluate_all", "register_function", "unregister_function"]

ROW_CHUNK = 1 << 15  # rows of one pass: their results and intermediate series fit the caches


def evaluate(
    text: str,
    panel: Panel,
    *,
    extents: Mapping[str, Extent] | None = None,
    optional: Collection[str] = frozenset(),
) -> np.ndarray:
    """Value of one expression at every row of a panel; arguments and errors as in `evaluate_all`.

    Parameters
    ----------
    text : str
        For instance "Ref($close, -2) / Ref($close, -1) - 1".
    panel, extents, optional
        As in `evaluate_all`.

    Returns
    -------
    float32 [R]

    Examples
    --------
    >>> import pandas as pd
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=3), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"close": [1.0, 2.0, 3.0]}, index=index), group="price")
    >>> evaluate("Ref($close, -1) / $close - 1", panel).tolist()
    [1.0, 0.5, nan]
    """
    return evaluate_all([text], panel, extents=extents, optional=optional)[:, 0]


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
) -> np.ndarray:
    """Values of expressions at rows of a panel.

    `Ref(x, n)` is the value n rows of the same instrument earlier (later for negative n), NaN where there is none;
    a window of n is the last n rows, fewer where an instrument begins; missing values are left out of it.

    Parameters
    ----------
    texts : sequence of str
        C expressions.
    panel : Panel
        `$name` is its column `name`, in whatever case.
    rows : int64 [M], optional
        Panel rows wanted, ascending. Default: all R. Values look at all rows of the panel.
    extents : mapping, optional
        Field -> rows in which that field is stored. Default: all rows of each instrument. A series
        has no value outside the rows in which one of its fields is stored.
    optional : collection of str
        Fields that are NaN where the panel has no such column; any other missing field is an error.
    start_time : date-like, optional
        The first day wanted. Only what looks back without end depends on it (EMA, a window of 0 rows): as in
        the reference that begins as many rows before this day as the function's window has.
    others : mapping, optional
        Prices of instruments that `Mask` names and the panel has not.
    out : float32 [M, C], optional
        Written to, and returned.

    Returns
    -------
    float32 [M, C]
        Computed like the reference: float32 fields, numbers do not widen them, windows in float64.

    Raises
    ------
    ExpressionError
        Not an expression, or a function that is not available; the message points at the place.
    DataError
        A field or instrument that the data has not.

    Source
    ------
    The expression engine of pyqlib 0.9.7 (qlib/data/ops.py).
    """
    rows = np.arange(panel.n_rows) if rows is None else rows
    if out is None:
        out = np.empty((len(rows), len(texts)), dtype=np.float32)
    graph = Graph(texts, panel, extents or {}, optional, start_time, others or {})
    masks = mask_values(graph)
    bounds = np.searchsorted(panel.instrument_codes, np.arange(len(panel.instruments) + 1))
    begin = 0
    while begin < len(panel.instruments):
        end = int(np.searchsorted(bounds, bounds[begin] + ROW_CHUNK, side="right")) - 1
        end = min(max(end, begin + torch.get_num_threads()), len(panel.instruments))  # threads share out instruments
        low, high = bounds[begin], bounds[end]
        first, stop = np.searchsorted(rows, [low, high])
        if first < stop:
            wanted = rows[first:stop] - low
            chunk = Chunk(graph, masks, begin, end, bounds)
            whole = len(wanted) == high - low
            with np.errstate(all="ignore"):
                table = chunk.table()
            out[first:stop] = (table if whole else table[:, wanted]).T
        begin = end
    return out


def depends_on_the_start(text: str) -> bool:
    """True for an expression that looks back without end (EMA, a window of 0 rows): the first day of the data counts.

    >>> depends_on_the_start("EMA($close, 5)"), depends_on_the_start("Mean($close, 5)")
    (True, False)
    """
    return looks_back_without_end(parse(text))


__getattr__ = renamed_names(
    __name__,
    {
        "register_operator": "qfast.data.expression_functions.register_function",
        "unregister_operator": "qfast.data.expression_functions.unregister_function",
    },
)
