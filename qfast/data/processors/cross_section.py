"""Across the stocks of one datetime: z-score, rank, and filling by the day's mean."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from qfast.data.panel import Panel
from qfast.data.processors.base import Processor, Workspace
from qfast.data.processors.columns import FieldsGroup, Selection, by_column, day_codes, rows_by_chunk, select
from qfast.data.processors.fitted import MAD_TO_STD, OUTLIER
from qfast.errors import ConfigError

RANK_TO_STD = 3.46  # sqrt(12): a uniform rank in [-.5, .5] gets unit standard deviation


class CSZScoreNorm(Processor):
    """Per datetime (x - mean) / std with ddof 1; "robust": (x - median) / MAD / 1.4826 clipped to ±3.

    A datetime with one value gives NaN.

    Parameters
    ----------
    fields_group : None, str or list
        Columns; None is all of them.
    method : {"zscore", "robust"}

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=1), ["A", "B", "C"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"x": [1.0, 2.0, 3.0]}, index=index))
    >>> CSZScoreNorm()(panel).values("feature")[:, 0].tolist()
    [-1.0, 0.0, 1.0]
    """

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
    """Per datetime (percentile rank - 0.5) * 3.46, ties averaged, NaN stays NaN.

    Parameters
    ----------
    fields_group : None, str or list

    Notes
    -----
    The result is float32; the reference's is float64.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=1), ["A", "B"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"x": [5.0, 9.0]}, index=index))
    >>> [round(float(v), 2) for v in CSRankNorm()(panel).values("feature")[:, 0]]
    [0.0, 1.73]
    """

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
    """NaN becomes the mean of that column over the stocks of the same datetime.

    Parameters
    ----------
    fields_group : None, str or list

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=1), ["A", "B", "C"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"x": [1.0, np.nan, 3.0]}, index=index))
    >>> CSZFillna()(panel).values("feature")[:, 0].tolist()
    [1.0, 2.0, 3.0]
    """

    def __init__(self, fields_group: FieldsGroup = None) -> None:
        self.fields_group = fields_group

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        def change(part: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
            return _fill_by_day(part, day_codes(panel, rows), np.isnan, np.isnan)

        return by_column(panel, select(panel, self.fields_group), space, change)


class ProcessInf(Processor):
    """±inf becomes the mean of that column's other values at the same datetime (NaN if there are none).

    Works on every column, as in the reference.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=1), ["A", "B", "C"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"x": [1.0, np.inf, 3.0]}, index=index))
    >>> ProcessInf()(panel).values("feature")[:, 0].tolist()
    [1.0, 2.0, 3.0]
    """

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        dirty: Selection = []
        for group, block in panel.blocks.items():
            has_inf = np.zeros(block.values.shape[1], dtype=bool)
            for rows in rows_by_chunk(panel.n_rows):
                has_inf |= np.isinf(block.values[rows]).any(axis=0)
            if has_inf.any():
                dirty.append((group, np.flatnonzero(has_inf)))

        def change(part: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
            return _fill_by_day(part, day_codes(panel, rows), np.isinf, lambda x: ~np.isfinite(x))

        return by_column(panel, dirty, space, change)


def _fill_by_day(
    part: np.ndarray,
    days: np.ndarray,
    replaced: Callable[[np.ndarray], np.ndarray],
    excluded: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Replace values of `part` [c, rows] where `replaced` by their day's mean over those not `excluded`."""
    for column in part:
        holes = np.flatnonzero(replaced(column))
        if len(holes):
            _, mean = _day_mean(np.where(excluded(column), np.nan, column), days)
            column[holes] = mean[days[holes]]
    return part


def _day_mean(column: np.ndarray, days: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per day: number and float64 mean of the non-NaN values; NaN for a day without any."""
    known = ~np.isnan(column)
    n_days = int(days.max()) + 1 if len(days) else 0
    count = np.bincount(days[known], minlength=n_days)
    with np.errstate(invalid="ignore", divide="ignore"):
        return count, np.bincount(days[known], weights=column[known], minlength=n_days) / count


def _zscore_by_day(part: np.ndarray, days: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for column in part:
            count, mean = _day_mean(column, days)
            centred = column - mean[days]
            _, spread = _day_mean(np.square(centred), days)
            # float64 sums of equal float32 values are exact, so a constant day has std 0 and gives NaN
            std = np.sqrt(spread * count / np.where(count > 1, count - 1, np.nan))
            column[:] = centred / std[days]
    return part


def _robust_by_day(part: np.ndarray, days: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for column in part:
            series = pd.Series(column)
            centred = series - series.groupby(days, sort=False).transform("median")
            mad = centred.abs().groupby(days, sort=False).transform("median")
            column[:] = np.clip((centred / mad / MAD_TO_STD).to_numpy(), -OUTLIER, OUTLIER)
    return part
