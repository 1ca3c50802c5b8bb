"""Processors across the instruments of one datetime: z-score, rank, and filling with the mean of the day."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from qfast.data.panel import Panel
from qfast.data.price_windows import PriceWindows
from qfast.data.processors.base import Processor, Workspace
from qfast.data.processors.columns import (
    FieldsGroup,
    by_column,
    by_column_in_few_rows,
    day_codes,
    rows_by_chunk,
    select,
)
from qfast.data.processors.fitted import MAD_TO_STD, OUTLIER
from qfast.errors import ConfigError

RANK_TO_STD = 3.46  # Qlib's value for sqrt(12), which scales a uniform rank in [-0.5, 0.5] to unit standard deviation

FEW_ROWS = 1 / 16  # part of the rows that a view stores with their values
OF_DAYS = "its constants are those of a day, and a view has constants of columns only"  # `Processor.no_view`


class CSZScoreNorm(Processor):
    """Cross-sectional z-score: for each datetime (x - mean) / std with ddof 1.

    method="robust" is (x - median) / (1.4826 median |x - median|), clipped to ±3. If a datetime has
    only one value, that value becomes NaN.

    Parameters
    ----------
    fields_group : None, str, list or (group, column)
        Columns. None: all.
    method : {"zscore", "robust"}

    Raises
    ------
    ConfigError
        `method` is none of these.

    Notes
    -----
    Source: CSZScoreNorm in qlib/data/dataset/processor.py of pyqlib 0.9.7.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=1), ["A", "B", "C"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"x": [1.0, 2.0, 3.0]}, index=index))
    >>> CSZScoreNorm()(panel).values("feature")[:, 0].tolist()
    [-1.0, 0.0, 1.0]
    """

    no_view = OF_DAYS

    def __init__(self, fields_group: FieldsGroup = None, method: str = "zscore") -> None:
        if method not in ("zscore", "robust"):
            raise ConfigError(f"CSZScoreNorm: method must be 'zscore' or 'robust', got {method!r}.")
        self.fields_group = fields_group
        self.method = method

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        def change(part: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
            days = day_codes(panel, rows)
            return _robust_by_day(part, days) if self.method == "robust" else _zscore_by_day(part, days)

        return by_column(panel, select(panel, self.fields_group), space, change)


class CSRankNorm(Processor):
    """Cross-sectional rank: for each datetime (percentile rank - 0.5) * 3.46. Ties have their mean rank; NaN stays NaN.

    Parameters
    ----------
    fields_group : None, str, list or (group, column)
        Columns. None: all.

    Notes
    -----
    Source: CSRankNorm in qlib/data/dataset/processor.py of pyqlib 0.9.7, whose result is float64 instead of float32.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=1), ["A", "B"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"x": [5.0, 9.0]}, index=index))
    >>> [round(float(v), 2) for v in CSRankNorm()(panel).values("feature")[:, 0]]
    [0.0, 1.73]
    """

    no_view = OF_DAYS

    def __init__(self, fields_group: FieldsGroup = None) -> None:
        self.fields_group = fields_group

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        def change(part: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
            days = day_codes(panel, rows)
            for column in part:
                ranks = pd.Series(column).groupby(days, sort=False).rank(pct=True).to_numpy()
                column[:] = (ranks - 0.5) * RANK_TO_STD
            return part

        return by_column(panel, select(panel, self.fields_group), space, change)


class CSZFillna(Processor):
    """Replaces NaN by the mean of the column over all instruments on the same datetime.

    Parameters
    ----------
    fields_group : None, str, list or (group, column)
        Columns. None: all.

    Notes
    -----
    Source: CSZFillna in qlib/data/dataset/processor.py of pyqlib 0.9.7.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=1), ["A", "B", "C"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"x": [1.0, np.nan, 3.0]}, index=index))
    >>> CSZFillna()(panel).values("feature")[:, 0].tolist()
    [1.0, 2.0, 3.0]
    """

    no_view = OF_DAYS

    def __init__(self, fields_group: FieldsGroup = None) -> None:
        self.fields_group = fields_group

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        def change(part: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
            return _fill_by_day(part, day_codes(panel, rows), np.isnan, np.isnan)

        return by_column(panel, select(panel, self.fields_group), space, change)


class ProcessInf(Processor):
    """Replaces ±inf by the mean of the column's finite values on the same datetime; by NaN if there are none.

    Like Qlib's ProcessInf (qlib/data/dataset/processor.py), it processes all columns.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=1), ["A", "B", "C"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"x": [1.0, np.inf, 3.0]}, index=index))
    >>> ProcessInf()(panel).values("feature")[:, 0].tolist()
    [1.0, 2.0, 3.0]
    """

    no_view = "too many rows contain infinite features"

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        def change(part: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
            return _fill_by_day(part, day_codes(panel, rows), np.isinf, lambda x: ~np.isfinite(x))

        for group, block in panel.blocks.items():
            table = block.table
            column_has_inf = np.zeros(table.shape[1], dtype=bool)
            row_has_inf = np.zeros(panel.n_rows, dtype=bool)
            for rows in rows_by_chunk(panel.n_rows):
                infinite = np.isinf(table[rows])
                column_has_inf |= infinite.any(axis=0)
                row_has_inf[rows] = infinite.any(axis=1)
            positions = np.flatnonzero(column_has_inf)
            if isinstance(table, PriceWindows) and row_has_inf.mean() < FEW_ROWS and len(positions):
                panel = by_column_in_few_rows(panel, group, table, positions, row_has_inf, change)
            else:
                panel = by_column(panel, [(group, positions)], space, change)
        return panel


def _fill_by_day(
    part: np.ndarray,
    days: np.ndarray,
    replaced: Callable[[np.ndarray], np.ndarray],
    excluded: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Replace the values of `part` [c, rows] that are `replaced` by the day's mean of the values not `excluded`."""
    for column in part:
        rows = np.flatnonzero(replaced(column))
        if len(rows):
            _, mean = _day_mean(np.where(excluded(column), np.nan, column), days)
            column[rows] = mean[days[rows]]
    return part


def _day_mean(column: np.ndarray, days: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count and float64 mean of the values of each day, without NaN. A day without values has the mean NaN."""
    present = ~np.isnan(column)
    n_days = int(days.max()) + 1 if len(days) else 0
    count = np.bincount(days[present], minlength=n_days)
    with np.errstate(invalid="ignore", divide="ignore"):
        return count, np.bincount(days[present], weights=column[present], minlength=n_days) / count


def _zscore_by_day(part: np.ndarray, days: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for column in part:
            count, mean = _day_mean(column, days)
            centered = column - mean[days]
            _, spread = _day_mean(np.square(centered), days)
            # Float64 sums of equal float32 values are exact, so a constant day has std 0 and becomes NaN.
            std = np.sqrt(spread * count / np.where(count > 1, count - 1, np.nan))
            column[:] = centered / std[days]
    return part


def _robust_by_day(part: np.ndarray, days: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for column in part:
            series = pd.Series(column)
            centered = series - series.groupby(days, sort=False).transform("median")
            mad = centered.abs().groupby(days, sort=False).transform("median")
            column[:] = np.clip((centered / mad / MAD_TO_STD).to_numpy(), -OUTLIER, OUTLIER)
    return part
