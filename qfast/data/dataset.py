"""Datasets: named segments of a handler's panel, as frames, as samplers, or as window sets.

`DatasetH` and `TSDatasetH` answer the calls that the reference's datasets answer
(pyqlib 0.9.7, qlib/data/dataset/__init__.py), but all segments and samplers are views of one float32
panel: preparing a segment costs its row numbers and nothing else.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from qfast.data.handlers import DataHandlerLP, build_handler
from qfast.data.panel import Panel
from qfast.data.windows import WindowSet
from qfast.errors import ConfigError, DataError, suggest, whole_number
from qfast.ops import WindowIndex, build_window_index, gather_windows, window_rows

DK_I, CS_ALL, CS_RAW = DataHandlerLP.DK_I, DataHandlerLP.CS_ALL, DataHandlerLP.CS_RAW
FILLS = ("none", "ffill", "ffill+bfill")

__all__ = ["DatasetH", "TSDataSampler", "TSDatasetH"]


class TSDataSampler:
    """Rolling windows of `step_len` rows ending at each (datetime, instrument) row.

    Parameters
    ----------
    data : DataFrame or Panel
        Rows indexed (datetime, instrument). The frame is copied once and left as it was.
    start, end : date-like or None
        Samples end between these, both inclusive; earlier rows serve as history.
    step_len : int
        T, at least 1.
    fillna_type : str
        What stands in for dates at which the instrument has no row: "none" (a NaN row), "ffill" (its
        last row inside the window) or "ffill+bfill" (then its first one for leading holes). Values
        that are NaN inside an existing row are never filled.
    dtype : numpy dtype, optional
        float32 or float64. Default: the frame's own common dtype where it is one of the two, float32
        otherwise.
    flt_data : Series or one-column frame, optional
        Truth values; rows that are False, NaN or missing are no samples but stay history.

    Notes
    -----
    Samples stand instrument by instrument, as in the reference. `sampler[i]` gives [T, C],
    `sampler[[i, j]]` [k, T, C], `sampler[datetime, instrument]` [T, C]. Reference: TSDataSampler of
    pyqlib 0.9.7. Differences on purpose: the caller's frame keeps its columns, an unknown instrument is
    an error instead of its neighbour's rows, an empty list gives an empty array.

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
        start: Any = None,
        end: Any = None,
        step_len: int = 30,
        fillna_type: str = "none",
        dtype: Any = None,
        flt_data: pd.Series | pd.DataFrame | None = None,
        *,
        groups: Sequence[str] | None = None,
        window_index: WindowIndex | None = None,
        history_start: Any = None,
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

    # ---------------------------------------------------------------- the reference's surface
    def __len__(self) -> int:
        return len(self.rows)

    @property
    def empty(self) -> bool:
        """True when there is no sample."""
        return len(self) == 0

    def config(self, **kwargs: Any) -> None:
        """Set attributes, for instance `config(fillna_type="ffill+bfill")`."""
        for name, value in kwargs.items():
            if not hasattr(self, name):
                raise ConfigError(f"TSDataSampler has no setting {name!r}." + suggest(name, vars(self)))
            setattr(self, name, value)

    def get_index(self) -> pd.MultiIndex:
        """(datetime, instrument) of each sample, in sample order (instrument by instrument)."""
        return self.panel.index(self.rows)

    @property
    def data_index(self) -> pd.MultiIndex:
        """(instrument, datetime) of each sample, in sample order."""
        return self.get_index().swaplevel()

    @property
    def data_arr(self) -> np.ndarray:
        """All live rows and, last, one row of NaN: a copy [R + 1, C] in the reference's layout."""
        rows = self.panel.live_rows()
        values = np.concatenate([self.panel.values(g)[rows] for g in self.groups], axis=1)
        return np.concatenate([values, np.full((1, values.shape[1]), np.nan, values.dtype)])

    def __getitem__(self, key: Any) -> np.ndarray:
        if isinstance(key, (list, np.ndarray)):
            parts = [self._rows_of(k) for k in key]
            index = torch.stack(parts) if parts else torch.empty((0, self.step_len), dtype=torch.int64)
            return self._gather(index)
        if isinstance(key, slice):
            raise TypeError("TSDataSampler does not take slices. Remedy: sampler[list(range(start, stop))].")
        return self._gather(self._rows_of(key).unsqueeze(0))[0]

    # ---------------------------------------------------------------- windows
    def windows(self, *, fill: str, name: str) -> WindowSet:
        """These samples for the training loop: first group features, last column of "label" the target."""
        table, columns, label = _feature_table(self.panel, self.groups)
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
        )

    def _history_rows(self) -> np.ndarray:
        """Live rows that some sample's window can reach: at most T - 1 live rows before the sample's own."""
        live_rows = self.panel.live_rows()
        codes = self.panel.instrument_codes[live_rows]
        every = np.arange(len(live_rows))
        first_of_instrument = np.maximum.accumulate(np.where(np.diff(codes, prepend=-1) != 0, every, 0))
        ranks = np.searchsorted(live_rows, self.rows)
        starts = np.maximum(ranks - (self.step_len - 1), first_of_instrument[ranks])
        change = np.zeros(len(live_rows) + 1, dtype=np.int32)
        np.add.at(change, starts, 1)
        np.add.at(change, ranks + 1, -1)
        reached = live_rows[np.cumsum(change[:-1]) > 0]
        return reached[self.window_index.position.numpy()[reached] >= self.first_position]

    def _gather(self, index: Tensor) -> np.ndarray:
        parts = [gather_windows(torch.from_numpy(self.panel.values(g)), index) for g in self.groups]
        return torch.cat(parts, dim=2).numpy() if len(parts) > 1 else parts[0].numpy()

    def _rows_of(self, key: Any) -> Tensor:
        """Panel rows [T] of one sample number or (datetime, instrument) pair; -1 is "no such row"."""
        self._check_fill()
        if isinstance(key, (int, np.integer)):
            if not 0 <= key < len(self):
                raise KeyError(f"sample {key} is out of [0, {len(self)})")
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
            f"TSDataSampler index must be a sample number, a list of them or (datetime, instrument); got {key!r}."
        )

    def _rows_of_cell(self, date: Any, instrument: Any) -> Tensor:
        """Window that ends at the last date <= `date`, whether or not the instrument has a row there."""
        code = int(np.searchsorted(self.panel.instruments, instrument))
        if code == len(self.panel.instruments) or self.panel.instruments[code] != instrument:
            raise DataError(
                f"instrument {instrument!r} is not in the data." + suggest(instrument, self.panel.instruments)
            )
        last_date = int(self.panel.datetimes.searchsorted(self.panel._timestamp(date, "date"), "right")) - 1
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
        """[n dates + 1]: how many dates with a live row come before each date code."""
        present = np.zeros(len(self.panel.datetimes) + 1, dtype=np.int64)
        present[self.panel.date_codes[self.panel.live_rows()] + 1] = 1
        return np.cumsum(present)

    def _filter(self, flt_data: pd.Series | pd.DataFrame) -> np.ndarray:
        """bool [R]: truth of flt_data at every panel row; missing and NaN are False."""
        if isinstance(flt_data, pd.DataFrame):
            if flt_data.shape[1] != 1:
                raise DataError(f"flt_data must have exactly one column, got {list(flt_data.columns)}.")
            flt_data = flt_data.iloc[:, 0]
        wanted = flt_data.reindex(self.panel.index(np.arange(self.panel.n_rows)))
        given = wanted.notna().to_numpy(dtype=bool)
        truth = np.zeros(len(given), dtype=bool)
        truth[given] = wanted.to_numpy()[given].astype(bool)
        return truth


class DatasetH:
    """Named segments of a handler's data; each sample is one row.

    Parameters
    ----------
    handler : DataHandlerLP, configuration mapping, or (datetime, instrument) frame
        Where the rows come from. A frame must have two-level columns ("feature", ...), ("label", ...).
    segments : mapping
        Name -> (start, end), both inclusive; None is unbounded.
    fetch_kwargs : mapping, optional
        Accepted for the reference's sake and handed to `handler.fetch`.

    Raises
    ------
    ConfigError
        A segment that is not a (start, end) pair, or starts after its end.
    """

    def __init__(
        self,
        handler: Any,
        segments: Mapping[str, Any],
        fetch_kwargs: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            name = next(iter(unknown))
            known = ("handler", "segments", "fetch_kwargs", "step_len", "flt_col")
            raise ConfigError(f"{type(self).__name__} has no argument {name!r}." + suggest(name, known))
        self.handler = _build_handler(handler)
        self.segments = {name: _segment(name, bounds) for name, bounds in dict(segments).items()}
        self.fetch_kwargs = dict(fetch_kwargs or {})

    def config(self, **kwargs: Any) -> None:
        """Replace `segments`; other settings are refused by name."""
        for name, value in kwargs.items():
            if name != "segments":
                raise ConfigError(
                    f"{type(self).__name__}.config has no setting {name!r}." + suggest(name, ["segments"])
                )
            self.segments = {key: _segment(key, bounds) for key, bounds in value.items()}

    def prepare(self, segments: Any, col_set: Any = CS_ALL, data_key: str = DK_I, **kwargs: Any) -> Any:
        """Data of one segment, or a list of them for a list of names.

        Parameters
        ----------
        segments : str, slice, (start, end), or a list of names
        col_set : str or list of str
            A group name gives single-level columns, a list two levels, "__all" drops the group level.
        data_key : str
            "raw", "infer" or "learn".

        Returns
        -------
        DataFrame sorted by (datetime, instrument); a `TSDataSampler` from `TSDatasetH`.
        """
        if isinstance(segments, (list, tuple)) and all(isinstance(s, str) and s in self.segments for s in segments):
            return [self._prepare(self._bounds(s), col_set, data_key, **kwargs) for s in segments]
        return self._prepare(self._bounds(segments), col_set, data_key, **kwargs)

    def windows(self, segment: Any, data_key: str, *, with_label: bool = True) -> WindowSet:
        """The segment's samples for the training loop, sharing the handler's panel."""
        panel = self.handler.panel(data_key)
        start, end = self._bounds(segment)
        rows = panel.by_date(panel.rows_between(start, end))
        table, columns, label = _feature_table(panel, _groups(panel, with_label))
        sample_rows = torch.from_numpy(rows)
        return WindowSet(
            features=table,
            rows=sample_rows,
            label=None if label is None else label[sample_rows],
            columns=columns,
            keys_of=panel.index,
            source=lambda: panel.to_frame(rows=rows),
            name=str(segment),
        )

    def _prepare(self, bounds: tuple[Any, Any], col_set: Any, data_key: str, **kwargs: Any) -> Any:
        fetch = {**self.fetch_kwargs, **kwargs}
        return self.handler.fetch(slice(*bounds), col_set=col_set, data_key=data_key, **fetch)

    def _bounds(self, segment: Any) -> tuple[Any, Any]:
        if isinstance(segment, str):
            if segment not in self.segments:
                raise DataError(
                    f"segment {segment!r} is not defined; the dataset has {sorted(self.segments)}."
                    + suggest(segment, self.segments)
                )
            return self.segments[segment]
        return _segment("segment", segment)


class TSDatasetH(DatasetH):
    """Named segments whose samples are rolling windows of `step_len` rows.

    Parameters
    ----------
    step_len : int
        T.
    flt_col : str, optional
        Column group whose one column says which rows are samples.
    handler, segments, fetch_kwargs
        As in `DatasetH`.

    Notes
    -----
    Windows at the head of a segment reach back into earlier rows, but no further than `step_len`
    dates of the inference data before the segment, as in the reference.
    """

    def __init__(self, step_len: int = 30, flt_col: str | None = None, **kwargs: Any) -> None:
        self.step_len = whole_number("step_len", step_len)
        self.flt_col = flt_col
        self._index_of: dict[str, tuple[Panel, WindowIndex]] = {}
        super().__init__(**kwargs)

    def config(self, **kwargs: Any) -> None:
        """Replace `step_len` or `segments`."""
        if "step_len" in kwargs:
            self.step_len = whole_number("step_len", kwargs.pop("step_len"))
        super().config(**kwargs)

    def windows(self, segment: Any, data_key: str, *, with_label: bool = True) -> WindowSet:
        panel = self.handler.panel(data_key)
        sampler = self._sampler(self._bounds(segment), _groups(panel, with_label), data_key)
        return sampler.windows(fill="ffill+bfill", name=str(segment))

    def _prepare(self, bounds: tuple[Any, Any], col_set: Any, data_key: str, **kwargs: Any) -> TSDataSampler:
        dtype, flt_col = kwargs.pop("dtype", None), kwargs.pop("flt_col", self.flt_col)
        if kwargs:
            raise ConfigError(f"TSDatasetH.prepare has no argument {next(iter(kwargs))!r}.")
        panel = self.handler.panel(data_key)
        groups = (
            list(panel.blocks)
            if col_set in (CS_ALL, CS_RAW)
            else ([col_set] if isinstance(col_set, str) else list(col_set))
        )
        return self._sampler(bounds, groups, data_key, dtype=dtype, flt_col=flt_col)

    def _sampler(
        self,
        bounds: tuple[Any, Any],
        groups: list[str],
        data_key: str,
        *,
        dtype: Any = None,
        flt_col: str | None = None,
    ) -> TSDataSampler:
        panel = self.handler.panel(data_key)
        flt_col = self.flt_col if flt_col is None else flt_col
        index = self._window_index(panel, data_key)
        if dtype is not None and np.dtype(dtype) != panel.values(groups[0]).dtype:
            for group in groups:
                panel = panel.replace(group, panel.values(group).astype(dtype))
        flt_data = None
        if flt_col is not None:
            flt_data = pd.Series(panel.values(flt_col)[:, 0], index=panel.index(np.arange(panel.n_rows)))
        return TSDataSampler(
            panel.only(groups),
            *bounds,
            step_len=self.step_len,
            flt_data=flt_data,
            groups=groups,
            window_index=index,
            history_start=self._history_start(bounds[0]),
        )

    def _window_index(self, panel: Panel, data_key: str) -> WindowIndex:
        """One table per data key, shared by all segments."""
        known = self._index_of.get(data_key)
        if known is None or known[0] is not panel:
            known = (panel, build_window_index(panel.instrument_codes, panel.date_codes, panel.live))
            self._index_of[data_key] = known
        return known[1]

    def _history_start(self, start: Any) -> pd.Timestamp | None:
        """The date `step_len` entries of the inference calendar before the segment's start."""
        if start is None:
            return None
        panel = self.handler.panel(DK_I)
        live = np.zeros(len(panel.datetimes), dtype=bool)
        live[panel.date_codes[panel.live_rows()]] = True
        calendar = panel.datetimes[live]
        begin = bisect.bisect_left(calendar, panel._timestamp(start, "start"))
        return None if begin <= self.step_len else calendar[begin - self.step_len]


# ---------------------------------------------------------------- helpers
def _segment(name: str, bounds: Any) -> tuple[Any, Any]:
    if isinstance(bounds, slice):
        bounds = (bounds.start, bounds.stop)
    if isinstance(bounds, (str, bytes)) or not isinstance(bounds, Sequence) or len(bounds) != 2:
        raise ConfigError(f"segment {name!r} must be (start, end), got {bounds!r}.")
    start, end = bounds
    if start is not None and end is not None and pd.Timestamp(start) > pd.Timestamp(end):
        raise ConfigError(f"segment {name!r} starts at {start} after its end {end}.")
    return start, end


def _build_handler(handler: Any) -> Any:
    if isinstance(handler, pd.DataFrame):
        return DataHandlerLP.from_frame(handler)
    if hasattr(handler, "panel") and hasattr(handler, "fetch"):
        return handler
    return build_handler(handler)


def _common_dtype(data: pd.DataFrame, dtype: Any) -> Any:
    if dtype is not None:
        if np.dtype(dtype) not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise ConfigError(f"dtype must be float32 or float64, got {dtype!r}.")
        return dtype
    if isinstance(data, pd.DataFrame) and (data.dtypes == np.float64).any():
        return np.float64
    return np.float32


def _groups(panel: Panel, with_label: bool) -> list[str]:
    if "feature" not in panel.blocks:
        raise DataError(f"the data has no column group 'feature'; it has {sorted(panel.blocks)}.")
    return ["feature", "label"] if with_label and "label" in panel.blocks else ["feature"]


def _feature_table(panel: Panel, groups: Sequence[str]) -> tuple[Tensor, tuple[str, ...], Tensor | None]:
    """Feature table [R, D], its column names and the label column [R], all views of the panel."""
    features = panel.values(groups[0])
    label = None
    if "label" in groups:
        columns = panel.columns("label")
        if len(columns) != 1:
            raise DataError(
                f"the data has {len(columns)} label columns {list(columns)}; a model is trained on exactly one. "
                "Remedy: keep one label in the handler."
            )
        label = torch.from_numpy(panel.values("label")[:, 0])
    return torch.from_numpy(features), panel.columns(groups[0]), label
