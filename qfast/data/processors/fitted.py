"""Normalizations whose statistics are learned from a period of the data."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from qfast.data.column_maps import ColumnMap, Normalize
from qfast.data.panel import Panel
from qfast.data.processors.base import Processor, Workspace
from qfast.data.processors.columns import FieldsGroup, column_names, columns_by_chunk, elementwise, select
from qfast.dates import DateLike
from qfast.errors import DataError, NotFittedError, shown, some

log = logging.getLogger("qfast.data")

EPS = 1e-12  # Qlib's guard against division by zero for a constant column
MAD_TO_STD = 1.4826  # standard deviation of a normal distribution, divided by its median absolute deviation
OUTLIER = 3.0  # clip bound in (robust) standard deviations

STATE_PARTS = ("positions", "shift", "scale")  # arrays of each group in a saved state


class _FittedNorm(Processor):
    """(x - shift) / scale, with a shift and a scale for each column that are learned from the fit period."""

    def __init__(
        self, fit_start_time: DateLike | None, fit_end_time: DateLike | None, fields_group: FieldsGroup = None
    ) -> None:
        self.fit_start_time = fit_start_time
        self.fit_end_time = fit_end_time
        self.fields_group = fields_group
        self._fitted: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None

    def fit(self, panel: Panel) -> None:
        """Learn shift and scale of each selected column.

        Raises
        ------
        DataError
            No live row is between `fit_start_time` and `fit_end_time`.
        """
        rows = panel.rows_between(self.fit_start_time, self.fit_end_time)
        if len(rows) == 0:
            dates = panel.datetimes
            span = f"{dates[0]} to {dates[-1]}" if len(dates) else "no dates at all"
            raise DataError(
                f"{type(self).__name__}: no row is between fit_start_time={self.fit_start_time} and "
                f"fit_end_time={self.fit_end_time}; the data has {span}. Remedy: a fit period inside the data."
            )
        selected = None if len(rows) == panel.n_rows else rows
        fitted = {}
        for group, positions in select(panel, self.fields_group):
            values = panel.table(group)
            shift = np.empty(len(positions), dtype=values.dtype)
            scale = np.empty(len(positions), dtype=values.dtype)
            number = 0
            for _, part in columns_by_chunk(values, positions, selected):
                for column in part:
                    shift[number], scale[number] = self._learn(column[~np.isnan(column)])
                    number += 1
            self._report_empty(column_names(panel, group, positions[np.isnan(shift) | np.isnan(scale)]))
            fitted[group] = (positions, shift, scale)
        self._fitted = fitted

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        if self._fitted is None:
            raise NotFittedError(f"{type(self).__name__} must be fitted before it is applied. Remedy: call fit(panel).")
        fitted = self._fitted
        for group, (positions, _, _) in fitted.items():
            if len(positions) and int(positions[-1]) >= len(panel.columns(group)):
                raise DataError(
                    f"{type(self).__name__} was fitted to {len(positions)} columns of group {group!r}, but the panel "
                    f"has {len(panel.columns(group))}. Remedy: apply it to the columns it was fitted to."
                )

        def map_of(group: str) -> ColumnMap:
            _, shift, scale = fitted[group]
            return Normalize(shift, scale, self._limit())

        return elementwise(panel, [(g, p) for g, (p, _, _) in fitted.items()], space, map_of)

    def state(self) -> dict[str, np.ndarray]:
        """Arrays "<group>.positions", "<group>.shift" and "<group>.scale" [c] of each group."""
        if self._fitted is None:
            raise NotFittedError(f"{type(self).__name__} is not fitted and has no state. Remedy: call fit(panel).")
        return {
            f"{group}.{part}": array
            for group, arrays in self._fitted.items()
            for part, array in zip(STATE_PARTS, arrays, strict=True)
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Load the result of `state`; raises a DataError if arrays are missing, unexpected or differ in length."""
        groups = sorted({group for group, _, part in (key.rpartition(".") for key in state) if part in STATE_PARTS})
        expected = [f"{group}.{part}" for group in groups for part in STATE_PARTS]
        missing, extra = [key for key in expected if key not in state], sorted(set(state) - set(expected))
        if not groups or missing or extra:
            absent = missing or ("no array" if groups else "all arrays")
            raise DataError(
                f"{type(self).__name__}: the saved state lacks {absent} and has {extra or 'no'} unexpected arrays."
            )
        fitted = {}
        for group in groups:
            positions, shift, scale = (np.asarray(state[f"{group}.{part}"]) for part in STATE_PARTS)
            if not (positions.ndim == 1 and positions.shape == shift.shape == scale.shape):
                raise DataError(
                    f"{type(self).__name__}: the saved arrays of group {group!r} must be equally long, got positions "
                    f"{positions.shape}, shift {shift.shape}, scale {scale.shape}."
                )
            self._require_statistics(group, positions, shift, scale)
            fitted[group] = (positions, shift, scale)
        self._fitted = fitted
        self.frozen = True

    def _require_statistics(self, group: str, positions: np.ndarray, shift: np.ndarray, scale: np.ndarray) -> None:
        """Refuse saved arrays that would leave columns unchanged, or that numpy would convert to other values."""
        is_ascending = positions.dtype.kind in "iu" and bool((np.diff(positions) > 0).all())
        if not len(positions) or not is_ascending or positions[0] < 0:
            raise DataError(
                f"{type(self).__name__}: the saved positions of group {group!r} must be ascending column numbers, at "
                f"least one, got {shown(positions.tolist())} of dtype {positions.dtype}."
            )
        for name, array in (("shift", shift), ("scale", scale)):
            if array.dtype.kind != "f":
                raise DataError(
                    f"{type(self).__name__}: the saved {name} of group {group!r} must be floating-point numbers, got "
                    f"{shown(array.tolist())} of dtype {array.dtype}."
                )

    def _learn(self, values: np.ndarray) -> tuple[Any, Any]:
        """(shift, scale) of the values of one column without NaN."""
        raise NotImplementedError(f"{type(self).__name__} must implement _learn(values)")

    def _limit(self) -> float:
        """Largest absolute value of the result."""
        return np.inf

    def _report_empty(self, names: list[str]) -> None:
        if names:
            log.warning(
                "%s: column(s) %s have no values between %s and %s and become NaN",
                type(self).__name__,
                some(names),
                self.fit_start_time,
                self.fit_end_time,
            )


class RobustZScoreNorm(_FittedNorm):
    """(x - median) / (1.4826 (median |x - median| + 1e-12)), clipped to ±3. NaN stays NaN.

    Parameters
    ----------
    fit_start_time, fit_end_time : date-like or None
        Period of the statistics, both inclusive. None: unbounded.
    fields_group : None, str, list or (group, column)
        Columns. None: all.
    clip_outlier : bool
        Clip the result to [-3, 3].

    Raises
    ------
    DataError
        `fit` raises it if no row is in the period.

    Notes
    -----
    A column without values in the period becomes NaN, and a warning names it. Source: RobustZScoreNorm in
    qlib/data/dataset/processor.py of pyqlib 0.9.7.

    Examples
    --------
    >>> import pandas as pd
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=5), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"x": [1.0, 2.0, 3.0, 4.0, 90.0]}, index=index))
    >>> step = RobustZScoreNorm(None, None)
    >>> step.fit(panel)
    >>> [round(float(v), 3) for v in step(panel).values("feature")[:, 0]]
    [-1.349, -0.674, 0.0, 0.674, 3.0]
    """

    def __init__(
        self,
        fit_start_time: DateLike | None,
        fit_end_time: DateLike | None,
        fields_group: FieldsGroup = None,
        clip_outlier: bool = True,
    ) -> None:
        super().__init__(fit_start_time, fit_end_time, fields_group)
        self.clip_outlier = clip_outlier

    def _learn(self, values: np.ndarray) -> tuple[Any, Any]:
        if len(values) == 0:
            return np.nan, np.nan
        with np.errstate(invalid="ignore"):
            center = np.median(values, overwrite_input=True)  # the column is a copy
            distance = np.abs(values - center)
            distance = distance[~np.isnan(distance)]
        if len(distance) == 0:
            return center, np.nan
        spread = np.median(distance, overwrite_input=True)
        return center, (spread + values.dtype.type(EPS)) * values.dtype.type(MAD_TO_STD)

    def _limit(self) -> float:
        return OUTLIER if self.clip_outlier else np.inf


class ZScoreNorm(_FittedNorm):
    """(x - mean) / std with ddof 0, learned from the values of the fit period without NaN.

    Constant columns are not changed.

    Parameters
    ----------
    fit_start_time, fit_end_time, fields_group
        As in `RobustZScoreNorm`.

    Raises
    ------
    DataError
        `fit` raises it if no row is in the period.

    Notes
    -----
    Sums are computed in float64, where Qlib uses the type of the data. Source: ZScoreNorm in
    qlib/data/dataset/processor.py of pyqlib 0.9.7.

    Examples
    --------
    >>> import pandas as pd
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=2), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"x": [1.0, 3.0]}, index=index))
    >>> step = ZScoreNorm("2024-01-01", "2024-01-02")
    >>> step.fit(panel)
    >>> step(panel).values("feature")[:, 0].tolist()
    [-1.0, 1.0]
    """

    def _learn(self, values: np.ndarray) -> tuple[Any, Any]:
        if len(values) == 0:
            return np.nan, np.nan
        with np.errstate(invalid="ignore", over="ignore"):
            mean = values.mean(dtype=np.float64)
            std = np.sqrt(np.square(values - mean, dtype=np.float64).mean())
        return (0.0, 1.0) if std == 0 else (mean, std)


class MinMaxNorm(_FittedNorm):
    """(x - min) / (max - min), with minimum and maximum of the fit period.

    Values outside the period are not clipped, and constant columns are not changed.

    Parameters
    ----------
    fit_start_time, fit_end_time, fields_group
        As in `RobustZScoreNorm`.

    Raises
    ------
    DataError
        `fit` raises it if no row is in the period.

    Notes
    -----
    Source: MinMaxNorm in qlib/data/dataset/processor.py of pyqlib 0.9.7.

    Examples
    --------
    >>> import pandas as pd
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=3), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"x": [1.0, 3.0, 7.0]}, index=index))
    >>> step = MinMaxNorm("2024-01-01", "2024-01-02")
    >>> step.fit(panel)
    >>> step(panel).values("feature")[:, 0].tolist()
    [0.0, 1.0, 3.0]
    """

    def _learn(self, values: np.ndarray) -> tuple[Any, Any]:
        if len(values) == 0:
            return np.nan, np.nan
        low, high = values.min(), values.max()
        with np.errstate(invalid="ignore"):
            return (0.0, 1.0) if low == high else (low, high - low)
