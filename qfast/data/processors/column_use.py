"""Which columns the result of a list of processors depends on, so a handler computes no others.

A processor that treats every column alone passes on a column that nobody reads. A processor that drops rows, or whose
learned constants are saved, reads all columns that it selects. A class that is not listed here, which includes
subclasses of the listed ones, may read anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from qfast.data.panel import Block, Panel
from qfast.data.processors.base import Processor
from qfast.data.processors.columns import column_names, select
from qfast.data.processors.cross_section import CSRankNorm, CSZFillna, CSZScoreNorm, ProcessInf
from qfast.data.processors.filling import (
    DropCol,
    DropnaLabel,
    DropnaProcessor,
    Fillna,
    FilterCol,
    TanhProcess,
    keep_columns,
)
from qfast.data.processors.fitted import MinMaxNorm, RobustZScoreNorm, ZScoreNorm
from qfast.errors import QfastError

__all__ = ["unread_columns"]

Column = tuple[str, str]  # (group, name)

EACH_COLUMN_ALONE = (CSZScoreNorm, CSRankNorm, CSZFillna, ProcessInf, Fillna, TanhProcess)
READ_THEIR_COLUMNS = (DropnaProcessor, DropnaLabel, RobustZScoreNorm, ZScoreNorm, MinMaxNorm)
SELECT_COLUMNS = (FilterCol, DropCol)


def unread_columns(
    columns: Mapping[str, Sequence[str]],
    shared: Sequence[Processor],
    infer: Sequence[Processor],
    learn: Sequence[Processor],
    independent: bool,
) -> set[str]:
    """Names of the columns that affect neither the inference data nor the data to learn from.

    Parameters
    ----------
    columns : mapping of group to names
        The raw columns.
    shared, infer, learn : sequence of Processor
        The stages of a handler.
    independent : bool
        Learn processors run on the result of the shared processors; otherwise on the inference data.

    Returns
    -------
    set of str
        Empty if a name occurs in two groups, because FilterCol compares names only.

    Examples
    --------
    >>> sorted(unread_columns({"feature": ["x", "y", "z"]}, [], [Fillna(), FilterCol("feature", ["y"])], [], False))
    ['x', 'z']
    """
    names = [name for group in columns.values() for name in group]
    if len(set(names)) < len(names):
        return set()
    try:
        needed = _needed(_without_rows(columns), shared, [infer, learn] if independent else [infer])
    except QfastError:  # the same processor raises the error when it runs on the data
        return set()
    return set(names) - {name for _, name in needed}


def _needed(panel: Panel, processors: Sequence[Processor], then: Sequence[Sequence[Processor]] = ()) -> set[Column]:
    """Columns of `panel` that the results of `processors`, followed by each of the lists `then`, depend on."""
    before = []
    for processor in processors:
        before.append(panel)
        if not _is_listed(processor):
            return _read_back(before, processors, _columns(panel))
        if isinstance(processor, SELECT_COLUMNS):
            panel = keep_columns(panel, processor.kept(panel))
    result = set[Column]().union(*(_needed(panel, more) for more in then)) if then else _columns(panel)
    return _read_back(before, processors, result)


def _read_back(before: Sequence[Panel], processors: Sequence[Processor], result: set[Column]) -> set[Column]:
    """Columns that `result` depends on: also the columns that a processor reads, at the panel before it."""
    for panel, processor in reversed(list(zip(before, processors, strict=False))):
        result = result | _read(panel, processor)
    return result


def _read(panel: Panel, processor: Processor) -> set[Column]:
    """Columns that must exist for a processor, besides those whose new values are needed."""
    fields_group = getattr(processor, "fields_group", None)
    if isinstance(processor, READ_THEIR_COLUMNS) or isinstance(fields_group, tuple):
        return {
            (group, name)
            for group, positions in select(panel, fields_group)
            for name in column_names(panel, group, positions)
        }
    return set()


def _is_listed(processor: Processor) -> bool:
    """True for the classes above, unless an attribute of the object replaces one of their methods."""
    listed = (*EACH_COLUMN_ALONE, *READ_THEIR_COLUMNS, *SELECT_COLUMNS)
    return type(processor) in listed and not any(map(callable, vars(processor).values()))


def _columns(panel: Panel) -> set[Column]:
    return {(group, name) for group, block in panel.blocks.items() for name in block.columns}


def _without_rows(columns: Mapping[str, Iterable[str]]) -> Panel:
    """A panel with these columns and no rows."""
    no_codes = np.empty(0, dtype=np.int32)
    blocks = {}
    for group, names in columns.items():
        listed = tuple(names)
        blocks[group] = Block(np.empty((0, len(listed)), dtype=np.float32), listed)
    return Panel(pd.DatetimeIndex([]), np.empty(0, dtype=object), no_codes, no_codes, blocks)
