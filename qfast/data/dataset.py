"""Datasets: named segments of a handler's data, as frames, samplers or window sets.

`DatasetH` and `TSDatasetH` have the interface of Qlib's datasets (qlib/data/dataset/__init__.py of pyqlib 0.9.7). All
segments and samplers are views of the same float32 panel, so preparing a segment only computes row numbers.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import DTypeLike

from qfast.data.arrow_tables import ArrowTable, is_arrow_table
from qfast.data.handlers import DataHandlerLP, build_handler
from qfast.data.handlers.base import DUMP_OPTIONS, check_dump_options
from qfast.data.handlers.saved import handler_content, handler_of, read_file, write_file
from qfast.data.panel import Panel
from qfast.data.protocols import Bounds, Columns, Handler, Segment
from qfast.data.sampler import TSDataSampler, feature_table
from qfast.data.windows import WindowSet
from qfast.dates import DateLike, starts_after
from qfast.errors import CheckpointError, ConfigError, DataError, suggest, whole_number
from qfast.ops import WindowIndex, build_window_index

MANY_ROWS = 1 << 22  # a larger panel has the window tables of one data key at a time

FLAT_ARGUMENTS = ("handler", "segments", "fetch_kwargs")  # of DatasetH
DK_I, CS_ALL, CS_RAW = DataHandlerLP.DK_I, DataHandlerLP.CS_ALL, DataHandlerLP.CS_RAW

__all__ = ["DatasetH", "TSDataSampler", "TSDatasetH"]


class DatasetH:
    """Named segments of a handler's data, in which each sample is one row.

    Parameters
    ----------
    handler : Handler, configuration mapping, DataFrame or Arrow table
        The data. A frame is indexed (datetime, instrument) and has two-level columns ("feature", ...), ("label", ...).
    segments : mapping
        Name -> (start, end), both inclusive. None is unbounded.
    fetch_kwargs : mapping, optional
        Additional arguments of `handler.fetch`, as in Qlib.

    Raises
    ------
    ConfigError
        A segment is not a (start, end) pair or starts after its end, or an argument is unknown.

    Notes
    -----
    Source: DatasetH of pyqlib 0.9.7.

    Examples
    --------
    >>> from qfast.data import synthetic
    >>> dataset = DatasetH(synthetic.factors(3, 20, 4), {"train": (None, "2015-01-14"), "test": ("2015-01-15", None)})
    >>> dataset.prepare("test", col_set="feature").shape[1]
    4
    """

    def __init__(
        self,
        handler: Handler | Mapping[str, Any] | pd.DataFrame | ArrowTable | str,
        segments: Mapping[str, Any],
        fetch_kwargs: Mapping[str, Any] | None = None,
        **unknown: object,
    ) -> None:
        if unknown:
            name = next(iter(unknown))
            names = ("handler", "segments", "fetch_kwargs", "step_len", "flt_col")
            raise ConfigError(f"{type(self).__name__} has no argument {name!r}." + suggest(name, names))
        self.handler = _build_handler(handler)
        self.segments = {name: _segment(name, bounds) for name, bounds in dict(segments).items()}
        self.fetch_kwargs = dict(fetch_kwargs or {})

    def __repr__(self) -> str:
        """Class, handler, segments and the arguments that are not defaults."""
        segments = ", ".join(f"{name} {_bounds_text(bounds)}" for name, bounds in self.segments.items())
        further = "".join(f", {name}={value!r}" for name, value in self._arguments().items() if value)
        return f"{type(self).__name__}({self.handler!r}, segments: {segments or 'none'}{further})"

    def config(self, handler_kwargs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Replace `segments`, or settings of the handler.

        Parameters
        ----------
        handler_kwargs : mapping, optional
            Arguments of the handler's `config`, which take effect with `setup_data`.
        **kwargs
            segments. dump_all, exclude, include and recursive are accepted for compatibility with Qlib.

        Raises
        ------
        ConfigError
            Another setting.
        """
        for name in kwargs:
            if name not in ("segments", *DUMP_OPTIONS):
                names = ["segments", "handler_kwargs"]
                raise ConfigError(f"{type(self).__name__}.config has no setting {name!r}." + suggest(name, names))
        if handler_kwargs is not None:
            self._own_handler("config").config(**handler_kwargs)
        if "segments" in kwargs:
            self.segments = {key: _segment(key, bounds) for key, bounds in kwargs["segments"].items()}

    def setup_data(self, handler_kwargs: Mapping[str, Any] | None = None) -> None:
        """Load the handler's data again, with `handler_kwargs` as arguments of its `setup_data`; None: do nothing."""
        if handler_kwargs is not None:
            self._own_handler("setup_data").setup_data(**handler_kwargs)

    def _own_handler(self, method: str) -> DataHandlerLP:
        if not isinstance(self.handler, DataHandlerLP):
            raise ConfigError(f"{type(self.handler).__name__} has no {method}, only a DataHandlerLP has.")
        return self.handler

    def to_pickle(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write handler, data and segments to a file, in qfast's safe format instead of pickle.

        Parameters and errors are as in `DataHandlerLP.to_pickle`.
        """
        check_dump_options(options)
        arrays, facts = handler_content(self._own_handler("to_pickle"))
        segments = {name: [None if end is None else str(end) for end in ends] for name, ends in self.segments.items()}
        own = {"class": type(self).__name__, "segments": segments, "arguments": self._arguments()}
        write_file(path, "dataset", arrays, {**facts, "dataset": own})

    @classmethod
    def load(cls, filepath: str | os.PathLike[str]) -> DatasetH:
        """Read a dataset that `to_pickle` has written.

        Raises
        ------
        CheckpointError
            The file is missing, damaged, a pickle file, or a dataset of another class.
        """
        arrays, facts = read_file(filepath, "dataset")
        own = facts["dataset"]
        if own["class"] != cls.__name__:
            raise CheckpointError(f"{str(filepath)!r} must be a {cls.__name__}, got a {own['class']}.")
        return cls(handler=handler_of(arrays, facts), segments=own["segments"], **own["arguments"])

    def _arguments(self) -> dict[str, Any]:
        """Arguments of the constructor other than handler and segments."""
        return {"fetch_kwargs": self.fetch_kwargs}

    def prepare(
        self, segments: Segment | Sequence[str], col_set: Columns = CS_ALL, data_key: str = DK_I, **kwargs: Any
    ) -> Any:
        """The data of one segment, or of each segment in a list of names.

        Parameters
        ----------
        segments : str, slice, (start, end), or a list of names
        col_set : str or list of str
            A group name selects that group with single-level columns, a list selects groups with two-level columns,
            "__all" selects all columns without the group level, "__raw" all with it.
        data_key : {"raw", "infer", "learn"}
        **kwargs
            Additional arguments of `handler.fetch`; for `TSDatasetH` `dtype` and `flt_col`.

        Returns
        -------
        DataFrame or TSDataSampler
            A frame sorted by (datetime, instrument); a sampler from `TSDatasetH`. A list of them for a list of names.

        Raises
        ------
        DataError
            The segment is unknown.
        """
        if isinstance(segments, (list, tuple)) and all(isinstance(s, str) and s in self.segments for s in segments):
            return [self._prepare(self._bounds(s), col_set, data_key, **kwargs) for s in segments]
        return self._prepare(self._bounds(segments), col_set, data_key, **kwargs)

    def windows(self, segment: Segment, data_key: str, *, with_label: bool = True) -> WindowSet:
        """The samples of a segment for the training loop. They share the memory of the handler's panel.

        Parameters
        ----------
        segment : str, slice or (start, end)
        data_key : {"raw", "infer", "learn"}
        with_label : bool
            Include the label, if the data has one.

        Raises
        ------
        DataError
            The segment is unknown, or the data has no group "feature" or several labels.
        """
        panel = self.handler.panel(data_key)
        start, end = self._bounds(segment)
        rows = panel.by_date(panel.rows_between(start, end))
        table, columns, label = feature_table(panel, _groups(panel, with_label))
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

    def _prepare(self, bounds: Bounds, col_set: Columns, data_key: str, **kwargs: Any) -> Any:
        fetch = {**self.fetch_kwargs, **kwargs}
        return self.handler.fetch(slice(*bounds), col_set=col_set, data_key=data_key, **fetch)

    def _bounds(self, segment: Segment | Sequence[str]) -> Bounds:
        if isinstance(segment, str):
            if segment not in self.segments:
                raise DataError(
                    f"the dataset has no segment {segment!r}; it has {sorted(self.segments)}."
                    + suggest(segment, self.segments)
                )
            return self.segments[segment]
        return _segment("segment", segment)


class TSDatasetH(DatasetH):
    """Named segments of a handler's data, in which each sample is a window of `step_len` rows.

    Parameters
    ----------
    step_len : int
        T.
    flt_col : str, optional
        Column group with one column, whose truth value selects the rows that are samples.
    handler, segments, fetch_kwargs
        As in `DatasetH`. Positional arguments are (handler, segments, fetch_kwargs) or, if the first one is a number,
        Qlib's (step_len, flt_col).

    Raises
    ------
    ConfigError
        As in `DatasetH`, or an argument is passed twice, or `step_len` is not a positive whole number.

    Notes
    -----
    The first windows of a segment contain rows before the segment but, as in Qlib, no row more than `step_len` dates of
    the inference data earlier. Source: TSDatasetH of pyqlib 0.9.7.

    Examples
    --------
    >>> from qfast.data import synthetic
    >>> dataset = TSDatasetH(synthetic.factors(3, 20, 4), {"test": (None, None)}, step_len=5)
    >>> dataset.prepare("test", col_set=["feature", "label"])[0].shape
    (5, 5)
    """

    def __init__(self, *arguments: Any, step_len: int = 30, flt_col: str | None = None, **kwargs: Any) -> None:
        names = ("step_len", "flt_col") if arguments and isinstance(arguments[0], int) else FLAT_ARGUMENTS
        if len(arguments) > len(names):
            raise ConfigError(
                f"TSDatasetH accepts the positional arguments (step_len, flt_col) or {FLAT_ARGUMENTS}, got "
                f"{len(arguments)}. Remedy: pass them by name."
            )
        positional = dict(zip(names, arguments, strict=False))
        twice = next((name for name in positional if name in kwargs), None)
        if twice is not None:
            raise ConfigError(f"TSDatasetH got {twice!r} twice, by position and by name.")
        self.step_len = whole_number("step_len", positional.pop("step_len", step_len))
        self.flt_col = positional.pop("flt_col", flt_col)
        self._index_of: dict[str, tuple[Panel, WindowIndex]] = {}
        super().__init__(**positional, **kwargs)

    def config(self, handler_kwargs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Replace `step_len`, `segments`, or settings of the handler."""
        if "step_len" in kwargs:
            self.step_len = whole_number("step_len", kwargs.pop("step_len"))
        super().config(handler_kwargs, **kwargs)

    def _arguments(self) -> dict[str, Any]:
        return {**super()._arguments(), "step_len": self.step_len, "flt_col": self.flt_col}

    def windows(self, segment: Segment, data_key: str, *, with_label: bool = True) -> WindowSet:
        """The windows of a segment for the training loop; arguments and errors as in `DatasetH.windows`."""
        panel = self.handler.panel(data_key)
        sampler = self._sampler(self._bounds(segment), _groups(panel, with_label), data_key)
        return sampler.windows(fill="ffill+bfill", name=str(segment))

    def _prepare(self, bounds: Bounds, col_set: Columns, data_key: str, **kwargs: Any) -> TSDataSampler:
        dtype, flt_col = kwargs.pop("dtype", None), kwargs.pop("flt_col", self.flt_col)
        if kwargs:
            raise ConfigError(f"TSDatasetH.prepare has no argument {next(iter(kwargs))!r}; it has dtype and flt_col.")
        panel = self.handler.panel(data_key)
        if col_set in (CS_ALL, CS_RAW):
            groups = list(panel.blocks)
        else:
            groups = [col_set] if isinstance(col_set, str) else list(col_set)
        return self._sampler(bounds, groups, data_key, dtype=dtype, flt_col=flt_col)

    def _sampler(
        self,
        bounds: Bounds,
        groups: list[str],
        data_key: str,
        *,
        dtype: DTypeLike | None = None,
        flt_col: str | None = None,
    ) -> TSDataSampler:
        panel = self.handler.panel(data_key)
        flt_col = self.flt_col if flt_col is None else flt_col
        index = self._window_index(panel, data_key)
        if dtype is not None and np.dtype(dtype) != panel.table(groups[0]).dtype:
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
        """The window tables of a data key, which all segments share."""
        entry = self._index_of.get(data_key)
        if entry is None or entry[0] is not panel:
            if panel.n_rows > MANY_ROWS:  # the tables need 12 bytes per row, and are built in a second
                entry = None
                self._index_of.clear()
            entry = (panel, build_window_index(panel.instrument_codes, panel.date_codes, panel.live))
            self._index_of[data_key] = entry
        return entry[1]

    def _history_start(self, start: DateLike | None) -> pd.Timestamp | None:
        """The date that is `step_len` dates of the inference data before `start`; None if there is no such date."""
        if start is None:
            return None
        panel = self.handler.panel(DK_I)
        calendar = panel.datetimes[panel.live_dates()]
        begin = bisect.bisect_left(calendar, panel.timestamp(start, "start"))
        return None if begin <= self.step_len else calendar[begin - self.step_len]


# ---------------------------------------------------------------- helpers
def _segment(name: str, bounds: object) -> Bounds:
    if isinstance(bounds, slice):
        bounds = (bounds.start, bounds.stop)
    if isinstance(bounds, (str, bytes)) or not isinstance(bounds, Sequence) or len(bounds) != 2:
        raise ConfigError(f"segment {name!r} must be (start, end), got {bounds!r}.")
    start, end = bounds
    if start is not None and end is not None and starts_after(start, end):
        raise ConfigError(f"segment {name!r} starts at {start} after its end {end}.")
    return start, end


def _bounds_text(bounds: Bounds) -> str:
    start, end = ("..." if bound is None else str(bound).removesuffix(" 00:00:00") for bound in bounds)
    return f"{start} to {end}"


def _build_handler(handler: Handler | Mapping[str, Any] | pd.DataFrame | ArrowTable | str) -> Handler:
    if isinstance(handler, pd.DataFrame) or is_arrow_table(handler):
        return DataHandlerLP(handler)
    if hasattr(handler, "panel") and hasattr(handler, "fetch"):
        return cast(Handler, handler)
    return build_handler(cast("Mapping[str, Any] | str", handler))


def _groups(panel: Panel, with_label: bool) -> list[str]:
    if "feature" not in panel.blocks:
        raise DataError(
            f"the data has no column group 'feature'; it has {sorted(panel.blocks)}. Remedy: name the groups of "
            "columns 'feature' and 'label'."
        )
    return ["feature", "label"] if with_label and "label" in panel.blocks else ["feature"]
