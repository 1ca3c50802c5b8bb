"""Processors: the steps between raw columns and what a model is fed.

They follow the processors of pyqlib 0.9.7 (qlib/data/dataset/processor.py) value for value, on panels
instead of frames. Statistics look at live rows only. A step that changes values writes one new block
and touches a few columns or a few thousand rows at a time; it overwrites the old block instead where
the caller owns it (`Processor.run`). Dropping rows flips the panel's mask and copies nothing.

Results are float32 also where the reference answers in float64 (CSRankNorm).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from qfast.data.panel import ROW_CHUNK, Panel
from qfast.errors import ConfigError, DataError, NotFittedError, suggest
from qfast.registry import PROCESSORS, parameters

__all__ = [
    "CSRankNorm",
    "CSZFillna",
    "CSZScoreNorm",
    "DropCol",
    "DropnaLabel",
    "DropnaProcessor",
    "Fillna",
    "FilterCol",
    "LearnOnlyProcessorError",
    "MinMaxNorm",
    "ProcessInf",
    "Processor",
    "RobustZScoreNorm",
    "TanhProcess",
    "ZScoreNorm",
    "build_processor",
    "run_processors",
]

log = logging.getLogger("qfast.data")

COLUMN_CHUNK_BYTES = 64 << 20  # transient copy of a few columns while statistics are taken
EPS = 1e-12  # keeps a constant column from dividing by zero, as in the reference
MAD_TO_STD = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
RANK_TO_STD = 3.46  # sqrt(12): a uniform rank in [-.5, .5] gets unit standard deviation
OUTLIER = 3.0  # clip bound, in (robust) standard deviations

STATE_PARTS = ("positions", "shift", "scale")  # of a fitted column normalisation, in a saved state

Selection = list[tuple[str, np.ndarray]]  # (group, column positions)


class Workspace:
    """Whose blocks a run of processors may overwrite, and which it did.

    Attributes
    ----------
    owned : set of str
        Groups whose current block nobody else sees.
    overwritten : set of str
        Groups whose original block was written over.
    """

    def __init__(self, owned: Iterable[str] = ()) -> None:
        self.owned = set(owned)
        self.overwritten: set[str] = set()


class LearnOnlyProcessorError(ConfigError, TypeError):
    """A processor that drops rows by their label stands where inference data is made."""


class Processor:
    """One step on a panel: `fit` learns from live rows, calling it gives a new panel.

    Subclasses implement `_apply(panel, space)`; the workspace says which blocks may be overwritten,
    because nobody else sees them. `_target` answers with the array to write to.
    """

    def fit(self, panel: Panel) -> None:
        """Learn what the step needs from the live rows of `panel`; nothing by default."""

    def __call__(self, panel: Panel) -> Panel:
        """The processed panel; `panel` and its blocks stay as they are."""
        return self._apply(panel, Workspace())

    def run(self, panel: Panel, space: Workspace) -> Panel:
        """As calling, but blocks that `space` owns may be overwritten; new blocks become its own."""
        before = {group: block.values for group, block in panel.blocks.items()}
        after = self._apply(panel, space)
        space.owned.update(g for g, block in after.blocks.items() if block.values is not before.get(g))
        return after

    frozen = False  # True once a saved state is loaded: `fit` is then no longer called

    def state(self) -> dict[str, np.ndarray]:
        """What `fit` has learnt, as named arrays that a file can hold; empty for a step that learns nothing."""
        return {}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` gave, and never fit again."""
        if state:
            raise DataError(f"{type(self).__name__} learns nothing, but a saved state holds {sorted(state)}.")
        self.frozen = True

    def is_for_infer(self) -> bool:
        """False for a step that only makes sense where labels are known."""
        return True

    def readonly(self) -> bool:
        """True if the step never changes values in place (the reference's question)."""
        return True

    def config(self, **kwargs: Any) -> None:
        """Replace `fit_start_time` / `fit_end_time` where the processor has them."""
        for name, value in kwargs.items():
            if name not in ("fit_start_time", "fit_end_time"):
                raise ConfigError(f"{type(self).__name__}.config has no setting {name!r}.")
            if hasattr(self, name):
                setattr(self, name, value)

    def __repr__(self) -> str:
        public = {
            k: v for k, v in vars(self).items() if not k.startswith("_") and not isinstance(v, (dict, np.ndarray))
        }
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in public.items())})"

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        raise NotImplementedError(f"{type(self).__name__} must implement _apply(panel, space)")


# ---------------------------------------------------------------- choosing columns, reading and writing blocks
def select(panel: Panel, fields_group: Any) -> Selection:
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


def _is_all(positions: np.ndarray, values: np.ndarray) -> bool:
    return len(positions) == values.shape[1]


def _target(panel: Panel, group: str, positions: np.ndarray, space: Workspace) -> np.ndarray:
    """Array [R, C] for the new values of `group`: the block itself where owned, else a new one.

    Columns outside `positions` already hold their values; the others must be written.
    """
    values = panel.values(group)
    if group in space.owned and values.flags.writeable:
        space.overwritten.add(group)
        return values
    if _is_all(positions, values):
        return np.empty_like(values)
    out: np.ndarray = values.copy()
    return out


def _rows_by_chunk(n_rows: int) -> Iterator[slice]:
    for start in range(0, n_rows, ROW_CHUNK):
        yield slice(start, min(start + ROW_CHUNK, n_rows))


def _columns_by_chunk(
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


def _elementwise(
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
        out = _target(panel, group, positions, space)
        whole = _is_all(positions, values)
        for rows in _rows_by_chunk(panel.n_rows):
            if whole:
                out[rows] = change(group, positions, values[rows])
            else:
                out[rows, positions] = change(group, positions, values[rows, positions])
        panel = panel.replace(group, out)
    return panel


def _by_column(
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
        out = _target(panel, group, positions, space)
        for some, part in _columns_by_chunk(values, positions, rows):
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


def _day_codes(panel: Panel, rows: np.ndarray | None) -> np.ndarray:
    return panel.date_codes if rows is None else panel.date_codes[rows]


# ---------------------------------------------------------------- fitted on a window of time
class _FittedNorm(Processor):
    """(x - shift) / scale per column, both learnt between fit_start_time and fit_end_time inclusive."""

    def __init__(self, fit_start_time: Any, fit_end_time: Any, fields_group: Any = None) -> None:
        self.fit_start_time = fit_start_time
        self.fit_end_time = fit_end_time
        self.fields_group = fields_group
        self._fitted: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None

    def fit(self, panel: Panel) -> None:
        """Learn each selected column's shift and scale.

        Raises
        ------
        DataError
            No live row lies between `fit_start_time` and `fit_end_time`.
        """
        rows = panel.rows_between(self.fit_start_time, self.fit_end_time)
        if len(rows) == 0:
            dates = panel.datetimes
            span = f"{dates[0]} to {dates[-1]}" if len(dates) else "no dates at all"
            raise DataError(
                f"{type(self).__name__}: no row lies between fit_start_time={self.fit_start_time} and "
                f"fit_end_time={self.fit_end_time}; the data has {span}. Remedy: choose a window inside the data."
            )
        every = None if len(rows) == panel.n_rows else rows
        fitted = {}
        for group, positions in select(panel, self.fields_group):
            values = panel.values(group)
            shift = np.empty(len(positions), dtype=values.dtype)
            scale = np.empty(len(positions), dtype=values.dtype)
            at = 0
            for _, part in _columns_by_chunk(values, positions, every):
                for column in part:
                    shift[at], scale[at] = self._learn(column[~np.isnan(column)])
                    at += 1
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
                    f"{type(self).__name__} was fitted on {len(positions)} columns of group {group!r}, "
                    f"the panel has {len(panel.columns(group))}."
                )

        def change(group: str, positions: np.ndarray, values: np.ndarray) -> np.ndarray:
            _, shift, scale = fitted[group]
            with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
                out = values - shift
                out /= scale
            return self._finish(out)

        return _elementwise(panel, [(g, p) for g, (p, _, _) in fitted.items()], space, change)

    def state(self) -> dict[str, np.ndarray]:
        if self._fitted is None:
            raise NotFittedError(f"{type(self).__name__} has learnt nothing yet. Remedy: call fit(panel).")
        return {
            f"{group}.{part}": array
            for group, arrays in self._fitted.items()
            for part, array in zip(STATE_PARTS, arrays, strict=True)
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        groups = {key.rpartition(".")[0] for key in state}
        missing = [f"{g}.{part}" for g in sorted(groups) for part in STATE_PARTS if f"{g}.{part}" not in state]
        if not groups or missing:
            raise DataError(f"{type(self).__name__}: the saved state lacks {missing or 'every array'}.")
        self._fitted = {g: tuple(state[f"{g}.{part}"] for part in STATE_PARTS) for g in groups}  # type: ignore[misc]
        self.frozen = True

    def _learn(self, values: np.ndarray) -> tuple[Any, Any]:
        raise NotImplementedError

    def _finish(self, values: np.ndarray) -> np.ndarray:
        return values

    def _report_empty(self, names: list[str]) -> None:
        if names:
            shown = ", ".join(names[:12]) + (f", ... {len(names) - 12} more" if len(names) > 12 else "")
            log.warning(
                "%s: no usable value between %s and %s in column(s) %s; they become NaN",
                type(self).__name__, self.fit_start_time, self.fit_end_time, shown,
            )  # fmt: skip


class RobustZScoreNorm(_FittedNorm):
    """(x - median) / (1.4826 (median |x - median| + 1e-12)), clipped to ±3; NaN stays NaN.

    Parameters
    ----------
    fit_start_time, fit_end_time : date-like or None
        Window of the statistics, both ends inclusive.
    fields_group : None, str, list or (group, column)
        Columns to normalise; None is all of them.
    clip_outlier : bool
        Clip the result to [-3, 3].

    Raises
    ------
    DataError
        From `fit`, where no row lies in the window.

    Notes
    -----
    A column without any value in the window stays NaN, with a warning that names it.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=5), ["A"]],
    ...                                    names=["datetime", "instrument"])
    >>> panel = Panel.from_frame(pd.DataFrame({"x": [1.0, 2.0, 3.0, 4.0, 90.0]}, index=index))
    >>> step = RobustZScoreNorm(None, None)
    >>> step.fit(panel)
    >>> [round(float(v), 3) for v in step(panel).values("feature")[:, 0]]
    [-1.349, -0.674, 0.0, 0.674, 3.0]
    """

    def __init__(
        self, fit_start_time: Any, fit_end_time: Any, fields_group: Any = None, clip_outlier: bool = True
    ) -> None:
        super().__init__(fit_start_time, fit_end_time, fields_group)
        self.clip_outlier = clip_outlier

    def _learn(self, values: np.ndarray) -> tuple[Any, Any]:
        if len(values) == 0:
            return np.nan, np.nan
        with np.errstate(invalid="ignore"):
            center = np.median(values, overwrite_input=True)  # the column is our own copy
            distance = np.abs(values - center)
            distance = distance[~np.isnan(distance)]
        if len(distance) == 0:
            return center, np.nan
        spread = np.median(distance, overwrite_input=True)
        return center, (spread + values.dtype.type(EPS)) * values.dtype.type(MAD_TO_STD)

    def _finish(self, values: np.ndarray) -> np.ndarray:
        return np.clip(values, -OUTLIER, OUTLIER, out=values) if self.clip_outlier else values


class ZScoreNorm(_FittedNorm):
    """(x - mean) / std, both over non-NaN values of the fit window, std with ddof 0.

    Constant columns are left as they are. Statistics are summed in float64; the reference sums in the
    data's own type.

    Parameters
    ----------
    fit_start_time, fit_end_time, fields_group
        As in `RobustZScoreNorm`.

    Examples
    --------
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
    """(x - min) / (max - min) over the fit window; no clipping outside it, constant columns untouched.

    Parameters
    ----------
    fit_start_time, fit_end_time, fields_group
        As in `RobustZScoreNorm`.

    Examples
    --------
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


# ---------------------------------------------------------------- across the stocks of one datetime
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

    def __init__(self, fields_group: Any = None, method: str = "zscore") -> None:
        if method not in ("zscore", "robust"):
            raise ConfigError(f"CSZScoreNorm: method must be 'zscore' or 'robust', got {method!r}.")
        self.fields_group = fields_group
        self.method = method

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        def change(part: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
            days = _day_codes(panel, rows)
            return _robust_by_day(part, days) if self.method == "robust" else _zscore_by_day(part, days)

        return _by_column(panel, select(panel, self.fields_group), space, change)


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

    def __init__(self, fields_group: Any = None) -> None:
        self.fields_group = fields_group

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        def change(part: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
            days = _day_codes(panel, rows)
            for column in part:
                ranks = pd.Series(column).groupby(days, sort=False).rank(pct=True).to_numpy()
                column[:] = (ranks - 0.5) * RANK_TO_STD
            return part

        return _by_column(panel, select(panel, self.fields_group), space, change)


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

    def __init__(self, fields_group: Any = None) -> None:
        self.fields_group = fields_group

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        def change(part: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
            return _fill_by_day(part, _day_codes(panel, rows), np.isnan, np.isnan)

        return _by_column(panel, select(panel, self.fields_group), space, change)


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
            for rows in _rows_by_chunk(panel.n_rows):
                has_inf |= np.isinf(block.values[rows]).any(axis=0)
            if has_inf.any():
                dirty.append((group, np.flatnonzero(has_inf)))

        def change(part: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
            return _fill_by_day(part, _day_codes(panel, rows), np.isinf, lambda x: ~np.isfinite(x))

        return _by_column(panel, dirty, space, change)


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


# ---------------------------------------------------------------- filling, clipping, dropping
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

    def __init__(self, fields_group: Any = None, fill_value: float = 0) -> None:
        if isinstance(fill_value, bool) or not isinstance(fill_value, (int, float, np.number)):
            raise ConfigError(f"Fillna: fill_value must be a number, got {fill_value!r}.")
        self.fields_group = fields_group
        self.fill_value = fill_value

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        def change(group: str, positions: np.ndarray, values: np.ndarray) -> np.ndarray:
            return np.where(np.isnan(values), values.dtype.type(self.fill_value), values)

        return _elementwise(panel, select(panel, self.fields_group), space, change)


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
        return _elementwise(panel, selection, space, change)


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

    def __init__(self, fields_group: Any = None) -> None:
        self.fields_group = fields_group

    def _apply(self, panel: Panel, space: Workspace) -> Panel:
        complete = np.ones(panel.n_rows, dtype=bool)
        for group, positions in select(panel, self.fields_group):
            values = panel.values(group)
            for rows in _rows_by_chunk(panel.n_rows):
                part = values[rows] if _is_all(positions, values) else values[rows, positions]
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

    def __init__(self, fields_group: Any = "label") -> None:
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

    def __init__(self, fields_group: Any = "feature", col_list: Sequence[str] = ()) -> None:
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


def _name_list(who: str, names: Any) -> tuple[str, ...]:
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
        for rows in _rows_by_chunk(panel.n_rows):
            values[rows] = block.values[rows][:, positions]
        blocks[group] = replace(block, values=values, columns=tuple(block.columns[p] for p in positions))
    return replace(panel, blocks=blocks)


# ---------------------------------------------------------------- building and running lists of processors
def build_processor(
    spec: Any, fit_start_time: Any = None, fit_end_time: Any = None, *, path: str = "", inject: bool = True
) -> Processor:
    """A processor from an instance, a mapping or a name; the caller's mapping stays as it is.

    Parameters
    ----------
    spec : Processor, mapping or str
        ``{"class": "Fillna", "kwargs": {"fields_group": "feature"}}``, "Fillna", or an instance.
    fit_start_time, fit_end_time : date-like or None
        Handed to a processor that takes both, unless its own kwargs give them (the reference
        overwrites the caller's values in that case).
    path : str
        Where the specification stands, for messages.
    inject : bool
        False: the specification must give its own fit window.

    Raises
    ------
    ConfigError
        Unknown class or argument; a processor that needs a fit window and has none.

    Examples
    --------
    >>> build_processor({"class": "Fillna", "kwargs": {"fill_value": 1}})
    Fillna(fields_group=None, fill_value=1)
    """
    if PROCESSORS.is_instance(spec):
        return spec
    factory, kwargs = PROCESSORS.resolve(spec, path)
    if inject and {"fit_start_time", "fit_end_time"} <= parameters(factory).keys():
        kwargs = {"fit_start_time": fit_start_time, "fit_end_time": fit_end_time, **kwargs}
        missing = [k for k in ("fit_start_time", "fit_end_time") if kwargs[k] is None]
        if missing:
            raise ConfigError(
                f"{path + ': ' if path else ''}{getattr(factory, '__name__', factory)} needs {' and '.join(missing)}. "
                "Remedy: give fit_start_time and fit_end_time to the handler or to the processor."
            )
    return PROCESSORS.build({"class": factory, "kwargs": kwargs}, path=path)


def run_processors(
    panel: Panel, processors: Sequence[Processor], *, stage: str, space: Workspace, fit: bool = True
) -> Panel:
    """Fit and apply processors one after the other; each is fitted on its predecessor's result.

    Parameters
    ----------
    panel : Panel
    processors : sequence of Processor
    stage : {"shared", "infer", "learn"}
        Learn-only processors are refused elsewhere.
    space : Workspace
        What may be overwritten; on return also owns the blocks that this stage made.
    fit : bool
        False applies without fitting.

    Raises
    ------
    LearnOnlyProcessorError
        A learn-only processor in the shared or infer stage (also a TypeError, as in the reference).
    """
    for number, processor in enumerate(processors):
        name = f"{stage}_processors[{number}]"
        if stage != "learn" and not processor.is_for_infer():
            raise LearnOnlyProcessorError(
                f"{name} is {type(processor).__name__}, which looks at labels and is for learning only. "
                "Remedy: move it to learn_processors."
            )
        if fit and not processor.frozen:
            processor.fit(panel)
        had_rows = panel.n_live
        panel = processor.run(panel, space)
        if had_rows and not panel.n_live:
            raise DataError(f"{name} ({processor!r}) dropped all {had_rows} rows: no row is without NaN.")
    return panel


PROCESSORS.accept(Processor)
for _class in (
    RobustZScoreNorm, ZScoreNorm, MinMaxNorm, CSZScoreNorm, CSRankNorm, CSZFillna, Fillna,
    DropnaProcessor, DropnaLabel, DropCol, FilterCol, ProcessInf, TanhProcess,
):  # fmt: skip
    PROCESSORS.add(_class, modules=("qlib.data.dataset.processor", "qfast.data.processors", "qfast.data"))
PROCESSORS.unavailable(
    "HashStockFormat",
    "HashStockFormat is not available: qfast keeps its data instrument by instrument already. Remedy: leave it out.",
    modules=("qlib.data.dataset.processor",),
)
