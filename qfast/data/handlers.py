"""Handlers: raw columns, the processors that run over them, and the three panels that result.

The flow is the reference's (pyqlib 0.9.7, DataHandlerLP): raw -> shared -> infer gives the "infer"
data; learn processors run on that ("append") or on the result of the shared ones ("independent") and
give the "learn" data. Panels share every block that no processor changed, so dropping rows and ranking
labels for learning costs no second copy of the features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from qfast.data.expression import evaluate, fields, reach
from qfast.data.panel import Block, Panel
from qfast.data.processors import Processor, Workspace, build_processor, run_processors
from qfast.data.rows import restrict_rows, select_rows, take_rows
from qfast.data.sources import PRICE_FIELDS, Prices, read_prices
from qfast.errors import ConfigError, DataError, suggest
from qfast.registry import HANDLERS

__all__ = ["Alpha360", "Alpha360vwap", "DataHandlerLP", "RawDataDroppedError", "build_handler"]

log = logging.getLogger("qfast.data")

DEFAULT_INFER_PROCESSORS: tuple[Mapping[str, Any], ...] = (
    {"class": "ProcessInf", "kwargs": {}},
    {"class": "ZScoreNorm", "kwargs": {}},
    {"class": "Fillna", "kwargs": {}},
)
DEFAULT_LEARN_PROCESSORS: tuple[Mapping[str, Any], ...] = (
    {"class": "DropnaLabel"},
    {"class": "CSZScoreNorm", "kwargs": {"fields_group": "label"}},
)
WINDOW_CHUNK = 1 << 12  # rows whose windows of one field stay in the cache


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
    >>> frame = pd.DataFrame({("feature", "x"): [1.0, np.nan, 3.0, 4.0], ("label", "y"): [1.0, np.nan, 3.0, 4.0]},
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
        start_time: Any = None,
        end_time: Any = None,
        infer_processors: Sequence[Any] = (),
        learn_processors: Sequence[Any] = (),
        shared_processors: Sequence[Any] = (),
        process_type: str = "append",
        drop_raw: bool = False,
        fit_start_time: Any = None,
        fit_end_time: Any = None,
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
        stages: Mapping[str, Sequence[Any]],
        process_type: str,
        drop_raw: bool,
        instruments: Any,
        start_time: Any,
        end_time: Any,
        fit_start_time: Any,
        fit_end_time: Any,
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
                f"{type(self).__name__}: no rows with instruments={_shown(self.instruments)}, "
                f"start_time={self.start_time}, end_time={self.end_time}."
            )
        panel = run_processors(raw, self.shared_processors, stage="shared", space=space)
        if self.process_type == self.PTYPE_A:
            infer = run_processors(panel, self.infer_processors, stage="infer", space=space)
            learn = run_processors(infer, self.learn_processors, stage="learn", space=Workspace())
        else:
            infer = run_processors(panel, self.infer_processors, stage="infer", space=Workspace())
            shown = {id(block.values) for block in infer.blocks.values()}
            space.owned -= {g for g, block in panel.blocks.items() if id(block.values) in shown}
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
        selector: Any = slice(None, None),
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


class Alpha360(DataHandlerLP):
    """60 days of six price fields as features, and the return of the next but one day as label.

    Features are Ref(f, i) / $close for i = 59 .. 0 and f = close, open, high, low, vwap, then
    Ref($volume, i) / ($volume + 1e-12): CLOSE59 .. CLOSE0, OPEN59 .. VOLUME0, feature by feature with
    time ascending. The label is Ref($close, -2) / Ref($close, -1) - 1, named LABEL0. Features and label
    may look outside [start_time, end_time] and outside an instrument's time in the market.

    Parameters
    ----------
    instruments : str, list, {code: [(start, end), ...]} or {"market": name}
        A market name needs a Qlib store; with other prices all instruments are used.
    start_time, end_time : date-like, optional
        Rows between, both inclusive.
    freq : str
        Calendar of a store: "day", "1min", ...
    infer_processors, learn_processors
        Default: the reference's, which are ProcessInf, ZScoreNorm and Fillna on all columns; DropnaLabel
        and CSZScoreNorm on the label. (Fillna also fills the labels with 0, as in the reference.)
    fit_start_time, fit_end_time : date-like
        Fit window of the processors that need one.
    filter_pipe, inst_processors
        Not available; anything but None is refused.
    shared_processors, process_type, drop_raw
        As in `DataHandlerLP`.
    label : list of expressions, or (expressions, names), optional
        A list without names is named by the expressions' texts.
    data : path, DataFrame or Panel
        Prices, see `qfast.data.sources.load_prices`.
    provider_uri : path or {freq: path}
        Folder of a Qlib binary store; alternative to `data`.
    vwap : {None, "typical"}
        "typical": prices without vwap get (high + low + close) / 3. Otherwise its features are NaN,
        as in the reference.

    Raises
    ------
    ConfigError, DataError
        Neither or both of `data` and `provider_uri`; an argument or prices that cannot be used.

    Notes
    -----
    Raw features are computed from the prices when they are asked for and not kept, unless no
    processor changes them. Source: pyqlib 0.9.7, qlib/contrib/data/handler.py and loader.py.

    Examples
    --------
    >>> dates = pd.date_range("2024-01-01", periods=70)
    >>> prices = pd.DataFrame({"datetime": dates, "instrument": "A", "close": np.arange(1.0, 71.0), "volume": 1.0})
    >>> handler = Alpha360(data=prices, infer_processors=[], learn_processors=[])
    >>> frame = handler.fetch(col_set="feature")
    >>> frame.shape, float(frame["CLOSE1"].iloc[1])
    ((70, 360), 0.5)
    """

    LABEL = (["Ref($close, -2)/Ref($close, -1) - 1"], ["LABEL0"])
    WINDOW = 60
    FIELDS = ("close", "open", "high", "low", "vwap", "volume")

    def __init__(
        self,
        instruments: Any = "csi500",
        start_time: Any = None,
        end_time: Any = None,
        freq: str = "day",
        infer_processors: Sequence[Any] = DEFAULT_INFER_PROCESSORS,
        learn_processors: Sequence[Any] = DEFAULT_LEARN_PROCESSORS,
        fit_start_time: Any = None,
        fit_end_time: Any = None,
        filter_pipe: None = None,
        inst_processors: None = None,
        *,
        shared_processors: Sequence[Any] = (),
        process_type: str = "append",
        drop_raw: bool = False,
        label: Any = None,
        data: Any = None,
        provider_uri: Any = None,
        vwap: str | None = None,
    ) -> None:
        for name, value in (("filter_pipe", filter_pipe), ("inst_processors", inst_processors)):
            if value:
                raise ConfigError(f"{type(self).__name__}: {name} is not available, got {_shown(value)}.")
        self._configure(
            {"shared": shared_processors, "infer": infer_processors, "learn": learn_processors},
            process_type, drop_raw, instruments, start_time, end_time, fit_start_time, fit_end_time,
        )  # fmt: skip
        self.freq = freq
        self._label, self._label_names = _label_config(self.LABEL if label is None else label)
        before, after = (max(side) for side in zip((self.WINDOW - 1, 0), *map(reach, self._label), strict=True))
        self._prices = read_prices(
            data, provider_uri=provider_uri, instruments=instruments, start_time=start_time, end_time=end_time,
            freq=freq, vwap=vwap, margin=(before, after),
            wanted=list(dict.fromkeys([*self.FIELDS, *(f for text in self._label for f in fields(text))])),
        )  # fmt: skip
        self._rows = self._prices.panel.rows_between(start_time, end_time)
        self._report_missing_fields()
        self._labels = self._label_panel()
        raw = self._with_features(self._labels)
        space = Workspace(raw.blocks if drop_raw else ["feature"])
        self._process(raw, space)
        if not drop_raw and "feature" not in space.overwritten:
            self._raw = raw  # nobody changed the features: the raw panel costs nothing
        if drop_raw:
            del self._prices, self._labels

    @property
    def prices(self) -> Panel | None:
        """The prices behind the features, group "price"; None where drop_raw gave them up."""
        found = getattr(self, "_prices", None)
        return None if found is None else found.panel

    def _report_missing_fields(self) -> None:
        """The reference reads a field without a file as NaN; say so, and refuse if none is there."""
        known = self._prices.panel.columns("price")
        missing = [f for f in self.FIELDS if f not in known]
        if "close" in missing:
            raise DataError(f"{type(self).__name__}: the prices have no column 'close'; they have {list(known)}.")
        if missing:
            log.warning(
                "%s: the prices have no column(s) %s; their features are NaN.%s",
                type(self).__name__, ", ".join(missing),
                " vwap='typical' uses (high + low + close) / 3 instead." if "vwap" in missing else "",
            )  # fmt: skip

    def _label_panel(self) -> Panel:
        """The handler's rows with the group "label" only."""
        panel, extents = self._prices
        optional = set(PRICE_FIELDS)
        values = np.empty((len(self._rows), len(self._label)), dtype=np.float32)
        for j, text in enumerate(self._label):
            values[:, j] = evaluate(text, panel, extents=extents, optional=optional)[self._rows]
        keys = replace(take_rows(panel, self._rows, groups=()), live=None)
        return keys.with_group("label", values, self._label_names)

    def _with_features(self, labels: Panel) -> Panel:
        names = [f"{field.upper()}{i}" for field in self.FIELDS for i in range(self.WINDOW - 1, -1, -1)]
        values = price_windows(self._prices, self._rows, self.FIELDS, self.WINDOW)
        features = replace(labels, blocks={"feature": Block(values, tuple(names))})
        return replace(labels, blocks={**features.blocks, **labels.blocks})

    def _raw_panel(self, groups: Sequence[str] | None) -> Panel:
        if self._raw is not None or self.drop_raw:
            return super()._raw_panel(groups)
        if groups is not None and set(groups) <= {"label"}:
            return self._labels
        log.debug("%s: raw features are computed again from the prices", type(self).__name__)
        return self._with_features(self._labels)


class Alpha360vwap(Alpha360):
    """`Alpha360` with the label Ref($vwap, -2) / Ref($vwap, -1) - 1.

    Examples
    --------
    >>> Alpha360vwap.LABEL[1]
    ['LABEL0']
    """

    LABEL = (["Ref($vwap, -2)/Ref($vwap, -1) - 1"], ["LABEL0"])


def price_windows(prices: Prices, rows: np.ndarray, names: Sequence[str], window: int) -> np.ndarray:
    """Last `window` values of each field over today's close (volume: over today's volume + 1e-12).

    Parameters
    ----------
    prices : Prices
    rows : int64 [B]
        Panel rows to compute.
    names : sequence of str
        F field names.
    window : int
        T.

    Returns
    -------
    float32 [B, F * T], field by field, time ascending; NaN where there is no price.
    """
    panel, extents = prices
    out = np.empty((len(rows), len(names) * window), dtype=np.float32)
    codes = panel.instrument_codes
    # window - 1 NaN rows before each instrument let every window be one contiguous slice
    place = np.arange(panel.n_rows) + (window - 1) * (codes.astype(np.int64) + 1)
    padded = np.full(panel.n_rows + (window - 1) * len(panel.instruments), np.nan, dtype=np.float32)
    known = panel.columns("price")
    close = panel.column("close", "price")
    for f, name in enumerate(names):
        columns = slice(f * window, (f + 1) * window)
        if name not in known:
            out[:, columns] = np.nan
            continue
        series = panel.column(name, "price")
        padded[place] = series
        windows = np.lib.stride_tricks.sliding_window_view(padded, window)
        base = series + np.float32(1e-12) if name == "volume" else close
        for start in range(0, len(rows), WINDOW_CHUNK):
            some = rows[start : start + WINDOW_CHUNK]
            target = out[start : start + WINDOW_CHUNK, columns]
            with np.errstate(all="ignore"):
                np.divide(windows[place[some] - (window - 1)], base[some, None], out=target)
            if name in extents:
                stored = extents[name]
                outside = (some < stored.start[codes[some]]) | (some >= stored.stop[codes[some]])
                if outside.any():  # the field's file does not cover this day: the reference has no row there
                    target[outside] = np.nan
    return out


def _label_config(label: Any) -> tuple[list[str], list[str]]:
    """Expressions and column names of a label setting."""
    if isinstance(label, str):
        label = [label]
    if isinstance(label, (list, tuple)) and len(label):
        if all(isinstance(text, str) for text in label):
            return list(label), list(label)
        if len(label) == 2 and all(isinstance(part, (list, tuple)) for part in label):
            texts, names = (list(part) for part in label)
            if texts and len(texts) == len(names) and all(isinstance(t, str) for t in [*texts, *names]):
                return texts, names
    raise ConfigError(
        f"label must be a list of expressions or (expressions, names) of equal length, got {_shown(label)}."
    )


# ---------------------------------------------------------------- helpers
def build_handler(spec: Any, *, path: str = "handler", **extra: Any) -> Any:
    """A handler from an instance, a mapping or a name; see `qfast.registry.Registry.build`."""
    return HANDLERS.build(spec, path=path, **extra)


def _build_processors(stage: str, specs: Any, fit_start_time: Any, fit_end_time: Any) -> list[Processor]:
    if isinstance(specs, (str, Mapping, Processor)) or (specs is not None and not isinstance(specs, Sequence)):
        raise ConfigError(f"{stage}_processors must be a list of processors, got {_shown(specs)}.")
    return [
        build_processor(spec, fit_start_time, fit_end_time, path=f"{stage}_processors[{number}]")
        for number, spec in enumerate(specs or ())
    ]


def _one_of(what: str, value: Any, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{what} must be one of {list(allowed)}, got {value!r}." + suggest(value, allowed))
    return value


def _shown(value: Any, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def _as_panel(source: Any) -> Panel:
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


def _squeezed(frame: pd.DataFrame, selector: Any, level: Any) -> Any:
    out: Any = frame.squeeze()
    return out.reset_index(level=level, drop=True) if isinstance(selector, (str, pd.Timestamp)) else out


def _columns_of(frame: pd.DataFrame, col_set: Any) -> pd.DataFrame:
    """What `col_set` means for a frame that a proc_func returned."""
    if not isinstance(frame.columns, pd.MultiIndex) or col_set == DataHandlerLP.CS_RAW:
        return frame
    if col_set == DataHandlerLP.CS_ALL:
        return frame.droplevel(0, axis=1)
    return frame.loc(axis=1)[col_set]


HANDLERS.add(DataHandlerLP, modules=("qlib.data.dataset.handler", "qfast.data.handlers", "qfast.data"))
for _class in (Alpha360, Alpha360vwap):
    HANDLERS.add(_class, modules=("qlib.contrib.data.handler", "qfast.data.handlers", "qfast.data"))
for _name in ("Alpha158", "Alpha158vwap"):
    HANDLERS.unavailable(
        _name,
        f"{_name} is not available yet. Remedy: use Alpha360, or compute the factors elsewhere and give them to "
        "DataHandlerLP.from_frame.",
        modules=("qlib.contrib.data.handler", "qfast.data.handlers", "qfast.data"),
    )
