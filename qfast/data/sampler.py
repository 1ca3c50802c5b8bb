"""Windows of a panel, by sample number or by (datetime, instrument)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from qfast.data.panel import Panel, shared_tensor
from qfast.data.windows import FeatureTable, WindowSet, gather_rows
from qfast.dates import DateLike
from qfast.errors import ConfigError, DataError, suggest, whole_number
from qfast.ops import WindowIndex, build_window_index, window_rows

HISTORY_ROWS = 1 << 20  # rows whose reach is determined at a time
FILLS = ("none", "ffill", "ffill+bfill")

__all__ = ["TSDataSampler", "feature_table"]


class TSDataSampler:
    """Windows of `step_len` rows, one ending at each (datetime, instrument) row.

    `sampler[i]` and `sampler[datetime, instrument]` return an array [T, C], and `sampler[[i, j]]` returns [k, T, C].
    Like in Qlib, samples are ordered by instrument and then by time.

    Parameters
    ----------
    data : DataFrame or Panel
        Rows indexed (datetime, instrument). A frame is copied.
    start, end : date-like or None
        Period of the last rows of the windows, both inclusive. Windows may contain earlier rows.
    step_len : int
        T, at least 1.
    fillna_type : {"none", "ffill", "ffill+bfill"}
        What replaces a date on which the instrument has no row: "none" is a NaN row, "ffill" the previous row of the
        window, and "ffill+bfill" in addition the first row of the window for dates before it. NaN values of existing
        rows are never filled.
    dtype : numpy dtype, optional
        float32 or float64. Default: float64 if a column of the frame is float64, otherwise float32.
    flt_data : Series or one-column frame, optional
        Truth values by (datetime, instrument). Rows for which it is False, NaN or missing are not samples, but other
        windows can contain them.
    groups : sequence of str, optional
        Column groups of the panel, in the order of the C columns. Default: all.
    window_index : WindowIndex, optional
        Window tables of the panel, if they exist already.
    history_start : date-like, optional
        Windows do not contain rows before this date.

    Raises
    ------
    ConfigError
        `step_len` is not a positive whole number, or `dtype` is another type.
    DataError
        The data has no rows, or `flt_data` has several columns.

    Notes
    -----
    Source: TSDataSampler in qlib/data/dataset/__init__.py of pyqlib 0.9.7. Unlike Qlib's, it leaves the caller's frame
    unchanged, raises an error for an unknown instrument instead of returning another instrument's rows, and returns an
    empty array for an empty list.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=3), ["A", "B"]],
    ...                                    names=["datetime", "instrument"])
    >>> sampler = TSDataSampler(pd.DataFrame({"close": np.arange(6.0)}, index=index), None, None, step_len=2)
    >>> sampler[1][:, 0].tolist()
    [0.0, 2.0]
    """

    def __init__(
        self,
        data: pd.DataFrame | Panel,
        start: DateLike | None = None,
        end: DateLike | None = None,
        step_len: int = 30,
        fillna_type: str = "none",
        dtype: DTypeLike | None = None,
        flt_data: pd.Series | pd.DataFrame | None = None,
        *,
        groups: Sequence[str] | None = None,
        window_index: WindowIndex | None = None,
        history_start: DateLike | None = None,
    ) -> None:
        self.panel = data if isinstance(data, Panel) else Panel.from_frame(data, dtype=_common_dtype(data, dtype))
        self.start, self.end = start, end
        self.step_len = whole_number("step_len", step_len)
        self.fillna_type = fillna_type
        self.groups = list(self.panel.blocks) if groups is None else list(groups)
        if self.panel.n_live == 0:
            raise DataError("TSDataSampler: the data has no rows.")
        if window_index is None:
            window_index = build_window_index(self.panel.instrument_codes, self.panel.date_codes, self.panel.live)
        self.window_index = window_index
        self._code_positions = self._positions_of_date_codes()
        self.first_position = 0
        if history_start is not None:
            self.first_position = int(self._code_positions[self.panel.date_code_range(history_start, None)[0]])
        self.rows = self.panel.rows_between(start, end)
        if flt_data is not None:
            self.rows = self.rows[self._filter(flt_data)[self.rows]]

    # ---------------------------------------------------------------- the interface of Qlib's TSDataSampler
    def __len__(self) -> int:
        """Number of samples."""
        return len(self.rows)

    @property
    def empty(self) -> bool:
        """True if there are no samples."""
        return len(self) == 0

    def config(self, **kwargs: Any) -> None:
        """Set attributes, for example `config(fillna_type="ffill+bfill")`. Raises a ConfigError for unknown names."""
        for name, value in kwargs.items():
            if not hasattr(self, name):
                raise ConfigError(f"TSDataSampler has no setting {name!r}." + suggest(name, vars(self)))
            setattr(self, name, value)

    def get_index(self) -> pd.MultiIndex:
        """(datetime, instrument) of each sample, in the order of the samples."""
        return self.panel.index(self.rows)

    @property
    def data_index(self) -> pd.MultiIndex:
        """(instrument, datetime) of each sample, in the order of the samples."""
        return self.get_index().swaplevel()

    @property
    def data_arr(self) -> np.ndarray:
        """A copy [R + 1, C] of all live rows, followed by one row of NaN as in Qlib."""
        rows = self.panel.live_rows()
        values = np.concatenate([self.panel.table(g)[rows] for g in self.groups], axis=1)
        return np.concatenate([values, np.full((1, values.shape[1]), np.nan, values.dtype)])

    def __getitem__(self, key: Any) -> np.ndarray:
        """The window of a sample number or (datetime, instrument) pair, or the windows of a list of them."""
        if isinstance(key, (list, np.ndarray)):
            parts = [self._rows_of(k) for k in key]
            index = torch.stack(parts) if parts else torch.empty((0, self.step_len), dtype=torch.int64)
            return self._gather(index)
        if isinstance(key, slice):
            raise TypeError(f"sampler[{key}] is not supported. Remedy: sampler[list(range(start, stop))].")
        return self._gather(self._rows_of(key).unsqueeze(0))[0]

    # ---------------------------------------------------------------- windows
    def windows(self, *, fill: str, name: str) -> WindowSet:
        """The samples as a `WindowSet`: the first group contains the features, "label" the label.

        Parameters
        ----------
        fill : {"none", "ffill", "ffill+bfill"}
        name : str
            Name of the segment, for messages.
        """
        table, columns, label = feature_table(self.panel, self.groups)
        rows = torch.from_numpy(self.rows)
        return WindowSet(
            features=table,
            rows=rows,
            label=None if label is None else label[rows],
            columns=columns,
            keys_of=self.panel.index,
            source=lambda: self,
            history=self._history_rows,
            index=self.window_index,
            step_len=self.step_len,
            fill=fill,
            first_position=self.first_position,
            name=name,
            label_table=label,
        )

    def _history_rows(self) -> np.ndarray:
        """Live rows that the window of at least one sample can contain: its own and up to T - 1 live rows before it."""
        codes = self.panel.instrument_codes
        bounds = np.searchsorted(codes, np.arange(len(self.panel.instruments) + 1, dtype=codes.dtype))
        parts, low = [self.rows[:0]], 0
        while low < len(codes):  # whole instruments, whose windows do not overlap
            high = int(bounds[np.searchsorted(bounds, min(low + HISTORY_ROWS, len(codes)))])
            first, stop = np.searchsorted(self.rows, [low, high])
            if first < stop:
                parts.append(self._history_between(low, high, self.rows[first:stop]))
            low = high
        reached = np.concatenate(parts)
        return reached[self.window_index.position.numpy()[reached] >= self.first_position]

    def _history_between(self, low: int, high: int, samples: np.ndarray) -> np.ndarray:
        """Live rows from `low` to `high - 1`, rows of whole instruments, that the windows of `samples` contain."""
        live = self.panel.live
        live_rows = np.arange(low, high) if live is None else low + np.flatnonzero(live[low:high])
        codes = self.panel.instrument_codes[live_rows]
        numbers = np.arange(len(live_rows))
        first_of_instrument = np.maximum.accumulate(np.where(np.diff(codes, prepend=-1) != 0, numbers, 0))
        ranks = np.searchsorted(live_rows, samples)
        starts = np.maximum(ranks - (self.step_len - 1), first_of_instrument[ranks])
        change = np.zeros(len(live_rows) + 1, dtype=np.int32)
        np.add.at(change, starts, 1)
        np.add.at(change, ranks + 1, -1)
        return live_rows[np.cumsum(change[:-1]) > 0]

    def _gather(self, index: Tensor) -> np.ndarray:
        parts = [gather_rows(_tensor_of(self.panel, group), index) for group in self.groups]
        return torch.cat(parts, dim=2).numpy() if len(parts) > 1 else parts[0].numpy()

    def _rows_of(self, key: Any) -> Tensor:
        """Panel rows [T] of one sample number or (datetime, instrument) pair; -1 where no row exists."""
        self._check_fill()
        if isinstance(key, (int, np.integer)):
            if not 0 <= key < len(self):
                raise KeyError(f"sample number must be from 0 to {len(self) - 1}, got {key}")
            last = torch.from_numpy(self.rows[key : key + 1])
            return window_rows(
                self.window_index,
                last,
                self.step_len,
                fill=self.fillna_type,
                first_position=self.first_position,
            )[0]
        if isinstance(key, tuple) and len(key) == 2:
            return self._rows_of_cell(*key)
        raise TypeError(
            f"TSDataSampler index must be a sample number, a list of them or (datetime, instrument), got {key!r}."
        )

    def _rows_of_cell(self, date: DateLike, instrument: str) -> Tensor:
        """Window that ends at the last date <= `date`, even if the instrument has no row on that date."""
        code = int(np.searchsorted(self.panel.instruments, instrument))
        if code == len(self.panel.instruments) or self.panel.instruments[code] != instrument:
            raise DataError(
                f"instrument {instrument!r} is not in the data." + suggest(instrument, self.panel.instruments)
            )
        last_date = int(self.panel.datetimes.searchsorted(self.panel.timestamp(date, "date"), "right")) - 1
        window = np.full(self.step_len, -1, dtype=np.int64)
        end = -1 if last_date < 0 else int(self._code_positions[last_date + 1]) - 1
        position = self.window_index.position.numpy()
        low, high = np.searchsorted(self.panel.instrument_codes, [code, code + 1])
        rows = np.arange(low, high)
        begin = max(end - self.step_len + 1, self.first_position)
        rows = rows[(position[low:high] >= begin) & (position[low:high] <= end)]
        window[position[rows] - (end - self.step_len + 1)] = rows
        if self.fillna_type != "none" and len(rows):
            slots = np.maximum.accumulate(np.where(window >= 0, np.arange(self.step_len), -1))
            window = np.where(slots >= 0, window[np.maximum(slots, 0)], -1)
            if self.fillna_type == "ffill+bfill":
                window[window < 0] = rows[0]
        return torch.from_numpy(window)

    def _check_fill(self) -> None:
        if self.fillna_type not in FILLS:
            raise ConfigError(f"fillna_type must be one of {FILLS}, got {self.fillna_type!r}.")

    def _positions_of_date_codes(self) -> np.ndarray:
        """int64 [D + 1]: number of dates with a live row before each date code."""
        return np.concatenate(([0], np.cumsum(self.panel.live_dates(), dtype=np.int64)))

    def _filter(self, flt_data: pd.Series | pd.DataFrame) -> np.ndarray:
        """bool [R]: truth of `flt_data` at each panel row; False if missing or NaN."""
        if isinstance(flt_data, pd.DataFrame):
            if flt_data.shape[1] != 1:
                raise DataError(f"flt_data must have exactly one column, got the columns {list(flt_data.columns)}.")
            flt_data = flt_data.iloc[:, 0]
        values = flt_data.reindex(self.panel.index(np.arange(self.panel.n_rows)))
        present = values.notna().to_numpy(dtype=bool)
        truth = np.zeros(len(present), dtype=bool)
        truth[present] = values.to_numpy()[present].astype(bool)
        return truth


def _common_dtype(data: pd.DataFrame, dtype: DTypeLike | None) -> DTypeLike:
    if dtype is not None:
        if np.dtype(dtype) not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise ConfigError(f"dtype must be float32 or float64, got {dtype!r}.")
        return dtype
    if isinstance(data, pd.DataFrame) and (data.dtypes == np.float64).any():
        return np.float64
    return np.float32


def _tensor_of(panel: Panel, group: str) -> FeatureTable:
    """The values of a group without a copy: a tensor, or windows of prices."""
    table = panel.table(group)
    return shared_tensor(table) if isinstance(table, np.ndarray) else table


def feature_table(panel: Panel, groups: Sequence[str]) -> tuple[FeatureTable, tuple[str, ...], Tensor | None]:
    """Views of a panel for training.

    Parameters
    ----------
    panel : Panel
    groups : sequence of str
        The first one contains the features. The label is used if "label" is among them.

    Returns
    -------
    tuple
        Feature table [R, D], D feature names, label [R] or None.

    Raises
    ------
    DataError
        The group "label" does not have exactly one column.
    """
    label = None
    if "label" in groups:
        columns = panel.columns("label")
        if len(columns) != 1:
            raise DataError(
                f"the data has {len(columns)} label columns {list(columns)}, but a model is trained on exactly one. "
                "Remedy: keep one label in the handler."
            )
        label = shared_tensor(panel.values("label")[:, 0])
    return _tensor_of(panel, groups[0]), panel.columns(groups[0]), label
