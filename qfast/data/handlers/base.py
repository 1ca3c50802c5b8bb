"""DataHandlerLP: a handler over given columns, its stages of processors, and access to their results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from qfast.data.arrow_tables import ArrowTable, conversion_hint, is_arrow_table, to_pandas
from qfast.data.handlers.saved import read_handler, write_handler
from qfast.data.loaders import LoaderSpec, LoadRequest, StaticDataLoader, build_loader, grouped_columns
from qfast.data.panel import Panel
from qfast.data.prices import Instruments, PriceSource, StorePath
from qfast.data.processors import Processor, ProcessorSpec, Workspace, build_processor, run_processors
from qfast.data.protocols import Columns, Selector
from qfast.data.rows import restrict_rows, select_rows
from qfast.data.storage import Storage
from qfast.data.tables import keyed_frame
from qfast.dates import DateLike, date_text
from qfast.errors import ConfigError, DataError, naming_data_page, shown, suggest
from qfast.read_options import ReadOptions, ReadSettings

if TYPE_CHECKING:
    from qfast.data.handlers.prices import PriceHandler


# Members of a PriceHandler that a handler with a data loader has, too.
PRICE_MEMBERS = (
    *(
        "prices",
        "quotes",
        "price_fields",
        "mask_prices",
        "lookback",
        "lookahead",
        "freq",
        "compat",
        "cells_unlike_qlib",
    ),
    *("feature_names", "feature_expressions", "label_names", "label_expressions", "label_horizon"),
)


DUMP_OPTIONS = ("dump_all", "exclude", "include", "recursive")  # of Qlib's Serializable


def check_dump_options(options: Mapping[str, Any]) -> None:
    """Raise a ConfigError for an option that Qlib's `to_pickle` does not have."""
    for name in options:
        if name not in DUMP_OPTIONS:
            raise ConfigError(f"to_pickle has no option {name!r}; allowed: {list(DUMP_OPTIONS)}.")


COPIES = 2  # of the columns that a handler needs: before and after the processors


class RawDataDroppedError(DataError, AttributeError):
    """Raw data was requested from a handler that drops it (drop_raw=True)."""


class _Origin(NamedTuple):
    """Where the columns of a handler come from: a panel, or a loader and its prices."""

    panel: Panel | None
    data_loader: LoaderSpec | None
    prices: Mapping[str, Any]


class DataHandlerLP:
    """A handler over given columns.

    Parameters
    ----------
    source : Panel, DataFrame, Arrow table, or mapping of group name to DataFrame
        Rows indexed (datetime, instrument). Models read the column groups "feature" and "label". Frames are copied. A
        table of Polars, Arrow or DuckDB has the keys as columns, and its labels begin with "label".
    instruments : sequence of str, optional
        Instruments to keep. Default: all. With a `data_loader` also the name of a market.
    start_time, end_time : date-like, optional
        First and last row, both inclusive.
    infer_processors, learn_processors, shared_processors : sequence of Processor, mapping or str
        See `qfast.data.processors.build_processor`.
    process_type : {"append", "independent"}
        "append": learn processors run on the result of the infer processors. "independent": they run on the result of
        the shared processors.
    drop_raw : bool
        Discard the raw data and reuse its memory.
    fit_start_time, fit_end_time : date-like, optional
        Period from which processors learn their statistics, both inclusive, unless a processor has its own.
    data_loader : DataLoader, mapping or str, optional
        Loads the columns, instead of `source`; see `qfast.data.loaders`.
    data, provider_uri, vwap, read_options, compat
        Prices of the `data_loader`, as in `FactorHandler`.
    memory_limit : number of bytes, or str such as "8 GB"
        If the columns and a copy of them are expected to need more, they are stored in temporary files that are mapped
        into memory. 0: always. Default: half of the memory of the machine, or of the control group. The values are
        equal to the bit.
    scratch : path, optional
        Folder of these files. Default: the variable TMPDIR, otherwise /var/tmp.

    Raises
    ------
    ConfigError
        A processor is unknown or in the wrong stage, or the fit period is missing.
    DataError
        The data cannot be used or has no rows.

    Notes
    -----
    Source: DataHandlerLP in qlib/data/dataset/handler.py of pyqlib 0.9.7.

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
    IT_FIT_SEQ, IT_LS = "fit_seq", "load_state"

    _raw: Panel | None
    _panels: dict[str, Panel]

    def __init__(
        self,
        source: Panel | pd.DataFrame | Mapping[str, pd.DataFrame] | ArrowTable | None = None,
        *,
        instruments: Instruments = None,
        start_time: DateLike | None = None,
        end_time: DateLike | None = None,
        infer_processors: Sequence[ProcessorSpec] = (),
        learn_processors: Sequence[ProcessorSpec] = (),
        shared_processors: Sequence[ProcessorSpec] = (),
        process_type: str = "append",
        drop_raw: bool = False,
        fit_start_time: DateLike | None = None,
        fit_end_time: DateLike | None = None,
        data_loader: LoaderSpec | None = None,
        data: PriceSource | None = None,
        provider_uri: StorePath | None = None,
        vwap: str | None = None,
        read_options: ReadSettings = None,
        compat: str | None = None,
        memory_limit: str | float | None = None,
        scratch: str | os.PathLike[str] | None = None,
    ) -> None:
        self._configure(
            {"shared": shared_processors, "infer": infer_processors, "learn": learn_processors},
            process_type,
            drop_raw,
            instruments,
            start_time,
            end_time,
            fit_start_time,
            fit_end_time,
        )
        if (source is None) == (data_loader is None):
            raise ConfigError(
                f"{type(self).__name__} requires either source (a frame or a Panel) or data_loader, got "
                + ("neither." if source is None else f"both: a {type(source).__name__} and {shown(data_loader)}.")
            )
        prices = {"data": data, "provider_uri": provider_uri, "vwap": vwap, "read_options": read_options}
        prices["compat"] = compat
        origin = _Origin(None if data_loader is not None else _as_panel(source), data_loader, prices)
        self._memory = (memory_limit, scratch)
        raw = self._read(origin)
        if not drop_raw:
            self._origin = origin
        self._flat_columns = isinstance(source, pd.DataFrame) and source.columns.nlevels == 1
        if not drop_raw:
            self._raw = raw
        self._process(raw, self._workspace(raw, raw.blocks if drop_raw and not isinstance(source, Panel) else ()))

    @classmethod
    def from_frame(cls, frame: pd.DataFrame | pd.Series | Mapping[str, pd.DataFrame], **kwargs: Any) -> DataHandlerLP:
        """A handler over a frame with columns (group, name), or over a mapping from group to frame.

        Parameters
        ----------
        frame : DataFrame, Series or mapping
            Indexed (datetime, instrument). The frames of a mapping may have different rows; missing values are NaN.
        **kwargs
            Other arguments of `DataHandlerLP`.

        Returns
        -------
        DataHandlerLP
        """
        return DataHandlerLP(frame.to_frame() if isinstance(frame, pd.Series) else frame, **kwargs)

    @classmethod
    def from_df(cls, df: pd.DataFrame) -> DataHandlerLP:
        """A handler over a frame, without processors; Qlib's name of `from_frame`."""
        return cls.from_frame(df)

    @classmethod
    def from_panels(
        cls,
        panels: Mapping[str, Panel],
        processors: Mapping[str, Sequence[Processor]],
        process_type: str = "append",
        *,
        flat_columns: bool = False,
        **bounds: DateLike | None,
    ) -> DataHandlerLP:
        """A handler over processed data.

        Parameters
        ----------
        panels : mapping
            "infer", "learn" and, unless it was dropped, "raw".
        processors : mapping
            Fitted processors of the stages "shared", "infer" and "learn".
        process_type : {"append", "independent"}
        flat_columns : bool
            Columns have no groups.
        **bounds
            start_time, end_time, fit_start_time and fit_end_time.
        """
        handler = object.__new__(DataHandlerLP)
        times = ("start_time", "end_time", "fit_start_time", "fit_end_time")
        handler._configure(processors, process_type, "raw" not in panels, None, *(bounds.get(n) for n in times))
        handler._flat_columns = flat_columns
        handler._raw = panels.get("raw")
        handler._panels = {key: panels[key] for key in ("infer", "learn")}
        return handler

    # ---------------------------------------------------------------- files
    def to_pickle(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write the data and the fitted processors to a file, in qfast's safe format instead of pickle.

        Parameters
        ----------
        path : path
        **options
            dump_all, exclude, include: accepted for compatibility with Qlib. The file always contains the data.

        Raises
        ------
        ConfigError
            `path` is a folder, an option is unknown, or a processor is not registered.

        Examples
        --------
        >>> import tempfile
        >>> from qfast.data import synthetic
        >>> handler = DataHandlerLP.from_df(synthetic.factors(3, 20, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     handler.to_pickle(f"{folder}/handler.qfast", dump_all=True)
        ...     DataHandlerLP.load(f"{folder}/handler.qfast").fetch().equals(handler.fetch())
        True
        """
        check_dump_options(options)
        write_handler(self, path)

    @classmethod
    def load(cls, filepath: str | os.PathLike[str]) -> DataHandlerLP:
        """Read a handler that `to_pickle` has written. The class is DataHandlerLP, whatever it was.

        Raises
        ------
        CheckpointError
            The file is missing, damaged, or a pickle file.
        """
        return read_handler(filepath)

    @property
    def flat_columns(self) -> bool:
        """True if the columns have no groups."""
        return self._flat_columns

    # ---------------------------------------------------------------- loading again
    def config(self, processor_kwargs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Change instruments, start_time or end_time, which take effect with `setup_data`.

        Parameters
        ----------
        processor_kwargs : mapping, optional
            Settings of all processors: fit_start_time and fit_end_time.
        **kwargs
            instruments, start_time, end_time. dump_all, exclude, include and recursive are accepted for compatibility
            with Qlib.

        Raises
        ------
        ConfigError
            Another setting.
        """
        for name, value in kwargs.items():
            if name in ("instruments", "start_time", "end_time"):
                setattr(self, name, value)
            elif name not in DUMP_OPTIONS:
                allowed = ["instruments", "start_time", "end_time", "processor_kwargs"]
                raise ConfigError(
                    f"{type(self).__name__}.config has no setting {name!r}; allowed: {allowed}."
                    + suggest(name, allowed)
                )
        for processor in self.get_all_processors() if processor_kwargs else ():
            processor.config(**dict(processor_kwargs or {}))

    def setup_data(self, init_type: str = IT_FIT_SEQ, enable_cache: bool = False) -> None:
        """Load the data again for the current instruments, start_time and end_time, and process it.

        Parameters
        ----------
        init_type : {"fit_seq", "load_state"}
            "fit_seq" fits the processors again, "load_state" applies them as they are.
        enable_cache : bool
            Ignored, as in Qlib.

        Raises
        ------
        ConfigError
            `init_type` is another one, or the handler no longer has its source: it was built with drop_raw=True, or
            loaded from a file.
        """
        if init_type == "fit_ind":
            raise ConfigError("init_type 'fit_ind' is not available. Remedy: use 'fit_seq', or --engine qlib.")
        one_of("init_type", init_type, (self.IT_FIT_SEQ, self.IT_LS))
        frozen = [(processor, processor.frozen) for processor in self.get_all_processors()]
        for processor, _ in frozen:
            processor.frozen = init_type == self.IT_LS
        try:
            self._set_up_again()
        finally:
            for processor, before in frozen:
                processor.frozen = before

    def _set_up_again(self) -> None:
        origin = self.__dict__.get("_origin")
        if origin is None:
            raise ConfigError(
                f"{type(self).__name__}.setup_data: the handler no longer has its source, because it was built with "
                "drop_raw=True, copied, or loaded from a file. Remedy: build a new handler."
            )
        raw = self._read(origin)
        if not self.drop_raw:
            self._raw = raw
        self._process(raw, self._workspace(raw))

    # ---------------------------------------------------------------- set-up
    def _read(self, origin: _Origin) -> Panel:
        """The columns for the current instruments and times, before processing."""
        if origin.panel is not None:
            listed: Any = self.instruments
            storage = self._workspace(origin.panel).storage
            return restrict_rows(origin.panel, listed, self.start_time, self.end_time, storage)
        assert origin.data_loader is not None
        loader = build_loader(origin.data_loader)
        data = origin.prices["data"]
        if isinstance(loader, StaticDataLoader) and data is not None:
            loader = StaticDataLoader(data)  # the data of the command line replaces the file
        request = LoadRequest(self.instruments, self.start_time, self.end_time, origin.prices)
        # The price handler behind the loader serves prices, lookback and so on.
        panel, self._priced = loader.read(request)
        return panel

    def _workspace(self, panel: Panel, owned: Iterable[str] = ()) -> Workspace:
        """A workspace whose new blocks are in memory or in files, depending on the size of `panel`."""
        n_bytes = sum(4 * panel.n_rows * len(block.columns) for block in panel.blocks.values())
        return Workspace(owned, storage=Storage.for_size(COPIES * n_bytes, *self._memory))

    @property
    def priced(self) -> PriceHandler | None:
        """The price handler whose expressions a data loader evaluates; None for given columns."""
        return self.__dict__.get("_priced")

    def __getstate__(self) -> dict[str, Any]:
        """Attributes for pickle and copy, without the source, which `setup_data` would read again."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_origin", "_arguments")}

    def __getattr__(self, name: str) -> Any:
        """Members of the price handler behind a data loader."""
        if name in PRICE_MEMBERS and self.__dict__.get("_priced") is not None:
            return getattr(self.__dict__["_priced"], name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

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
        """Store the settings and build the processors, before any data is read."""
        self.process_type = one_of("process_type", process_type, (self.PTYPE_A, self.PTYPE_I))
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
        """Run all stages over `raw`. Blocks that `space` owns may be overwritten."""
        if raw.n_live == 0:
            prices = getattr(self, "_prices", None)
            dates = raw.datetimes if prices is None else prices.panel.datetimes
            span = f"; its dates are {date_text(dates[0])} to {date_text(dates[-1])}" if len(dates) else ""
            raise DataError(
                f"{type(self).__name__}: the data has no rows with instruments={shown(self.instruments)}, "
                f"start_time={self.start_time}, end_time={self.end_time}{span}."
            )
        panel = run_processors(raw, self.shared_processors, stage="shared", space=space)
        if self.process_type == self.PTYPE_A:
            infer = run_processors(panel, self.infer_processors, stage="infer", space=space)
            learn = run_processors(infer, self.learn_processors, stage="learn", space=space.without_blocks())
        else:
            infer = run_processors(panel, self.infer_processors, stage="infer", space=space.without_blocks())
            infer_tables = {id(block.table) for block in infer.blocks.values()}
            space.owned -= {g for g, block in panel.blocks.items() if id(block.table) in infer_tables}
            learn = run_processors(panel, self.learn_processors, stage="learn", space=space)
        self._panels = {self.DK_I: infer, self.DK_L: learn}

    def get_all_processors(self) -> list[Processor]:
        """Shared, infer and learn processors, in this order."""
        return [*self.shared_processors, *self.infer_processors, *self.learn_processors]

    # ---------------------------------------------------------------- reading
    def panel(self, data_key: str = DK_I) -> Panel:
        """The raw data, or the result of the processors.

        Parameters
        ----------
        data_key : {"raw", "infer", "learn"}

        Returns
        -------
        Panel
            The same object at every call for "infer" and "learn".

        Raises
        ------
        ConfigError
            `data_key` is none of these.
        RawDataDroppedError
            `data_key` is "raw" and the handler was built with drop_raw=True.
        """
        one_of("data_key", data_key, (self.DK_R, self.DK_I, self.DK_L))
        return self._raw_panel(None) if data_key == self.DK_R else self._panels[data_key]

    def _raw_panel(self, groups: Sequence[str] | None) -> Panel:
        """The raw panel with at least the column groups `groups`; None: all groups."""
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
        """Selected rows and columns as a frame sorted by (datetime, instrument).

        Parameters
        ----------
        selector : slice, (start, end), date-like, str, list, or index
            Rows, selected by `level`. A slice includes both ends, and a pair means a slice.
        level : {"datetime", "instrument"}, 0, 1 or None
            Index level of the selector. None: the selector applies to the (datetime, instrument) index.
        col_set : str or list of str
            A group name selects that group with single-level columns, a list selects groups in that order with
            two-level columns, "__all" selects all columns without the group level, "__raw" all with it.
        data_key : {"raw", "infer", "learn"}
        squeeze : bool
            Squeeze a frame of one column or row, and drop the index level of a single selected key.
        proc_func : callable, optional
            Function of a frame, applied to the selected rows with all column groups before columns are selected.

        Returns
        -------
        DataFrame
            A copy, float32.

        Raises
        ------
        ConfigError
            `data_key` or `level` is invalid.
        DataError
            The data lacks a column group, or the selector matches no rows.
        """
        one_of("data_key", data_key, (self.DK_R, self.DK_I, self.DK_L))
        one_group = isinstance(col_set, str) and col_set not in (self.CS_ALL, self.CS_RAW)
        groups = [str(col_set)] if one_group else (None if isinstance(col_set, str) else list(col_set))
        if self._flat_columns or proc_func is not None:
            groups = None
        panel = self._raw_panel(groups) if data_key == self.DK_R else self._panels[data_key]
        rows = select_rows(panel, selector, level)
        frame = panel.to_frame(groups if groups is not None else list(panel.blocks), rows)
        if proc_func is not None:
            frame = _columns_of(proc_func(frame), col_set)
        elif self._flat_columns or one_group or col_set == self.CS_ALL:
            frame = frame.droplevel(0, axis=1)
        return _squeezed(frame, selector, level) if squeeze else frame

    def get_cols(self, col_set: str | Sequence[str] = CS_ALL, data_key: str = DK_I) -> list[Any]:
        """Names of the columns that `fetch` returns.

        Parameters
        ----------
        col_set, data_key
            As in `fetch`. If the raw data was dropped, "raw" means "infer".

        Returns
        -------
        list of str, or of (group, name) pairs
        """
        panel = self.panel(DataHandlerLP.DK_I if data_key == self.DK_R and self._raw is None else data_key)
        if isinstance(col_set, str) and col_set not in (self.CS_ALL, self.CS_RAW) and not self._flat_columns:
            return list(panel.columns(col_set))
        groups = list(panel.blocks) if isinstance(col_set, str) else list(col_set)
        pairs = [(g, c) for g in groups for c in panel.columns(g)]
        return [c for _, c in pairs] if self._flat_columns or col_set == self.CS_ALL else list(pairs)

    def __repr__(self) -> str:
        """Class, instruments, rows and columns."""
        panel = self._panels.get(self.DK_I)
        if panel is None:
            return f"{type(self).__name__}(no data)"
        widths = {group: len(block.columns) for group, block in panel.blocks.items()}
        return (
            f"{type(self).__name__}({len(panel.instruments)} instruments, {panel.n_live} rows, "
            f"{self._panels[self.DK_L].n_live} to learn from, columns {widths})"
        )


# ---------------------------------------------------------------- helpers
def _build_processors(
    stage: str, specs: object, fit_start_time: DateLike | None, fit_end_time: DateLike | None
) -> list[Processor]:
    if isinstance(specs, Mapping) and not specs:
        specs = []
    if isinstance(specs, (str, Mapping, Processor)) or (specs is not None and not isinstance(specs, Sequence)):
        raise ConfigError(f"{stage}_processors must be a list of processors, got {shown(specs)}.")
    return [
        build_processor(spec, fit_start_time, fit_end_time, path=f"{stage}_processors[{number}]")
        for number, spec in enumerate(specs or ())
    ]


def one_of(name: str, value: object, allowed: Sequence[str]) -> str:
    """`value`, if it is one of the allowed names; otherwise a ConfigError that lists them."""
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name} must be one of {list(allowed)}, got {value!r}." + suggest(value, allowed))
    return value


@naming_data_page()
def _as_panel(source: object) -> Panel:
    if isinstance(source, Panel):
        return source
    if is_arrow_table(source):
        source = grouped_columns(keyed_frame(to_pandas(source), "the table", ReadOptions()))
    if isinstance(source, pd.DataFrame):
        return Panel.from_frame(source)
    if isinstance(source, Mapping):
        if not source:
            raise DataError("source must contain at least one column group, got an empty mapping.")
        for group, frame in source.items():
            if not isinstance(frame, (pd.DataFrame, pd.Series)):
                raise DataError(f"column group {group!r} must be a DataFrame, got {type(frame).__name__}.")
        return Panel.from_frame(pd.concat({g: pd.DataFrame(f) for g, f in source.items()}, axis=1))
    raise DataError(
        "source must be a Panel, a DataFrame, an Arrow table or a mapping of group to DataFrame, got "
        f"{type(source).__name__}." + conversion_hint(source)
    )


def _squeezed(frame: pd.DataFrame, selector: Selector, level: str | int | None) -> Any:
    out: Any = frame.squeeze()
    return out.reset_index(level=level, drop=True) if isinstance(selector, (str, pd.Timestamp)) else out


def _columns_of(frame: pd.DataFrame, col_set: Columns) -> pd.DataFrame:
    """The columns `col_set` of a frame that a proc_func returned."""
    if not isinstance(frame.columns, pd.MultiIndex) or col_set == DataHandlerLP.CS_RAW:
        return frame
    if col_set == DataHandlerLP.CS_ALL:
        return frame.droplevel(0, axis=1)
    return frame.loc(axis=1)[col_set]
