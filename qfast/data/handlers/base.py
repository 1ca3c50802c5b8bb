"""A handler over raw columns of one's own: stages of processors, and reading the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from qfast.data.panel import Panel
from qfast.data.prices import Instruments
from qfast.data.processors import Processor, ProcessorSpec, Workspace, build_processor, run_processors
from qfast.data.protocols import Columns, Selector
from qfast.data.rows import restrict_rows, select_rows
from qfast.dates import DateLike
from qfast.errors import ConfigError, DataError, shown, suggest


class RawDataDroppedError(DataError, AttributeError):
    """Raw data was asked of a handler that was told to drop it."""


class DataHandlerLP:
    """Data with learnable processors.

    Parameters
    ----------
    source : Panel, DataFrame, or mapping of group name to DataFrame
        Rows keyed (datetime, instrument); column groups "feature" and "label" are what models use.
        A frame is copied once and left as it was.
    instruments : sequence of str, optional
        Keep only these.
    start_time, end_time : date-like, optional
        Keep only rows between, both inclusive.
    infer_processors, learn_processors, shared_processors : sequence of Processor, mapping or str
        See `qfast.data.processors.build_processor`.
    process_type : {"append", "independent"}
        "append": learn processors run on the result of the infer processors. "independent": on the
        result of the shared processors.
    drop_raw : bool
        Give up the raw data, so that its memory is used again.
    fit_start_time, fit_end_time : date-like, optional
        Fit window for processors that need one and have none of their own.

    Raises
    ------
    ConfigError, DataError
        An unknown or misplaced processor, a missing fit window, unusable data.

    Examples
    --------
    >>> index = pd.MultiIndex.from_product([pd.date_range("2024-01-01", periods=2), ["A", "B"]],
    ...                                    names=["datetime", "instrument"])
    >>> frame = pd.DataFrame({("feature", "x"): [1.0, None, 3.0, 4.0], ("label", "y"): [1.0, None, 3.0, 4.0]},
    ...                      index=index)
    >>> handler = DataHandlerLP(frame, infer_processors=[{"class": "Fillna", "kwargs": {"fields_group": "feature"}}],
    ...                         learn_processors=["DropnaLabel"])
    >>> handler.fetch(data_key="infer")["x"].tolist(), len(handler.fetch(data_key="learn"))
    ([1.0, 0.0, 3.0, 4.0], 3)
    """

    DK_R, DK_I, DK_L = "raw", "infer", "learn"
    CS_ALL, CS_RAW = "__all", "__raw"
    PTYPE_A, PTYPE_I = "append", "independent"

    _raw: Panel | None
    _panels: dict[str, Panel]

    def __init__(
        self,
        source: Panel | pd.DataFrame | Mapping[str, pd.DataFrame],
        *,
        instruments: Sequence[str] | None = None,
        start_time: DateLike | None = None,
        end_time: DateLike | None = None,
        infer_processors: Sequence[ProcessorSpec] = (),
        learn_processors: Sequence[ProcessorSpec] = (),
        shared_processors: Sequence[ProcessorSpec] = (),
        process_type: str = "append",
        drop_raw: bool = False,
        fit_start_time: DateLike | None = None,
        fit_end_time: DateLike | None = None,
    ) -> None:
        self._configure(
            {"shared": shared_processors, "infer": infer_processors, "learn": learn_processors},
            process_type, drop_raw, instruments, start_time, end_time, fit_start_time, fit_end_time,
        )  # fmt: skip
        raw = restrict_rows(_as_panel(source), instruments, start_time, end_time)
        self._flat_columns = isinstance(source, pd.DataFrame) and source.columns.nlevels == 1
        if not drop_raw:
            self._raw = raw
        self._process(raw, Workspace(raw.blocks if drop_raw and not isinstance(source, Panel) else ()))

    @classmethod
    def from_frame(cls, frame: pd.DataFrame | pd.Series | Mapping[str, pd.DataFrame], **kwargs: Any) -> DataHandlerLP:
        """A handler of a frame with columns (group, name), or of a mapping from group to frame.

        Parameters
        ----------
        frame : DataFrame, Series or mapping
            Indexed (datetime, instrument). Frames of a mapping may have different rows; missing
            values become NaN.
        **kwargs
            As for `DataHandlerLP`.
        """
        return DataHandlerLP(frame.to_frame() if isinstance(frame, pd.Series) else frame, **kwargs)

    # ---------------------------------------------------------------- set-up
    def _configure(
        self,
        stages: Mapping[str, Sequence[ProcessorSpec]],
        process_type: str,
        drop_raw: bool,
        instruments: Instruments,
        start_time: DateLike | None,
        end_time: DateLike | None,
        fit_start_time: DateLike | None,
        fit_end_time: DateLike | None,
    ) -> None:
        """Store the settings and build the processors, before any data is touched."""
        self.process_type = _one_of("process_type", process_type, (self.PTYPE_A, self.PTYPE_I))
        self.drop_raw = bool(drop_raw)
        self.instruments, self.start_time, self.end_time = instruments, start_time, end_time
        self.fit_start_time, self.fit_end_time = fit_start_time, fit_end_time
        self.shared_processors, self.infer_processors, self.learn_processors = (
            _build_processors(stage, specs, fit_start_time, fit_end_time) for stage, specs in stages.items()
        )
        self._flat_columns = False
        self._raw = None
        self._panels = {}

    def _process(self, raw: Panel, space: Workspace) -> None:
        """Run the stages over `raw`, whose blocks may be overwritten where `space` owns them."""
        if raw.n_live == 0:
            raise DataError(
                f"{type(self).__name__}: no rows with instruments={shown(self.instruments)}, "
                f"start_time={self.start_time}, end_time={self.end_time}."
            )
        panel = run_processors(raw, self.shared_processors, stage="shared", space=space)
        if self.process_type == self.PTYPE_A:
            infer = run_processors(panel, self.infer_processors, stage="infer", space=space)
            learn = run_processors(infer, self.learn_processors, stage="learn", space=Workspace())
        else:
            infer = run_processors(panel, self.infer_processors, stage="infer", space=Workspace())
            kept = {id(block.values) for block in infer.blocks.values()}
            space.owned -= {g for g, block in panel.blocks.items() if id(block.values) in kept}
            learn = run_processors(panel, self.learn_processors, stage="learn", space=space)
        self._panels = {self.DK_I: infer, self.DK_L: learn}

    def get_all_processors(self) -> list[Processor]:
        """Shared, infer and learn processors, in this order."""
        return [*self.shared_processors, *self.infer_processors, *self.learn_processors]

    # ---------------------------------------------------------------- reading
    def panel(self, data_key: str = DK_I) -> Panel:
        """The panel of `data_key`; "infer" and "learn" give the same object at every call.

        Parameters
        ----------
        data_key : {"raw", "infer", "learn"}

        Raises
        ------
        RawDataDroppedError
            Raw data of a handler with drop_raw=True.
        """
        _one_of("data_key", data_key, (self.DK_R, self.DK_I, self.DK_L))
        return self._raw_panel(None) if data_key == self.DK_R else self._panels[data_key]

    def _raw_panel(self, groups: Sequence[str] | None) -> Panel:
        """Raw panel with at least `groups` (None: all of them)."""
        if self._raw is None:
            raise RawDataDroppedError(
                "the raw data was dropped (drop_raw=True). Remedy: build the handler with drop_raw=False."
            )
        return self._raw

    def fetch(
        self,
        selector: Selector = slice(None, None),
        level: str | int | None = "datetime",
        col_set: str | Sequence[str] = CS_ALL,
        data_key: str = DK_I,
        squeeze: bool = False,
        proc_func: Callable[[pd.DataFrame], pd.DataFrame] | None = None,
    ) -> pd.DataFrame:
        """Rows and columns as a frame sorted by (datetime, instrument).

        Parameters
        ----------
        selector : slice, (start, end), date-like, or index
            Which rows, by `level`; a slice includes both ends. A pair is read as a slice.
        level : {"datetime", "instrument"}, 0, 1 or None
            None uses the selector on the (datetime, instrument) index itself.
        col_set : str or list of str
            A group name gives single-level columns, a list of them two levels in that order, "__all"
            all columns without the group level, "__raw" all with it.
        data_key : {"raw", "infer", "learn"}
        squeeze : bool
            Squeeze a frame of one column or row, and drop the level of a single selected key.
        proc_func : callable, optional
            Applied to the selected rows, with all column groups, before columns are chosen.

        Returns
        -------
        DataFrame
            A copy, float32.
        """
        _one_of("data_key", data_key, (self.DK_R, self.DK_I, self.DK_L))
        plain = isinstance(col_set, str) and col_set not in (self.CS_ALL, self.CS_RAW)
        groups = [str(col_set)] if plain else (None if isinstance(col_set, str) else list(col_set))
        if self._flat_columns or proc_func is not None:
            groups = None
        panel = self._raw_panel(groups) if data_key == self.DK_R else self._panels[data_key]
        rows = select_rows(panel, selector, level)
        frame = panel.to_frame(groups if groups is not None else list(panel.blocks), rows)
        if proc_func is not None:
            frame = _columns_of(proc_func(frame), col_set)
        elif self._flat_columns or plain or col_set == self.CS_ALL:
            frame = frame.droplevel(0, axis=1)
        return _squeezed(frame, selector, level) if squeeze else frame

    def get_cols(self, col_set: str | Sequence[str] = CS_ALL, data_key: str = DK_I) -> list[Any]:
        """Column names that `fetch` would give.

        Parameters
        ----------
        col_set, data_key
            As in `fetch`.
        """
        panel = self.panel(DataHandlerLP.DK_I if data_key == self.DK_R and self._raw is None else data_key)
        if isinstance(col_set, str) and col_set not in (self.CS_ALL, self.CS_RAW) and not self._flat_columns:
            return list(panel.columns(col_set))
        groups = list(panel.blocks) if isinstance(col_set, str) else list(col_set)
        pairs = [(g, c) for g in groups for c in panel.columns(g)]
        return [c for _, c in pairs] if self._flat_columns or col_set == self.CS_ALL else list(pairs)

    def __repr__(self) -> str:
        panel = self._panels.get(self.DK_I)
        if panel is None:
            return f"{type(self).__name__}(no data)"
        size = {group: len(block.columns) for group, block in panel.blocks.items()}
        return (
            f"{type(self).__name__}({len(panel.instruments)} instruments, {panel.n_live} rows, "
            f"{self._panels[self.DK_L].n_live} to learn from, columns {size})"
        )


# ---------------------------------------------------------------- helpers
def _build_processors(
    stage: str, specs: object, fit_start_time: DateLike | None, fit_end_time: DateLike | None
) -> list[Processor]:
    if isinstance(specs, (str, Mapping, Processor)) or (specs is not None and not isinstance(specs, Sequence)):
        raise ConfigError(f"{stage}_processors must be a list of processors, got {shown(specs)}.")
    return [
        build_processor(spec, fit_start_time, fit_end_time, path=f"{stage}_processors[{number}]")
        for number, spec in enumerate(specs or ())
    ]


def _one_of(what: str, value: object, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{what} must be one of {list(allowed)}, got {value!r}." + suggest(value, allowed))
    return value


def _as_panel(source: object) -> Panel:
    if isinstance(source, Panel):
        return source
    if isinstance(source, pd.DataFrame):
        return Panel.from_frame(source)
    if isinstance(source, Mapping):
        if not source:
            raise DataError("the mapping of column groups is empty.")
        for group, frame in source.items():
            if not isinstance(frame, (pd.DataFrame, pd.Series)):
                raise DataError(f"column group {group!r} must be a DataFrame, got {type(frame).__name__}.")
        return Panel.from_frame(pd.concat({g: pd.DataFrame(f) for g, f in source.items()}, axis=1))
    raise DataError(
        f"source must be a Panel, a DataFrame or a mapping of group to DataFrame, got {type(source).__name__}."
    )


def _squeezed(frame: pd.DataFrame, selector: Selector, level: str | int | None) -> Any:
    out: Any = frame.squeeze()
    return out.reset_index(level=level, drop=True) if isinstance(selector, (str, pd.Timestamp)) else out


def _columns_of(frame: pd.DataFrame, col_set: Columns) -> pd.DataFrame:
    """What `col_set` means for a frame that a proc_func returned."""
    if not isinstance(frame.columns, pd.MultiIndex) or col_set == DataHandlerLP.CS_RAW:
        return frame
    if col_set == DataHandlerLP.CS_ALL:
        return frame.droplevel(0, axis=1)
    return frame.loc(axis=1)[col_set]
