"""Selects columns of a panel, and reads and writes a few of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from qfast.data.column_maps import ColumnMap
from qfast.data.panel import ROW_CHUNK, Panel, Table, WindowBlock
from qfast.data.price_windows import PriceWindows
from qfast.data.processors.base import Workspace
from qfast.errors import ConfigError, DataError, some, suggest

COLUMN_CHUNK_BYTES = 64 << 20  # size of the temporary copy of a few columns
DAY_BLOCK_BYTES = 64 << 20  # size of the temporary copies of a few days
BYTES_PER_ROW = 64  # that a cross-sectional processor needs for one column at a time
MANY_ROWS = 1 << 22  # cross-sectional processors divide a larger panel into blocks of days

FieldsGroup: TypeAlias = str | Sequence[str] | None
"""None for all columns, a group, a list of groups, or the pair (group, column)."""

Selection = list[tuple[str, np.ndarray]]  # (group, column positions)


def select(panel: Panel, fields_group: FieldsGroup) -> Selection:
    """Column positions, by group, that `fields_group` selects.

    Parameters
    ----------
    panel : Panel
    fields_group : None, str, list of str, or (group, column)
        None: all columns. A name: that group. A list: several groups. A pair: one column.

    Returns
    -------
    list of (str, int [c])

    Raises
    ------
    ConfigError
        `fields_group` has another form.
    DataError
        The panel lacks the group or column.

    Examples
    --------
    >>> import pandas as pd
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=1), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"x": [1.0], "y": [2.0]}, index=index))
    >>> select(panel, ("feature", "y"))
    [('feature', array([1]))]
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
                f"fields_group {fields_group!r}: group {group!r} has no column {name!r}; it has {some(columns)}."
                + suggest(name, columns)
            )
        groups = list(fields_group)
        if None in groups:
            return select(panel, None)
    else:
        raise ConfigError(
            f"fields_group must be None, a group name, a list of group names or (group, column), got {fields_group!r}."
        )
    return [(group, np.arange(len(panel.columns(group)))) for group in groups]


def whole_groups(panel: Panel, fields_group: FieldsGroup) -> list[str]:
    """Groups of which `fields_group` selects all columns, and not one column by its name."""
    selection = select(panel, fields_group)
    one_column = isinstance(fields_group, tuple) and len(fields_group) == 2 and fields_group[1] not in panel.blocks
    return [] if one_column else [group for group, _ in selection]


def column_names(panel: Panel, group: str, positions: np.ndarray) -> list[str]:
    """Names of the columns of a group at `positions`."""
    names = panel.columns(group)
    return [names[int(p)] for p in positions]


def is_all(positions: np.ndarray, values: Table) -> bool:
    """True if `positions` are all columns of `values` [R, C]."""
    return len(positions) == values.shape[1]


def target(panel: Panel, group: str, positions: np.ndarray, space: Workspace) -> np.ndarray:
    """The array [R, C] for new values of a group: its block if `space` owns it, otherwise a new array.

    The caller must write the columns at `positions`. All other columns have their values already.
    """
    values = panel.values(group)
    if group in space.owned and values.flags.writeable:
        space.overwritten.add(group)
        return values
    out = space.storage.empty(values.shape, values.dtype)
    if not is_all(positions, values):
        for rows in rows_by_chunk(panel.n_rows):
            out[rows] = values[rows]
    return out


def rows_by_chunk(n_rows: int) -> Iterator[slice]:
    """Slices of at most ROW_CHUNK rows that cover `n_rows` rows."""
    for start in range(0, n_rows, ROW_CHUNK):
        yield slice(start, min(start + ROW_CHUNK, n_rows))


def computed(panel: Panel, group: str, space: Workspace) -> Panel:
    """A panel in which the values of a group are stored. Windows of prices are computed, and `space` owns them."""
    windows = panel.table(group)
    if not isinstance(windows, PriceWindows):
        return panel
    values = space.storage.empty(windows.shape)
    for rows in rows_by_chunk(panel.n_rows):
        values[rows] = windows[rows]
    space.owned.add(group)
    return panel.replace(group, values)


def columns_by_chunk(
    values: Table, positions: np.ndarray, rows: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A few columns at a time, as (positions, contiguous copy [c, rows]). None: all rows."""
    n_rows = len(values) if rows is None else len(rows)
    # Each chunk reads all cache lines or pages of a table, so a large table needs few chunks.
    n_bytes = COLUMN_CHUNK_BYTES if isinstance(values, PriceWindows) else max(COLUMN_CHUNK_BYTES, values.nbytes // 16)
    step = int(min(16, max(1, n_bytes // max(1, n_rows * values.itemsize))))
    for start in range(0, len(positions), step):
        chunk = positions[start : start + step]
        if isinstance(values, PriceWindows):
            yield chunk, values.columns(chunk, rows)
            continue
        low, high = int(chunk[0]), int(chunk[-1]) + 1
        part = values[:, low:high] if high - low == len(chunk) else values[:, chunk]
        # Callers write to the result, so it must be a copy. A single column transposed would be a view.
        yield chunk, np.array((part if rows is None else part[rows]).T, order="C", copy=True)


def elementwise(panel: Panel, selection: Selection, space: Workspace, map_of: Callable[[str], ColumnMap]) -> Panel:
    """Apply `map_of(group)` to the selected columns: to windows of prices when they are read, to others at once."""
    for group, positions in selection:
        if len(positions) == 0:
            continue
        table, change = panel.table(group), map_of(group)
        if isinstance(table, PriceWindows):
            panel = panel.with_block(group, WindowBlock(table.mapped(change, positions), panel.columns(group)))
            continue
        panel = computed(panel, group, space)
        values = panel.values(group)
        out = target(panel, group, positions, space)
        all_columns = is_all(positions, values)
        for rows in rows_by_chunk(panel.n_rows):
            if all_columns:
                out[rows] = change(values[rows])
            else:
                out[rows, positions] = change(values[rows, positions])
        panel = panel.replace(group, out)
    return panel


def by_column(
    panel: Panel,
    selection: Selection,
    space: Workspace,
    change: Callable[[np.ndarray, np.ndarray | None], np.ndarray],
) -> Panel:
    """Replace the live rows of the selected columns by `change(values [c, rows], row numbers or None for all rows)`.

    `change` must treat each column and each day alone, because large panels are processed in blocks of days.
    """
    rows = None if panel.live is None else panel.live_rows()
    for group, positions in selection:
        if len(positions) == 0:
            continue
        panel = computed(panel, group, space)
        values = panel.values(group)
        out = target(panel, group, positions, space)
        if space.storage.folder is not None or panel.n_rows > MANY_ROWS:
            _by_days(panel, values, out, positions, change)
            panel = panel.replace(group, out)
            continue
        for chunk, part in columns_by_chunk(values, positions, rows):
            changed = change(part, rows).T
            low, high = int(chunk[0]), int(chunk[-1]) + 1
            columns: Any = slice(low, high) if high - low == len(chunk) else chunk
            if rows is None:
                out[:, columns] = changed
                continue
            if out is not values:  # dropped rows keep their values
                out[:, columns] = values[:, columns]
            out[rows[:, None], chunk[None, :]] = changed
        panel = panel.replace(group, out)
    return panel


def _by_days(
    panel: Panel,
    values: np.ndarray,
    out: np.ndarray,
    positions: np.ndarray,
    change: Callable[[np.ndarray, np.ndarray | None], np.ndarray],
) -> None:
    """Write the selected columns of a few days at a time to `out`, which reads every page of a file about once."""
    if out is not values:  # dropped rows keep their values
        for rows in rows_by_chunk(panel.n_rows):
            out[rows, positions] = values[rows, positions]
    live = panel.live_rows()
    days = panel.date_codes[live]
    per_day = max(1, np.bincount(days, minlength=1).max() * (BYTES_PER_ROW + len(positions) * values.itemsize))
    step = int(max(1, DAY_BLOCK_BYTES // per_day))
    for first in range(0, int(days.max(initial=-1)) + 1, step):
        rows = live[(days >= first) & (days < first + step)]
        if len(rows):
            part = np.ascontiguousarray(values[rows[:, None], positions[None, :]].T)
            out[rows[:, None], positions[None, :]] = change(part, rows).T


def by_column_in_few_rows(
    panel: Panel,
    group: str,
    windows: PriceWindows,
    positions: np.ndarray,
    changes: np.ndarray,
    change: Callable[[np.ndarray, np.ndarray | None], np.ndarray],
) -> Panel:
    """`by_column` for windows of prices and a `change` that affects only the rows where `changes` (bool [R]) is True.

    These rows are stored, and the windows remain a view.
    """
    live = None if panel.live is None else panel.live_rows()
    rows = np.flatnonzero(changes if panel.live is None else changes & panel.live)
    values = windows[rows]
    numbers = rows if live is None else np.searchsorted(live, rows)
    for chunk, part in columns_by_chunk(windows, positions, live):
        values[:, chunk] = change(part, live)[:, numbers].T
    return panel.with_block(group, WindowBlock(windows.with_stored(rows, values), panel.columns(group)))


def day_codes(panel: Panel, rows: np.ndarray | None) -> np.ndarray:
    """Date codes of `rows`; None: of all rows."""
    return panel.date_codes if rows is None else panel.date_codes[rows]
