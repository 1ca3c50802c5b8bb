"""Processors that fill values, squash them, or drop rows and columns."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from qfast.data.column_maps import Fill, ShiftedTanh
from qfast.data.panel import Block, Panel, WindowBlock
from qfast.data.price_windows import PriceWindows
from qfast.data.processors.base import Processor, Workspace
from qfast.data.processors.columns import (
    FieldsGroup,
    column_names,
    elementwise,
    is_all,
    rows_by_chunk,
    select,
    whole_groups,
)
from qfast.data.storage import Storage
from qfast.errors import ConfigError, DataError, some, suggest

log = logging.getLogger("qfast.data")

FEATURE = "feature"
FEW_COLUMNS = "few columns remain, which need about as little memory as a view"  # `Processor.no_view`
LEAST_SELECTED = 1 / 4  # of the columns that a view computes; with fewer, columns are stored


class Fillna(Processor):
    """Replaces NaN by a constant.

    Parameters
    ----------
    fields_group : None, str, list or (group, column)
        Columns. None: all.
    fill_value : float

    Raises
    ------
    ConfigError
        `fill_value` is not a number.

    Notes
    -----
    Source: Fillna in qlib/data/dataset/processor.py of pyqlib 0.9.7.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=2), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"x": [np.nan, 3.0]}, index=index))
    >>> Fillna()(panel).values("feature")[:, 0].tolist()
    [0.0, 3.0]
    """

    def __init__(self, fields_group: FieldsGroup = None, fill_value: float = 0) -> None:
        if isinstance(fill_value, bool) or not isinstance(fill_value, (int, float, np.number)):
            raise ConfigError(f"Fillna: fill_value must be a number, got {fill_value!r}.")
        self.fields_group = fields_group
        self.fill_value = fill_value

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        return elementwise(panel, select(panel, self.fields_group), space, lambda group: Fill(self.fill_value))


class TanhProcess(Processor):
    """Replaces x by tanh(x - 1) in every column whose name does not contain "LABEL".

    Like in Qlib (TanhProcess in qlib/data/dataset/processor.py), the name of the column matters and not its group, so a
    label with another name is transformed too.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=2), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"x": [1.0, 2.0], "LABEL0": [5.0, 5.0]}, index=index))
    >>> TanhProcess()(panel).values("feature").round(3).tolist()
    [[0.0, 5.0], [0.7620000243186951, 5.0]]
    """

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        selection = [
            (
                group,
                np.array([j for j, name in enumerate(block.columns) if "LABEL" not in name], dtype=np.intp),
            )
            for group, block in panel.blocks.items()
        ]
        return elementwise(panel, selection, space, lambda group: ShiftedTanh())


class DropnaProcessor(Processor):
    """Drops rows with a NaN in any of the selected columns. Only the panel's mask changes.

    Parameters
    ----------
    fields_group : None, str, list or (group, column)
        Columns. None: all.

    Notes
    -----
    Source: DropnaProcessor in qlib/data/dataset/processor.py of pyqlib 0.9.7.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=2), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"x": [np.nan, 3.0]}, index=index))
    >>> DropnaProcessor("feature")(panel).n_live
    1
    """

    def __init__(self, fields_group: FieldsGroup = None) -> None:
        self.fields_group = fields_group

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        complete = np.ones(panel.n_rows, dtype=bool)
        for group, positions in select(panel, self.fields_group):
            values = panel.table(group)
            for rows in rows_by_chunk(panel.n_rows):
                part = values[rows] if is_all(positions, values) else values[rows, positions]
                complete[rows] &= ~np.isnan(part).any(axis=1)
        return panel if complete.all() else panel.keep(complete)


class DropnaLabel(DropnaProcessor):
    """Drops rows whose label is NaN. It is for learning only, because inference data has no labels.

    Parameters
    ----------
    fields_group : str
        Group of the labels.

    Examples
    --------
    >>> DropnaLabel().is_for_infer()
    False
    """

    def __init__(self, fields_group: FieldsGroup = "label") -> None:
        super().__init__(fields_group)

    def is_for_infer(self) -> bool:
        """False, because it reads labels."""
        return False


class DropCol(Processor):
    """Drops columns by name from all groups.

    Parameters
    ----------
    col_list : sequence of str
        Names. Unknown names are logged as a warning and ignored.

    Raises
    ------
    ConfigError
        `col_list` is not a list of names.

    Notes
    -----
    Source: DropCol in qlib/data/dataset/processor.py of pyqlib 0.9.7.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=1), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"x": [1.0], "y": [2.0]}, index=index))
    >>> DropCol(["x"])(panel).columns("feature")
    ('y',)
    """

    no_view = FEW_COLUMNS

    def __init__(self, col_list: Sequence[str] = ()) -> None:
        self.col_list = _name_list("DropCol", col_list)

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        _warn_unknown("DropCol", self.col_list, panel, space)
        space.omitted -= set(self.col_list)
        return keep_columns(panel, self.kept(panel), space.storage)

    def kept(self, panel: Panel) -> dict[str, list[bool]]:
        """For each group, whether each of its columns remains."""
        return {g: [c not in self.col_list for c in b.columns] for g, b in panel.blocks.items()}


class FilterCol(Processor):
    """Keeps only the listed columns of a group, in the order of the group. Other groups are unchanged.

    Parameters
    ----------
    fields_group : None, str, list or (group, column)
        Columns to filter.
    col_list : sequence of str
        Names of the columns to keep. Unknown names are logged as a warning and ignored.

    Raises
    ------
    ConfigError
        `col_list` is not a list of names.
    DataError
        None of the names is in the group.

    Notes
    -----
    Like in Qlib (FilterCol in qlib/data/dataset/processor.py), columns are compared by name only. A column of another
    group with the name of a removed column is removed too.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=1), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"x": [1.0], "y": [2.0], "z": [3.0]}, index=index))
    >>> FilterCol("feature", ["z", "x"])(panel).columns("feature")
    ('x', 'z')
    """

    no_view = FEW_COLUMNS

    def __init__(self, fields_group: FieldsGroup = "feature", col_list: Sequence[str] = ()) -> None:
        self.fields_group = fields_group
        self.col_list = _name_list("FilterCol", col_list)

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        kept = self.kept(panel)
        _warn_unknown("FilterCol", self.col_list, panel, space)
        if FEATURE in whole_groups(panel, self.fields_group):
            space.omitted &= set(self.col_list)
        return keep_columns(panel, kept, space.storage)

    def kept(self, panel: Panel) -> dict[str, list[bool]]:
        """For each group, whether each of its columns remains.

        Raises
        ------
        DataError
            None of the names is in the group.
        """
        inside = {n for group, p in select(panel, self.fields_group) for n in column_names(panel, group, p)}
        if not inside.intersection(self.col_list):
            raise DataError(
                f"FilterCol: none of the columns [{some(self.col_list)}] is in group {self.fields_group!r}, which has "
                f"[{some(sorted(inside))}]."
            )
        listed = set(self.col_list)
        return {g: [c in listed or c not in inside for c in b.columns] for g, b in panel.blocks.items()}


def _name_list(processor: str, names: object) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, (Sequence, set, np.ndarray, pd.Index)):
        raise ConfigError(f"{processor}: col_list must be a list of column names, got {names!r}.")
    return tuple(str(n) for n in names)


def _warn_unknown(processor: str, names: Sequence[str], panel: Panel, space: Workspace) -> None:
    columns = {c for b in panel.blocks.values() for c in b.columns} | space.omitted
    for name in names:
        if name not in columns:
            log.warning("%s: ignoring column %r, which the data lacks.%s", processor, name, suggest(name, columns))


def keep_columns(panel: Panel, keep: Mapping[str, Sequence[bool]], storage: Storage | None = None) -> Panel:
    """A panel with the columns of each group for which `keep` is True. A group without columns is removed."""
    blocks = dict(panel.blocks)
    for group, mask in keep.items():
        block = panel.block(group)
        if all(mask):
            continue
        if not any(mask):
            del blocks[group]
            continue
        positions, table = np.flatnonzero(mask), block.table
        names = tuple(block.columns[p] for p in positions)
        if isinstance(table, PriceWindows):
            windows = table.select(positions)
            if windows.required or len(positions) >= windows.computed * LEAST_SELECTED:
                blocks[group] = WindowBlock(windows, names)
                continue
        values = (storage or Storage()).empty((panel.n_rows, len(positions)), table.dtype)
        for rows in rows_by_chunk(panel.n_rows):
            values[rows] = table[rows][:, positions]
        blocks[group] = Block(values, names)
    return replace(panel, blocks=blocks)
