"""Row by row or column by column: filling, squashing, dropping."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from qfast.data.panel import Panel
from qfast.data.processors.base import Processor, Workspace
from qfast.data.processors.columns import FieldsGroup, column_names, elementwise, is_all, rows_by_chunk, select
from qfast.errors import ConfigError, DataError, suggest

log = logging.getLogger("qfast.data")


class Fillna(Processor):
    """NaN becomes `fill_value`.

    Parameters
    ----------
    fields_group : None, str, list or (group, column)
    fill_value : float

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
        def change(group: str, positions: np.ndarray, values: np.ndarray) -> np.ndarray:
            return np.where(np.isnan(values), values.dtype.type(self.fill_value), values)

        return elementwise(panel, select(panel, self.fields_group), space, change)


class TanhProcess(Processor):
    """x becomes tanh(x - 1) in every column whose name does not contain "LABEL".

    The name decides, not the group, as in the reference: a label that is named by its expression is
    transformed too.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=2), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"x": [1.0, 2.0], "LABEL0": [5.0, 5.0]}, index=index))
    >>> TanhProcess()(panel).values("feature").round(3).tolist()
    [[0.0, 5.0], [0.7620000243186951, 5.0]]
    """

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        def change(group: str, positions: np.ndarray, values: np.ndarray) -> np.ndarray:
            return np.tanh(values - 1)

        selection = [
            (
                group,
                np.array([j for j, name in enumerate(block.columns) if "LABEL" not in name], dtype=np.intp),
            )
            for group, block in panel.blocks.items()
        ]
        return elementwise(panel, selection, space, change)


class DropnaProcessor(Processor):
    """Drop rows with a NaN in any of the selected columns. Blocks are shared, only the mask changes.

    Parameters
    ----------
    fields_group : None, str, list or (group, column)

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
            values = panel.values(group)
            for rows in rows_by_chunk(panel.n_rows):
                part = values[rows] if is_all(positions, values) else values[rows, positions]
                complete[rows] &= ~np.isnan(part).any(axis=1)
        return panel if complete.all() else panel.keep(complete)


class DropnaLabel(DropnaProcessor):
    """Drop rows whose label is NaN. For learning only: at inference the label is not known.

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
        """False: rows are chosen by their label."""
        return False


class DropCol(Processor):
    """Drop the columns of these names from every group.

    Parameters
    ----------
    col_list : sequence of str
        Unknown names are ignored with a warning.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=1), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"x": [1.0], "y": [2.0]}, index=index))
    >>> DropCol(["x"])(panel).columns("feature")
    ('y',)
    """

    def __init__(self, col_list: Sequence[str] = ()) -> None:
        self.col_list = _name_list("DropCol", col_list)

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        _warn_unknown("DropCol", self.col_list, {c for b in panel.blocks.values() for c in b.columns})
        return _keep_columns(panel, {g: [c not in self.col_list for c in b.columns] for g, b in panel.blocks.items()})


class FilterCol(Processor):
    """Keep the listed columns of one group, in the group's own order; other groups stay.

    Parameters
    ----------
    fields_group : str or None
        Group to filter.
    col_list : sequence of str
        Names to keep; unknown ones are ignored with a warning.

    Raises
    ------
    DataError
        None of the listed names is in the group.

    Notes
    -----
    As in the reference a name decides: a column of another group that shares its name with a column
    of the filtered group is kept only if it is listed.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=1), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"x": [1.0], "y": [2.0], "z": [3.0]}, index=index))
    >>> FilterCol("feature", ["z", "x"])(panel).columns("feature")
    ('x', 'z')
    """

    def __init__(self, fields_group: FieldsGroup = "feature", col_list: Sequence[str] = ()) -> None:
        self.fields_group = fields_group
        self.col_list = _name_list("FilterCol", col_list)

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        inside = {n for group, p in select(panel, self.fields_group) for n in column_names(panel, group, p)}
        if not inside.intersection(self.col_list):
            raise DataError(
                f"FilterCol: none of the columns {list(self.col_list)[:12]} is in group {self.fields_group!r}, "
                f"which has {sorted(inside)[:12]}."
            )
        _warn_unknown("FilterCol", self.col_list, {c for b in panel.blocks.values() for c in b.columns})
        wanted = set(self.col_list)
        return _keep_columns(
            panel, {g: [c in wanted or c not in inside for c in b.columns] for g, b in panel.blocks.items()}
        )


def _name_list(who: str, names: object) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, (Sequence, set, np.ndarray, pd.Index)):
        raise ConfigError(f"{who}: col_list must be a list of column names, got {names!r}.")
    return tuple(str(n) for n in names)


def _warn_unknown(who: str, names: Sequence[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            log.warning("%s: column %r is not in the data and is ignored.%s", who, name, suggest(name, known))


def _keep_columns(panel: Panel, keep: Mapping[str, Sequence[bool]]) -> Panel:
    """Panel with the marked columns of each group; a group that loses all of them disappears."""
    blocks = dict(panel.blocks)
    for group, mask in keep.items():
        block = panel.block(group)
        if all(mask):
            continue
        if not any(mask):
            del blocks[group]
            continue
        positions = np.flatnonzero(mask)
        values = np.empty((panel.n_rows, len(positions)), dtype=block.values.dtype)
        for rows in rows_by_chunk(panel.n_rows):
            values[rows] = block.values[rows][:, positions]
        blocks[group] = replace(block, values=values, columns=tuple(block.columns[p] for p in positions))
    return replace(panel, blocks=blocks)
