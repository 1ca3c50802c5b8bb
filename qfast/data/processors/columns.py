"""Choosing columns of a panel, and reading and writing a few of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from qfast.data.panel import ROW_CHUNK, Panel
from qfast.data.processors.base import Workspace
from qfast.errors import ConfigError, DataError, suggest

COLUMN_CHUNK_BYTES = 64 << 20  # transient copy of a few columns while statistics are taken

FieldsGroup: TypeAlias = str | Sequence[str] | None
"""None for all columns, a group, a list of groups, or the pair (group, column)."""

Selection = list[tuple[str, np.ndarray]]  # (group, column positions)


def select(panel: Panel, fields_group: FieldsGroup) -> Selection:
    """Column positions by group for `fields_group`.

    Parameters
    ----------
    fields_group : None, str, list of str, or (group, column)
        None takes every column, a name one group, a list several groups, a pair one column.

    Raises
    ------
    DataError
        A group or column that the panel has not.
    """
    if fields_group is None:
        groups: Sequence[Any] = list(panel.blocks)
    elif isinstance(fields_group, str):
        groups = [fields_group]
    elif isinstance(fields_group, (list, tuple)):
        if isinstance(fields_group, tuple) and len(fields_group) == 2 and fields_group[1] not in panel.blocks:
            group, name = fields_group
            columns = panel.columns(group)
            if name in columns:
                return [(group, np.array([columns.index(name)]))]
            raise DataError(
                f"fields_group {fields_group!r}: group {group!r} has no column {name!r}." + suggest(name, columns)
            )
        groups = list(fields_group)
        if None in groups:
            return select(panel, None)
    else:
        raise ConfigError(
            f"fields_group must be None, a group name, a list of group names or (group, column); got {fields_group!r}."
        )
    return [(group, np.arange(len(panel.columns(group)))) for group in groups]


def column_names(panel: Panel, group: str, positions: np.ndarray) -> list[str]:
    """Names of some columns of a group."""
    names = panel.columns(group)
    return [names[int(p)] for p in positions]


def is_all(positions: np.ndarray, values: np.ndarray) -> bool:
    return len(positions) == values.shape[1]


def target(panel: Panel, group: str, positions: np.ndarray, space: Workspace) -> np.ndarray:
    """Array [R, C] for the new values of `group`: the block itself where owned, else a new one.

    Columns outside `positions` already hold their values; the others must be written.
    """
    values = panel.values(group)
    if group in space.owned and values.flags.writeable:
        space.overwritten.add(group)
        return values
    if is_all(positions, values):
        return np.empty_like(values)
    out: np.ndarray = values.copy()
    return out


def rows_by_chunk(n_rows: int) -> Iterator[slice]:
    for start in range(0, n_rows, ROW_CHUNK):
        yield slice(start, min(start + ROW_CHUNK, n_rows))


def columns_by_chunk(
    values: np.ndarray, positions: np.ndarray, rows: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(positions, contiguous copy [c, rows]) of a few columns at a time."""
    n_rows = len(values) if rows is None else len(rows)
    step = int(min(16, max(1, COLUMN_CHUNK_BYTES // max(1, n_rows * values.itemsize))))
    for start in range(0, len(positions), step):
        some = positions[start : start + step]
        low, high = int(some[0]), int(some[-1]) + 1
        part = values[:, low:high] if high - low == len(some) else values[:, some]
        # always a copy: callers write to it (one column transposed would be a view)
        yield some, np.array((part if rows is None else part[rows]).T, order="C", copy=True)


def elementwise(
    panel: Panel,
    selection: Selection,
    space: Workspace,
    change: Callable[[str, np.ndarray, np.ndarray], np.ndarray],
) -> Panel:
    """Apply `change(group, positions, values[rows, positions])` to the selected columns, rows in chunks."""
    for group, positions in selection:
        values = panel.values(group)
        if len(positions) == 0:
            continue
        out = target(panel, group, positions, space)
        whole = is_all(positions, values)
        for rows in rows_by_chunk(panel.n_rows):
            if whole:
                out[rows] = change(group, positions, values[rows])
            else:
                out[rows, positions] = change(group, positions, values[rows, positions])
        panel = panel.replace(group, out)
    return panel


def by_column(
    panel: Panel,
    selection: Selection,
    space: Workspace,
    change: Callable[[np.ndarray, np.ndarray | None], np.ndarray],
) -> Panel:
    """Apply `change(values[c, live rows], live row numbers or None)` to a few selected columns at a time."""
    rows = None if panel.live is None else panel.live_rows()
    for group, positions in selection:
        values = panel.values(group)
        if len(positions) == 0:
            continue
        out = target(panel, group, positions, space)
        for some, part in columns_by_chunk(values, positions, rows):
            changed = change(part, rows).T
            low, high = int(some[0]), int(some[-1]) + 1
            columns: Any = slice(low, high) if high - low == len(some) else some
            if rows is None:
                out[:, columns] = changed
                continue
            if out is not values:  # dead rows keep what they had
                out[:, columns] = values[:, columns]
            out[rows[:, None], some[None, :]] = changed
        panel = panel.replace(group, out)
    return panel


def day_codes(panel: Panel, rows: np.ndarray | None) -> np.ndarray:
    return panel.date_codes if rows is None else panel.date_codes[rows]
